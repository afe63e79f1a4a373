"""What the comparison with words and the comparison with references give, as one map and one score."""

from collections.abc import MutableMapping
from typing import Any

import torch

from anomalib_clipad.components.class_choice import rows_of
from anomalib_clipad.components.float32 import Float32Buffers
from anomalib_clipad.components.scores import with_classes

LIMIT = 20.0  # units, which no map exceeds, however regular the normal images are
LARGEST_SHARE = 0.1  # of a map's pixels, whose mean is the map's score
TEXT_WEIGHT = 0.5  # of the text score beside the map's, both in units of the normal images
LOGIT_BOUND = 1e-6  # text scores nearer to 0 or 1 count as this


class ReferenceFusion(Float32Buffers):
    """One map from two and one score from two, each in units of what it does on the normal images of its class.

    A value's unit is its standard deviation over the references, counted from its mean there. So a map that fires on
    normal images too has less to say. No test statistics are used. The map is the sum of both; the image score is made
    of the reference map and the text score, as in WinCLIP+ (arXiv 2303.14814). Units, the share of a map that is looked
    at, and how the two scores are joined are ours; figures are in ``benchmarks/references.md``.

    Example:
        >>> fusion = ReferenceFusion()
        >>> fusion.fit(torch.rand(4, 64), torch.rand(4, 64), torch.rand(4))
        >>> text_units, reference_units = fusion.units(torch.rand(2, 8, 8), torch.rand(2, 8, 8))
        >>> fusion.fuse_scores(torch.rand(2), fusion.map_score(reference_units.flatten(1))).shape
        torch.Size([2])
    """

    growing = ("mean", "std")

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        # (classes, 3), of the text map, the reference map, and the text score's logit.
        self.register_buffer("mean", torch.zeros(1, 3))
        self.register_buffer("std", torch.ones(1, 3))

    def fit(
        self, text_maps: torch.Tensor, reference_maps: torch.Tensor, text_scores: torch.Tensor, number: int = 0
    ) -> None:
        """Measure the units.

        The logits are few, so one more, a logit away from their mean, is added to their variance.

        Args:
            text_maps: (k, n), of the references' n pixels.
            reference_maps: (k, n), of each compared with the others.
            text_scores: (k,) in [0, 1].
            number: Index of their class.
        """
        logits = text_scores.logit(eps=LOGIT_BOUND)
        # One after the other, since maps in float64 are large; by the CPU, since GPUs of Apple have no float64.
        units = [torch.var_mean(values.cpu().double(), correction=0) for values in (text_maps, reference_maps, logits)]
        variance, mean = (torch.stack(both) for both in zip(*units, strict=True))
        variance[2] += (1 - variance[2]) / (len(logits) + 1)
        # A run in inference mode would leave tensors that cannot be used where gradients are on.
        with torch.inference_mode(mode=False):
            self.mean, self.std = self.mean.clone(), self.std.clone()
            self.mean[number] = mean.float()
            # A map that is flat on the references has no unit; rounding is not to become one.
            self.std[number] = variance.sqrt().clamp(min=1e-6).float()

    def _load_from_state_dict(
        self,
        state_dict: MutableMapping[str, torch.Tensor],
        prefix: str,
        *args: Any,  # noqa: ANN401 - handed on to torch's method
        **kwargs: Any,  # noqa: ANN401 - handed on to torch's method
    ) -> None:
        self.reset()  # which stays where a version without references has written the state dict
        for name in self.growing:
            state_dict.setdefault(prefix + name, getattr(self, name))
        with_classes(state_dict, prefix, self.growing)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def reset(self, classes: int = 1) -> None:
        """Have no units, for so many classes from now on."""
        self.mean, self.std = self.mean.new_zeros(classes, 3), self.std.new_ones(classes, 3)

    def units(
        self, text_map: torch.Tensor, reference_map: torch.Tensor, class_index: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both maps (B, H, W) in their units u, each as u / (1 + abs(u) / 20): neither outvotes the other in a sum."""
        mean, std = (rows_of(values, class_index, dims=2)[..., :2] for values in (self.mean, self.std))
        units = (torch.stack([text_map, reference_map], dim=-1) - mean) / std
        text_units, reference_units = _limited(units).unbind(dim=-1)
        return text_units, reference_units

    def offset_units(self, offset: torch.Tensor, class_index: torch.Tensor | None = None) -> torch.Tensor:
        """(B,) what all pixels of a text map have in common, as a part of the sum of both maps in their units."""
        return _limited(offset / rows_of(self.std, class_index)[..., 0])

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

    def fuse_scores(
        self, text_score: torch.Tensor, map_score: torch.Tensor, class_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The image score, (B,): the root of the two scores' squares, the text score's with half the weight.

        The text score counts as its logit, in its unit. A score that is below that of normal images adds nothing: it
        is no evidence that what the other one found is none. A map's score below 0 stays as it is.
        """
        mean, std = (rows_of(values, class_index)[..., 2] for values in (self.mean, self.std))
        text = TEXT_WEIGHT * (text_score.logit(eps=LOGIT_BOUND) - mean) / std
        # Not torch.hypot, which cannot be exported to ONNX.
        above = (map_score.clamp(min=0).square() + text.clamp(min=0).square()).sqrt()
        return above + map_score.clamp(max=0)


def _limited(units: torch.Tensor) -> torch.Tensor:
    return units / (1 + units.abs() / LIMIT)
