"""What a comparison shows: one scale for all models, verdicts, the table of all images, and pictures of them."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from lightning.pytorch import seed_everything
from PIL import Image
from sklearn.metrics import confusion_matrix

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.compare import CompareJob, CompareJobGenerator, write_report
from anomalib_clipad.compare.example_pictures import MOST_EXTREMES, choose_rows, examples_figure
from anomalib_clipad.compare.gallery import page_images
from anomalib_clipad.compare.job_files import Kept, KeptImage, heat_folder
from anomalib_clipad.compare.predictions import read_kept
from anomalib_clipad.compare.remarks import remarks
from anomalib_clipad.compare.runners import SerialCompareRunner
from anomalib_clipad.compare.scale import Scale, Scales, choose_scales
from anomalib_clipad.compare.score_figure import left_out, scores_figure
from anomalib_clipad.engine.table import BOXES, COLUMNS

from .conftest import LAYOUT, folder, new_engine

SIDE = 32  # of the small CLIP's maps, so that nothing is resized


def configuration(category: Path, output: Path, small_clip: str) -> dict:
    """SDP with a threshold of its own, and without a post-processor that would know one."""
    arguments = {"backbone": small_clip, "class_name": "widget"}
    data = {"name": "widget", "root": str(category), **LAYOUT, "num_workers": 0, "val_split_mode": "same_as_test"}
    return {
        "models": [
            {"class_path": "ClipAdSdp", "name": "SDP", "init_args": arguments},
            {"class_path": "ClipAdSdp", "name": "raw", "init_args": {**arguments, "post_processor": False}},
        ],
        "data": {"class_path": "Folder", "init_args": data},
        "map_size": SIDE,
        "output": str(output),
    }


def run(config: dict) -> list[dict]:
    return SerialCompareRunner(CompareJobGenerator("cpu")).run(config)


@pytest.fixture(scope="module")
def compared(category: Path, small_clip: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """Folder and rows of a comparison of two models on one category."""
    output = tmp_path_factory.mktemp("compared")
    rows = run(configuration(category, output, small_clip))
    write_report(output, rows)
    return output, rows


def kept_of(output: Path, row: dict) -> Kept:
    found = Kept.read(output / "jobs" / f"{row['key']}.json")
    assert found is not None
    return found


def test_a_comparison_shows_what_predict_shows(
    compared: tuple[Path, list[dict]], category: Path, small_clip: str, tmp_path: Path
) -> None:
    output, (row, _) = compared
    kept = kept_of(output, row)
    model = ClipAdSdp("widget", small_clip, visualizer=False)
    for batch in new_engine(tmp_path).predict(model, datamodule=folder(category)):
        for path, score, label, one in zip(
            batch.image_path, batch.pred_score, batch.pred_label, batch.anomaly_map, strict=True
        ):
            image = kept.images[str(path)]
            assert min(max(image.shown, 0), 1) == pytest.approx(float(score), abs=1e-4)
            assert (image.shown > 0.5) == bool(label)
            levels = np.asarray(Image.open(image.heat), dtype=float)
            np.testing.assert_allclose(levels / 254, one.clamp(0, 1).numpy(), atol=0.01)  # a level, and float16


def test_without_a_threshold_good_images_set_the_scale_and_nothing_is_judged(
    compared: tuple[Path, list[dict]],
) -> None:
    output, (_, row) = compared
    kept = kept_of(output, row)
    good = [image.shown for image in kept.images.values() if image.label == 0]
    assert (max(good), min(good)) == (pytest.approx(0.5), pytest.approx(0))
    sentence = "raw on widget has no threshold, so no verdicts: 0.5 is the largest score of its good images"
    report = (output / "report.md").read_text()
    assert sentence in report
    assert "| raw |" not in report.split("### Verdicts by model")[1].split("\n\n## ")[0]
    table = pd.read_csv(output / "predictions.csv")
    assert table.loc[table["model"] == "raw", ["label", "threshold"]].isna().all(axis=None)
    unlabelled = choose_scales(None, [1.0, 3.0], [(0, 1), (0, 4)], [None, None])
    assert (unlabelled.score.source, unlabelled.map.shown(4.0)) == ("all images", 0.5)


def test_a_row_an_image_in_the_words_of_the_other_table(compared: tuple[Path, list[dict]]) -> None:
    output, rows = compared
    table = pd.read_csv(output / "predictions.csv")
    assert len(table) == sum(row["images"] for row in rows)
    assert set(COLUMNS) - {"class", "picture"} <= set(table)
    ours = table[table["model"] == "SDP"]
    assert ((ours["score"] > ours["threshold"]) == (ours["label"] == "anomalous")).all()
    assert ((ours["scaled_score"] > 0.5) == (ours["label"] == "anomalous")).all()
    assert set(ours["true_label"]) == {"normal", "anomalous"}
    counts = confusion_matrix(ours["true_label"], ours["label"], labels=["normal", "anomalous"])
    (passed, alarms), (missed, found) = counts
    line = f"| SDP | {found} | {missed} | {alarms} | {passed} |"
    assert line in (output / "report.md").read_text()


def test_a_comparison_says_of_an_image_what_predict_says(category: Path, small_clip: str, tmp_path: Path) -> None:
    config = configuration(category, tmp_path / "out", small_clip)
    arguments = {**config["models"][0]["init_args"], "k_shot": 2, "false_alarm_rate": 0.3}
    config["models"] = [{"class_path": "ClipAdSdp", "name": "SDP", "init_args": arguments}]
    write_report(tmp_path / "out", run(config))
    ours = pd.read_csv(tmp_path / "out/predictions.csv").set_index("path").sort_index()
    engine = new_engine(tmp_path)
    seed_everything(42)
    model = ClipAdSdp(visualizer=False, **arguments)
    engine.test(model, datamodule=folder(category, val_split_mode="same_as_test"), verbose=False)
    other = pd.read_csv(next(tmp_path.rglob("test/v0/predictions.csv"))).set_index("path").sort_index()
    shared = ["label", "true_label", "p_value", "marked_area", *BOXES]
    assert ours["p_value"].notna().all()
    assert (ours["marked_area"] > 0).any()
    assert len(model.post_processor.map_offset.largest) == 1
    pd.testing.assert_frame_equal(ours[shared], other[shared], atol=2e-3, check_dtype=False)


def test_an_interrupted_comparison_leaves_the_rows_of_what_is_done(
    category: Path, small_clip: str, tmp_path: Path
) -> None:
    class Interrupted(CompareJob):
        def run(self, task_id: int | None = None) -> dict:  # noqa: ARG002 - as its parent
            raise KeyboardInterrupt

    first, second = CompareJobGenerator("cpu").generate_jobs(configuration(category, tmp_path, small_clip))
    second.__class__ = Interrupted
    with pytest.raises(KeyboardInterrupt):
        SerialCompareRunner(lambda *_: [first, second]).run({})
    assert set(pd.read_csv(tmp_path / "predictions.csv")["model"]) == {"SDP"}


def test_a_job_whose_heat_layers_are_incomplete_runs_again(category: Path, small_clip: str, tmp_path: Path) -> None:
    job = CompareJobGenerator("cpu").generate_jobs(configuration(category, tmp_path, small_clip))[0]
    job.run()
    layers = sorted(heat_folder(job.file).iterdir())
    assert [path.name for path in layers] == [f"{number:05d}.png" for number in range(11)]
    layers[3].unlink()
    (layers[0].parent / "00099.png").write_bytes(b"of a run with more images")
    assert job.result() is None
    job.run()
    assert job.result() is not None
    assert sorted(heat_folder(job.file).iterdir()) == layers
    assert not list(tmp_path.rglob(".*"))


def some_kept(scores: Sequence[float], labels: Sequence[int], scale: Scale | None = None) -> Kept:
    scale = scale or Scale(0.5, 0.0, 1.0, "model")
    images = {
        f"line/{number:03d}.png": KeptImage(score, float(scale.shown(score)), label, Path("none.png"))
        for number, (score, label) in enumerate(zip(scores, labels, strict=True))
    }
    return Kept(images, {}, Scales(scale, scale), "digest")


def test_the_worst_good_image_and_the_best_hidden_defect_are_shown_once_and_named() -> None:
    labels = [0] * 10 + [1] * 10
    scores = [0.1] * 20
    scores[4], scores[13] = 0.7, 0.05
    kept = {"SDP": some_kept(scores, labels), "SDP+": some_kept(scores, labels)}
    rows, too_many = choose_rows(kept)
    reasons = {row.path: row.why for row in rows if row.why}
    assert reasons == {
        "line/004.png": "worst good image of SDP; SDP+",
        "line/013.png": "best-hidden defect of SDP; SDP+",
    }
    assert (len(rows), too_many) == (7, 0), "the defect is one of the six examples"
    many = {f"model {n}": some_kept(np.roll(scores[:10], n).tolist() + scores[10:], labels) for n in range(10)}
    rows, too_many = choose_rows(many)
    assert len({row.path for row in rows}) == len(rows) == 6 + MOST_EXTREMES
    assert too_many > 0


def test_pictures_say_right_or_wrong_in_words() -> None:
    kept = some_kept([0.9, 0.1, 0.8, 0.2], [0, 0, 1, 1])
    unknown = some_kept([0.9], [0], Scale(0.5, 0.0, 1.0, "good images"))
    figure = examples_figure({"SDP": kept}, choose_rows({"SDP": kept})[0], [])
    words = {axis.get_xlabel().split("\n")[-1] for axis in figure.axes if axis.get_xlabel()}
    assert words == {"✗ false alarm", "✓ right", "✗ missed"}
    close = some_kept([0.50004, 0.1], [0, 0])
    figure = examples_figure({"SDP": close}, choose_rows({"SDP": close})[0], [])
    assert "score 0.50004, anomalous\n✗ false alarm" in [axis.get_xlabel() for axis in figure.axes]
    figure = examples_figure({"raw": unknown}, choose_rows({"raw": unknown})[0], ["No threshold."])
    assert [axis.get_xlabel() for axis in figure.axes if axis.get_xlabel()] == ["score 0.900\nno verdict"]
    assert any("No threshold." in text.get_text() for text in figure.texts)


def test_the_contour_is_drawn_where_a_threshold_is_known(compared: tuple[Path, list[dict]]) -> None:
    output, rows = compared
    white = {}
    for row in rows:
        kept = kept_of(output, row)
        figure = examples_figure({row["model"]: kept}, choose_rows({row["model"]: kept})[0], [])
        heatmaps = [axis.images[0].get_array() for axis in figure.axes if "score" in axis.get_xlabel()]
        white[row["model"]] = sum(int((one == 255).all(axis=-1).sum()) for one in heatmaps)
    assert white["SDP"] > 0
    assert white["raw"] == 0


def test_one_category_has_no_table_of_categories_in_colours(compared: tuple[Path, list[dict]]) -> None:
    output, rows = compared
    report = (output / "report.md").read_text()
    assert not (output / "per_category.png").exists()
    assert "per_category.png" not in report
    assert "![Scores](scores.png)" in report
    assert min(Image.open(output / "scores.png").size) > 200
    assert Image.open(output / "examples/widget.png").width > 600
    assert all("error" not in row for row in rows)


def test_only_what_has_changed_is_drawn_again(compared: tuple[Path, list[dict]]) -> None:
    output, rows = compared
    pictures = sorted(output.glob("*.png")) + sorted(output.glob("examples/*.png"))
    for path in pictures:
        os.utime(path, (0, 0))
    write_report(output, rows)
    assert [path.stat().st_mtime for path in pictures] == [0] * len(pictures)
    write_report(output, [{**rows[0], "image_AUROC": 0.123}, *rows[1:]])
    redrawn = {path.name for path in pictures if path.stat().st_mtime}
    assert redrawn == {"means.png", "speed_accuracy.png"}
    (output / "scores.png").write_bytes(b"damaged")
    write_report(output, rows)
    assert Image.open(output / "scores.png").format == "PNG"


def test_what_figures_are_worth_is_said_first() -> None:
    demo = {"class_path": "ClipAdSdp", "name": "SDP", "init_args": {"backbone": "demo"}}
    random = {"class_path": "ClipAdSdp", "name": "random", "init_args": {"pretrained": None}}
    own = {"class_path": "ClipAdSdp", "name": "own", "init_args": {"backbone": str(Path.cwd()), "pretrained": None}}
    jobs = CompareJobGenerator("cpu").generate_jobs({"models": [demo, random, own], "images": "photos"})
    measured = zip(jobs, (0.4, 0.6, 0.5), (None, 0.49, 0.9), strict=True)
    rows = [{**job._row(), "image_AUROC": image, "pixel_AUROC": pixel} for job, image, pixel in measured]
    assert remarks(rows) == [
        "Demonstration backbone: SDP. These figures say nothing of pretrained weights.",
        "Random weights: random. These figures say nothing of pretrained weights.",
        "Worse than chance: SDP on photos, image AUROC 40.0 %.",
        "Worse than chance: random on photos, pixel AUROC 49.0 %.",
    ]


def test_histograms_of_many_models_and_categories_stay_readable() -> None:
    names = pd.MultiIndex.from_product([[f"m{n}" for n in range(9)], [f"c{n}" for n in range(20)], range(4)])
    table = names.to_frame(index=False, name=["model", "category", "image"])
    table = table.assign(scaled_score=0.1 * table["image"], threshold=1.0, true_label="normal")
    figure = scores_figure(table)
    assert len(figure.axes) == 6 * 8
    assert max(figure.get_size_inches()) < 20
    assert left_out(table) == (
        "The first 6 of 9 models and the first 8 of 20 categories are drawn; predictions.csv has all scores."
    )


def test_the_page_shows_every_image_with_what_every_model_says(compared: tuple[Path, list[dict]]) -> None:
    output, rows = compared
    images = page_images(output, rows, read_kept(output, rows))
    assert len(images) == 11
    assert {image.truth for image in images} == {0, 1}
    assert {image.folder for image in images} == {"good", "square"}
    table = pd.read_csv(output / "predictions.csv").set_index(["path", "model"])
    page = (output / "report.html").read_text()
    for image in images:
        assert list(image.findings) == ["SDP", "raw"]
        assert Path(image.path).name in page
        with Image.open(output / image.thumbnail) as thumbnail, Image.open(image.path) as whole:
            assert thumbnail.size == whole.size
        for model, finding in image.findings.items():
            assert finding.score == pytest.approx(table.loc[(image.path, model), "scaled_score"])
            assert float(finding.raw) == pytest.approx(table.loc[(image.path, model), "score"], rel=1e-5)
            with Image.open(output / finding.heat) as layer:
                assert (layer.mode, layer.size) == ("P", (SIDE, SIDE))
    assert all(remark.split(":")[0] in page for remark in remarks(rows))
