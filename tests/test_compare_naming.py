"""Words for defects in a comparison: counted image by image, beside what guessing gives, the same after a restart."""

import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anomalib.data import MVTecAD
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.compare import CompareJob, CompareJobGenerator, write_report
from anomalib_clipad.compare.naming import Naming, namings
from anomalib_clipad.compare.naming_figure import confusion_figure
from anomalib_clipad.compare.predictions import read_kept
from anomalib_clipad.compare.runners import SerialCompareRunner

from .conftest import new_engine, write_category

WORDS = ["square", "Big dent", "hole"]
OWN_WORDS = {"gear": ["square", "hole"], "plate": ["big dent", "rust", "stain"]}
NONE = ["unspecified", "not called anomalous"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two categories in MVTec-AD's layout, with two kinds of defect that are words and one that is not."""
    root = tmp_path_factory.mktemp("naming")
    for name in ("gear", "plate"):
        write_category(root / name, normal=3, broken=6)
        for number, kind in enumerate(("square", "big_dent", "rust")):
            for where, ending in (("test", ""), ("ground_truth", "_mask")):
                (root / name / where / kind).mkdir(exist_ok=True)
                for image in (2 * number, 2 * number + 1):
                    file = f"{where}/{{}}/{image:03d}{ending}.png"
                    shutil.move(root / name / file.format("square"), root / name / file.format(kind))
    return root


def configuration(root: Path, output: Path, small_clip: str) -> dict:
    words = {"SDP": WORDS, "own": OWN_WORDS, "silent": None}
    return {
        "models": [
            {"class_path": "ClipAdSdp", "name": name, "init_args": {"backbone": small_clip, "defects": defects}}
            for name, defects in words.items()
        ],
        "data": {
            "class_path": "MVTecAD",
            "init_args": {"root": str(root), "category": {"grid": ["gear", "plate"]}, "num_workers": 0},
        },
        "map_size": 32,
        "metrics": "image_AUROC",
        "output": str(output),
    }


def run(config: dict) -> list[dict]:
    rows = SerialCompareRunner(CompareJobGenerator("cpu")).run(config)
    write_report(Path(config["output"]), rows, title="")
    return rows


@pytest.fixture(scope="module")
def compared(root: Path, small_clip: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    output = tmp_path_factory.mktemp("compared")
    return output, run(configuration(root, output, small_clip))


def truth_and_word(output: Path) -> list[tuple[str, str]]:
    """Of every anomalous image whose folder is a word, from path, label and explanation."""
    found = []
    for row in pd.read_csv(output / "predictions.csv", keep_default_na=False).itertuples():
        truth = {"square": "square", "big_dent": "Big dent"}.get(Path(row.path).parent.name)
        if row.model != "SDP" or truth is None:
            continue
        word = re.sub(r" \d\.\d\d$", "", row.explanation.split(",")[0])
        found.append((truth, word if row.label == "anomalous" else NONE[1]))
    return found


def test_the_matrix_counts_every_image_once(compared: tuple[Path, list[dict]]) -> None:
    output, rows = compared
    naming = namings(rows, read_kept(output, rows))[0]
    counts = Counter(truth_and_word(output))
    assert sum(counts.values()) == 8
    assert len({word for _, word in counts}) > 1
    matrix = naming.confusion
    assert list(matrix) == [*WORDS, *NONE]
    cells = matrix.stack()
    assert cells[cells > 0].to_dict() == counts
    truth, named = zip(*truth_and_word(output), strict=True)
    labels = [*WORDS, *NONE]
    assert np.array_equal(matrix, confusion_matrix(truth, named, labels=labels)[:2])


def test_figures_are_those_of_scikit_learn_beside_guesses(compared: tuple[Path, list[dict]]) -> None:
    output, _ = compared
    truth, named = zip(*truth_and_word(output), strict=True)
    right, f1 = accuracy_score(truth, named), f1_score(truth, named, labels=["square", "Big dent"], average="macro")
    line = f"| SDP | 8 | {100 * right:.1f} | {100 * f1:.1f} | 33.3 | 50.0 |"
    report = (output / "report.md").read_text()
    assert line in report
    assert "![Words of SDP](words/SDP.png)" in report
    assert "| silent |" not in report.split("## Words for what was found")[1].split("\n## ")[0]
    assert f"named: accuracy {100 * right:.1f} % (chance 33.3 %" in (output / "report.html").read_text()
    table = pd.read_csv(output / "results.csv").set_index(["model", "category"])
    halves = table.loc["SDP", "naming_accuracy"]
    assert halves.mean() == pytest.approx(right)
    assert table.loc["silent", "naming_accuracy"].isna().all()
    assert min(Image.open(output / "words/SDP.png").size) > 200


def test_a_restarted_comparison_says_the_same(
    compared: tuple[Path, list[dict]], root: Path, small_clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, rows = compared
    before = {name: (output / name).read_bytes() for name in ("report.md", "predictions.csv", "words/SDP.png")}
    for name in before:
        (output / name).unlink()
    monkeypatch.setattr(CompareJob, "_measure", lambda *_: pytest.fail("a job that is done runs again"))
    assert run(configuration(root, output, small_clip)) == rows
    assert {name: (output / name).read_bytes() for name in before} == before


def test_a_comparison_and_a_test_say_the_same_of_an_image(
    compared: tuple[Path, list[dict]], root: Path, small_clip: str, tmp_path: Path
) -> None:
    output, _ = compared
    model = ClipAdSdp(backbone=small_clip, defects=WORDS, visualizer=False)
    data = MVTecAD(root, category="plate", num_workers=0)
    (figures,) = new_engine(tmp_path).test(model, datamodule=data, verbose=False)
    theirs = pd.read_csv(next(tmp_path.rglob("test/v0/predictions.csv")), index_col="path")["explanation"]
    ours = pd.read_csv(output / "predictions.csv").query("model == 'SDP' and category == 'plate'").set_index("path")
    pd.testing.assert_series_equal(ours["explanation"].sort_index(), theirs.sort_index(), check_dtype=False)
    known = ours[ours["true_defect"].notna()]
    named = known["defect"].fillna("")
    assert figures["image_NamingAccuracy"] == pytest.approx((known["true_defect"] == named).mean())
    f1 = f1_score(known["true_defect"], named, labels=sorted(set(known["true_defect"])), average="macro")
    assert figures["image_NamingF1Score"] == pytest.approx(f1)


def test_other_words_in_another_category_have_a_matrix_of_their_own(compared: tuple[Path, list[dict]]) -> None:
    output, rows = compared
    found = namings(rows, read_kept(output, rows))[1:]
    assert [(one.title, one.words) for one in found] == [
        (f"own, {name}", tuple(words)) for name, words in OWN_WORDS.items()
    ]
    assert [set(one.truth) for one in found] == [{"square"}, {"big dent", "rust"}]
    report = (output / "report.md").read_text()
    assert all(f"![Words of {one.title}](words/" in report for one in found)
    assert len(list((output / "words").iterdir())) == 3


def test_the_matrix_is_readable_with_two_words_and_with_fifteen() -> None:
    for count in (2, 15):
        words = tuple(f"kind {number}" for number in range(count))
        naming = Naming("$5", ("nut",), words, words * 3, (words + words[1:] + words[:1] + (NONE[0],) * count))
        figure = confusion_figure(naming)
        (axes,) = figure.axes
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == 3 * count
        assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
        size = figure.get_size_inches() * figure.dpi
        for text in (*axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label, axes.yaxis.label):
            box = text.get_window_extent()
            assert min(box.x0, box.y0, *(size - box.max)) > -1, text.get_text()
