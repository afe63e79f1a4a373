"""References: distances to the nearest patch of normal images, against loops in float64."""

import itertools
import weakref

import pytest
import torch
from torch.nn import functional as F

from anomalib_clipad.components import ReferenceBank
from anomalib_clipad.components.coreset import coreset
from anomalib_clipad.components.reference_tokens import ReferenceTokens
from anomalib_clipad.errors import InputError
from anomalib_clipad.sdp import ClipAdSdpModel
from anomalib_clipad.sdp_plus import ClipAdSdpPlusModel

from .conftest import make_clip

GRID = (3, 4)


def tokens(images: int, taps: int = 2, width: int = 6, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, 1 + GRID[0] * GRID[1], width, generator=generator) for _ in range(taps)]


def patches_of(tap: torch.Tensor, image: int) -> dict[tuple[int, int], torch.Tensor]:
    places = itertools.product(range(GRID[0]), range(GRID[1]))
    return {place: F.normalize(vector.double(), dim=0) for place, vector in zip(places, tap[image, 1:], strict=True)}


def neighbours(place: tuple[int, int]) -> list[tuple[int, int]]:
    rows, columns = ([side + step for step in (-1, 0, 1)] for side in place)
    return [(r, c) for r in rows for c in columns if 0 <= r < GRID[0] and 0 <= c < GRID[1]]


def mean_at(patches: dict[tuple[int, int], torch.Tensor], place: tuple[int, int]) -> torch.Tensor:
    near = [patches[other] for other in neighbours(place)]
    return F.normalize(sum(near) / len(near), dim=0)


def naive(ours: list[torch.Tensor], image: int, references: list[torch.Tensor], compared: list[int]) -> list[float]:
    """Distances of an image's patches from those of the images ``compared``; of itself, outside the neighbourhood."""
    distances = []
    for place in patches_of(ours[0], image):
        parts = []
        for own_tap, tap in zip(ours, references, strict=True):
            own, banks = patches_of(own_tap, image), [patches_of(tap, other) for other in compared]
            itself = ours is references and compared == [image]
            allowed = [p for p in own if not itself or p not in neighbours(place)]
            parts.append(1 - max(own[place] @ bank[p] for bank in banks for p in allowed))
            mean = mean_at(own, place)
            parts.append(1 - max(mean @ mean_at(bank, p) for bank in banks for p in allowed))
        distances.append(float(sum(parts)) / len(parts) / 2)
    return distances


def test_distances_equal_loops() -> None:
    references, images = tokens(3), tokens(2, seed=1)
    bank = ReferenceBank(taps=2, width=6, grid=GRID)
    bank.fit(references)
    expected = torch.tensor([naive(images, image, references, [0, 1, 2]) for image in range(2)])
    # Half precision rounds a vector's entries by at most 2**-12 of themselves, so a cosine by at most 2**-12.
    torch.testing.assert_close(bank(images), expected, atol=2**-13, rtol=0)


@pytest.mark.parametrize("network", [ClipAdSdpModel, ClipAdSdpPlusModel])
def test_images_are_compared_at_some_of_the_layers(network: type[ClipAdSdpModel]) -> None:
    model = network(clip=make_clip(), class_names=["nut"], rvs="mean", reference_layers=[1, 3])
    references, images = torch.randn(2, 3, 32, 32), torch.randn(3, 3, 32, 32)
    model.set_references([references])
    alone = ReferenceBank(taps=2, width=32, grid=(4, 4))
    kept, compared = (model.visual(batch).original[::2] for batch in (references, images))
    alone.fit(kept)
    wanted = alone(compared).reshape(3, 1, 4, 4)
    enlarged = F.interpolate(wanted, size=(32, 32), mode="bilinear", align_corners=False)[:, 0]
    found = model._look(images, model.references, None).reference_map
    torch.testing.assert_close(found, enlarged, atol=1e-5, rtol=0)


def test_references_are_compared_with_the_others() -> None:
    references = tokens(3)
    ours = ReferenceBank(taps=2, width=6, grid=GRID).fit(references)
    expected = torch.tensor([naive(references, k, references, [j for j in range(3) if j != k]) for k in range(3)])
    torch.testing.assert_close(ours, expected, atol=2**-12, rtol=0)


def test_a_single_reference_is_compared_with_itself_outside_of_the_neighbourhood() -> None:
    references = tokens(1)
    ours = ReferenceBank(taps=2, width=6, grid=GRID).fit(references)
    torch.testing.assert_close(ours, torch.tensor([naive(references, 0, references, [0])]), atol=2**-12, rtol=0)
    assert ours.min() > 0.01, "no patch may find itself"


def test_other_views_of_a_reference_are_not_others() -> None:
    references, copies = tokens(2), tokens(2)  # the second view is the same as the first
    both = [torch.cat(pair) for pair in zip(references, copies, strict=True)]
    bank = ReferenceBank(taps=2, width=6, grid=GRID)
    expected = ReferenceBank(taps=2, width=6, grid=GRID).fit(references)
    torch.testing.assert_close(bank.fit(both, images=2), expected)
    assert len(bank.patches) == 2 * 2 * 12


def test_a_state_dict_gives_the_same_distances_to_the_last_bit() -> None:
    for most in (10_000, 20):
        bank, other = (ReferenceBank(taps=2, width=6, grid=GRID, max_patches=most) for _ in range(2))
        bank.fit(tokens(3))
        other.load_state_dict(bank.state_dict())
        assert torch.equal(bank(tokens(2, seed=1)), other(tokens(2, seed=1)))


def test_a_bank_of_four_at_240_pixels_has_at_most_seven_megabytes() -> None:
    bank = ReferenceBank(taps=4, width=896, grid=(15, 15))
    bank.fit([torch.randn(4, 226, 896) for _ in range(4)])
    assert sum(value.numel() * value.element_size() for value in bank.state_dict().values()) <= 7e6


def test_patches_of_references_are_never_there_twice() -> None:
    """They are given up batch by batch while they are joined, as they are first, and serve other classes, too."""
    batches = [torch.randn(12 * n, 2, 6).half() for n in (1, 2, 3)]
    expected, of_all = torch.cat([batches[1], batches[0], batches[2]]), ReferenceTokens()
    collected = ReferenceTokens()
    for turn, batch in zip((1, 0, 1), batches, strict=True):
        collected.add(turn, batch)
    alive = [weakref.ref(batch) for batch in batches]
    del batch, batches
    for _ in range(2):
        assert torch.equal(collected.patches(), expected)
        assert [one() for one in alive] == [None] * 3
    of_all.extend(collected)
    assert torch.equal(of_all.patches(), expected)


def test_a_coreset_keeps_the_spread_of_the_patches_and_is_the_same_each_time() -> None:
    references, images = tokens(8), tokens(2, seed=1)
    whole, small, again = (ReferenceBank(2, 6, GRID, max_patches=most) for most in (96, 24, 24))
    for bank in (whole, small, again):
        bank.fit(references)
        torch.rand(3)  # the choice does not hang on how far the global generator is
    assert len(small.patches) == len(small.means) == 24
    assert len(whole.means) == 0
    assert torch.equal(small.patches, again.patches)
    assert (small(images) >= whole(images) - 1e-3).all(), "fewer patches cannot be nearer"
    assert (small.fit(references) >= whole.fit(references) - 1e-3).all()


def test_a_coreset_of_narrow_patches_is_greedy_by_their_own_distances() -> None:
    """They are not projected, which would need more features than they have."""
    patches = F.normalize(torch.randn(60, 2, 4), dim=-1).half()
    chosen = coreset(patches, torch.arange(5, 60), 12)
    vectors = F.normalize(patches.double(), dim=-1).flatten(1)[5:]
    expected = [int(chosen[0]) - 5]
    for _ in range(11):
        expected.append(int(torch.cdist(vectors, vectors[expected]).amin(dim=1).argmax()))
    assert chosen.tolist() == [5 + index for index in expected]


def model(**arguments: object) -> ClipAdSdpModel:
    return ClipAdSdpModel(clip=make_clip(), class_names=["cup"], rvs="mean", **arguments)


def test_a_model_without_references_is_the_same_to_the_last_bit_after_it_had_some() -> None:
    network, images = model(), torch.randn(2, 3, 32, 32)
    before = network(images)
    network.set_references([torch.randn(2, 3, 32, 32)])
    assert not torch.equal(network(images).anomaly_map, before.anomaly_map)
    network.set_classes(["cup"])
    torch.testing.assert_close(network(images), before, atol=0, rtol=0)


def test_scores_of_references_are_what_each_scores_against_the_others() -> None:
    network, images = model(), torch.randn(3, 3, 32, 32)
    scores = network.set_references([images[:2], images[2:]])
    text = network.text_features[0]
    features = network.taps(images)
    text_maps = network.tiling.smoothing(network.map_before_smoothing(features, text)[0])
    for k in range(3):
        others = ReferenceBank(4, 32, network.grid)
        others.fit([tap[[j for j in range(3) if j != k]] for tap in features.original])
        distances = others([tap[k : k + 1] for tap in features.original]).reshape(1, 1, *network.grid)
        enlarged = F.interpolate(distances, size=(32, 32), mode="bilinear", align_corners=False)[:, 0]
        text_units, units = network.reference_fusion.units(text_maps[k : k + 1], network.tiling.smoothing(enlarged))
        torch.testing.assert_close(scores.anomaly_map[k : k + 1], text_units + units, atol=2e-3, rtol=1e-3)
        tenth = units.flatten().sort(descending=True).values[:102].mean()  # of 32 x 32 pixels
        torch.testing.assert_close(scores.map_score[k], tenth, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("augment", [False, True])
def test_batches_and_order_of_references_change_nothing(augment: bool) -> None:
    images, references = torch.randn(2, 3, 32, 32), torch.randn(5, 3, 32, 32)
    found = []
    for batches in (references.split(5), references.split(2), [references.flip(0)]):
        network = model()
        network.set_references(batches, augment=augment)
        found += [network(images), network(images[1:])]
    for whole, part in itertools.pairwise(found):
        ours = min(len(whole.pred_score), len(part.pred_score))
        torch.testing.assert_close(part.anomaly_map[-ours:], whole.anomaly_map[-ours:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(part.pred_score[-ours:], whole.pred_score[-ours:], atol=1e-4, rtol=1e-4)


def test_turned_references_recognise_a_turned_image() -> None:
    reference = torch.randn(1, 3, 32, 32)
    plain, turning = model(), model()
    plain.set_references([reference])
    turning.set_references([reference], augment=True)
    turned = reference.rot90(1, (-2, -1))
    near, far = (network.references(network.taps(turned).original).max() for network in (turning, plain))
    assert near < 1e-3 < far


@pytest.mark.parametrize(
    ("original", "words"),
    [
        (tokens(2)[:1], "References need 2 tensors"),
        (tokens(2, width=5), "References need 2 tensors"),
        ([tap[:0] for tap in tokens(2)], "References need 2 tensors"),
        ([None, None], "NoneType"),
        ([tap * float("nan") for tap in tokens(2)], "not finite"),
    ],
)
def test_wrong_tokens_are_one_sentence(original: list, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ReferenceBank(taps=2, width=6, grid=GRID).fit(original)


def test_an_empty_bank_says_so() -> None:
    with pytest.raises(InputError, match="There are no references"):
        ReferenceBank(taps=2, width=6, grid=GRID)(tokens(1))
    with pytest.raises(InputError, match="no image to take as a reference"):
        model().set_references([])
    with pytest.raises(InputError, match="max_references must be a whole number"):
        ReferenceBank(taps=2, width=6, grid=GRID, max_patches=0)


def test_patches_that_nothing_can_be_compared_with_are_refused() -> None:
    bank = ReferenceBank(taps=1, width=6, grid=(3, 3))
    original = torch.randn(2, 10, 6, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="have no others to be compared with.*give a second normal image"):
        bank.fit([original[:1]])
    assert not bank.fitted
    assert bank.fit([original]).max() < 1


def test_a_region_with_patches_that_nothing_can_be_compared_with_is_refused() -> None:
    normal = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    small = model(region=[0.5, 0.5, 1, 1])
    with pytest.raises(InputError, match="a larger region"):
        small.set_references([normal[:1]])
    assert small.set_references([normal]).map_score.isfinite().all()
    half = model(region=[0, 0.5, 1, 1])
    assert half.set_references([normal[:1]]).map_score.max() < 100, "in units of what is usual"
