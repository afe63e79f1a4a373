"""A comparison over the number of normal images: every model is given the same ones."""

import argparse
import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from anomalib.models import Patchcore
from PIL import Image

from anomalib_clipad import ClipAdSdp, InputError
from anomalib_clipad.compare import Compare, CompareJob, CompareJobGenerator
from anomalib_clipad.compare.pipeline import preflight
from anomalib_clipad.compare.report import mean_table
from anomalib_clipad.engine.normal_images import NormalImages

from .conftest import LAYOUT, write_category

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
    assert Image.open(tmp_path / "out/shots.png").width > 600
    table = pd.read_csv(tmp_path / "out/results.csv")
    assert set(table["family"]) == {"SDP", "PatchCore"}

    jobs = CompareJobGenerator("cpu").generate_jobs(config)
    assert preflight(jobs)[0] == "9 jobs, 9 of them done."
    again = run(config, tmp_path)
    assert json.dumps(again) == json.dumps(rows)


def test_without_shots_jobs_and_report_are_as_before(root: Path, small_clip: str, tmp_path: Path) -> None:
    config = configuration(root, tmp_path, small_clip)
    (sdp, _) = CompareJobGenerator("cpu").generate_jobs(config)
    model = {**config["models"][0]}
    before = CompareJob(model, config["data"], None, 42, 32, tmp_path, "cpu")
    assert (sdp.key, sdp.model_name, sdp.shots) == (before.key, "SDP", None)
    assert "shots" not in sdp.failed("as planned")


def test_k_shot_may_be_a_grid(root: Path, small_clip: str, tmp_path: Path) -> None:
    config = configuration(root, tmp_path, small_clip)
    config["models"][0]["init_args"]["k_shot"] = {"grid": [0, 2]}
    names = [job.model_name for job in CompareJobGenerator("cpu").generate_jobs(config)]
    assert names == ["SDP k_shot=0", "SDP k_shot=2", "PatchCore"]
    assert ClipAdSdp("cup", small_clip, k_shot=2).k_shot == 2


def test_more_images_than_there_are_fail_the_job_in_a_sentence(root: Path, small_clip: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 of 1 jobs failed"):
        run({**configuration(root, tmp_path / "out", small_clip, shots=7), "models": [PATCHCORE]}, tmp_path)
    assert "shots asks for 7 normal images, and the training split has 6" in (tmp_path / "out/report.md").read_text()


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
