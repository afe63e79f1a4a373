"""A comparison is one of the same images, and says where it cannot be one."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from anomalib.data import ImageBatch

from anomalib_clipad import InputError
from anomalib_clipad.compare import CompareEvaluator, CompareJob, CompareJobGenerator, write_report
from anomalib_clipad.compare.metric_figures import categories_figure
from anomalib_clipad.compare.pipeline import preflight
from anomalib_clipad.compare.scale import Scales

from .conftest import LAYOUT, write_category, write_good

PADIM = {"class_path": "Padim", "init_args": {"backbone": "resnet18", "pre_trained": False}}
DFKDE = {"class_path": "Dfkde", "init_args": {"backbone": "resnet18", "pre_trained": False, "n_pca_components": 2}}


def jobs(models: list[dict], output: Path, root: Path | None = None, **arguments: object) -> list[CompareJob]:
    """Jobs on a folder as ``write_category`` makes it, with other arguments of Folder."""
    config: dict = {"models": models, "output": str(output), "map_size": 32}
    if root is not None:
        layout = {"name": "widget", "num_workers": 0, "root": str(root), **LAYOUT, **arguments}
        config["data"] = {"class_path": "Folder", "init_args": {k: v for k, v in layout.items() if v is not None}}
    return list(CompareJobGenerator("cpu").generate_jobs(config))


def sdp(small_clip: str, **arguments: object) -> dict:
    return {"class_path": "ClipAdSdp", "init_args": {"backbone": small_clip, **arguments}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = write_category(tmp_path / "widget", normal=8, broken=8)
    shutil.rmtree(root / "train/good")
    write_good(root / "train/good", 12)
    return root


@pytest.mark.parametrize("arguments", [{}, {"normal_test_dir": None, "val_split_mode": "same_as_test"}])
def test_all_models_are_tested_on_the_same_images(small_clip: str, root: Path, tmp_path: Path, arguments: dict) -> None:
    # anomalib splits without a seed of its own, and models draw their weights from the same generator.
    tested = []
    for job in jobs([sdp(small_clip), PADIM], tmp_path / "out", root, **arguments):
        row = job.run()
        assert "error" not in row, row
        tested.append(set(pd.read_csv(job.file.with_suffix(".csv"))["path"]))
    assert tested[0] == tested[1]


@pytest.mark.parametrize(("left_out", "only"), [("abnormal_dir", "normal"), ("normal_test_dir", "anomalous")])
def test_images_of_one_kind_have_no_figures(
    small_clip: str, root: Path, tmp_path: Path, left_out: str, only: str
) -> None:
    arguments = {left_out: None, "val_split_mode": "same_as_test"}
    if only == "normal":
        arguments["mask_dir"] = None
    else:  # anomalib would take normal ones of the training split
        arguments["test_split_mode"] = "none"
    rows = [job.run() for job in jobs([sdp(small_clip)], tmp_path / "out", root, **arguments)]
    if "error" in rows[0]:
        pytest.fail(rows[0]["error"])
    assert not [key for key in rows[0] if key.startswith("image_")]
    write_report(tmp_path / "out", rows)
    report = (tmp_path / "out/report.md").read_text()
    assert f"**Nothing to tell apart**: all images of widget are {only}, so ClipAdSdp has no AUROC" in report
    assert "Worse than chance" not in report


def test_a_model_without_maps_is_compared_by_its_scores(root: Path, tmp_path: Path) -> None:
    rows = [job.run() for job in jobs([DFKDE, PADIM], tmp_path / "out", root, val_split_mode="same_as_test")]
    assert not [row["error"] for row in rows if "error" in row]
    assert 0 <= rows[0]["image_AUROC"] <= 1
    assert "pixel_AUROC" not in rows[0]
    assert "pixel_AUROC" in rows[1]
    write_report(tmp_path / "out", rows)
    assert "Dfkde on widget gives no anomaly maps: its heatmaps are grey." in (tmp_path / "out/report.md").read_text()


def test_unlabelled_images_are_judged_by_what_the_data_told(small_clip: str, root: Path, tmp_path: Path) -> None:
    models = [sdp(small_clip), {**sdp(small_clip, k_shot=2), "name": "few"}]
    judged = []
    for job in jobs(models, tmp_path / "out", root, val_split_mode="same_as_test"):
        measured = job.run()
        job.images = str(root / "test/square")
        row = job.run()
        assert "error" not in row, row
        assert row["images"] == 8
        scales = [Scales.read(one["scales"]).score for one in (measured, row)]
        judged.append(scales[0].threshold == pytest.approx(scales[1].threshold))
        assert scales[1].threshold != 0.5, "of a model without thresholds"
    assert judged == [True, True]


def test_another_accelerator_runs_the_job_again(small_clip: str, root: Path, tmp_path: Path) -> None:
    job = jobs([sdp(small_clip)], tmp_path / "out", root)[0]
    job.run()
    assert job.result() is not None
    job.accelerator = "cuda"
    assert job.result() is None


def test_epochs_of_a_trained_model_can_be_set(root: Path, tmp_path: Path) -> None:
    model = {"class_path": "Fastflow", "init_args": {"backbone": "resnet18", "pre_trained": False}, "max_epochs": 1}
    job = jobs([model], tmp_path / "out", root, val_split_mode="same_as_test", train_batch_size=2)[0]
    told: list[str] = []
    job.tell = lambda what, *_: told.append(what)
    row = job.run()
    assert "error" not in row, row
    assert told.count("training") > 1
    assert not [what for what in told if "epoch" in what]
    with pytest.raises(InputError, match="max_epochs in compare: models must be a whole number from 1"):
        jobs([{**model, "max_epochs": 0}], tmp_path, root)


def test_categories_stay_beside_their_own_values() -> None:
    rows = [
        {"model": "SDP", "category": "brain", "image_AUROC": 0.9},
        {"model": "SDP", "category": "skin", "image_AUROC": 0.6, "pixel_AP": 0.3},
    ]
    figure = categories_figure(pd.DataFrame(rows), ["image_AUROC", "pixel_AP"])
    images, pixels = figure.axes
    assert [label.get_text() for label in images.get_yticklabels()] == ["brain", "skin"]
    assert [(text.get_position()[1], text.get_text()) for text in images.texts] == [(0, "90"), (1, "60")]
    assert [(text.get_position()[1], text.get_text()) for text in pixels.texts] == [(1, "30")]


def test_published_figures_are_those_of_the_same_data(tmp_path: Path) -> None:
    def report(*data: str) -> str:
        row = {"model": "SDP", "class": "ClipAdSdp", "pixel_AUPRO": 0.5, "key": "none"}
        more = {"images_per_second": 1.0, "peak_memory_mib": 1.0}
        rows = [{**row, **more, "category": name, "data": name} for name in data]
        write_report(tmp_path, rows, title=yaml.safe_dump({"data": list(data)}))
        return (tmp_path / "report.md").read_text()

    assert "Beside published figures on MVTecAD," in report("MVTecAD")
    assert "Beside published" not in report("MVTecAD2")
    assert "Beside published" not in report("MVTecAD", "Visa")


def test_categories_below_a_folder_of_the_root_are_found(small_clip: str, tmp_path: Path) -> None:
    def check() -> list[str]:
        data = {"class_path": "RealIAD", "init_args": {"root": str(tmp_path / "iad"), "category": "toy"}}
        config = {"models": [sdp(small_clip)], "data": data, "output": str(tmp_path / "out")}
        return preflight(CompareJobGenerator("cpu").generate_jobs(config))

    (tmp_path / "iad/elsewhere/toy").mkdir(parents=True)
    with pytest.raises(InputError, match="These data are missing"):
        check()
    (tmp_path / "iad/realiad_256/toy").mkdir(parents=True)
    assert check() == ["1 jobs, 0 of them done."]


def test_a_model_without_scores_and_maps_is_refused() -> None:
    evaluator = CompareEvaluator(8)
    batch: Any = ImageBatch(image=torch.zeros(1, 3, 8, 8), image_path=["a.png"])
    unused: Any = None
    evaluator.on_test_batch_start(unused, unused, batch, 0)
    with pytest.raises(InputError, match="gives neither scores nor anomaly maps"):
        evaluator.on_test_batch_end(unused, unused, None, batch, 0)
    evaluator.stream.close()
