"""``image_size: auto``: pictures keep their shape in every run, in checkpoints and in exports."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.deploy import TorchInferencer
from PIL import Image

from anomalib_clipad import ClipAdSdp, ClipAdSdpPlus, InputError
from anomalib_clipad.components import keep_shape
from anomalib_clipad.data import AuxiliaryDataModule

from .conftest import folder, new_engine, part, weights

BARE = {"visualizer": False}
WIDE, TALL = (24, 40), (40, 24)  # of the small CLIP, whose own size is 32 x 32 in patches of 8


def write(root: Path, height: int, width: int, normal: int = 3, broken: int = 3) -> Path:
    """A category in MVTec layout of pictures of this shape."""
    rng = np.random.default_rng(height)
    for split, count in (("train/good", 3), ("test/good", normal), ("test/square", broken)):
        (root / split).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(60, 120, (height, width, 3), dtype=np.uint8)
            if split == "test/square":
                mask = np.zeros((height, width), dtype=np.uint8)
                mask[10:24, 12:30] = 255
                pixels[mask > 0] += 100
                (root / "ground_truth/square").mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(root / f"ground_truth/square/{number:03d}_mask.png")
            Image.fromarray(pixels).save(root / split / f"{number:03d}.png")
    return root


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Categories of wide and of tall pictures."""
    root = tmp_path_factory.mktemp("shapes")
    write(root / "wide", 48, 80)
    write(root / "tall", 80, 48)
    return root


def run(model: ClipAdSdp, data: Path, where: Path, **arguments: object) -> tuple[dict[str, float], torch.Tensor]:
    """Figures of a test, and the maps of the test images."""
    engine, datamodule = new_engine(where), folder(data, data.name, **arguments)
    figures = engine.test(model, datamodule=datamodule, verbose=False)[0]
    maps = torch.cat([batch.anomaly_map for batch in engine.predict(model, datamodule=datamodule)])
    return figures, maps


@pytest.mark.parametrize("sides", [(700, 700), (1270, 500), (500, 1270), (768, 576), (100, 9000), (1, 999)])
def test_the_size_has_the_pictures_shape_and_the_towers_number_of_patches(sides: tuple[int, int]) -> None:
    height, width = keep_shape(*sides, (240, 240), (16, 16))
    assert height % 16 == width % 16 == 0
    assert 0.9 * 225 <= height * width // 256 <= 1.1 * 225
    if max(sides) < 20 * min(sides):  # a strip cannot be thinner than a patch
        assert height / width == pytest.approx(sides[0] / sides[1], rel=0.06)
    if sides == (700, 700):
        assert (height, width) == (240, 240), "square pictures are seen as before"


@pytest.mark.parametrize(("name", "size", "arguments"), [("wide", WIDE, {}), ("tall", TALL, {"k_shot": 2})])
def test_auto_gives_what_the_size_itself_gives(
    small_clip: str, shapes: Path, tmp_path: Path, name: str, size: tuple[int, int], arguments: dict
) -> None:
    given = ClipAdSdp(backbone=small_clip, image_size=size, **arguments, **BARE)
    found = ClipAdSdp(backbone=small_clip, image_size="auto", **arguments, **BARE)
    expected, maps = run(given, shapes / name, tmp_path / "given")
    figures, found_maps = run(found, shapes / name, tmp_path / "found", num_workers=1)
    assert found_maps.shape[1:] == size
    assert figures == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(found_maps, maps)


def test_a_model_that_goes_to_another_shape_and_back_scores_as_a_new_one(
    small_clip: str, shapes: Path, tmp_path: Path
) -> None:
    one = ClipAdSdp(backbone=small_clip, image_size="auto", k_shot=2, **BARE)
    for number, name in enumerate(("wide", "tall", "wide")):
        new = ClipAdSdp(backbone=small_clip, image_size="auto", k_shot=2, **BARE)
        expected, maps = run(new, shapes / name, tmp_path / f"new{number}")
        figures, same_maps = run(one, shapes / name, tmp_path / f"one{number}")
        assert figures == pytest.approx(expected, abs=1e-6)
        torch.testing.assert_close(same_maps, maps)


def test_a_checkpoint_keeps_the_size_for_pictures_of_any_shape(small_clip: str, shapes: Path, tmp_path: Path) -> None:
    engine, first = new_engine(tmp_path / "first"), ClipAdSdp(backbone=small_clip, image_size="auto", **BARE)
    engine.test(first, datamodule=folder(shapes / "wide", "wide"), verbose=False)
    path = weights(engine, "model.ckpt")
    expected = [batch.pred_score for batch in engine.predict(first, data_path=shapes / "tall/test/good")]
    again = ClipAdSdp(backbone=small_clip, image_size="auto", **BARE)
    tall = folder(shapes / "tall", "tall", normal_dir="test/good", num_workers=1)
    batches = new_engine(tmp_path / "second").predict(again, datamodule=tall, ckpt_path=path)
    assert {batch.anomaly_map.shape[1:] for batch in batches} == {WIDE}
    loaded = ClipAdSdp.load_from_checkpoint(path)
    found = new_engine(tmp_path / "third").predict(loaded, data_path=shapes / "tall/test/good")
    torch.testing.assert_close(torch.cat([batch.pred_score for batch in found]), torch.cat(expected))


def test_the_size_that_is_said_is_the_one_that_is_used(
    small_clip: str, shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="anomalib_clipad")
    engine = new_engine(tmp_path / "first")
    engine.test(
        ClipAdSdp(backbone=small_clip, image_size="auto", **BARE),
        datamodule=folder(shapes / "wide", "wide"),
        verbose=False,
    )
    assert "image_size is 24 x 40, after the shape of a picture of 48 x 80 pixels" in caplog.text
    path = weights(engine, "model.ckpt")
    again = ClipAdSdp(backbone=small_clip, image_size="auto", **BARE)
    for number, (shape, said) in enumerate([("wide", 0), ("tall", 1), ("tall", 1), ("wide", 0)]):
        caplog.clear()
        model = again if number < 2 else ClipAdSdp.load_from_checkpoint(path, **BARE)
        of_run = path if number < 2 else None
        new_engine(tmp_path / str(number)).predict(model, data_path=shapes / shape / "test/good", ckpt_path=of_run)
        assert caplog.text.count("checkpoint's image_size 24 x 40 is used, into which pictures of 80 x 48") == said
        assert "after the shape" not in caplog.text


def test_a_squeezed_picture_is_said_once_for_each_checkpoint(
    small_clip: str, shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = {}
    for shape in ("wide", "tall"):
        engine, model = new_engine(tmp_path / shape), ClipAdSdp(backbone=small_clip, image_size="auto", **BARE)
        engine.test(model, datamodule=folder(shapes / shape, shape), verbose=False)
        paths[shape] = weights(engine, "model.ckpt")
    model = ClipAdSdp(backbone=small_clip, image_size="auto", **BARE)
    runs = [("wide", "wide", 0), ("tall", "wide", 1), ("tall", "wide", 0), ("wide", "wide", 0), ("wide", "tall", 1)]
    for of_checkpoint, of_pictures, said in runs:
        caplog.clear()
        pictures = shapes / of_pictures / "test/good"
        new_engine(tmp_path / "run").predict(model, data_path=pictures, ckpt_path=paths[of_checkpoint])
        assert caplog.text.count("are squeezed") == said
    model = ClipAdSdp(backbone=small_clip, image_size="auto", **BARE)
    for said in (1, 0):
        caplog.clear()
        new_engine(tmp_path / "run").predict(model, data_path=shapes / "tall/test/good", ckpt_path=paths["wide"])
        assert caplog.text.count("are squeezed") == said


def test_a_checkpoint_of_an_impossible_size_is_refused(small_clip: str, shapes: Path, tmp_path: Path) -> None:
    engine, model = new_engine(tmp_path), ClipAdSdp(backbone=small_clip, image_size="auto", **BARE)
    engine.test(model, datamodule=folder(shapes / "wide", "wide"), verbose=False)
    path = weights(engine, "model.ckpt")
    content = torch.load(path, weights_only=True)
    for size in ([24, 41], "wide", [10**6, 10**6]):
        content["clip_ad"]["image_size"] = size
        torch.save(content, path)
        with pytest.raises(InputError, match="The checkpoint is damaged: it has the image_size"):
            ClipAdSdp.load_from_checkpoint(path)


def test_training_takes_the_shape_of_its_data_and_leaves_it_open(small_clip: str, shapes: Path, tmp_path: Path) -> None:
    engine = new_engine(tmp_path, max_epochs=1)
    model = ClipAdSdpPlus(backbone=small_clip, image_size="auto", **BARE)
    data = AuxiliaryDataModule(
        [part(shapes, "wide")], num_workers=0, val_split_ratio=0.4, train_batch_size=2, cache_features=True
    )
    engine.fit(model, datamodule=data)
    assert model.model.image_size == WIDE
    later = ClipAdSdpPlus(backbone=small_clip, image_size="auto", **BARE)
    tall = folder(shapes / "tall", "tall")
    for kind in (later, model):
        path = weights(engine, "model.ckpt") if kind is later else None
        figures = new_engine(tmp_path / "later").test(kind, datamodule=tall, ckpt_path=path, verbose=False)[0]
        assert figures["pixel_AUROC"] > 0
        assert kind.model.image_size == TALL


def test_an_exported_file_has_the_size_that_was_found(
    small_clip: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # anomalib's inferencer keeps a cache where it is started
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    model = ClipAdSdp("part", backbone=small_clip, image_size="auto", **BARE)
    with pytest.raises(InputError, match="image_size auto has seen no picture yet; give a checkpoint"):
        model.to_torch(tmp_path)
    engine = new_engine(tmp_path)
    engine.predict(model, data_path=shapes / "wide/test/good")
    inferencer = TorchInferencer(model.to_torch(tmp_path), device="cpu")
    picture = shapes / "tall/test/good/000.png"
    expected = next(iter(engine.predict(model, data_path=picture)))
    found = np.squeeze(inferencer.predict(picture).anomaly_map)
    assert found.shape == WIDE
    np.testing.assert_allclose(found, expected.anomaly_map[0], atol=1e-5)


def test_images_alone_have_a_shape_too(small_clip: str) -> None:
    model = ClipAdSdp("cup", backbone=small_clip, image_size="auto").eval()
    assert model(torch.rand(2, 3, 80, 48)).anomaly_map.shape == (2, *TALL)
    assert model(torch.rand(1, 3, 48, 80)).anomaly_map.shape == (1, *TALL), "found once"


def test_the_first_picture_that_can_be_opened_gives_the_shape(small_clip: str, shapes: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(b"not a picture")
    (pictures / "b.png").write_bytes((shapes / "tall/test/good/000.png").read_bytes())
    model = ClipAdSdp("cup", backbone=small_clip, image_size="auto", **BARE)
    batches = new_engine(tmp_path).predict(model, data_path=pictures)
    assert [batch.anomaly_map.shape for batch in batches if batch is not None] == [(1, *TALL)]


def test_a_ratio_is_width_over_height_on_the_command_line(anomalib: Callable, small_clip: str, shapes: Path) -> None:
    result = anomalib(
        "predict", "--model", "ClipAdSdp", "--model.backbone", small_clip, "--model.class_name", "cup",
        "--model.image_size", "auto:0.25.5", "--data", shapes / "wide/test/good",
    )  # fmt: skip
    assert result.returncode == 1
    assert "image_size must be numbers of pixels, auto, or auto:RATIO" in result.stderr
    assert ClipAdSdp(backbone=small_clip, image_size="auto:1.6").model.image_size == WIDE


@pytest.mark.parametrize("size", ["auto:", "auto:0", "auto:-2", "auto:nan", "automatic", "240", "", "auto:1e9", 0])
def test_wrong_sizes_are_one_sentence(small_clip: str, size: object) -> None:
    with pytest.raises(InputError, match="image_size must be"):
        ClipAdSdp(backbone=small_clip, image_size=size)


def test_a_pre_processor_of_ones_own_needs_a_size(small_clip: str) -> None:
    with pytest.raises(InputError, match="image_size auto belongs to the default pre-processor"):
        ClipAdSdp(backbone=small_clip, image_size="auto", pre_processor=False)
