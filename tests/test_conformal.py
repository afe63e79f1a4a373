"""Thresholds from normal images: the promise holds for new ones."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import beta, binom

from anomalib_clipad.components import conformal_threshold, p_values
from anomalib_clipad.errors import InputError


@pytest.mark.parametrize(
    ("images", "rate"), [(19, 0.05), (39, 0.05), (99, 0.01), (9, 0.1), (50, 0.3), (3, 0.5), (38, 0.05)]
)
def test_the_threshold_is_the_score_of_the_right_rank(images: int, rate: float) -> None:
    scores = torch.randperm(images).float()
    threshold = conformal_threshold(scores, rate)
    rank = math.ceil(round((images + 1) * (1 - rate), 9))
    assert threshold.value == sorted(scores.tolist())[rank - 1]
    assert threshold.expected_rate == pytest.approx((images + 1 - rank) / (images + 1))
    assert threshold.expected_rate <= rate + 1e-9
    assert threshold.upper_rate == pytest.approx(beta.ppf(0.95, images + 1 - rank, rank))


@pytest.mark.parametrize(("images", "rate"), [(18, 0.05), (98, 0.01), (1, 0.05), (8, None)])
def test_too_few_images_give_the_largest_score_and_the_rate_it_is_worth(images: int, rate: float | None) -> None:
    threshold = conformal_threshold(torch.arange(images).float(), rate)
    assert threshold.value == images - 1
    assert threshold.expected_rate == pytest.approx(1 / (images + 1))


def test_known_numbers_of_images_for_a_bound() -> None:
    """59 images for at most 5 % with 95 % confidence, 299 for 1 %."""
    for images, rate in ((59, 0.05), (299, 0.01)):
        assert conformal_threshold(torch.arange(images).float()).upper_rate <= rate
        assert conformal_threshold(torch.arange(images - 1).float()).upper_rate > rate


@pytest.mark.parametrize(("images", "rate"), [(19, 0.05), (40, 0.1), (7, 0.05)])
def test_the_realised_rate_is_the_promised_one(images: int, rate: float) -> None:
    """2,000 draws of n normal images and a new one: how often the new one is above the threshold."""
    draws, rng = 2000, np.random.default_rng(0)
    scores = torch.from_numpy(rng.gamma(2.0, size=(draws, images + 1)))
    thresholds = [conformal_threshold(row[1:], rate) for row in scores]
    above = sum(float(row[0]) > threshold.value for row, threshold in zip(scores, thresholds, strict=True))
    low, high = binom.interval(0.999, draws, thresholds[0].expected_rate)
    assert low <= above <= high
    p = torch.cat([p_values(row[:1], row[1:]) for row in scores])
    for level in (0.1, 0.25, 0.5):  # p-values of normal images are uniform, or larger
        assert (p <= level).sum() <= binom.ppf(0.999, draws, level)


def test_p_values_count_ties_and_what_is_not_a_number() -> None:
    ours = p_values(torch.tensor([2.0, 2.5, 9.0, math.nan]), torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(ours, torch.tensor([3, 2, 1, 1]) / 4)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, math.nan, "0.05", True, [0.05]])
def test_a_rate_outside_of_0_to_1_is_one_sentence(rate: object) -> None:
    with pytest.raises(InputError, match="false_alarm_rate must be a number between 0 and 1"):
        conformal_threshold(torch.rand(20), rate)


def test_no_image_is_one_sentence() -> None:
    with pytest.raises(InputError, match="at least one normal image"):
        conformal_threshold(torch.empty(0), 0.05)
