"""A comparison over the number of normal images: every model is given the same ones."""

import argparse
import json
from collections import Counter
from pathlib import Path

import open_clip
import pandas as pd
import pytest
import torch
import yaml
from anomalib.models import Patchcore, WinClip
from PIL import Image

from anomalib_clipad import ClipAdSdp, InputError
from anomalib_clipad.compare import Compare, CompareJob, CompareJobGenerator, write_report
from anomalib_clipad.compare.known import towers_are_sequence_first
from anomalib_clipad.compare.metric_figures import _over_seeds
from anomalib_clipad.compare.pipeline import preflight
from anomalib_clipad.compare.shots import take
from anomalib_clipad.compare.tables import mean_table
from anomalib_clipad.data.datamodules import build_datamodule
from anomalib_clipad.engine.normal_images import NormalImages

from .conftest import LAYOUT, ROOT, SMALL_CONFIG, make_clip, write_category

PATCHCORE = {
    "class_path": "Patchcore",
    "name": "PatchCore",
    "init_args": {"pre_trained": False, "backbone": "resnet18", "layers": ["layer1"], "coreset_sampling_ratio": 0.01},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_category(tmp_path_factory.mktemp("shots") / "gear", normal=3, broken=3)
    for number in range(2, 6):
        Image.open(root / "train/good/000.png").rotate(number).save(root / f"train/good/{number:03d}.png")
    return root


def configuration(root: Path, output: Path, small_clip: str, **more: object) -> dict:
    sdp = {"class_path": "ClipAdSdp", "name": "SDP", "init_args": {"backbone": small_clip}}
    arguments = {"name": "gear", "root": str(root), **LAYOUT, "num_workers": 0, "val_split_mode": "same_as_test"}
    data = {"class_path": "Folder", "init_args": arguments}
    return {"models": [sdp, PATCHCORE], "data": data, "map_size": 32, "output": str(output), **more}


def run(config: dict, where: Path) -> list[dict]:
    path = where / "compare.yaml"
    path.write_text(yaml.safe_dump({"accelerator": "cpu", "compare": config}))
    return Compare().run(argparse.Namespace(config=str(path)))


@pytest.mark.slow
def test_every_model_is_given_the_same_images(
    root: Path, small_clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, list[set[str]]] = {"SDP": [], "PatchCore": []}
    of_split, on_train_start = NormalImages.of_training_split.__func__, Patchcore.on_train_start

    def watched_split(cls: type, datamodule: object, transform: object) -> NormalImages:
        images = of_split(cls, datamodule, transform)
        given["SDP"].append(set(images.paths))
        return images

    def watched_start(self: Patchcore) -> None:
        given["PatchCore"].append(set(map(str, self.trainer.datamodule.train_data.samples.image_path)))
        return on_train_start(self)

    monkeypatch.setattr(NormalImages, "of_training_split", classmethod(watched_split))
    monkeypatch.setattr(Patchcore, "on_train_start", watched_start)
    config = configuration(root, tmp_path / "out", small_clip, shots=[0, 1, 3], seed=[0, 1])
    rows = run(config, tmp_path)

    named = [(row["model"], row["shots"], row["seed"]) for row in rows]
    few = [
        (f"{name}, {words}", count, seed)
        for name in ("SDP", "PatchCore")
        for words, count in (("1 image", 1), ("3 images", 3))
        for seed in (0, 1)
    ]
    assert named == [("SDP, 0 images", 0, 0), *few]
    ours = [images for number, images in enumerate(given["SDP"]) if images not in given["SDP"][:number]]
    assert ours == given["PatchCore"], "in the order of the jobs: 1 and 3 images, two seeds each"
    assert [len(images) for images in ours] == [1, 1, 3, 3]
    assert ours[0] != ours[1]
    assert ours[2] != ours[3]

    means = mean_table(rows)
    assert list(means.index) == list(dict.fromkeys(row["model"] for row in rows))
    three = [row["image_AUROC"] for row in rows if row["model"] == "SDP, 3 images"]
    assert means.loc["SDP, 3 images", "image_AUROC"] == pytest.approx(sum(three) / 2)
    report = (tmp_path / "out/report.md").read_text()
    assert "![Over the number of normal images](shots.png)" in report
    assert "Means over 2 seeds" in report
    assert "Bands: from the lowest to the highest mean of a seed." in report
    assert Image.open(tmp_path / "out/shots.png").width > 600
    table = pd.read_csv(tmp_path / "out/results.csv")
    assert set(table["family"]) == {"SDP", "PatchCore"}

    jobs = CompareJobGenerator("cpu").generate_jobs(config)
    assert preflight(jobs)[0] == "9 jobs, 9 of them done."
    again = run(config, tmp_path)
    assert json.dumps(again) == json.dumps(rows)


def small_winclip(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """WinCLIP's backbone cannot be chosen, so a small CLIP takes its name, in the cache as the real one would lie."""
    vision = {"image_size": 240, "patch_size": 16}
    (home / ".cache/clip").mkdir(parents=True)
    torch.save(make_clip(**vision).state_dict(), home / ".cache/clip/small.pt")
    config = {**SMALL_CONFIG, "vision_cfg": {**SMALL_CONFIG["vision_cfg"], **vision}}
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-16-plus-240", config)
    tag = {"laion400m_e31": {"url": "https://example.com/small.pt"}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-B-16-plus-240", tag)


@pytest.mark.skipif(not towers_are_sequence_first(), reason="anomalib's WinCLIP does not work with this open_clip")
def test_winclip_is_given_them_too(
    root: Path, small_clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_winclip(tmp_path / "home", monkeypatch)
    given, collect = [], WinClip.collect_reference_images

    def watched(self: WinClip, dataloader: torch.utils.data.DataLoader) -> torch.Tensor:
        given.append({path for batch in dataloader for path in batch.image_path})
        return collect(self, dataloader)

    monkeypatch.setattr(WinClip, "collect_reference_images", watched)
    config = configuration(root, tmp_path / "out", small_clip, shots=[0, 2], seed=[3], metrics="image_AUROC")
    config["models"] = [{"class_path": "WinClip", "name": "WinCLIP"}]
    rows = [job.run() for job in CompareJobGenerator("cpu").generate_jobs(config)]
    assert [(row["model"], "error" in row) for row in rows] == [
        ("WinCLIP, 0 images", False),
        ("WinCLIP, 2 images", False),
    ]
    assert given == [set(take(build_datamodule(config["data"]), 2, seed=3))], (
        "none with 0, and those of the others with 2"
    )


def test_zero_shot_models_run_once_whatever_the_numbers(root: Path, small_clip: str, tmp_path: Path) -> None:
    models = [{"class_path": "AnomalyVFM", "name": "VFM"}, PATCHCORE]
    config = configuration(root, tmp_path, small_clip, shots=[1, 2], seed=[5, 6]) | {"models": models}
    found = [(job.model_name, job.shots, job.seed) for job in CompareJobGenerator("cpu").generate_jobs(config)]
    assert found[0] == ("VFM, 0 images", 0, 5)
    assert [shots for _, shots, _ in found[1:]] == [1, 1, 2, 2]


def test_figures_of_maps_that_are_no_numbers_are_refused(root: Path, small_clip: str, tmp_path: Path) -> None:
    """PaDiM has no covariance of one image; its maps are NaN, which metrics sort like any number."""
    arguments = {"pre_trained": False, "backbone": "resnet18", "layers": ["layer1"], "n_features": 10}
    padim = {"class_path": "Padim", "name": "PaDiM", "init_args": arguments}
    config = configuration(root, tmp_path, small_clip, shots=[1, 2]) | {"models": [padim]}
    one, two = (job.run() for job in CompareJobGenerator("cpu").generate_jobs(config))
    assert one["model"] == "PaDiM, 1 image"
    assert "is not a number (NaN), so nothing can be measured" in one["error"]
    assert "image_AUROC" not in one
    assert two["pixel_AUROC"] > 0


def test_a_failed_job_of_one_seed_shifts_neither_table_nor_figure(tmp_path: Path) -> None:
    """The easy category has lost a seed; what is left counts as much as the hard one."""
    values = [("hard", 0, 0.2), ("hard", 1, 0.4), ("easy", 0, 0.9)]
    more = {"model": "SDP, 2 images", "family": "SDP", "shots": 2, "key": "none", "images_per_second": 1.0}
    rows = [
        {**more, "category": category, "seed": seed, "image_AUROC": value, "peak_memory_mib": 1.0}
        for category, seed, value in values
    ]
    assert mean_table(rows).loc["SDP, 2 images", "image_AUROC"] == pytest.approx(0.6)
    table = pd.DataFrame(rows)
    middle, low, high = _over_seeds(table.groupby(["shots", "category", "seed"])["image_AUROC"].mean())
    assert middle.to_dict() == pytest.approx({2: 0.6})
    assert (low.to_dict(), high.to_dict()) == (pytest.approx({2: 0.55}), pytest.approx({2: 0.7}))
    write_report(tmp_path, rows)
    assert not (tmp_path / "shots.png").exists(), "one number of images is no line"


def test_without_shots_jobs_and_report_are_as_before(root: Path, small_clip: str, tmp_path: Path) -> None:
    config = configuration(root, tmp_path, small_clip)
    (sdp, _) = CompareJobGenerator("cpu").generate_jobs(config)
    model = {**config["models"][0]}
    before = CompareJob(model, config["data"], None, 42, 32, tmp_path, "cpu")
    assert (sdp.key, sdp.model_name, sdp.shots) == (before.key, "SDP", None)
    assert "shots" not in sdp.failed("as planned")


def test_the_configuration_becomes_jobs(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "configs/compare_few_shot.yaml").read_text())["compare"]
    write_category(tmp_path / "bottle")
    config["data"]["init_args"]["root"] = str(tmp_path)
    jobs = CompareJobGenerator("cpu").generate_jobs(config)
    assert Counter(job.family for job in jobs) == {"SDP": 13, "WinCLIP": 13, "PatchCore": 12, "PaDiM": 12}
    assert len({job.key for job in jobs}) == len(jobs) == 50, "0 images once, 1, 2, 4 and 8 with three seeds"


def test_k_shot_may_be_a_grid(root: Path, small_clip: str, tmp_path: Path) -> None:
    config = configuration(root, tmp_path, small_clip)
    config["models"][0]["init_args"]["k_shot"] = {"grid": [0, 2]}
    names = [job.model_name for job in CompareJobGenerator("cpu").generate_jobs(config)]
    assert names == ["SDP k_shot=0", "SDP k_shot=2", "PatchCore"]
    assert ClipAdSdp("cup", small_clip, k_shot=2).k_shot == 2


def test_more_images_than_there_are_is_said_before_the_first_job(root: Path, small_clip: str, tmp_path: Path) -> None:
    config = configuration(root, tmp_path / "out", small_clip, shots=[1, 7], seed=[0, 1])
    words = "shots asks for 7 normal images, and the training split of gear has 6; ask for fewer."
    with pytest.raises(InputError, match=words):
        run(config, tmp_path)
    assert not (tmp_path / "out").exists()
    row = CompareJobGenerator("cpu").generate_jobs(config | {"models": [PATCHCORE]})[-1].run()
    assert row["error"] == f"InputError: {words}".replace(" of gear", "")


@pytest.mark.parametrize("own", [{"k_shot": 2}, {"k_shot": 0}, {"few_shot_source": "good"}])
def test_normal_images_of_ones_own_contradict_shots(root: Path, small_clip: str, tmp_path: Path, own: dict) -> None:
    config = configuration(root, tmp_path, small_clip, shots=[0, 2])
    config["models"][0]["init_args"] |= own
    with pytest.raises(InputError, match=f"SDP has {next(iter(own))} in its init_args, and shots"):
        CompareJobGenerator("cpu").generate_jobs(config)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        *(({"shots": value}, "shots must be a whole number") for value in (-1, 1.5, "4", True, [], [1, 1], [None])),
        *(({"seed": value}, "seed must be a whole number") for value in (-1, [], [1, 1], "a", [2**33])),
        ({"shots": 0, "models": [PATCHCORE]}, "No model can be tried with shots"),
        ({"shots": 2, "data": None, "images": "photos"}, "shots takes normal images of data"),
    ],
)
def test_wrong_values_are_one_sentence(root: Path, small_clip: str, tmp_path: Path, more: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        CompareJobGenerator("cpu").generate_jobs(configuration(root, tmp_path, small_clip) | more)
