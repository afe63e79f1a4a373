"""From tokens and maps to the two scores of an image, and from these to one."""

from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from anomalib_clipad.components.float32 import Float32Buffers
from anomalib_clipad.components.surgery import margin

LOGIT_SCALE = 100.0  # CLIP's own temperature

# Of images with references, see ReferenceFusion.
LIMIT = 20.0  # units, which no map exceeds, however regular the normal images are
LARGEST_SHARE = 0.1  # of a map's pixels, whose mean is the map's score
TEXT_WEIGHT = 0.5  # of the text score beside the map's, both in units of the normal images
LOGIT_BOUND = 1e-6  # text scores nearer to 0 or 1 count as this


class Scores(NamedTuple):
    """What the method gives for a batch, before the two scores become one.

    Attributes:
        anomaly_map: (B, H, W), smoothed; around 0, larger is more anomalous, at most 1 in size for each stage.
        text_score: (B,) in [0, 1], softmax of the image against the two text vectors.
        map_score: (B,), largest value of the map.
        defect_evidence: (B, V, N, words) of the patches of V views, if there are words, see :class:`DefectNames`.

    Example:
        >>> maps = torch.tensor([[[0.01, -0.02], [0.03, 0.0]]])
        >>> Scores(maps, torch.tensor([0.5]), maps.amax(dim=(-2, -1))).map_score
        tensor([0.0300])
    """

    anomaly_map: torch.Tensor
    text_score: torch.Tensor
    map_score: torch.Tensor
    defect_evidence: torch.Tensor | None = None


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


class Prediction(NamedTuple):
    """What a network gives for a batch; labels and masks are the post-processor's.

    Attributes:
        pred_score: (B,), one score an image, see :class:`ScoreFusion`; larger is more anomalous.
        anomaly_map: (B, H, W), as in :class:`Scores`.
        text_score: (B,) in [0, 1], likewise.
        map_score: (B,), likewise.

    Example:
        >>> maps = torch.zeros(1, 2, 2)
        >>> Prediction(torch.tensor([0.5]), maps, torch.tensor([0.5]), torch.tensor([0.0])).anomaly_map.shape
        torch.Size([1, 2, 2])
    """

    pred_score: torch.Tensor
    anomaly_map: torch.Tensor
    text_score: torch.Tensor
    map_score: torch.Tensor


class ScoreFusion(Float32Buffers):
    """One image score from text score and map score; the only owner of their ranges.

    Fitted on the scores of labelled validation images, it is the paper's: each score min-max normalised, then the mean
    of the two. Before, the map score is brought into (0, 1) by the scale of the model's map.

    Args:
        map_scale: Scale of the model's map.

    Example:
        >>> fusion = ScoreFusion(MapScale(centre=0.0, slope=50.0))
        >>> text, maps = torch.tensor([0.2, 0.4]), torch.tensor([0.0, 0.02])
        >>> fusion(text, maps)
        tensor([0.3500, 0.5750])
        >>> fusion.fit(text, maps)
        tensor([0., 1.])
        >>> fusion(torch.tensor([0.3]), torch.tensor([0.01]))
        tensor([0.5000])
    """

    score_min: torch.Tensor
    score_max: torch.Tensor

    def __init__(self, map_scale: MapScale) -> None:
        super().__init__()
        self.map_scale = map_scale
        # Of the text and the map score; unknown until fitted.
        self.register_buffer("score_min", torch.full((2,), float("nan")))
        self.register_buffer("score_max", torch.full((2,), float("nan")))

    def forward(self, text_score: torch.Tensor, map_score: torch.Tensor) -> torch.Tensor:
        """Fuse scores of shape (B,) each; in [0, 1] within the ranges, or if there are none."""
        both = torch.stack([text_score, map_score], dim=-1)
        # Finite where unknown, since quantisers fail at branches that are not taken.
        minimum, maximum = self.score_min.nan_to_num(), self.score_max.nan_to_num()
        extent = maximum - minimum
        normalised = (both - minimum) / torch.where(extent > 0, extent, 1.0)
        by_rule = torch.stack([text_score, self.map_scale.squash(map_score)], dim=-1)
        return torch.where(self.score_min.isnan(), by_rule, normalised).mean(dim=-1)

    def fit(self, text_score: torch.Tensor, map_score: torch.Tensor) -> torch.Tensor:
        """Set the ranges from validation scores of shape (N,) each, and return these fused."""
        both = torch.stack([text_score, map_score], dim=-1)
        self.score_min.copy_(both.amin(dim=0))
        self.score_max.copy_(both.amax(dim=0))
        return self(text_score, map_score)

    def reset(self) -> None:
        """Forget the ranges."""
        self.score_min.fill_(float("nan"))
        self.score_max.fill_(float("nan"))


class ReferenceFusion(Float32Buffers):
    """One map from two and one score from two, each in units of what it does on the normal images.

    A value's unit is its standard deviation over the references, counted from its mean there. So a map that fires on
    normal images too has less to say. No test statistics are used. Units and image score are ours; figures are
    in ``benchmarks/references.md``.

    Example:
        >>> fusion = ReferenceFusion()
        >>> fusion.fit(torch.rand(4, 64), torch.rand(4, 64), torch.rand(4))
        >>> anomaly_map = fusion.fuse_maps(torch.rand(2, 8, 8), torch.rand(2, 8, 8))
        >>> fusion.fuse_scores(torch.rand(2), fusion.map_score(anomaly_map.flatten(1))).shape
        torch.Size([2])
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        # Of the text map, the reference map, and the text score's logit.
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))

    def fit(self, text_maps: torch.Tensor, reference_maps: torch.Tensor, text_scores: torch.Tensor) -> None:
        """Measure the units.

        The logits are few, so one more, a logit away from their mean, is added to their variance.

        Args:
            text_maps: (k, n), of the references' n pixels.
            reference_maps: (k, n), of each compared with the others.
            text_scores: (k,) in [0, 1].
        """
        logits = _logit(text_scores)
        values = [maps.double() for maps in (text_maps, reference_maps)]
        mean = torch.stack([*(maps.mean() for maps in values), logits.double().mean()])
        variance = torch.stack([*(maps.var(correction=0) for maps in values), logits.double().var(correction=0)])
        variance[2] += (1 - variance[2]) / (len(logits) + 1)
        self.mean.copy_(mean)
        # A map that is flat on the references has no unit; rounding is not to become one.
        self.std.copy_(variance.sqrt().clamp(min=1e-6))

    def _load_from_state_dict(
        self,
        state_dict: MutableMapping[str, torch.Tensor],
        prefix: str,
        *args: Any,  # noqa: ANN401 - torch's
        **kwargs: Any,  # noqa: ANN401 - torch's
    ) -> None:
        self.reset()  # which stays where a version without references has written the state dict
        for name in ("mean", "std"):
            state_dict.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def reset(self) -> None:
        """Have no units."""
        self.mean.zero_()
        self.std.fill_(1)

    def fuse_maps(self, text_map: torch.Tensor, reference_map: torch.Tensor) -> torch.Tensor:
        """Sum of two maps (B, H, W) in their units u, each as u / (1 + abs(u) / 20): neither outvotes the other."""
        units = (torch.stack([text_map, reference_map], dim=-1) - self.mean[:2]) / self.std[:2]
        return (units / (1 + units.abs() / LIMIT)).sum(dim=-1)

    @staticmethod
    def map_score(values: torch.Tensor, area: int | None = None) -> torch.Tensor:
        """Mean of the largest values of a map.

        Args:
            values: (B, n), the map's n pixels.
            area: Pixels of which a tenth is looked at, at most all; all by default. A tile's, where a defect is to be
                found that is small beside the picture.

        Returns:
            (B,).
        """
        looked_at = min(area or values.shape[1], values.shape[1])
        return values.topk(max(1, round(LARGEST_SHARE * looked_at)), dim=1).values.mean(dim=1)

    def fuse_scores(self, text_score: torch.Tensor, map_score: torch.Tensor) -> torch.Tensor:
        """The image score, (B,): the map's score and half of the text score's logit in its unit."""
        return map_score + TEXT_WEIGHT * (_logit(text_score) - self.mean[2]) / self.std[2]


def _logit(score: torch.Tensor) -> torch.Tensor:
    bounded = score.clamp(LOGIT_BOUND, 1 - LOGIT_BOUND)
    return (bounded / (1 - bounded)).log()
