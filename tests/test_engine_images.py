"""Images as they come, through the engine: of every kind, damaged, very large, or not numbers."""

import logging
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, ImageItem, PredictDataset
from anomalib.engine import Engine
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.data import ReadableDataLoader

from . import conftest
from .conftest import new_engine, write_category

folder = partial(conftest.folder, eval_batch_size=4)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return new_engine(tmp_path)


@pytest.fixture
def strange_folder(image_folder: Path) -> Path:
    """One image of each strange kind, and two that cannot be read."""
    rng = np.random.default_rng(2)
    colour = Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8))
    colour.convert("L").save(image_folder / "grey.png")
    colour.convert("RGBA").save(image_folder / "rgba.png")
    colour.convert("P").save(image_folder / "palette.png")
    colour.convert("CMYK").save(image_folder / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 255, (1, 1, 3), dtype=np.uint8)).save(image_folder / "pixel.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    colour.save(image_folder / "rotated.jpg", exif=exif)
    Image.fromarray(rng.integers(0, 65535, (40, 60), dtype=np.uint16)).save(image_folder / "deep.png")
    (image_folder / "corrupt.png").write_bytes(b"no image at all")
    whole = (image_folder / "b.jpg").read_bytes()
    (image_folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    return image_folder


@pytest.mark.parametrize("workers", [0, 2])
def test_strange_images_are_scored_and_unreadable_ones_named(
    small_clip: str, strange_folder: Path, engine: Engine, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    model = ClipAdSdp(visualizer=False, backbone=small_clip, class_name="cup")
    dataset = PredictDataset(strange_folder)
    loader = DataLoader(dataset, batch_size=2, collate_fn=dataset.collate_fn, num_workers=workers)
    batches = engine.predict(model, dataloaders=loader)
    scored = {Path(path).name for batch in batches for path in batch.image_path}
    assert scored == {path.name for path in strange_folder.iterdir()} - {"corrupt.png", "truncated.jpg"}
    assert all(batch.pred_score.isfinite().all() for batch in batches)
    if not workers:  # workers log in their own process
        assert "corrupt.png, which cannot be read" in caplog.text
        assert "truncated.jpg, which cannot be read" in caplog.text
        assert "rotated.jpg is stored rotated" in caplog.text


def test_workers_that_start_afresh_read_the_same(strange_folder: Path) -> None:
    """As from Python 3.14 on, on macOS and on Windows, where they are handed a pickle."""
    dataset = PredictDataset(strange_folder)
    loader = ReadableDataLoader(DataLoader(dataset, batch_size=len(dataset), collate_fn=lists_of))
    handed, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    (expected,) = loader
    found = collate([handed[number] for number in range(len(handed))])
    assert [item.image_path for item in found] == [item.image_path for item in expected]
    assert len(found) == len(dataset) - 2
    assert all(torch.equal(one.image, other.image) for one, other in zip(found, expected, strict=True))


def lists_of(items: list[ImageItem]) -> list[ImageItem]:
    """The images have several sizes."""
    return items


def test_sixteen_bit_images_are_not_saturated(small_clip: str, tmp_path: Path) -> None:
    shades = np.linspace(0, 255, 32 * 32).reshape(32, 32).astype(np.uint8)
    for name, pixels in (("eight.png", shades), ("sixteen.png", shades.astype(np.uint16) * 257)):
        (tmp_path / name.split(".")[0]).mkdir()
        Image.fromarray(pixels).save(tmp_path / name.split(".")[0] / name)
    model = ClipAdSdp(visualizer=False, backbone=small_clip, class_name="cup")
    eight, sixteen = (
        new_engine(tmp_path).predict(model, data_path=tmp_path / kind)[0] for kind in ("eight", "sixteen")
    )
    torch.testing.assert_close(eight.anomaly_map, sixteen.anomaly_map, atol=1e-5, rtol=0)


def test_a_very_large_image(small_clip: str, tmp_path: Path, engine: Engine) -> None:
    Image.new("RGB", (10_000, 9_000), (90, 120, 60)).save(tmp_path / "large.jpg")
    batch = engine.predict(
        ClipAdSdp(visualizer=False, backbone=small_clip, class_name="cup"), data_path=tmp_path / "large.jpg"
    )[0]
    assert batch.anomaly_map.shape == (1, 32, 32)
    assert batch.pred_score.isfinite().all()


def test_an_unreadable_test_image_costs_only_itself(
    small_clip: str, tmp_path: Path, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_category(tmp_path / "widget")
    model = ClipAdSdp(visualizer=False, backbone=small_clip)
    (root / "test/good/001.png").write_bytes(b"gone")
    broken = engine.test(model, datamodule=folder(root))[0]
    assert "001.png or its mask, which cannot be read" in caplog.text
    (root / "test/good/001.png").unlink()
    assert broken == pytest.approx(new_engine(tmp_path / "b").test(model, datamodule=folder(root))[0], abs=1e-6)


def test_other_models_read_images_as_before(
    small_clip: str, category: Path, image_folder: Path, engine: Engine
) -> None:
    engine.test(ClipAdSdp(visualizer=False, backbone=small_clip), datamodule=folder(category))
    assert "process_dataloader" not in vars(engine.trainer.strategy)
    (image_folder / "corrupt.png").write_bytes(b"no image at all")
    with pytest.raises(OSError, match="cannot identify image file"):
        list(DataLoader(PredictDataset(image_folder), collate_fn=ImageBatch.collate))


def test_not_a_number_is_named(
    small_clip: str, engine: Engine, image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(PredictDataset):
        def __getitem__(self, index: int) -> object:
            item = super().__getitem__(index)
            if index == 0:
                item.image[0, 0, 0] = float("nan")
            return item

    dataset = Broken(image_folder)
    loader = DataLoader(dataset, batch_size=2, collate_fn=dataset.collate_fn)
    with caplog.at_level(logging.WARNING):
        batch = engine.predict(ClipAdSdp(visualizer=False, backbone=small_clip, class_name="cup"), dataloaders=loader)[
            0
        ]
    assert "a.png" in caplog.text
    assert batch.pred_label[0]
    assert batch.pred_score[0].isnan()
    assert batch.pred_score[1].isfinite()
