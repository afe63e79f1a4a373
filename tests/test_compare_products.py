"""Several products in a comparison: one job over all of them, each on the scale of its own threshold."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from anomalib_clipad import ClipAdSdp, InputError
from anomalib_clipad.compare import CompareJobGenerator, write_report
from anomalib_clipad.compare.predictions import read_kept
from anomalib_clipad.compare.runners import SerialCompareRunner

from .conftest import LAYOUT, new_engine
from .conftest import folder as data
from .test_page import data_of
from .test_products import BARE, FOLDERS, NAMES, mixed

__all__ = ["mixed"]  # a fixture
MODELS = {"listed": NAMES, "mapped": FOLDERS, "one": "plate"}


def configuration(root: Path, output: Path, small_clip: str, **more: object) -> dict:
    arguments = {"backbone": small_clip, "false_alarm_rate": 0.3}
    given = {"name": "line", "root": str(root), "val_split_mode": "same_as_test", "num_workers": 0}
    return {
        "models": [
            {"class_path": "ClipAdSdp", "name": name, "init_args": {**arguments, "class_name": class_name}}
            for name, class_name in MODELS.items()
        ],
        "data": {"class_path": "Folder", "init_args": {**given, **LAYOUT}},
        "map_size": 32,
        "metrics": ["image_AUROC", "pixel_AUROC"],
        "output": str(output),
        **more,
    }


def run(config: dict) -> list[dict]:
    rows = SerialCompareRunner(CompareJobGenerator("cpu")).run(config)
    assert not [row["error"] for row in rows if "error" in row]
    write_report(Path(config["output"]), rows)
    return rows


@pytest.fixture(scope="module")
def compared(mixed: Path, small_clip: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    output = tmp_path_factory.mktemp("compared")
    return output, run(configuration(mixed, output, small_clip))


@pytest.mark.parametrize("name", ["listed", "mapped"])
def test_a_comparison_says_of_each_image_what_test_says(
    compared: tuple[Path, list[dict]], mixed: Path, small_clip: str, tmp_path: Path, name: str
) -> None:
    """Class, score, threshold of the class, verdict, p-value, and the heatmap; and the same figures."""
    output, rows = compared
    model = ClipAdSdp(MODELS[name], small_clip, false_alarm_rate=0.3, **BARE)
    engine = new_engine(tmp_path)
    engine.test(model, datamodule=data(mixed), verbose=False)
    theirs = pd.read_csv(next(tmp_path.rglob("predictions.csv"))).set_index("path").sort_index()
    ours = pd.read_csv(output / "predictions.csv").query("model == @name").set_index("path").sort_index()
    pd.testing.assert_frame_equal(ours[["class", "label"]], theirs[["class", "label"]])
    pd.testing.assert_series_equal(ours["p_value"], theirs["p_value"], atol=1e-5)
    pd.testing.assert_series_equal(ours["scaled_score"].clip(0, 1), theirs["score"], check_names=False, atol=1e-4)
    thresholds = model.post_processor.of_class.values[:, 2].tolist()
    assert set(ours["class"]) == set(NAMES)
    assert len(set(thresholds)) == 2
    for number, own in enumerate(NAMES):
        assert ours.loc[ours["class"] == own, "threshold"].to_numpy() == pytest.approx(thresholds[number])
    row = next(row for row in rows if row["model"] == name)
    kept = read_kept(output, rows)[row["key"]]
    again = data(mixed)
    again.setup()
    for batch in engine.predict(model, dataloaders=again.test_dataloader()):
        for path, anomaly_map in zip(batch.image_path, batch.anomaly_map, strict=True):
            levels = np.asarray(Image.open(kept.images[path].heat), dtype=float) / 254
            np.testing.assert_allclose(levels, anomaly_map.clamp(0, 1).numpy(), atol=0.01)


def test_report_page_and_pictures_name_the_class(compared: tuple[Path, list[dict]]) -> None:
    output, _ = compared
    table = pd.read_csv(output / "predictions.csv")
    report = (output / "report.md").read_text()
    lines = report.split("### Classes")[1].split("\n## ")[0]
    for name in ("listed", "mapped"):
        for own in NAMES:
            part = table.query("model == @name and `class` == @own")
            found = [sum((part["true_label"] == true) & (part["label"] == said)) for true, said in CELLS]
            line = rf"\| {name} \| line \| {own} \| {len(part)} \| [-\d.e]+ \| {' . '.join(map(str, found))} \|"
            assert re.search(line, lines), line
    assert "| one |" not in lines
    page = data_of(output / "report.html")
    chosen = table.set_index(["path", "model"])["class"]
    for path, *_, found in page["images"]:
        words = dict(zip(page["models"], found, strict=True))
        assert [words[name][-1] for name in ("listed", "mapped")] == [chosen[path, "listed"], chosen[path, "mapped"]]
        assert len(words["one"]) < len(words["listed"])
    assert Image.open(output / "examples/line.png").height > 500


CELLS = [("anomalous", "anomalous"), ("anomalous", "normal"), ("normal", "anomalous"), ("normal", "normal")]


def test_unlabelled_images_are_shown_with_their_class(mixed: Path, small_clip: str, tmp_path: Path) -> None:
    config = configuration(mixed, tmp_path / "out", small_clip, data=None, images=str(mixed / "test/good"))
    config["models"] = config["models"][1:2]
    run(config)
    table = pd.read_csv(tmp_path / "out/predictions.csv")
    assert (table["class"] == ["plate" if "/b/" in path else "tile" for path in table["path"]]).all()
    assert re.search(r"\| n/007.png \| \d\.\d{4} \(tile\) \|", (tmp_path / "out/report.md").read_text())


def test_several_names_where_they_cannot_be_are_one_sentence(mixed: Path, small_clip: str, tmp_path: Path) -> None:
    config = configuration(mixed, tmp_path, small_clip, shots=[2])
    with pytest.raises(InputError, match="listed takes k_shot normal images of each class"):
        CompareJobGenerator("cpu").generate_jobs(config)
    winclip = {"class_path": "WinClip", "init_args": {"class_name": NAMES}}
    (job,) = CompareJobGenerator("cpu").generate_jobs({**config, "models": [winclip], "shots": None})
    assert "WinClip takes one name as class_name, got ['plate', 'tile']; compare" in job.run()["error"]
