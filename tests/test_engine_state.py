"""Nothing of one run gets into the next, and nothing that a run has set is lost by another."""

import hashlib
import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.callbacks.checkpoint import ModelCheckpoint
from anomalib.deploy import TorchInferencer
from lightning.pytorch import Callback
from PIL import Image

from anomalib_clipad import ClipAdSdp, ClipAdSdpPlus, InputError
from anomalib_clipad.data import AuxiliaryDataModule
from anomalib_clipad.data.feature_cache import CachedFeatures

from .conftest import auxiliary, fitted, folder, new_engine, weights, write_category, write_good
from .test_few_shot import BARE, predict
from .test_products import FOLDERS, mixed

__all__ = ["mixed"]  # a fixture


class Fails(Callback):
    """Ends a run at its second batch of images, as a full memory would."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def on_validation_batch_start(self, *arguments: object) -> None:
        if self.stage == "validation" and arguments[3] == 1:
            raise MemoryError

    def on_test_batch_start(self, *arguments: object) -> None:
        if self.stage == "test" and arguments[3] == 1:
            raise MemoryError


@pytest.mark.parametrize("stage", ["validation", "test"])
def test_a_run_that_failed_leaves_nothing_to_the_next(small_clip: str, parts: Path, tmp_path: Path, stage: str) -> None:
    other = write_category(tmp_path / "other", normal=3, broken=4, size=64)
    model, fresh = (ClipAdSdp("cup", small_clip, single_pass=False, page=False, visualizer=False) for _ in range(2))
    with pytest.raises(MemoryError):
        new_engine(tmp_path, callbacks=[Fails(stage)]).test(model, datamodule=folder(other, eval_batch_size=4))
    figures = [
        new_engine(tmp_path).test(one, datamodule=folder(parts, eval_batch_size=4), verbose=False)[0]
        for one in (model, fresh)
    ]
    assert figures[0] == figures[1]
    for name, value in fresh.post_processor.state_dict().items():
        torch.testing.assert_close(model.post_processor.state_dict()[name], value, equal_nan=True, rtol=0, atol=0)


def test_after_training_an_engine_is_as_it_was(
    small_clip: str, auxiliary_root: Path, category: Path, tmp_path: Path
) -> None:
    model, engine = fitted(small_clip, auxiliary_root, tmp_path)
    best, last = weights(engine, "model.ckpt"), weights(engine, "last.ckpt")
    before = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (best, last)]
    assert engine.best_model_path == str(best)
    assert len([one for one in engine.trainer.callbacks if isinstance(one, ModelCheckpoint)]) == 1
    pickle.loads(pickle.dumps(engine.trainer.callbacks))  # as ddp_spawn does
    engine.test(model, datamodule=folder(category), ckpt_path=best, verbose=False)
    assert engine.best_model_path == str(best), "of a run that writes none"
    engine.test(model, datamodule=folder(category), verbose=False)
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in (best, last)] == before
    assert engine.best_model_path != str(best)
    kept = [one for one in engine.trainer.callbacks if isinstance(one, ModelCheckpoint)]
    assert [one.monitor for one in kept] == [None], "the engine's own, which asks for no figure of ours"


def test_trained_layers_are_tested_where_there_are_no_masks(
    small_clip: str, auxiliary_root: Path, category: Path, tmp_path: Path
) -> None:
    model, engine = fitted(small_clip, auxiliary_root, tmp_path)
    figures = engine.test(model, datamodule=folder(category, mask_dir=None), verbose=False)[0]
    assert figures.keys() >= {"image_AUROC", "image_F1Score"}
    assert not [name for name in figures if name.startswith("pixel")]


def test_a_prediction_keeps_the_thresholds_of_the_data_before(small_clip: str, parts: Path, tmp_path: Path) -> None:
    source = write_good(tmp_path / "good", 6, seed=11)
    model = ClipAdSdp("cup", small_clip, few_shot_source=source, false_alarm_rate=0.1, **BARE)
    new_engine(tmp_path).test(model, datamodule=folder(parts), verbose=False)
    before = model.post_processor.good_scores.clone()
    assert len(before) == 18
    predict(model, tmp_path, data_path=parts / "test")
    model.to_torch(tmp_path / "exported")
    assert torch.equal(model.post_processor.good_scores, before)
    for path in list(source.iterdir())[:2]:  # other references are another matter
        path.unlink()
    predict(model, tmp_path, data_path=parts / "test")
    assert len(model.post_processor.good_scores) == 4


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("arguments", [{}, {"false_alarm_rate": 0.2}])
def test_an_image_that_is_not_a_number_sets_no_threshold(
    small_clip: str, parts: Path, tmp_path: Path, batch_size: int, arguments: dict, caplog: pytest.LogCaptureFixture
) -> None:
    root = shutil.copytree(parts, tmp_path / "parts")

    def thresholds() -> dict[str, torch.Tensor]:
        model = ClipAdSdp("cup", small_clip, **BARE, **arguments)
        new_engine(tmp_path).validate(model, datamodule=folder(root, eval_batch_size=batch_size), verbose=False)
        return dict(model.post_processor.state_dict())

    whole = thresholds()
    pixels = np.full((48, 48), 0.5, dtype=np.float32)
    pixels[10, 10] = np.nan
    for place in ("test/good", "train/good"):
        Image.fromarray(pixels).save(root / place / "000a.tiff")
    with caplog.at_level(logging.WARNING, "anomalib_clipad"):
        found = thresholds()
    assert "test/good/000a.tiff has a score that is not a number, so the thresholds are made without it." in caplog.text
    assert whole.keys() == found.keys()
    for state in (whole, found):  # the draw is another with one image more
        state["normal"] = state["normal"].sort(dim=0).values
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_an_automatic_size_fits_one_of_its_own(small_clip: str, category: Path, tmp_path: Path) -> None:
    sizes = ("auto", (48, 48))
    for one, other in (sizes, sizes[::-1]):
        engine = new_engine(tmp_path)
        model = ClipAdSdp("cup", small_clip, image_size=one, **BARE)
        engine.test(model, datamodule=folder(category), verbose=False)
        path = weights(engine, "model.ckpt")
        model = ClipAdSdp("cup", small_clip, image_size=model.model.image_size if other != "auto" else other, **BARE)
        assert new_engine(tmp_path).predict(model, data_path=category / "test/good", ckpt_path=path)


@pytest.mark.parametrize("sigma", [3, None])
def test_a_checkpoint_of_another_smoothing_is_refused(
    small_clip: str, category: Path, tmp_path: Path, sigma: float | None
) -> None:
    engine = new_engine(tmp_path)
    engine.test(ClipAdSdp("cup", small_clip, sigma=sigma, **BARE), datamodule=folder(category), verbose=False)
    path = weights(engine, "model.ckpt")
    with pytest.raises(InputError, match=r"sigma was .*, here it is 2"):
        new_engine(tmp_path).predict(ClipAdSdp("cup", small_clip, sigma=2, **BARE), data_path=category, ckpt_path=path)
    same = ClipAdSdp("cup", small_clip, sigma=sigma, **BARE)
    assert new_engine(tmp_path).predict(same, data_path=category / "test/good", ckpt_path=path)
    content = torch.load(path, weights_only=True)
    del content["clip_ad"]["sigma"]  # as earlier versions wrote it
    torch.save(content, path)
    assert new_engine(tmp_path).predict(same, data_path=category / "test/good", ckpt_path=path)


def test_cached_features_are_those_of_the_model_at_hand(small_clip: str, auxiliary_root: Path, tmp_path: Path) -> None:
    data = auxiliary(auxiliary_root, cache_features=True)

    def first(model: ClipAdSdpPlus, data: AuxiliaryDataModule) -> torch.Tensor:
        new_engine(tmp_path, max_epochs=1).fit(model, datamodule=data)
        assert isinstance(data.train_data, CachedFeatures)
        assert data.test_data is data.val_data
        return data.train_data[0].features.original[0]

    models = [ClipAdSdpPlus(backbone=small_clip, layers=layers, visualizer=False) for layers in ([1, 2], [3, 4])]
    kept = [first(model, data) for model in models]
    own = first(
        ClipAdSdpPlus(backbone=small_clip, layers=[3, 4], visualizer=False),
        auxiliary(auxiliary_root, cache_features=True),
    )
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(kept[1], own)


def test_without_masks_normal_images_judge_the_pixels(small_clip: str, parts: Path, tmp_path: Path) -> None:
    few = ClipAdSdp("cup", small_clip, few_shot_source=parts / "train/good", **BARE)
    predict(few, tmp_path, data_path=parts / "test")
    labelled = ClipAdSdp("cup", small_clip, few_shot_source=parts / "train/good", **BARE)
    new_engine(tmp_path).test(labelled, datamodule=folder(parts, mask_dir=None), verbose=False)
    for name in ("pixel_threshold", "pixel_min", "pixel_max"):
        assert getattr(labelled.post_processor, name) == getattr(few.post_processor, name)
    offset = few.post_processor.map_offset.largest
    assert offset.isfinite().all()
    torch.testing.assert_close(labelled.post_processor.map_offset.largest, offset, rtol=0, atol=0)
    assert labelled.post_processor.image_threshold != few.post_processor.image_threshold
    masked = ClipAdSdp("cup", small_clip, few_shot_source=parts / "train/good", **BARE)
    new_engine(tmp_path).test(masked, datamodule=folder(parts), verbose=False)
    assert masked.post_processor.map_offset.largest.isnan().all()
    new_engine(tmp_path).test(masked, datamodule=folder(parts, mask_dir=None), verbose=False)
    for name in ("pixel_threshold", "pixel_min", "pixel_max"):
        assert getattr(masked.post_processor, name) == getattr(few.post_processor, name), "nothing of the masks before"
    assert masked.post_processor.map_offset.largest == offset


def test_data_without_masks_are_measured_after_data_with_masks(small_clip: str, category: Path, tmp_path: Path) -> None:
    model = ClipAdSdp("cup", small_clip, **BARE)
    new_engine(tmp_path).test(model, datamodule=folder(category), verbose=False)
    figures = new_engine(tmp_path).test(model, datamodule=folder(category, mask_dir=None), verbose=False)[0]
    assert "image_F1Max" in figures
    assert not [name for name in figures if name.startswith("pixel")]


def test_a_class_without_normal_images_that_count_has_the_thresholds_of_all(
    small_clip: str, mixed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = shutil.copytree(mixed, tmp_path / "mixed")
    shutil.rmtree(root / "test/good/b")
    model = ClipAdSdp(FOLDERS, small_clip, k_shot=3, **BARE)
    with caplog.at_level(logging.WARNING, "anomalib_clipad"):
        new_engine(tmp_path).test(model, datamodule=folder(root), verbose=False)
    assert "'plate' has 0 normal images, and thresholds of its own take 3" in caplog.text


def test_a_class_has_too_few_images_if_those_that_count_are_too_few(
    small_clip: str, mixed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = shutil.copytree(mixed, tmp_path / "mixed")
    of_plate = sorted(root.glob("train/good/b/*"))
    assert len(of_plate) >= 3
    for path in of_plate[1:]:
        path.unlink()
    assert len(list(root.glob("test/good/b/*"))) >= 3, "which do not count, since they are tested"
    model = ClipAdSdp(FOLDERS, small_clip, false_alarm_rate=0.1, **BARE)
    with caplog.at_level(logging.WARNING, "anomalib_clipad"):
        new_engine(tmp_path).test(model, datamodule=folder(root), verbose=False)
    assert (
        "'plate' has 1 normal image, and thresholds of its own take 3; it has those of all classes together"
        in caplog.text
    )


def test_normal_images_that_are_tested_are_said(
    small_clip: str, parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings(**arguments: object) -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "anomalib_clipad"):
            model = ClipAdSdp("cup", small_clip, k_shot=2, false_alarm_rate=0.2, **BARE)
            new_engine(tmp_path).test(model, datamodule=folder(parts, **arguments), verbose=False)
        return caplog.text

    assert "6 of the 6 normal images are test images, too" in warnings(normal_dir="test/good")
    assert "are test images" not in warnings()


def test_an_exported_file_names_no_images(
    small_clip: str, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    model = ClipAdSdp("cup", small_clip, k_shot=2, **BARE)
    new_engine(tmp_path).test(model, datamodule=folder(parts), verbose=False)
    table, page = model.table, model.page
    content = model.to_torch(tmp_path / "exported").read_bytes()
    assert b"000.png" not in content
    assert model.table is table, "the model itself goes on as it was"
    assert model.page is page
    loaded = TorchInferencer(tmp_path / "exported/weights/torch/model.pt", device="cpu")
    assert loaded.predict(str(parts / "test/good/000.png")).anomaly_map is not None


def test_a_state_dict_brings_its_size_or_is_refused(small_clip: str, tmp_path: Path) -> None:
    write_good(tmp_path / "good", 3)
    for path in (tmp_path / "good").iterdir():
        Image.open(path).resize((90, 40)).save(path)
    arguments = {"few_shot_source": str(tmp_path / "good"), "image_size": "auto", **BARE}
    model = ClipAdSdp("cup", small_clip, **arguments)
    predict(model, tmp_path, data_path=tmp_path / "good")
    assert model.model.image_size == (24, 40)
    same = ClipAdSdp("cup", small_clip, **arguments)
    same.load_state_dict(model.state_dict())
    pictures = torch.rand(1, 3, 40, 90, generator=torch.Generator().manual_seed(0))
    assert torch.equal(same.eval()(pictures).pred_score, model.eval()(pictures).pred_score)
    with pytest.raises(InputError, match=r"image_size \[24, 40\], and this one has \[32, 32\]"):
        ClipAdSdp("cup", small_clip).load_state_dict(model.state_dict())


def test_a_test_without_validation_keeps_a_checkpoint(small_clip: str, parts: Path, tmp_path: Path) -> None:
    arguments = {"k_shot": 3, "false_alarm_rate": 0.2, **BARE}
    model, engine = ClipAdSdp("cup", small_clip, **arguments), new_engine(tmp_path)
    engine.test(model, datamodule=folder(parts, val_split_mode="none"), verbose=False)
    path = weights(engine, "model.ckpt")
    assert engine.best_model_path == str(path)
    expected = predict(model, tmp_path, data_path=parts / "test")
    found = predict(ClipAdSdp("cup", small_clip, **arguments), tmp_path, data_path=parts / "test", ckpt_path=path)
    assert torch.equal(found["pred_score"], expected["pred_score"])
    assert torch.equal(found["p_value"], expected["p_value"])
