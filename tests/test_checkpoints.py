"""Checkpoints: what they hold, what they are refused for, and those of earlier versions."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine
from anomalib.models import get_model
from jsonargparse import Namespace
from safetensors.torch import save_file

from anomalib_clipad import ClipAdSdp, ClipAdSdpPlus, InputError
from anomalib_clipad.data import DemoTextures

from . import conftest
from .conftest import build_model, new_engine, save_clip, write_good

folder = partial(conftest.folder, eval_batch_size=4)
DATA = Path(__file__).parent / "data/checkpoints"


@pytest.fixture(scope="module")
def linen(tmp_path_factory: pytest.TempPathFactory) -> DemoTextures:
    data = DemoTextures(tmp_path_factory.mktemp("textures"), "linen", num_workers=0)
    data.prepare_data()
    return data


@pytest.fixture(scope="module")
def parity_folder(parity: conftest.Parity, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CLIP of the parity numbers, as ``backbone`` takes it: its weights are a part of the tests."""
    folder = tmp_path_factory.mktemp("parity_clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": parity.meta["cfg"]}))
    state = {key: value.contiguous() for key, value in parity.clip().state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


@pytest.mark.parametrize(("name", "kind"), [("sdp", ClipAdSdp), ("sdp_plus", ClipAdSdpPlus)])
def test_a_checkpoint_of_version_0_1_gives_the_same_scores(
    name: str, kind: type[ClipAdSdp], linen: DemoTextures, parity_folder: Path, tmp_path: Path
) -> None:
    """``expected.json`` was written by version 0.1 with the model that wrote the checkpoint."""
    model = kind(backbone=str(parity_folder), visualizer=False)
    images = Path(linen.root) / "linen/test"
    batches = new_engine(tmp_path).predict(model, data_path=images, ckpt_path=DATA / f"{name}-0.1.0.ckpt")
    expected = json.loads((DATA / "expected.json").read_text())[name]["scores"]
    assert len(batches) == len(expected)
    for batch in batches:
        # Version 0.1 showed the fused score itself, without the threshold at 0.5.
        fused = model.model.fuse(batch.text_score, batch.map_score).clamp(0, 1)
        ours = [fused.item(), batch.anomaly_map.max().item()]
        score, largest, label, area = expected[Path(batch.image_path[0]).relative_to(images).as_posix()]
        assert ours == pytest.approx([score, largest], abs=1e-4)
        assert batch.pred_label.item() is label
        assert batch.pred_mask.float().mean().item() == pytest.approx(area, abs=1e-3)
    assert model.model.class_names == ("linen",)


@pytest.mark.parametrize("kind", [ClipAdSdp, ClipAdSdpPlus])
def test_a_model_from_a_configuration_has_a_checkpoint_that_is_read_as_weights_only(
    kind: type[ClipAdSdp], small_clip: str, tmp_path: Path
) -> None:
    """anomalib hands on containers of OmegaConf, and of jsonargparse where the configuration has its."""
    given = {
        "class_name": {"b": "plate", "n": "tile"},
        "layers": [1, 2, 3, 4],
        "rvs": {"method": "mean_shift"},
        "prompts": {"normal_states": ["{}"], "anomalous_states": ["bad {}"], "templates": ["a {}.", "the {}."]},
        "image_size": [32, 48],
        "tile_size": [32, 32],
        "region": [[0.0, 0.0, 0.8, 1.0], [0.5, 0.0, 1.0, 1.0]],
        "reference_layers": [2, 3],
        "defects": {"plate": ["dent", "hole"], "tile": ["crack", "stain"]},
    }
    build_model(kind.__name__, small_clip, tmp_path)  # writes layers
    adapter = {"adapter": str(tmp_path / "adapter.safetensors")} if kind is ClipAdSdpPlus else {}
    more = {"backbone": small_clip, "visualizer": False, **adapter}
    models = (
        get_model({"class_path": kind.__name__, "init_args": {**given, **more}}),
        kind(**{**given, **more, "defects": Namespace(**given["defects"])}),
    )
    picture = write_good(tmp_path / "b", 1)
    for number, model in enumerate(models):
        engine, path = new_engine(tmp_path / "run"), tmp_path / f"{number}.ckpt"
        engine.predict(model, data_path=picture)
        engine.trainer.save_checkpoint(path)
        kept = torch.load(path, weights_only=True)["hyper_parameters"]
        assert {key: kept[key] for key in given} == given
        again = kind.load_from_checkpoint(path)
        assert {key: again.hparams[key] for key in given} == given
        assert again.model.class_names == ("plate", "tile")


def checkpoint(engine: Engine) -> Path:
    return Path(engine.trainer.default_root_dir) / "weights/lightning/model.ckpt"


@pytest.mark.parametrize("way", ["ckpt_path", "load_from_checkpoint"])
def test_checkpoint_needs_no_labels_no_text_tower_and_no_class_name(
    small_clip: str, category: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    first, model = new_engine(tmp_path / "a"), ClipAdSdp(visualizer=False, backbone=small_clip)
    first.test(model, datamodule=folder(category))
    path = checkpoint(first)
    expected = new_engine(tmp_path / "b").predict(model, data_path=category / "test")

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the text tower was asked")

    monkeypatch.setattr("anomalib_clipad.components.text_encoder.TextEncoder.encode", refuse)
    second = new_engine(tmp_path / "c")
    if way == "ckpt_path":
        ours = second.predict(
            ClipAdSdp(visualizer=False, backbone=small_clip), data_path=category / "test", ckpt_path=path
        )
    else:
        ours = second.predict(ClipAdSdp.load_from_checkpoint(path), data_path=category / "test")
    for a, b in zip(ours, expected, strict=True):
        for key in ("pred_score", "pred_label", "anomaly_map", "pred_mask"):
            assert torch.equal(getattr(a, key), getattr(b, key)), key


@pytest.mark.parametrize("way", ["ckpt_path", "load_from_checkpoint"])
@pytest.mark.parametrize("earlier", [False, True], ids=["present", "earlier"])
def test_thresholds_from_normal_images_mark_the_same_after_a_checkpoint(
    small_clip: str, category: Path, tmp_path: Path, way: str, earlier: bool
) -> None:
    """Those of earlier versions have no offsets of normal images: all maps stay as they are."""
    given = {"visualizer": False, "backbone": small_clip, "k_shot": 2, "false_alarm_rate": 0.4}
    model, first = ClipAdSdp(**given), new_engine(tmp_path / "a")
    first.test(model, datamodule=folder(category))
    offset = model.post_processor.map_offset
    assert len(offset.largest) == 1
    offset.take(float(offset.largest) - 0.5)  # so that it shows
    path = tmp_path / "model.ckpt"
    first.trainer.save_checkpoint(path)
    if earlier:
        content = torch.load(path, weights_only=True)
        states = [content["state_dict"], *content["callbacks"].values()]
        for state, key in [(one, key) for one in states for key in one]:
            if key.endswith("map_offset.largest"):
                del state[key]
            elif key.endswith("normal") and state[key].ndim == 2:
                state[key] = state[key][:, [0, 1, 2, 3, 5]]
        torch.save(content, path)
        offset.take(torch.nan)
    expected = new_engine(tmp_path / "b").predict(model, data_path=category / "test")
    assert 0 < torch.cat([batch.pred_mask for batch in expected]).float().mean() < 1
    second = new_engine(tmp_path / "c")
    if way == "ckpt_path":
        again = ClipAdSdp(**given)
        ours = second.predict(again, data_path=category / "test", ckpt_path=path)
    else:
        again = ClipAdSdp.load_from_checkpoint(path)
        ours = second.predict(again, data_path=category / "test")
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a.pred_mask, b.pred_mask)
        assert torch.equal(a.anomaly_map, b.anomaly_map)
    assert again.post_processor.normal.shape == (2, 6)
    new_engine(tmp_path / "d").test(again, datamodule=folder(category), verbose=False)


def test_checkpoint_holds_what_is_not_clip(small_clip: str, category: Path, tmp_path: Path) -> None:
    engine = new_engine(tmp_path)
    model = ClipAdSdp(
        visualizer=False, backbone=small_clip, prompts={"normal_states": ["good {}"]}, rvs={"method": "kde"}
    )
    engine.test(model, datamodule=folder(category))
    content = torch.load(checkpoint(engine), weights_only=True)
    assert not any("visual" in key for key in content["state_dict"])
    tensors = [value for value in content["state_dict"].values() if isinstance(value, torch.Tensor)]
    assert sum(value.numel() for value in tensors) < 100
    restored = ClipAdSdp.load_from_checkpoint(checkpoint(engine))
    assert restored.model.prompts == model.model.prompts
    assert restored.model.rvs == {"method": "kde"}


def test_checkpoint_of_other_weights_is_refused(small_clip: str, category: Path, tmp_path: Path) -> None:
    engine = new_engine(tmp_path)
    engine.test(ClipAdSdp(visualizer=False, backbone=small_clip), datamodule=folder(category))
    other = str(save_clip(tmp_path / "other", seed=5))
    with pytest.raises(InputError, match="does not fit this model: backbone was .*; weights was '.*', here it is"):
        ClipAdSdp.load_from_checkpoint(checkpoint(engine), backbone=other)
    moved = ClipAdSdp.load_from_checkpoint(checkpoint(engine), backbone=str(save_clip(tmp_path / "moved")))
    assert moved.model.class_names == ("widget",)
    with pytest.raises(InputError, match=r"layers was \[1, 2, 3, 4\], here it is \[2, 4\]"):
        new_engine(tmp_path / "b").test(
            ClipAdSdp(visualizer=False, backbone=small_clip, layers=[2, 4]),
            datamodule=folder(category),
            ckpt_path=checkpoint(engine),
        )


def test_wrong_checkpoints_are_refused_in_a_sentence(small_clip: str, image_folder: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.ckpt"
    notes.write_text("hello")
    with pytest.raises(InputError, match=r"notes\.ckpt is not a checkpoint"):
        new_engine(tmp_path).predict(
            ClipAdSdp(visualizer=False, backbone=small_clip), data_path=image_folder, ckpt_path=notes
        )
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.0.0"}, notes)
    with pytest.raises(InputError, match="not one of ClipAdSdp"):
        new_engine(tmp_path).predict(
            ClipAdSdp(visualizer=False, backbone=small_clip), data_path=image_folder, ckpt_path=notes
        )


def test_checkpoints_class_prevails_and_says_so(
    small_clip: str, category: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = new_engine(tmp_path)
    engine.test(ClipAdSdp(visualizer=False, backbone=small_clip), datamodule=folder(category))
    model = ClipAdSdp(visualizer=False, class_name="gear", backbone=small_clip)
    new_engine(tmp_path / "b").predict(model, data_path=category / "test/good", ckpt_path=checkpoint(engine))
    assert model.model.class_names == ("widget",)
    assert "class 'widget' is used, not 'gear'" in caplog.text
