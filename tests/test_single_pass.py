"""Where validation and test read the same images, each is scored once, and no figure changes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_clipad.compare.evaluator import CompareEvaluator
from anomalib_clipad.data.batch import ZeroShotBatch
from anomalib_clipad.sdp_plus import ClipAdSdpPlus

from .conftest import build_model, folder, new_engine, write_category

IMAGES = 8


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_category(tmp_path / "data", normal=3, broken=5)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the images that went through the network."""
    from anomalib_clipad.engine.module import ZeroShotMixin

    paths: list[str] = []
    original = ZeroShotMixin._scores

    def count(self: ZeroShotMixin, batch: ZeroShotBatch) -> object:
        paths.extend(batch.image_path)
        return original(self, batch)

    monkeypatch.setattr(ZeroShotMixin, "_scores", count)
    return paths


def figures(name: str, small_clip: str, root: Path, results: Path, **arguments: object) -> dict[str, float]:
    results.mkdir()
    model = build_model(name, small_clip, results, single_pass=arguments.pop("single_pass", True), visualizer=False)
    data = folder(root, eval_batch_size=3, **arguments)
    return new_engine(results).test(model, datamodule=data, verbose=False)[0]


@pytest.mark.parametrize("name", ["ClipAdSdp", "ClipAdSdpPlus"])
def test_every_image_is_scored_once_and_the_figures_are_the_same(
    name: str, small_clip: str, root: Path, tmp_path: Path, scored: list[str]
) -> None:
    once = figures(name, small_clip, root, tmp_path / "once")
    assert len(scored) == len(set(scored)) == IMAGES
    twice = figures(name, small_clip, root, tmp_path / "twice", single_pass=False)
    assert len(scored) == 3 * IMAGES
    assert once == twice


@pytest.mark.parametrize(
    "arguments",
    [{"val_split_mode": "from_test"}, {"augmentations": RandomHorizontalFlip()}],
    ids=["other images", "random images"],
)
def test_images_that_differ_are_scored_again(
    small_clip: str, root: Path, tmp_path: Path, scored: list[str], arguments: dict
) -> None:
    figures("ClipAdSdp", small_clip, root, tmp_path / "results", **arguments)
    tested = IMAGES if "augmentations" in arguments else IMAGES // 2
    assert len(scored) == 2 * tested


def test_a_loaded_checkpoint_scores_anew(small_clip: str, root: Path, tmp_path: Path, scored: list[str]) -> None:
    engine, data = new_engine(tmp_path / "results"), folder(root)
    model = build_model("ClipAdSdp", small_clip, tmp_path, visualizer=False)
    engine.validate(model, datamodule=data, verbose=False)
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    engine.test(model, datamodule=data, ckpt_path=tmp_path / "model.ckpt", verbose=False)
    assert len(scored) == 2 * IMAGES


def test_layers_that_were_trained_in_between_count(small_clip: str, root: Path, tmp_path: Path) -> None:
    model = build_model("ClipAdSdpPlus", small_clip, tmp_path, visualizer=False)
    assert isinstance(model, ClipAdSdpPlus)
    engine, data = new_engine(tmp_path / "results"), folder(root)
    before = engine.test(model, datamodule=data, verbose=False)[0]
    with torch.no_grad():
        for parameter in model.model.adapter.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    assert engine.test(model, datamodule=data, verbose=False)[0] != before


def test_more_images_than_there_is_room_for_are_scored_twice(
    small_clip: str, root: Path, tmp_path: Path, scored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anomalib_clipad.engine.single_pass.MOST_BYTES", 4 * 32 * 32 * 4)
    once = figures("ClipAdSdp", small_clip, root, tmp_path / "results")
    assert len(scored) == 2 * IMAGES - 3  # one batch of three has room
    monkeypatch.undo()
    assert once == figures("ClipAdSdp", small_clip, root, tmp_path / "again")


def test_a_comparison_counts_the_time_of_the_pass_that_scored() -> None:
    evaluator = CompareEvaluator(map_size=32)
    evaluator.paths, evaluator.seconds = ["nut.png"] * 8, 1.0
    evaluator.validated, evaluator.validation_seconds = 8, 3.0
    assert evaluator.images_per_second(SimpleNamespace(served=8)) == 2
    assert evaluator.images_per_second(SimpleNamespace(served=4)) == 3
    assert evaluator.images_per_second(object()) == 8


def test_weights_that_were_changed_between_two_runs_of_a_trainer_count(
    small_clip: str, root: Path, tmp_path: Path, scored: list[str]
) -> None:
    model = build_model("ClipAdSdpPlus", small_clip, tmp_path, visualizer=False)
    engine, data = new_engine(tmp_path / "results"), folder(root)
    engine.validate(model, datamodule=data, verbose=False)
    changed = {key: value + 0.1 for key, value in model.model.adapter.state_dict().items()}
    model.model.adapter.load_state_dict(changed)
    engine.trainer.test(model, datamodule=data, verbose=False)
    assert len(scored) == 2 * IMAGES


def test_an_exported_file_holds_no_scores_of_a_validation(small_clip: str, root: Path, tmp_path: Path) -> None:
    model = build_model("ClipAdSdp", small_clip, tmp_path, visualizer=False)
    plain = model.to_torch(tmp_path / "plain").stat().st_size
    new_engine(tmp_path / "results").validate(model, datamodule=folder(root), verbose=False)
    assert model._kept
    maps = IMAGES * 32 * 32 * 4  # bytes
    assert model.to_torch(tmp_path / "validated").stat().st_size < plain + maps / 2
