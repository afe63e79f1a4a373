"""SDP+ trained as a user does it: what it learns, resumes, caches and refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.engine import Engine

from anomalib_clipad import ClipAdSdpPlus, InputError
from anomalib_clipad.sdp_plus import save_adapter

from .conftest import (
    auxiliary,
    fitted,
    folder,
    new_engine,
    part,
    save_clip,
    state,
    weights,
)

BARE = {"visualizer": False}


@pytest.fixture(scope="module")
def trained(
    small_clip: str, auxiliary_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ClipAdSdpPlus, Engine]:
    """SDP+ after one epoch, and the engine that trained it."""
    return fitted(small_clip, auxiliary_root, tmp_path_factory.mktemp("trained"), epochs=1)


def test_training_learns_what_a_defect_is(
    small_clip: str, auxiliary_root: Path, category: Path, tmp_path: Path
) -> None:
    untrained = tmp_path / "untrained.safetensors"
    torch.manual_seed(0)
    model = ClipAdSdpPlus(backbone=small_clip, visualizer=False)
    save_adapter(model.model.adapter, untrained)
    before = new_engine(tmp_path).test(
        ClipAdSdpPlus(untrained, backbone=small_clip, visualizer=False),
        datamodule=folder(category),
    )[0]
    model, _ = fitted(small_clip, auxiliary_root, tmp_path / "fit", epochs=6)
    after = new_engine(tmp_path / "test").test(model, datamodule=folder(category))[0]
    assert after["pixel_AP"] > 2 * before["pixel_AP"]
    assert model.model.class_names == ("widget",)


def test_only_the_linear_layers_are_trained(small_clip: str, trained: tuple[ClipAdSdpPlus, Engine]) -> None:
    clip = ClipAdSdpPlus(backbone=small_clip, visualizer=False).model.visual.state_dict()
    model, engine = trained
    assert all(torch.equal(value, clip[key]) for key, value in model.model.visual.state_dict().items())
    assert not model.model.visual.training
    assert {"train_loss", "train_focal", "train_dice", "pixel_AP"} <= set(engine.trainer.callback_metrics)


def test_best_checkpoint_is_small_and_the_last_can_be_resumed(
    small_clip: str, auxiliary_root: Path, tmp_path: Path
) -> None:
    whole, _ = fitted(small_clip, auxiliary_root, tmp_path / "whole", epochs=3)
    _, engine = fitted(small_clip, auxiliary_root, tmp_path / "part", epochs=1)
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002 - another global state than before the interruption
    resumed = ClipAdSdpPlus(backbone=small_clip, lr=1e-2, visualizer=False)
    second = new_engine(tmp_path / "rest", max_epochs=3)
    second.fit(resumed, datamodule=auxiliary(auxiliary_root), ckpt_path=weights(engine, "last.ckpt"))
    for key, value in state(whole).items():
        torch.testing.assert_close(state(resumed)[key], value, atol=1e-6, rtol=0)
    best = torch.load(weights(engine, "model.ckpt"), weights_only=True)
    assert "optimizer_states" not in best
    assert not any("visual" in key for key in best["state_dict"])


def test_an_interrupted_run_can_be_resumed_from_its_last_epoch(
    small_clip: str, auxiliary_root: Path, tmp_path: Path
) -> None:
    class Interrupted(ClipAdSdpPlus):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2:
                msg = "as planned"
                raise RuntimeError(msg)

    engine = new_engine(tmp_path, max_epochs=3)
    with pytest.raises(RuntimeError, match="as planned"):
        engine.fit(Interrupted(backbone=small_clip, visualizer=False), datamodule=auxiliary(auxiliary_root))
    last = torch.load(weights(engine, "last.ckpt"), weights_only=True)
    assert last["epoch"] == 1
    assert last["optimizer_states"]
    assert {path.name for path in weights(engine, "last.ckpt").parent.iterdir()} == {"model.ckpt", "last.ckpt"}


@pytest.mark.parametrize("kept", ["memory", "folder"])
def test_cached_features_change_nothing(small_clip: str, auxiliary_root: Path, tmp_path: Path, kept: str) -> None:
    plain, plain_engine = fitted(small_clip, auxiliary_root, tmp_path / "a")
    cache = True if kept == "memory" else str(tmp_path / "cache")
    cached, engine = fitted(small_clip, auxiliary_root, tmp_path / "b", cache_features=cache)
    for key, value in state(plain).items():
        torch.testing.assert_close(state(cached)[key], value, atol=1e-6, rtol=0)
    for key, value in plain_engine.trainer.callback_metrics.items():
        torch.testing.assert_close(engine.trainer.callback_metrics[key], value, atol=1e-6, rtol=1e-6)
    if kept == "folder":
        count = len(list(Path(cache).iterdir()))
        assert count == 2 * (6 + 8)
        fitted(small_clip, auxiliary_root, tmp_path / "c", epochs=1, cache_features=cache)
        assert len(list(Path(cache).iterdir())) == count
        other = save_clip(tmp_path / "other", seed=9)
        fitted(str(other), auxiliary_root, tmp_path / "d", epochs=1, cache_features=cache)
        assert len(list(Path(cache).iterdir())) == 2 * count, "another CLIP must not be served these features"
        content = json.loads((other / "open_clip_config.json").read_text())
        content["preprocess_cfg"] = {"mean": [0.5, 0.5, 0.5]}
        (other / "open_clip_config.json").write_text(json.dumps(content))
        fitted(str(other), auxiliary_root, tmp_path / "e", epochs=1, cache_features=cache)
        assert len(list(Path(cache).iterdir())) == 3 * count, "nor may otherwise normalised images"


def test_bf16_mixed_trains_and_tests(small_clip: str, auxiliary_root: Path, category: Path, tmp_path: Path) -> None:
    model = ClipAdSdpPlus(backbone=small_clip, visualizer=False)
    engine = new_engine(tmp_path, max_epochs=1, precision="bf16-mixed")
    engine.fit(model, datamodule=auxiliary(auxiliary_root))
    assert engine.trainer.callback_metrics["train_loss"].isfinite()
    data = folder(category)
    figures = new_engine(tmp_path / "t", precision="bf16-mixed").test(model, datamodule=data)[0]
    expected = new_engine(tmp_path / "f").test(model, datamodule=data)[0]
    assert figures == pytest.approx(expected, abs=0.05)  # one exchange of two images is worth 1 / 30


def test_untrained_layers_refuse_to_predict_and_test(
    small_clip: str, category: Path, image_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no trained layers yet; give adapter a file, or train it"):
        new_engine(tmp_path).predict(ClipAdSdpPlus(backbone=small_clip, visualizer=False), data_path=image_folder)
    data = folder(category)
    with pytest.raises(InputError, match="no trained layers yet"):
        new_engine(tmp_path).test(ClipAdSdpPlus(backbone=small_clip, visualizer=False), datamodule=data)
    with pytest.raises(InputError, match="no trained layers yet"):
        ClipAdSdpPlus(backbone=small_clip, visualizer=False).save_adapter(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="no trained layers yet; give adapter demo or a file"):
        ClipAdSdpPlus(backbone="demo", visualizer=False).save_adapter(tmp_path / "a.safetensors")


def test_other_data_than_auxiliary_are_refused_for_training(small_clip: str, category: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trained on an AuxiliaryDataModule, got Folder"):
        new_engine(tmp_path).fit(ClipAdSdpPlus(backbone=small_clip, visualizer=False), datamodule=folder(category))


def test_a_trained_checkpoint_scores_the_class_at_hand(
    small_clip: str, trained: tuple[ClipAdSdpPlus, Engine], category: Path, image_folder: Path, tmp_path: Path
) -> None:
    model, engine = trained
    data = folder(category)
    expected = new_engine(tmp_path / "a").test(model, datamodule=data)[0]
    model.save_adapter(tmp_path / "ours.safetensors")
    for arguments in ({"adapter": str(weights(engine, "model.ckpt"))}, {"adapter": str(tmp_path / "ours.safetensors")}):
        other = ClipAdSdpPlus(**arguments, backbone=small_clip, visualizer=False)
        assert new_engine(tmp_path / "b").test(other, datamodule=data)[0] == pytest.approx(expected, abs=1e-6)
    restored = ClipAdSdpPlus(backbone=small_clip, visualizer=False)
    ours = new_engine(tmp_path / "c").test(restored, datamodule=data, ckpt_path=weights(engine, "model.ckpt"))[0]
    assert restored.model.class_names == ("widget",)
    assert ours == pytest.approx(expected, abs=1e-6)
    batch = new_engine(tmp_path / "d").predict(other, data_path=image_folder)[0]
    assert 0 <= batch.pred_score.item() <= 1


def test_testing_on_what_was_trained_on_warns(
    category: Path,
    auxiliary_root: Path,
    trained: tuple[ClipAdSdpPlus, Engine],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, _ = trained
    new_engine(tmp_path).test(model, datamodule=folder(category))
    assert "not a zero-shot result" not in caplog.text
    new_engine(tmp_path).test(model, datamodule=part(auxiliary_root, "gear", num_workers=0))
    assert "trained on gear: what they score there is not a zero-shot result" in caplog.text


def test_a_model_of_several_products_is_trained_on_others(
    small_clip: str, auxiliary_root: Path, category: Path, tmp_path: Path
) -> None:
    """It learns from the data's own classes; then its products are scored, also from the checkpoint."""
    defects = {"bottle": ["dent", "hole"], "nut": ["crack", "stain"]}
    arguments = {"class_name": list(defects), "backbone": small_clip, "defects": defects, "visualizer": False}
    model, fit = ClipAdSdpPlus(**arguments), new_engine(tmp_path / "fit", max_epochs=1)
    fit.fit(model, datamodule=auxiliary(auxiliary_root))
    assert model.trained_on == ["gear", "plate"]
    path = weights(fit, "model.ckpt")
    found = []
    for number, one in enumerate((model, ClipAdSdpPlus(**arguments), ClipAdSdpPlus.load_from_checkpoint(path))):
        engine = new_engine(tmp_path / str(number))
        figures = engine.test(one, datamodule=folder(category), ckpt_path=path if number == 1 else None)[0]
        assert one.model.class_names == ("bottle", "nut")
        assert one.model.defect_names.words == (("dent", "hole"), ("crack", "stain"))
        found.append((figures, one.post_processor.of_class.values.tolist()))
    assert found[1:] == found[:1] * 2


def test_a_training_can_be_repeated_whatever_was_drawn_before(
    small_clip: str, auxiliary_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for seed in ("0", "0", "1"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        torch.rand(len(found) + 1)
        model = ClipAdSdpPlus(backbone=small_clip, **BARE)
        new_engine(tmp_path, max_epochs=1).fit(model, datamodule=auxiliary(auxiliary_root))
        found.append(state(model)["0.weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_training_says_what_it_takes_no_notice_of_and_where_the_best_layers_are(
    small_clip: str, auxiliary_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="anomalib_clipad")
    data = auxiliary(auxiliary_root)
    with pytest.raises(InputError, match="few_shot_source nowhere does not exist"):
        new_engine(tmp_path).fit(ClipAdSdpPlus(backbone=small_clip, few_shot_source="nowhere", **BARE), datamodule=data)
    model = ClipAdSdpPlus(backbone=small_clip, class_name="cup", k_shot=2, **BARE)
    engine = new_engine(tmp_path, max_epochs=1)
    engine.fit(model, datamodule=data)
    assert "Training takes no notice of class_name, k_shot;" in caplog.text
    assert f"on held-out images, are in {engine.best_model_path}" in caplog.text
