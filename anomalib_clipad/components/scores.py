"""From tokens and maps to the two scores of an image, and from these to one."""

from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from anomalib_clipad.components.class_choice import rows_of
from anomalib_clipad.components.float32 import Float32Buffers
from anomalib_clipad.components.surgery import margin

LOGIT_SCALE = 100.0  # CLIP's own temperature


class Scores(NamedTuple):
    """What the method gives for a batch, before the two scores become one.

    Attributes:
        anomaly_map: (B, H, W), smoothed; around 0, larger is more anomalous, at most 1 in size for each stage.
        text_score: (B,) in [0, 1], softmax of the image against the two text vectors.
        map_score: (B,), largest value of the map.
        defect_evidence: (B, V, N, words) of the patches of V views, if there are words, see :class:`DefectNames`.
        class_index: (B,) index of the class that each image was compared with; the first one where there is none.
        map_offset: (B,) mean of what the class token adds to the map, in the map's units, see
            :func:`anomalib_clipad.components.surgery.surgery_scores`.

    Example:
        >>> maps = torch.tensor([[[0.01, -0.02], [0.03, 0.0]]])
        >>> Scores(maps, torch.tensor([0.5]), maps.amax(dim=(-2, -1))).map_score
        tensor([0.0300])
    """

    anomaly_map: torch.Tensor
    text_score: torch.Tensor
    map_score: torch.Tensor
    defect_evidence: torch.Tensor | None = None
    class_index: torch.Tensor | None = None
    map_offset: torch.Tensor | None = None


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
        class_index: (B,), likewise.
        map_offset: (B,), likewise.

    Example:
        >>> maps = torch.zeros(1, 2, 2)
        >>> Prediction(torch.tensor([0.5]), maps, torch.tensor([0.5]), torch.tensor([0.0])).anomaly_map.shape
        torch.Size([1, 2, 2])
    """

    pred_score: torch.Tensor
    anomaly_map: torch.Tensor
    text_score: torch.Tensor
    map_score: torch.Tensor
    class_index: torch.Tensor | None = None
    map_offset: torch.Tensor | None = None


class ScoreFusion(Float32Buffers):
    """One image score from text score and map score; the only owner of their ranges, which each class has its own of.

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

    growing = ("score_min", "score_max")

    score_min: torch.Tensor
    score_max: torch.Tensor

    def __init__(self, map_scale: MapScale) -> None:
        super().__init__()
        self.map_scale = map_scale
        # (classes, 2), of the text and the map score; unknown until fitted.
        self.register_buffer("score_min", torch.full((1, 2), float("nan")))
        self.register_buffer("score_max", torch.full((1, 2), float("nan")))

    def forward(
        self, text_score: torch.Tensor, map_score: torch.Tensor, class_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Fuse scores of shape (B,) each; in [0, 1] within the ranges, or if there are none.

        Args:
            text_score: (B,) in [0, 1].
            map_score: (B,), of the map's own range.
            class_index: (B,) index of the images' classes; the first one for all by default.
        """
        both = torch.stack([text_score, map_score], dim=-1)
        lowest, highest = rows_of(self.score_min, class_index), rows_of(self.score_max, class_index)
        # Finite where unknown, since quantisers fail at branches that are not taken.
        minimum, maximum = lowest.nan_to_num(), highest.nan_to_num()
        extent = maximum - minimum
        normalised = (both - minimum) / torch.where(extent > 0, extent, 1.0)
        by_rule = torch.stack([text_score, self.map_scale.squash(map_score)], dim=-1)
        return torch.where(lowest.isnan(), by_rule, normalised).mean(dim=-1)

    def fit(self, text_score: torch.Tensor, map_score: torch.Tensor, number: int | None = None) -> torch.Tensor:
        """Set the ranges from validation scores of shape (N,) each, and return these fused.

        Args:
            text_score: (N,) in [0, 1].
            map_score: (N,), of the map's own range.
            number: Whose ranges they are, an index into the classes; every class's by default.
        """
        both = torch.stack([text_score, map_score], dim=-1)
        own = slice(None) if number is None else slice(number, number + 1)
        # A run in inference mode would leave tensors that cannot be written to in another one.
        with torch.inference_mode(mode=False):
            self.score_min, self.score_max = self.score_min.clone(), self.score_max.clone()
            self.score_min[own] = both.amin(dim=0)
            self.score_max[own] = both.amax(dim=0)
        class_index = None if number is None else torch.full_like(text_score, number, dtype=torch.long)
        return self(text_score, map_score, class_index)

    def reset(self, classes: int = 1) -> None:
        """Forget the ranges, and have some for so many classes from now on."""
        with torch.inference_mode(mode=False):  # see above
            self.score_min = self.score_min.new_full((classes, 2), float("nan"))
            self.score_max = self.score_min.clone()

    def _load_from_state_dict(
        self,
        state_dict: MutableMapping[str, torch.Tensor],
        prefix: str,
        *args: Any,  # noqa: ANN401 - handed on to torch's method
        **kwargs: Any,  # noqa: ANN401 - handed on to torch's method
    ) -> None:
        with_classes(state_dict, prefix, self.growing)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def with_classes(state_dict: MutableMapping[str, torch.Tensor], prefix: str, names: Sequence[str]) -> None:
    """Give values that a version of one class has written the dimension of the classes."""
    for name in names:
        value = state_dict.get(prefix + name)
        if isinstance(value, torch.Tensor) and value.ndim == 1:
            state_dict[prefix + name] = value[None]
