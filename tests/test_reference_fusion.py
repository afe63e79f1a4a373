"""Maps and scores of text and references as one, in units of the references."""

import math

import torch

from anomalib_clipad.components import ReferenceFusion


def test_units_are_those_of_the_references() -> None:
    text, reference, scores = torch.rand(4, 5, 6) * 3 + 1, torch.rand(4, 5, 6), torch.tensor([0.2, 0.4, 0.5, 0.6])
    fusion = ReferenceFusion()
    fusion.fit(text, reference, scores)
    images = torch.rand(2, 5, 6) * 40, torch.rand(2, 5, 6)
    units = [
        (image.double() - maps.double().mean()) / maps.double().std(correction=0)
        for image, maps in zip(images, (text, reference), strict=True)
    ]
    expected = [u / (1 + u.abs() / 20) for u in units]
    for found, wanted in zip(fusion.units(*images), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)
    largest = expected[1].flatten(1).sort(descending=True).values[:, :3].mean(dim=1)  # a tenth of 30 pixels
    torch.testing.assert_close(fusion.map_score(expected[1].flatten(1).float()).double(), largest, atol=1e-5, rtol=0)

    logits = torch.logit(scores.double())
    variance = (((logits - logits.mean()) ** 2).sum() + 1) / 5
    scored = [(0.9, 2.0), (0.9, -1.5), (0.1, 2.0), (0.1, -1.5)]  # text above and below that of normal images
    unit = float((torch.logit(torch.tensor(0.9, dtype=torch.float64)) - logits.mean()) / variance.sqrt())
    wanted = torch.tensor([math.hypot(2.0, unit / 2), unit / 2 - 1.5, 2.0, -1.5], dtype=torch.float64)
    ours = fusion.fuse_scores(*map(torch.tensor, zip(*scored, strict=True)))
    torch.testing.assert_close(ours.double(), wanted, atol=1e-5, rtol=0)
    broken = fusion.fuse_scores(torch.tensor([torch.nan, 0.9, 0.9]), torch.tensor([1.0, torch.nan, 1.0]))
    assert broken.isnan().tolist() == [True, True, False]


def test_flat_maps_and_certain_texts_stay_finite() -> None:
    fusion = ReferenceFusion()
    fusion.fit(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), torch.ones(1))
    assert all(units.isfinite().all() for units in fusion.units(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)))
    assert fusion.fuse_scores(torch.tensor([0.0, 1.0]), torch.zeros(2)).isfinite().all()


def test_units_of_maps_that_vary_little_are_their_own() -> None:
    """Distances of regular parts have a standard deviation of some thousandths."""
    maps, fusion = 0.1 + 1e-3 * torch.rand(4, 64), ReferenceFusion()
    fusion.fit(maps, maps, torch.rand(4))
    torch.testing.assert_close(fusion.std[0, :2], maps.std(correction=0).expand(2), atol=0, rtol=1e-3)


def test_units_from_a_run_in_inference_mode_can_be_used_where_gradients_are_on() -> None:
    fusion = ReferenceFusion()
    for mode in (True, False):
        with torch.inference_mode(mode):
            fusion.fit(torch.rand(4, 64), torch.rand(4, 64), torch.rand(4))
        scores = torch.tensor([0.9, 0.8], requires_grad=True)
        fusion.fuse_scores(scores, torch.ones(2)).sum().backward()
        assert scores.grad.isfinite().all()


def test_a_state_dict_of_before_references_has_units_for_one_class() -> None:
    fusion = ReferenceFusion()
    fusion.reset(classes=3)
    fusion.load_state_dict({})
    assert fusion.mean.shape == fusion.std.shape == (1, 3)


def test_what_the_class_token_adds_is_in_units_of_the_text_map_of_its_class() -> None:
    fusion, offsets = ReferenceFusion(), torch.tensor([-0.5, 0.0, 7.0])
    fusion.reset(classes=2)
    text, reference = torch.rand(2, 4, 64) * torch.tensor([3.0, 9.0])[:, None, None], torch.rand(2, 4, 64)
    for number in range(2):
        fusion.fit(text[number], reference[number], torch.rand(4), number)
    for number, index in ((0, None), (0, torch.tensor([0, 0, 0])), (1, torch.tensor([1, 1, 1]))):
        units = offsets / text[number].std(correction=0)
        torch.testing.assert_close(fusion.offset_units(offsets, index), units / (1 + units.abs() / 20))
