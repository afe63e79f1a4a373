"""``output_size: original``: maps and masks in each picture's own pixels, and nothing else changes."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, ImageItem, PredictDataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.data.batch import ZeroShotBatch, ZeroShotItem
from anomalib_clipad.engine.post_processing import ClipAdPostProcessor
from anomalib_clipad.errors import InputError
from anomalib_clipad.pictures.heatmap import LEVELS

from .conftest import ROUNDING, build_model, new_engine

SIZES = {"a.png": (40, 60), "b.png": (40, 60), "long.png": (100, 30), "small.png": (9, 20)}  # height and width


def enlarged(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, pixel centre by pixel centre, the edge continued."""
    large = np.empty(size, dtype=np.float64)
    places = [
        np.clip((np.arange(side) + 0.5) * own / side - 0.5, 0, own - 1)
        for side, own in zip(size, values.shape, strict=True)
    ]
    for i, y in enumerate(places[0]):
        for j, x in enumerate(places[1]):
            top, left = int(y), int(x)
            bottom, right = min(top + 1, values.shape[0] - 1), min(left + 1, values.shape[1] - 1)
            above = (1 - (x - left)) * values[top, left] + (x - left) * values[top, right]
            below = (1 - (x - left)) * values[bottom, left] + (x - left) * values[bottom, right]
            large[i, j] = (1 - (y - top)) * above + (y - top) * below
    return large


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    root.mkdir()
    rng = np.random.default_rng(3)
    for name, size in SIZES.items():
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(root / name)
    return root


def predict(model: ClipAdSdp, pictures: Path, where: Path, batch: int = 4) -> list[ZeroShotBatch]:
    dataset = PredictDataset(pictures)
    loader = DataLoader(dataset, batch_size=batch, collate_fn=dataset.collate_fn)
    return new_engine(where).predict(model, dataloaders=loader)


def by_name(batches: list[ZeroShotBatch]) -> dict[str, ZeroShotItem]:
    return {Path(str(item.image_path)).name: item for batch in batches for item in batch.items}


@pytest.mark.parametrize(("kind", "batch"), [("ClipAdSdp", 1), ("ClipAdSdp", 4), ("ClipAdSdpPlus", 4)])
def test_maps_and_masks_are_those_of_the_model_enlarged(
    kind: str, batch: int, small_clip: str, pictures: Path, tmp_path: Path
) -> None:
    given = {"class_name": "nut", "visualizer": False}
    small = by_name(predict(build_model(kind, small_clip, tmp_path, **given), pictures, tmp_path / "small", batch))
    model = build_model(kind, small_clip, tmp_path, output_size="original", **given)
    batches = predict(model, pictures, tmp_path / "large", batch)
    found, marked = by_name(batches), 0
    assert set(found) == set(SIZES)
    for name, size in SIZES.items():
        expected = enlarged(small[name].anomaly_map.numpy(), size)
        np.testing.assert_allclose(found[name].anomaly_map, expected, atol=1e-5)
        sure = np.abs(expected - 0.5) > 1e-5
        assert np.array_equal(found[name].pred_mask.numpy()[sure], (expected > 0.5)[sure])
        assert torch.equal(found[name].pred_label, small[name].pred_label)
        torch.testing.assert_close(found[name].pred_score, small[name].pred_score, atol=ROUNDING, rtol=0)
        marked += int(found[name].pred_mask.sum())
        run = next((tmp_path / "large").rglob("predict/v0"))
        with Image.open(run / "heatmaps" / name) as heatmap, Image.open(run / "masks" / name) as mask:
            assert heatmap.size == mask.size == size[::-1]
            assert np.abs(np.asarray(heatmap) / (LEVELS - 2) - expected).max() <= 0.5 / (LEVELS - 2) + 1e-5
            assert np.array_equal(np.asarray(mask), found[name].pred_mask)
    assert 0 < marked < sum(height * width for height, width in SIZES.values())
    if batch == 1:
        assert [tuple(one.anomaly_map.shape[1:]) for one in batches] == list(SIZES.values())
    else:
        assert batches[0].anomaly_map is None


def test_a_region_stays_sharp_in_the_pictures_pixels(small_clip: str, pictures: Path, tmp_path: Path) -> None:
    given = {"class_name": "nut", "visualizer": False, "few_shot_source": pictures, "region": [0.3, 0.0, 1.0, 0.55]}
    small = by_name(predict(ClipAdSdp(backbone=small_clip, **given), pictures, tmp_path / "small"))
    found = by_name(predict(ClipAdSdp(backbone=small_clip, output_size="original", **given), pictures, tmp_path))
    for name, (height, width) in SIZES.items():
        inside = np.zeros((height, width), dtype=bool)
        inside[(np.arange(height) + 0.5) / height < 0.55] = True
        inside[:, (np.arange(width) + 0.5) / width < 0.3] = False
        values = small[name].anomaly_map.numpy().copy()
        box = ((np.arange(32) + 0.5) / 32 < 0.55).sum(), ((np.arange(32) + 0.5) / 32 < 0.3).sum()
        values[box[0] :] = values[box[0] - 1]
        values[:, : box[1]] = values[:, [box[1]]]  # nothing of the outside blends in
        expected = np.where(inside, enlarged(values, (height, width)), 0)
        np.testing.assert_allclose(found[name].anomaly_map, expected, atol=1e-5)
        assert not found[name].pred_mask.numpy()[~inside].any()


def test_the_command_writes_them_and_keeps_no_large_maps(
    anomalib: Callable[..., CompletedProcess], small_clip: str, pictures: Path, tmp_path: Path
) -> None:
    done = anomalib(
        *("predict", "--model", "ClipAdSdp", "--model.class_name", "nut", "--model.backbone", small_clip),
        *("--model.output_size", "original", "--data", str(pictures)),
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "results/ClipAdSdp/latest/predict/v0"
    for kind in ("heatmaps", "masks"):
        sizes = {path.name: Image.open(path).size[::-1] for path in (run / kind).iterdir()}
        assert sizes == SIZES


def test_what_makes_no_sense_is_refused_in_a_sentence(small_clip: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="output_size must be original, .*got 'large'"):
        ClipAdSdp(backbone=small_clip, output_size="large")
    with pytest.raises(InputError, match="belongs to the default post-processor"):
        ClipAdSdp(backbone=small_clip, output_size="original", post_processor=False)
    model = ClipAdSdp("nut", small_clip, output_size="original")
    for export in (model.to_torch, model.to_onnx):
        with pytest.raises(InputError, match="An exported file gives maps of the model's image_size"):
            export(tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_data_without_files_are_refused(small_clip: str, tmp_path: Path) -> None:
    class WithoutFiles(Dataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> ImageItem:
            return ImageItem(image=torch.rand(3, 40, 40))

    loader = DataLoader(WithoutFiles(), collate_fn=ImageBatch.collate)
    model = ClipAdSdp("nut", small_clip, output_size="original", visualizer=False)
    with pytest.raises(InputError, match="output_size original looks at the pictures' files, and the data name none"):
        new_engine(tmp_path).predict(model, dataloaders=loader)


def test_masks_of_raw_maps_take_each_pictures_own_offset(small_clip: str, pictures: Path, tmp_path: Path) -> None:
    processor = ClipAdPostProcessor(enable_normalization=False)
    model = ClipAdSdp("nut", small_clip, output_size="original", visualizer=False, post_processor=processor)
    raw = by_name(predict(model, pictures, tmp_path / "raw")).values()
    least = min(float(item.map_offset) for item in raw)
    threshold = float(np.mean([float(item.anomaly_map.mean() - item.map_offset) for item in raw])) + least
    for name, value in {"_pixel_threshold": threshold, "pixel_min": threshold - 1, "pixel_max": threshold + 1}.items():
        getattr(processor, name).fill_(value)
    processor.map_offset.take(least)  # which all pictures but one exceed
    marked = 0
    for item in by_name(predict(model, pictures, tmp_path / "marked")).values():
        away = item.anomaly_map - (item.map_offset - least) - threshold
        sure = away.abs() > 1e-6
        assert sure.float().mean() > 0.99
        assert torch.equal(item.pred_mask[sure], (away > 0)[sure])
        marked += int(item.pred_mask.sum())
    assert 0 < marked < sum(height * width for height, width in SIZES.values())
