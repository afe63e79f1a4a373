"""From tokens and maps to the two scores of an image."""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from anomalib_clipad.components.surgery import margin

LOGIT_SCALE = 100.0  # CLIP's own temperature


class Scores(NamedTuple):
    """What the method says of a batch, before the two scores become one.

    Attributes:
        anomaly_map: (B, H, W), smoothed; around 0, larger is more anomalous, at most 1 in size for each stage.
        text_score: (B,) in [0, 1], softmax of the image against the two text vectors.
        map_score: (B,), largest value of the map.

    Example:
        >>> maps = torch.tensor([[[0.01, -0.02], [0.03, 0.0]]])
        >>> Scores(maps, torch.tensor([0.5]), maps.amax(dim=(-2, -1))).map_score
        tensor([0.0300])
    """

    anomaly_map: torch.Tensor
    text_score: torch.Tensor
    map_score: torch.Tensor


def text_score(tokens: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
    """Probability that an image is anomalous, from its class token (section 3.3 of the paper).

    Args:
        tokens: (B, N + 1, D), last tap of the surgery path.
        text_features: (2, D) or (B, 2, D) unit vectors.

    Returns:
        (B,) in [0, 1].

    Example:
        >>> text_score(torch.tensor([[[1.0, 0.0]], [[0.6, 0.8]]]), torch.eye(2)).round(decimals=4)
        tensor([0., 1.])
    """
    class_token = F.normalize(tokens[:, 0].float(), dim=-1)
    # A softmax of two is a sigmoid of their difference.
    return (LOGIT_SCALE * (class_token[:, None] * margin(text_features)).sum(dim=-1))[:, 0].sigmoid()


class MapScale(NamedTuple):
    """Where a model's map balances between normal and anomalous, and how fast it leaves that point.

    Attributes:
        centre: Map value at which neither prevails.
        slope: Logits a unit of the map is worth.

    Example:
        >>> MapScale(centre=0.0, slope=50.0).squash(torch.tensor([-4.0, 0.0, 0.02, 4.0]))
        tensor([0.0025, 0.5000, 0.7500, 0.9975])
    """

    centre: float
    slope: float

    def squash(self, values: torch.Tensor) -> torch.Tensor:
        """Bring map values into (0, 1), the centre to 0.5, strictly increasing in float32 over all that can occur.

        ``x / (1 + |x|)`` flattens late, where a sigmoid of these logits would be 1 already.
        """
        logits = self.slope * (values - self.centre)
        return 0.5 + 0.5 * logits / (1 + logits.abs())
