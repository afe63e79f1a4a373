"""The comparison in Python: figures, metrics, processes, configurations; test_compare_command.py has the command."""

import os
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from anomalib_clipad import InputError
from anomalib_clipad.compare import CompareEvaluator, CompareJob, CompareJobGenerator, known, write_report
from anomalib_clipad.compare.pipeline import preflight
from anomalib_clipad.compare.runners import ParallelCompareRunner, SerialCompareRunner

from .commands import run_in_process
from .conftest import LAYOUT, write_category
from .test_compare_shots import small_winclip
from .test_metrics import aupro, best_f1


def configuration(root: Path, models: list[dict], names: tuple[str, ...] = ("gear", "plate")) -> dict:
    more = {"val_split_mode": "same_as_test", "num_workers": 0, "eval_batch_size": 4}
    data = [
        {"class_path": "Folder", "init_args": {"name": name, "root": str(root / name), **LAYOUT, **more}}
        for name in names
    ]
    return {"accelerator": "cpu", "compare": {"output": "out", "map_size": 64, "models": models, "data": data}}


SDP = {"class_path": "ClipAdSdp", "name": "SDP"}
WINCLIP = {"class_path": "WinClip", "name": "WinCLIP"}
RVS = ("mean", "median", "kde")  # the second does not exist
PATCHCORE = {
    "class_path": "Patchcore",
    "name": "PatchCore",
    "init_args": {"pre_trained": False, "backbone": "resnet18", "coreset_sampling_ratio": 0.01},
}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compare")
    for name in ("gear", "plate"):
        write_category(root / name)
    return root


def maps_of(root: Path, name: str) -> np.ndarray:
    """Masks of a category's test images in the order of their paths, at the size compared."""
    masks = []
    for path in sorted((root / name / "test").rglob("*.png")):
        mask = root / name / "ground_truth/square" / f"{path.stem}_mask.png"
        whole = Image.open(mask) if path.parent.name == "square" else Image.new("L", (48, 48))
        masks.append(torch.from_numpy(np.array(whole)).float()[None, None])
    return torch.nn.functional.interpolate(torch.cat(masks), (64, 64), mode="nearest")[:, 0].numpy() > 0


def test_pixel_figures_are_those_of_the_files_masks(data_root: Path, small_clip: str, tmp_path: Path) -> None:
    kept: list[CompareEvaluator] = []

    class Keeping(CompareJob):
        def _keep(self, evaluator: CompareEvaluator, *others: object) -> None:
            kept.append(evaluator)
            super()._keep(evaluator, *others)

    config = configuration(data_root, [{**SDP, "init_args": {"backbone": small_clip}}], ("gear",))["compare"]
    row = Keeping(config["models"][0], config["data"][0], None, 0, 64, tmp_path, "cpu").run()
    order = np.argsort(kept[0].paths)
    measured = next(metric for metric in kept[0].test_metrics if metric.name == "pixel_AUPRO")
    maps, masks = torch.cat(measured.preds).numpy()[order], maps_of(data_root, "gear")
    assert row["pixel_AUROC"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-6)
    assert row["pixel_AP"] == pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), abs=1e-6)
    assert row["pixel_F1Max"] == pytest.approx(best_f1(masks.ravel(), maps.ravel()), abs=1e-6)
    assert row["pixel_AUPRO"] == pytest.approx(aupro(masks, maps), abs=1e-5)


def figures(output: Path) -> pd.DataFrame:
    table = pd.read_csv(output / "results.csv").set_index(["model", "category"]).sort_index()
    return table[[column for column in table if column.startswith(("image_", "pixel_"))]]


def test_only_the_metrics_asked_for(data_root: Path, small_clip: str, tmp_path: Path) -> None:
    config = configuration(data_root, [{**SDP, "init_args": {"backbone": small_clip}}], ("gear",))["compare"]
    config |= {"metrics": ["pixel_AP", "image_AUROC"], "output": str(tmp_path)}
    write_report(tmp_path, SerialCompareRunner(CompareJobGenerator("cpu")).run(config))
    assert set(figures(tmp_path)) == {"pixel_AP", "image_AUROC"}
    assert Image.open(tmp_path / "speed_accuracy.png").size[0] > 300


@pytest.mark.slow
def test_several_processes_give_what_one_gives(data_root: Path, small_clip: str, tmp_path: Path) -> None:
    models = [
        {"class_path": "ClipAdSdp", "name": rvs, "init_args": {"backbone": small_clip, "rvs": rvs}} for rvs in RVS
    ]
    config = configuration(data_root, models)["compare"]
    for runner, name in (
        (ParallelCompareRunner(CompareJobGenerator("cpu"), n_jobs=2), "two"),
        (SerialCompareRunner(CompareJobGenerator("cpu")), "one"),
    ):
        (tmp_path / name).mkdir()
        rows = runner.run({**config, "output": str(tmp_path / name)})
        assert [(row["category"], row["model"]) for row in rows] == [(c, m) for c in ("gear", "plate") for m in RVS]
        assert [row["model"] for row in rows if "error" in row] == ["median", "median"]
        write_report(tmp_path / name, rows)
    pd.testing.assert_frame_equal(figures(tmp_path / "two"), figures(tmp_path / "one"), atol=1e-6)


@pytest.mark.slow
def test_a_process_ended_by_the_system_leaves_what_is_done(data_root: Path, small_clip: str, tmp_path: Path) -> None:
    """As the operating system kills one that takes all memory."""
    first, *others = jobs(configuration(data_root, [{**SDP, "init_args": {"backbone": small_clip}}]), tmp_path)
    done = first.run()
    runner = ParallelCompareRunner(lambda *_: [first, *map(Dying, others)], n_jobs=2)
    runner.generator.job_class = CompareJob
    rows = runner.run({})
    assert rows[0] == done
    assert "start it again for what is missing" in rows[1]["error"]


class Dying(CompareJob):
    def __init__(self, job: CompareJob) -> None:
        self.__dict__ = dict(job.__dict__)

    def run(self, **_: int) -> dict:
        os.kill(os.getpid(), signal.SIGKILL)


def test_unlabelled_images_side_by_side(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_winclip(tmp_path / "home", monkeypatch)
    config = {"output": "out", "models": [SDP, WINCLIP], "images": str(data_root / "gear/test/square")}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump({"accelerator": "cpu", "compare": config}))
    done = run_in_process("compare", "--config", "compare.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    report = (tmp_path / "out/report.md").read_text()
    assert "no metrics" in report
    assert "| image | SDP | WinCLIP |" in report
    assert "| 000.png |" in report
    assert Image.open(tmp_path / "out/examples/square.png").size[0] > 300
    assert not (tmp_path / "out/means.png").exists()


def jobs(config: dict, output: Path) -> list:
    return CompareJobGenerator("cpu").generate_jobs({**config["compare"], "output": str(output)})


def test_winclip_is_refused_where_its_maps_would_be_constant(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, sentence = known.REQUIRED["WinClip"]
    monkeypatch.setitem(known.REQUIRED, "WinClip", (lambda: False, sentence))
    with pytest.raises(InputError, match=r"maps are constant.*install 'open_clip_torch>=2.23,<2.26.1'"):
        preflight(jobs(configuration(data_root, [SDP, WINCLIP]), tmp_path))


def test_missing_data_and_downloads_are_said_before_the_start(data_root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="These data are missing: .*valve"):
        preflight(jobs(configuration(data_root, [SDP], ("valve",)), tmp_path))
    monkey = pytest.MonkeyPatch()
    monkey.setenv("HOME", str(tmp_path))
    pretrained = {"class_path": "Patchcore", "init_args": {"backbone": "resnet18"}}
    lines = preflight(jobs(configuration(data_root, [SDP, pretrained, PATCHCORE]), tmp_path))
    monkey.undo()
    assert lines[0] == "6 jobs, 0 of them done."
    assert "laion400m_e31 of ViT-B-16-plus-240 will be downloaded (800 MB)" in lines[1]
    assert lines[2:] == ["The weights of resnet18 for Patchcore will be downloaded (47 MB)."]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"models": []}, "compare needs models"),
        ({"data": None}, "data or images"),
        ({"modls": []}, "takes the keys .*got modls"),
        ({"metrics": ["pixel_AP", "PRO"]}, "metrics takes any of image_AUROC, .*got PRO"),
        ({"models": [{"name": "x"}]}, "needs a class_path"),
    ],
)
def test_wrong_configurations_are_refused_in_a_sentence(
    data_root: Path, tmp_path: Path, change: dict, words: str
) -> None:
    config = configuration(data_root, [SDP])
    config["compare"] |= change
    with pytest.raises(InputError, match=words):
        jobs(config, tmp_path)


@pytest.mark.parametrize("name", ["compare_folder", "compare_mvtec"])
def test_the_configurations_become_jobs(name: str, tmp_path: Path) -> None:
    config = yaml.safe_load((Path(__file__).parents[1] / f"configs/{name}.yaml").read_text())
    arguments = config["compare"]["data"]["init_args"]
    if arguments.get("category") == "all":
        write_category(tmp_path / "bottle")
        arguments["root"] = str(tmp_path)
    models = {job.model_name for job in jobs(config, tmp_path)}
    assert {"SDP", "WinCLIP", "PatchCore"} <= models


def test_grids_and_all_categories_become_jobs(data_root: Path, tmp_path: Path) -> None:
    config = {
        "models": [{"class_path": "ClipAdSdp", "init_args": {"rvs": {"grid": ["mean", "kde"]}}}],
        "data": {"class_path": "MVTecAD", "init_args": {"root": str(data_root), "category": "all"}},
    }
    found = {(j.category, j.model_config["init_args"]["rvs"]) for j in jobs({"compare": config}, tmp_path)}
    assert found == {(name, rvs) for name in ("gear", "plate") for rvs in ("mean", "kde")}


def test_published_figures_stand_beside_measured_ones(tmp_path: Path) -> None:
    rows = [
        {
            "model": name,
            "class": kind,
            "category": "bottle",
            "pixel_F1Max": 0.3,
            "pixel_AUPRO": 0.6,
            "images_per_second": 1.0,
            "peak_memory_mib": 1.0,
            "key": "none",
            **more,
        }
        for name, kind, more in (
            ("SDP", "ClipAdSdp", {"learning_type": "zero_shot"}),
            ("SDP, 0 images", "ClipAdSdp", {"shots": 0, "family": "SDP", "seed": 0}),
            ("SDP, good parts", "ClipAdSdp", {"learning_type": "few_shot"}),
            ("PatchCore, 1 image", "Patchcore", {"shots": 1, "family": "PatchCore", "seed": 0}),
            ("WinCLIP", "WinClip", {}),
        )
    ]
    write_report(tmp_path, rows, published="MVTecAD")
    report = (tmp_path / "report.md").read_text()
    assert "| SDP | pixel F1-max | 30.0 | 35.9 |" in report
    assert "| SDP, 0 images | pixel F1-max | 30.0 | 35.9 |" in report
    assert "| WinCLIP | pixel AUPRO | 60.0 | 64.6 |" in report
    published = report.split("## Beside published figures")[1].split("## By category")[0]
    assert "good parts" not in published, "published figures are of no normal image"
    assert "PatchCore" not in published, "or of all of them"


def test_a_failed_job_is_named_with_its_seed_where_there_are_several(tmp_path: Path) -> None:
    rows = [{"model": "PaDiM", "category": "nut", "seed": seed, "error": "no data", "key": "none"} for seed in (0, 1)]
    write_report(tmp_path, rows)
    report = (tmp_path / "report.md").read_text()
    assert "**Failed**: PaDiM on nut, seed 0: no data" in report
    assert "**Failed**: PaDiM on nut, seed 1: no data" in report
