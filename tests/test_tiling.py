"""Tiles: what they give by definition, and that nothing but the size of the picture decides it."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import normalize, resize

from anomalib_clipad.components import Scores, Tiling
from anomalib_clipad.components.neighbourhood import neighbourhood_means
from anomalib_clipad.components.tiling import tile_positions
from anomalib_clipad.demo.canvas import Style
from anomalib_clipad.demo.defects import paint_defect
from anomalib_clipad.demo.textures import render
from anomalib_clipad.errors import InputError
from anomalib_clipad.sdp import ClipAdSdpModel
from anomalib_clipad.sdp_plus import ClipAdSdpPlusModel

from .conftest import ROUNDING, make_clip

IMAGE, TILE = (56, 90), (32, 40)  # of the small CLIP, whose patches are 8 x 8
SIZES = [((56, 90), (32, 40), 0.25), ((64, 64), (32, 32), 0.0), ((41, 100), (40, 40), 0.9), ((32, 33), (32, 32), 0.5)]


def build(kind: type[ClipAdSdpModel] = ClipAdSdpModel, **arguments: object) -> ClipAdSdpModel:
    """A small network; always of the same weights."""
    clip = make_clip()
    torch.manual_seed(1)
    return kind(clip=clip, class_names=["bottle", "metal nut"], rvs="mean", **arguments).eval()


def tiled(kind: type[ClipAdSdpModel] = ClipAdSdpModel, **arguments: object) -> ClipAdSdpModel:
    return build(kind, **{"image_size": IMAGE, "tile_size": TILE, **arguments})


def corners(image: tuple[int, int], tile: tuple[int, int], overlap: float) -> list[tuple[int, int]]:
    """Upper left corners of tiles: as few as overlap by this much, evenly spread, the last flush with the border."""
    lines = []
    for length, side in zip(image, tile, strict=True):
        count = 1 if length == side else 2
        while count > 1 and side - (length - side) / (count - 1) < overlap * side - 1e-6:
            count += 1
        lines.append([round(k * (length - side) / max(1, count - 1)) for k in range(count)])
    return list(product(*lines))


def blended(maps: list[np.ndarray], places: list[tuple[int, int]], image: tuple[int, int]) -> np.ndarray:
    """Mean of the tiles' maps at every pixel, each weighted by the distances from its edges."""
    height, width = maps[0].shape
    total, weight = np.zeros(image), np.zeros(image)
    for tile, (y, x) in zip(maps, places, strict=True):
        for i, j in product(range(height), range(width)):
            w = min(i + 1, height - i) * min(j + 1, width - j)
            total[y + i, x + j] += w * tile[i, j]
            weight[y + i, x + j] += w
    return total / weight


@pytest.mark.parametrize("kind", [ClipAdSdpModel, ClipAdSdpPlusModel])
def test_map_and_scores_equal_their_definition(kind: type[ClipAdSdpModel]) -> None:
    network, image = tiled(kind), torch.randn(1, 3, *IMAGE)
    found = network.scores(image)
    raw = build(kind, image_size=TILE, sigma=0.0)
    smooth = build(kind, image_size=TILE)
    places = corners(IMAGE, TILE, 0.25)
    assert len(places) == 6
    tiles = [raw.scores(image[:, :, y : y + TILE[0], x : x + TILE[1]]) for y, x in places]
    maps = gaussian_filter(blended([t.anomaly_map[0].detach().numpy() for t in tiles], places, IMAGE), smooth.sigma)
    whole = smooth.scores(resize(image, list(TILE), InterpolationMode.BICUBIC, antialias=True))
    enlarged = F.interpolate(whole.anomaly_map[None], IMAGE, mode="bilinear")[0, 0].detach().numpy()
    np.testing.assert_allclose(found.anomaly_map[0].detach(), (2 * maps + enlarged) / 3, atol=ROUNDING)
    offsets = [float(one.map_offset) for one in (whole, *tiles)]
    assert float(found.map_offset) == pytest.approx(np.mean([offsets[0], *2 * [np.mean(offsets[1:])]]), abs=ROUNDING)
    worst = max(float(tile.text_score) for tile in tiles)
    assert float(found.text_score) == pytest.approx((float(whole.text_score) + worst) / 2, abs=ROUNDING)
    assert float(found.map_score) == pytest.approx(float(found.anomaly_map.amax()), abs=1e-6)


@pytest.mark.parametrize("references", [0, 2])
def test_a_picture_of_one_tile_scores_as_without_tiles(references: int) -> None:
    plain, one = build(image_size=TILE), build(image_size=TILE, tile_size=TILE, tile_overlap=0.5)
    images = torch.randn(4, 3, *TILE)
    if references:
        for network in (plain, one):
            network.set_references([images[:references]])
    torch.testing.assert_close(one(images), plain(images), atol=0, rtol=0)


@pytest.mark.parametrize("arguments", [{"tile_batch_size": 1}, {"tile_batch_size": 5}, {"tile_batch_size": 1000}])
def test_neither_order_nor_batches_change_anything(arguments: dict) -> None:
    images, index = torch.randn(3, 3, *IMAGE), torch.tensor([1, 0, 1])
    references = torch.randn(3, 3, *IMAGE)
    first, second = tiled(), tiled(**arguments)
    for with_references in (False, True):
        if with_references:
            for network, size in ((first, 3), (second, 1)):
                network.set_references(references.split(size))
        together = first(images, index)
        for order in ([0, 1, 2], [2, 0, 1]):
            alone = [second(images[i : i + 1], index[i : i + 1]) for i in order]
            for name in together._fields:
                found = torch.cat([getattr(one, name) for one in alone])
                torch.testing.assert_close(found, getattr(together, name)[order], atol=10 * ROUNDING, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_tiles_cover_the_picture_evenly(size: tuple[tuple[int, int], tuple[int, int], float]) -> None:
    tiling, places = Tiling(*size), corners(*size)
    assert list(product(*tiling.positions)) == places
    (height, width), (h, w), _ = size
    assert places[0] == (0, 0)
    assert places[-1] == (height - h, width - w)
    image = torch.randn(2, 3, height, width)
    expected = torch.stack([one[:, y : y + h, x : x + w] for one in image for y, x in places])
    assert torch.equal(torch.cat(list(tiling.tiles(image, 3))), expected)


@pytest.mark.parametrize("size", SIZES)
def test_joining_is_exact_for_any_map_that_the_tiles_agree_on(
    size: tuple[tuple[int, int], tuple[int, int], float],
) -> None:
    """Constant and linear maps among them, and a defect that lies on a seam."""
    (height, width), _, _ = size
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    seam = torch.zeros(height, width)
    seam[height // 2 - 1 : height // 2 + 1, width // 2 - 1 : width // 2 + 1] = 1
    maps = torch.stack(
        [torch.full((height, width), 0.3), 0.01 * rows - 0.02 * columns, seam, torch.rand(height, width)]
    )
    tiling = Tiling(*size)
    joined = tiling.join_tiles(torch.cat([tiles[:, 0] for tiles in tiling.tiles(maps[:, None], 4)]))
    torch.testing.assert_close(joined, maps, atol=1e-6, rtol=0)


def test_a_joined_map_has_no_seam_where_tiles_disagree() -> None:
    """Neighbouring tiles of values 0 and 1 meet in a ramp over their whole overlap."""
    tiling = Tiling((40, 70), (40, 40), 0.25)
    line = tiling.join_tiles(torch.stack([torch.zeros(40, 40), torch.ones(40, 40)]))[0, 20]
    assert line[:30].eq(0).all()
    assert line[40:].eq(1).all()
    assert line.diff().max() < 1.2 / 11


@pytest.mark.parametrize("count", [1, 3])
def test_references_are_compared_tile_by_tile(count: int) -> None:
    """With the tiles of the other images, or of one image alone with what lies elsewhere in it."""
    network, images = tiled(), torch.randn(count, 3, *IMAGE)
    patches, centres, originals = [], [], []
    for image, (y, x) in product(images, corners(IMAGE, TILE, 0.25)):
        original = network.taps(image[None, :, y : y + TILE[0], x : x + TILE[1]]).original
        plain = [F.normalize(tap[:, 1:], dim=-1) for tap in original]
        patches.append(torch.stack([torch.stack([p, neighbourhood_means(p, network.grid)]) for p in plain])[:, :, 0])
        centres += [(y / 8 + row, x / 8 + column) for row, column in product(*map(range, network.grid))]
        originals.append(original)
    places = network.tiling.places(network.grid)
    assert places.repeat(count, 1).tolist() == [list(centre) for centre in centres]
    vectors = torch.cat(patches, dim=2)  # (taps, patches or means, all, W)
    cosines = (vectors @ vectors.transpose(-1, -2)).flatten(0, 1)  # (8, all, all)
    owner = torch.arange(len(centres)) // len(places)
    apart = (torch.tensor(centres)[:, None] - torch.tensor(centres)).abs().amax(dim=-1) >= 2
    allowed = apart if count == 1 else owner[:, None] != owner
    expected = 0.5 * (1 - cosines.masked_fill(~allowed, -1).amax(dim=-1)).mean(dim=0)
    bank = network.tile_references
    found = bank.fit_patches(torch.cat([bank.half_patches(original) for original in originals]), count, places)
    torch.testing.assert_close(found.flatten(), expected, atol=2e-3, rtol=0)
    network.set_references([images])
    torch.testing.assert_close(network.tile_references(originals[0])[0], torch.zeros(len(found[0])), atol=1e-3, rtol=0)


def test_each_tile_of_a_picture_is_trained_on_as_a_picture() -> None:
    """Loss and gradients are those of one batch of whole pictures and tiles, however many go through at once."""
    images, masks, index = torch.randn(2, 3, *IMAGE), torch.rand(2, *IMAGE) > 0.8, torch.tensor([1, 0])
    places = corners(IMAGE, TILE, 0.25)
    windows = [np.s_[..., y : y + TILE[0], x : x + TILE[1]] for y, x in places]
    small = resize(images, list(TILE), InterpolationMode.BICUBIC, antialias=True)
    rows, columns = ((torch.arange(tile) * side // tile) for tile, side in zip(TILE, IMAGE, strict=True))
    views = torch.cat([small, *(images[window] for window in windows)])
    parts = torch.cat([masks[:, rows[:, None], columns], *(masks[window] for window in windows)])
    plain = build(ClipAdSdpPlusModel, image_size=TILE)
    expected = plain.loss(plain.taps(views).original, parts, index.repeat(len(views) // 2))
    sum(expected).backward()
    for most in (1, 5, 100):
        network = tiled(ClipAdSdpPlusModel, tile_batch_size=most)
        found = network.loss_of_pictures(images, masks, index)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        sum(found).backward()
        for own, wanted in zip(network.adapter.parameters(), plain.adapter.parameters(), strict=True):
            torch.testing.assert_close(own.grad, wanted.grad, atol=1e-5, rtol=1e-4)


def test_a_defect_on_a_seam_is_found() -> None:
    """With the demonstration backbone: a hole where four tiles meet without overlap."""
    rng = np.random.default_rng(0)
    picture, inside = render("linen", Style.random(rng), rng, 96)
    hole, mask = paint_defect(picture, inside, "hole", rng)
    picture = np.tile(picture, (2, 2, 1))
    y, x = (int(np.flatnonzero(mask.any(axis=axis)).mean()) for axis in (1, 0))
    picture[48:144, 48:144] = np.roll(hole, (48 - y, 48 - x), (0, 1))
    network = ClipAdSdpModel("demo", None, ["linen"], image_size=192, tile_size=96, tile_overlap=0.0)
    assert network.tiling.positions == [[0, 96], [0, 96]]
    image = torch.from_numpy(picture).permute(2, 0, 1)
    anomaly_map = network(normalize(image, network.mean, network.std)[None]).anomaly_map[0].detach()
    peak = divmod(int(anomaly_map.argmax()), 192)
    assert max(abs(peak[0] - 96), abs(peak[1] - 96)) < 12


def test_an_image_that_is_not_finite_spoils_no_other() -> None:
    network, images = tiled(), torch.randn(2, 3, *IMAGE)
    expected = network(images[1:])
    images[0, 0, 50, 80] = math.nan
    found = network(images)
    assert found.pred_score[0].isnan()
    torch.testing.assert_close(found.anomaly_map[1:], expected.anomaly_map, atol=ROUNDING, rtol=0)


def test_a_small_defect_counts_as_much_in_a_large_picture() -> None:
    """With references, an image's score is the mean over a tenth of a tile, not of the picture."""
    network, images = tiled(), torch.randn(3, 3, *IMAGE)
    network.set_references([images[:2]])
    scores: Scores = network.scores(images)
    area = round(0.1 * TILE[0] * TILE[1])
    whole = network._look(network.tiling.whole(images), network.references, None)
    joined = network.tiling.join(whole, network._look_at_tiles(images, None))
    units = network.reference_fusion.units(joined.text_map, joined.reference_map)[1]
    expected = units.flatten(1).sort(descending=True).values[:, :area].mean(dim=1)
    torch.testing.assert_close(scores.map_score, expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *(({"tile_overlap": value}, "tile_overlap must be a share of a tile") for value in (-0.1, 0.95, math.nan, "a")),
        *(({"tile_batch_size": value}, "tile_batch_size must be a number of tiles") for value in (0, 2.5, None, True)),
        ({"tile_size": 64}, "tile_size 64 x 64 is larger than the picture, which is analysed at 56 x 90"),
        ({"tile_size": 30}, "tile_size must be a multiple of the tower's patch size"),
        *(
            ({"tile_size": value}, "tile_size must be one or two positive")
            for value in ("large", 0, 2.5, (8, 8, 8), True)
        ),
        ({"image_size": "auto"}, "image_size auto has about the pixels of one tile; with tile_size give the height"),
    ],
)
def test_wrong_tiles_are_one_sentence(arguments: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        tiled(**arguments)


def test_positions_of_many_tiles_keep_their_overlap() -> None:
    for length, tile, overlap in product((40, 41, 97, 400, 4001), (40,), (0.0, 0.25, 0.5, 0.9)):
        positions = tile_positions(length, tile, overlap)
        steps = np.diff(positions)
        assert positions[0] == 0
        assert positions[-1] == length - tile
        assert not len(steps) or (steps.max() - steps.min() <= 1 and steps.max() <= math.ceil(tile * (1 - overlap)))
