"""The scale of a comparison: 0.5 is the threshold of every model that has one."""

import numpy as np
import pytest
import torch
from anomalib.data import InferenceBatch
from anomalib.post_processing import PostProcessor

from anomalib_clipad.compare.scale import choose_scales
from anomalib_clipad.components.scores import MapScale, Prediction
from anomalib_clipad.engine.post_processing import ClipAdPostProcessor


@pytest.mark.parametrize("sensitivity", [0.5, 0.8, 0.3])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", [PostProcessor, ClipAdPostProcessor])
def test_scores_and_maps_are_shown_where_the_post_processor_shows_them(
    kind: type[PostProcessor], known: bool, offset: bool, sensitivity: float
) -> None:
    """With the default sensitivity all values agree, with any the verdicts do."""
    arguments = {"image_sensitivity": sensitivity, "pixel_sensitivity": sensitivity}
    ours = kind is ClipAdPostProcessor
    processor = kind(MapScale(0.3, 5.0), **arguments) if ours else kind(**arguments)
    if known:
        for level, values in {"image": (2.0, -1.0, 7.0), "pixel": (0.4, 0.0, 0.9)}.items():
            for name, value in zip((f"_{level}_threshold", f"{level}_min", f"{level}_max"), values, strict=True):
                getattr(processor, name).fill_(value)
    if offset and ours and known:
        processor.map_offset.take(0.2)
    scores, maps = torch.linspace(-3, 9, 41), torch.linspace(-0.53, 1.49, 41 * 9).reshape(41, 3, 3)
    if not (known or ours):
        assert not choose_scales(processor, scores.tolist(), [(0, 1)] * 41, [None] * 41).score.known
        return
    offsets = torch.linspace(-0.1, 0.6, 41)
    raw = (
        Prediction(scores, maps, scores, scores, map_offset=offsets)
        if ours
        else InferenceBatch(scores, None, maps, None)
    )
    expected, scales = processor(raw), choose_scales(processor, scores.tolist(), [(0, 1)] * 41, [None] * 41)
    of_maps = scales.maps_of([None] * 41, offsets.tolist())
    shown_score = scales.score.shown(scores.numpy())
    shown_map = np.stack([scale.shown(one) for scale, one in zip(of_maps, maps.numpy(), strict=True)])
    np.testing.assert_array_equal(shown_score > 0.5, expected.pred_label.numpy())
    np.testing.assert_array_equal(shown_map > 0.5, expected.pred_mask.numpy())
    if sensitivity == 0.5:
        np.testing.assert_allclose(shown_score.clip(0, 1), expected.pred_score.numpy(), atol=1e-6)
        np.testing.assert_allclose(shown_map.clip(0, 1), expected.anomaly_map.numpy(), atol=1e-6)
    assert (np.diff(shown_score) > 0).all(), "not clamped, so the order stays"


def test_good_images_of_one_score_set_the_threshold_there() -> None:
    """Such as a single one."""
    scales = choose_scales(None, [3.0, 5.0], [(1.0, 1.0), (0.0, 4.0)], [0, 1])
    assert scales.score.shown([2.0, 3.0, 5.0]).tolist() == [0.0, 0.5, 1.0]
    assert scales.map.shown([0.0, 1.0, 4.0]).tolist() == [0.0, 0.5, 1.0]


def test_good_images_without_a_number_leave_a_scale() -> None:
    scales = choose_scales(None, [np.nan, 5.0], [(np.nan, np.nan), (0.0, 4.0)], [0, 1])
    assert scales.score.shown([-1.0, 0.0, 5.0]).tolist() == [0.0, 0.5, 1.0]


def test_what_is_not_normalised_is_shown_from_0_to_1_with_the_threshold_in_the_middle() -> None:
    processor = PostProcessor(enable_normalization=False)
    processor._image_threshold.fill_(2.0)
    processor._pixel_threshold.fill_(0.5)
    scales = choose_scales(processor, [1.0, 2.0, 6.0], [(0.0, 0.75), (0.25, 0.5), (0.25, 1.5)], [None] * 3)
    assert scales.score.shown([1.0, 2.0, 6.0]).tolist() == [0.375, 0.5, 1.0]
    assert scales.map.shown([0.0, 0.5, 1.5]).tolist() == [0.25, 0.5, 1.0]
