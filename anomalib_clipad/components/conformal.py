"""Thresholds from the scores of normal images alone, with a false-alarm rate that holds for new ones.

Split conformal, see Bates et al., "Testing for outliers with conformal p-values", 2023: if a new normal image is
exchangeable with n others, its score is equally likely to have any of the n + 1 ranks.
"""

import math
from typing import NamedTuple

import torch

from anomalib_clipad.errors import InputError

CONFIDENCE = 0.95


class ConformalThreshold(NamedTuple):
    """A threshold that normal images seldom exceed.

    Attributes:
        value: The threshold; a larger score is anomalous.
        images: Number n of normal images it was made from.
        rank: Which of their scores it is, from 1 for the smallest.

    Example:
        >>> threshold = ConformalThreshold(value=0.7, images=19, rank=19)
        >>> threshold.expected_rate, round(threshold.upper_rate, 3)
        (0.05, 0.146)
    """

    value: float
    images: int
    rank: int

    @property
    def expected_rate(self) -> float:
        """Share of new normal images above the threshold, on average over all draws of the n."""
        return (self.images + 1 - self.rank) / (self.images + 1)

    @property
    def upper_rate(self) -> float:
        """What that share stays below with 95 % confidence: it follows Beta(n + 1 - rank, rank)."""
        from scipy.special import betaincinv  # here, because no model's start is to wait for it

        return float(betaincinv(self.images + 1 - self.rank, self.rank, CONFIDENCE))


def conformal_threshold(scores: torch.Tensor, rate: float | None = None) -> ConformalThreshold:
    """Threshold of the scores of n normal images.

    Args:
        scores: (n,) scores, larger is more anomalous; one that is not a number counts as the largest.
        rate: False-alarm rate wanted, between 0 and 1. n images support none below 1 / (n + 1): the largest score is
            taken then, and where no rate is given.

    Returns:
        The l-th smallest score, l = ceil((n + 1)(1 - rate)).

    Raises:
        InputError: If there is no score, or the rate is not between 0 and 1.

    Example:
        >>> conformal_threshold(torch.arange(1.0, 100), rate=0.05)
        ConformalThreshold(value=95.0, images=99, rank=95)
        >>> conformal_threshold(torch.tensor([0.2, 0.4]), rate=0.05).expected_rate.__round__(3)
        0.333
    """
    if rate is not None:
        check_rate(rate)
    count = scores.numel()
    if not count:
        msg = "A threshold needs the score of at least one normal image."
        raise InputError(msg)
    above = max(1, math.floor((count + 1) * (rate or 0.0) + 1e-9))  # rounding is not to cost an image
    rank = min(count, count + 1 - above)
    return ConformalThreshold(float(scores.flatten().sort().values[rank - 1]), count, rank)


def check_rate(rate: object) -> None:
    """Refuse a false-alarm rate that is not between 0 and 1.

    Raises:
        InputError: If it is not.

    Example:
        >>> check_rate(0.05)
    """
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1:
        msg = f"false_alarm_rate must be a number between 0 and 1, such as 0.05, got {rate!r}."
        raise InputError(msg)


def p_values(scores: torch.Tensor, normal: torch.Tensor, own: torch.Tensor | None = None) -> torch.Tensor:
    """Conformal p-values: how seldom a normal image scores that high.

    Args:
        scores: (B,) scores; one that is not a number is more anomalous than any other.
        normal: (n,) scores of normal images.
        own: (B, n), true where a normal image counts for a score; by default all do.

    Returns:
        (B,), (1 + number of normal scores at least as high) / (n + 1).

    Example:
        >>> p_values(torch.tensor([0.0, 0.3, 0.9]), torch.tensor([0.1, 0.2, 0.3, 0.4])).tolist()
        [1.0, 0.6000000238418579, 0.20000000298023224]
    """
    higher = normal >= scores[:, None]
    if own is None:
        return (1 + higher.sum(dim=1)) / (len(normal) + 1)
    return (1 + (higher & own).sum(dim=1)) / (own.sum(dim=1) + 1)
