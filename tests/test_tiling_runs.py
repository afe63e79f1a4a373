"""Tiles in the engine: test, predict, references, checkpoints, training and exports."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from anomalib.data.utils import read_image

from anomalib_clipad import ClipAdSdp, ClipAdSdpPlus, InputError

from .conftest import ROUNDING, auxiliary, build_model, folder, new_engine, weights
from .test_export import assert_same, eager, run_onnx, run_openvino

TILES = {"image_size": (40, 56), "tile_size": 32, "visualizer": False}


@pytest.mark.parametrize("name", ["ClipAdSdp", "ClipAdSdpPlus"])
def test_a_checkpoint_gives_the_scores_of_the_run_that_wrote_it(
    name: str, small_clip: str, category: Path, tmp_path: Path
) -> None:
    arguments = {**TILES, "k_shot": 2, "tile_overlap": 0.5}
    model, engine = build_model(name, small_clip, tmp_path, **arguments), new_engine(tmp_path)
    figures = engine.test(model, datamodule=folder(category), verbose=False)[0]
    assert figures["image_AUROC"] > 0
    expected = engine.predict(model, data_path=category / "test/square")
    assert {batch.anomaly_map.shape for batch in expected} == {(1, 40, 56)}
    path = weights(engine, "model.ckpt")
    again = build_model(name, small_clip, tmp_path, **{**arguments, "tile_batch_size": 3})
    found = new_engine(tmp_path / "again").predict(again, data_path=category / "test/square", ckpt_path=path)
    assert len(again.model.tile_references.patches) == 2 * len(again.model.tiling) * 16
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.anomaly_map, other.anomaly_map, atol=ROUNDING, rtol=0)
        torch.testing.assert_close(one.pred_score, other.pred_score, atol=ROUNDING, rtol=0)
    for other in ({**arguments, "tile_size": None}, {**arguments, "tile_overlap": 0.25}):
        with pytest.raises(InputError, match="The checkpoint does not fit this model: tiles was"):
            new_engine(tmp_path / "other").predict(
                build_model(name, small_clip, tmp_path, **other), data_path=category / "test/square", ckpt_path=path
            )


def test_references_return_with_the_class(small_clip: str, category: Path, tmp_path: Path) -> None:
    model = ClipAdSdp(backbone=small_clip, k_shot=2, **TILES)
    new_engine(tmp_path).test(model, datamodule=folder(category), verbose=False)
    kept = model.model.tile_references.patches.clone()
    model.choose_class("gear")
    assert not model.model.tile_references.fitted
    model.choose_class("widget")
    assert torch.equal(model.model.tile_references.patches, kept)


def test_training_on_pictures_of_one_tile_is_training_without_tiles(
    small_clip: str, auxiliary_root: Path, tmp_path: Path
) -> None:
    """And on larger ones something else is learned, which a checkpoint of the same tiles takes."""
    found, engines = [], []
    for number, arguments in enumerate(({}, {"image_size": 32, "tile_size": 32}, TILES)):
        torch.manual_seed(0)
        model = ClipAdSdpPlus(backbone=small_clip, lr=1e-2, **{"visualizer": False, **arguments})
        engines.append(new_engine(tmp_path / str(number), max_epochs=1))
        engines[-1].fit(model, datamodule=auxiliary(auxiliary_root))
        found.append(model.model.adapter.state_dict())
    for key, value in found[0].items():
        assert torch.equal(found[1][key], value)
        assert not torch.equal(found[2][key], value)
    again = ClipAdSdpPlus.load_from_checkpoint(weights(engines[2], "model.ckpt"), backbone=small_clip)
    assert again.model.tile_size == (32, 32)
    with pytest.raises(InputError, match="cache_features keeps the features of whole pictures"):
        new_engine(tmp_path, max_epochs=1).fit(
            ClipAdSdpPlus(backbone=small_clip, **TILES), datamodule=auxiliary(auxiliary_root, cache_features=True)
        )


def test_half_precision_gives_about_the_same_maps(small_clip: str, category: Path, tmp_path: Path) -> None:
    maps = []
    for number, precision in enumerate(("32", "bf16-true")):
        model = ClipAdSdp("cup", backbone=small_clip, **TILES)
        engine = new_engine(tmp_path / str(number), precision=precision)
        maps.append(torch.cat([batch.anomaly_map for batch in engine.predict(model, data_path=category / "test/good")]))
    assert maps[1].dtype == torch.float32
    torch.testing.assert_close(maps[1], maps[0], atol=0.05, rtol=0)


@pytest.mark.slow
def test_exported_files_cut_tiles_themselves(small_clip: str, category: Path, tmp_path: Path) -> None:
    model, engine = ClipAdSdp(backbone=small_clip, k_shot=2, reference_layers=[1, 3], **TILES), new_engine(tmp_path)
    engine.test(model, datamodule=folder(category), verbose=False)
    images = torch.stack([read_image(path, as_tensor=True) for path in sorted((category / "test/square").glob("*"))])
    path = model.to_onnx(tmp_path)  # which OpenVINO reads, and which anomalib's export to OpenVINO begins with
    for batch in (images, images[:1]):
        expected = eager(model.eval(), batch)
        assert_same(run_onnx(path, batch.numpy()), expected)
        assert_same(run_openvino(path, batch.numpy()), expected)


def test_tiles_on_the_command_line(anomalib: Callable, small_clip: str, category: Path, tmp_path: Path) -> None:
    result = anomalib(
        "predict", "--model", "ClipAdSdp", "--model.backbone", small_clip, "--model.class_name", "cup",
        "--model.image_size", "[40, 56]", "--model.tile_size", "32", "--model.tile_overlap", "0.5",
        "--data", category / "test/good",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(list(tmp_path.rglob("predictions.csv"))) == 1
    result = anomalib(
        "predict", "--model", "ClipAdSdp", "--model.backbone", small_clip, "--model.image_size", "[24, 56]",
        "--model.tile_size", "32", "--data", category / "test/good",
    )  # fmt: skip
    assert result.returncode == 1
    assert "error: tile_size 32 x 32 is larger than the picture" in result.stderr
