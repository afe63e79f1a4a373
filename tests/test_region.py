"""A region: nothing outside of it has any influence, and what is inside is what a loop over its pixels finds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from anomalib_clipad.components import Region
from anomalib_clipad.sdp import ClipAdSdpModel
from anomalib_clipad.sdp_plus import ClipAdSdpPlusModel

from .conftest import ROUNDING
from .test_tiling import IMAGE, TILE, build, tiled

BOX = [0.1, 0.2, 0.6, 0.9]
SQUARE = (32, 32)
NETWORKS = [ClipAdSdpModel, ClipAdSdpPlusModel]


def inside_box(size: tuple[int, int], box: list[float]) -> np.ndarray:
    """Pixel by pixel."""
    left, top, right, bottom = box
    inside = np.zeros(size, dtype=bool)
    for y in range(size[0]):
        for x in range(size[1]):
            inside[y, x] = left <= (x + 0.5) / size[1] < right and top <= (y + 0.5) / size[0] < bottom
    return inside


def nearest_fill(image: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(C, H, W); of a box, the nearest pixel inside is the one of the clamped place."""
    rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
    filled = image.copy()
    for y in range(inside.shape[0]):
        for x in range(inside.shape[1]):
            filled[:, y, x] = image[:, np.clip(y, rows[0], rows[-1]), np.clip(x, columns[0], columns[-1])]
    return filled


def write_mask(path: Path, inside: np.ndarray) -> str:
    Image.fromarray(255 * inside.astype(np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("references", [0, 1, 3])
@pytest.mark.parametrize("make", [build, tiled])
def test_what_is_outside_changes_nothing(kind: type[ClipAdSdpModel], references: int, make: Callable) -> None:
    model = make(kind, region=BOX)
    outside = torch.from_numpy(~inside_box(model.image_size, BOX))
    images, normal = torch.randn(2, 3, *model.image_size), torch.randn(max(1, references), 3, *model.image_size)

    def found(images: torch.Tensor, normal: torch.Tensor) -> list[torch.Tensor]:
        scored = model.set_references([normal], augment=True) if references else ()
        return [values for values in (*model(images), *scored) if values is not None]

    expected = found(images, normal)
    for values in (images, normal):
        values[:, :, outside] = torch.rand(values[:, :, outside].shape) * 100
    images[0, :, outside] = float("nan")
    for one, other in zip(expected, found(images, normal), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", NETWORKS)
def test_map_and_scores_are_those_of_the_filled_picture_inside(kind: type[ClipAdSdpModel]) -> None:
    images, inside = torch.randn(2, 3, *SQUARE), inside_box(SQUARE, BOX)
    found = build(kind, region=[BOX])(images)
    plain = build(kind)(torch.from_numpy(np.stack([nearest_fill(image.numpy(), inside) for image in images])))
    assert torch.equal(found.text_score, plain.text_score)
    for number in range(2):
        values = [float(plain.anomaly_map[number, y, x]) for y, x in np.argwhere(inside)]
        assert float(found.map_score[number]) == max(values)
        for y, x in np.ndindex(SQUARE):
            wanted = float(plain.anomaly_map[number, y, x]) if inside[y, x] else min(values)
            assert float(found.anomaly_map[number, y, x]) == wanted


def test_references_count_inside_only() -> None:
    """Units, distances and the largest tenth, by loops over the patches and pixels inside."""
    model, inside = build(region=[0.0, 0.0, 0.5, 1.0]), inside_box(SQUARE, [0.0, 0.0, 0.5, 1.0])
    normal, images = torch.randn(3, 3, *SQUARE), torch.randn(2, 3, *SQUARE)
    model.set_references([normal])
    fill = lambda batch: torch.from_numpy(np.stack([nearest_fill(one.numpy(), inside) for one in batch]))  # noqa: E731
    plain, patches = build(), [row * 4 + column for row in range(4) for column in (0, 1)]

    def tokens(batch: torch.Tensor) -> list[torch.Tensor]:
        return [F.normalize(tap[:, 1:], dim=-1) for tap in plain.visual(fill(batch)).original]

    def means(taps: list[torch.Tensor]) -> list[torch.Tensor]:
        found = []
        for tap in taps:
            grid = tap.unflatten(1, (4, 4))
            rows = [
                grid[:, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].flatten(1, 2).sum(dim=1)
                for y in range(4)
                for x in range(4)
            ]
            found.append(F.normalize(torch.stack(rows, dim=1), dim=-1))
        return found

    kept = tokens(normal)
    kept += means(kept)

    def distance_map(batch: torch.Tensor, others: list[list[int]]) -> torch.Tensor:
        own = tokens(batch)
        own += means(own)
        maps = []
        for number, allowed in enumerate(others):
            total = torch.zeros(16)
            for tap, bank in zip(own, kept, strict=True):
                nearest = torch.stack([bank[k, p] for k in allowed for p in patches])
                total += 0.5 * (1 - (tap[number] @ nearest.T).amax(dim=1)) / len(own)
            maps.append(F.interpolate(total.reshape(1, 1, 4, 4), SQUARE, mode="bilinear")[0, 0])
        return model.tiling.smoothing(torch.stack(maps))

    own = distance_map(normal, [[1, 2], [0, 2], [0, 1]])[:, inside]
    text = plain(fill(normal)).anomaly_map[:, inside]
    fusion = model.reference_fusion
    assert fusion.mean[0, :2].tolist() == pytest.approx([float(text.mean()), float(own.mean())], abs=1e-4)
    assert fusion.std[0, :2].tolist() == pytest.approx([float(v.std(correction=0)) for v in (text, own)], abs=1e-4)
    found = model(images)
    both = (plain(fill(images)).anomaly_map, distance_map(images, [[0, 1, 2]] * 2))
    units = [(maps - mean) / std for maps, mean, std in zip(both, fusion.mean[0], fusion.std[0], strict=False)]
    wanted = [(values / (1 + values.abs() / 20))[:, inside] for values in units]
    half = {"atol": 0.02, "rtol": 1e-2}  # patches in half precision
    torch.testing.assert_close(found.anomaly_map[:, inside], sum(wanted), **half)
    tenth = wanted[1].sort(dim=1, descending=True).values[:, : round(0.1 * inside.sum())]
    torch.testing.assert_close(found.map_score, tenth.mean(dim=1), **half)


@pytest.mark.parametrize("make", [build, tiled])
def test_the_whole_picture_as_region_changes_nothing(make: Callable) -> None:
    plain, whole = make(), make(region=[0, 0, 1, 1])
    images = torch.randn(3, 3, *plain.image_size)
    for references in (False, True):
        if references:
            for model in (plain, whole):
                model.set_references([images])
        for name, one, other in zip(plain(images)._fields, plain(images), whole(images), strict=True):
            torch.testing.assert_close(other, one, atol=ROUNDING, rtol=1e-5, msg=name)


def test_text_of_tiles_outside_does_not_count() -> None:
    model = tiled(region=[0.0, 0.0, 0.4, 0.6])
    assert len(model.tiling) == 6
    assert model.region.tiles is not None
    inside = inside_box(IMAGE, [0.0, 0.0, 0.4, 0.6])
    starts = [(y, x) for y in model.tiling.positions[0] for x in model.tiling.positions[1]]
    shares = [inside[y : y + TILE[0], x : x + TILE[1]].mean() for y, x in starts]
    assert model.region.tiles.tolist() == [share >= 0.5 for share in shares]
    assert model.region.tiles.sum() == 1
    small = tiled(region=[0.0, 0.0, 0.1, 0.1])
    assert small.region.tiles is not None
    assert small.region.tiles.tolist() == [True] + [False] * 5


def test_digests_tell_regions_apart(tmp_path: Path) -> None:
    mask = np.zeros((4, 4), dtype=bool)
    mask[0] = True
    regions = [Region([0, 0, 1, 0.5]), Region([0, 0, 1, 0.25]), Region(write_mask(tmp_path / "a.png", mask))]
    regions.append(Region(write_mask(tmp_path / "b.png", mask.T)))
    assert len({region.digest for region in regions}) == 4
    assert Region([[0, 0, 1, 0.5]]).digest == regions[0].digest
