"""What defect words' evidence is on normal images."""

from collections.abc import Sequence

import torch

from anomalib_clipad.components.float32 import Float32Buffers
from anomalib_clipad.components.tiling import TILES_WEIGHT


class DefectBaseline(Float32Buffers):
    """What the words' evidence is on normal images, from which a word that they show is counted.

    A word whose evidence there is above 0, where the text vectors with it and without it balance, fires on good parts:
    the hole of a nut is no defect. Other words keep their zero. Subtracting every word's mean, and making spreads
    equal, were measured and not taken, see ``benchmarks/defect_names.md``.

    Example:
        >>> baseline = DefectBaseline()
        >>> baseline.fit(torch.tensor([[[[-0.2, 0.1], [-0.1, 0.3]]]]))
        >>> baseline(torch.tensor([0.1, 0.15]), slice(0, 2))
        tensor([ 0.1000, -0.0500])
    """

    growing = ("mean",)
    added = True

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.empty(0))  # (words,), empty without normal images

    def fit(self, evidence: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Measure normal images.

        Args:
            evidence: (k, V, N, words).
            weights: (V, N), 0 for patches that do not count; by default all do.
        """
        ones = evidence.new_ones(evidence.shape[:-1])
        self.mean = region_means(evidence, ones if weights is None else ones * weights).mean(dim=0)

    def fit_classes(
        self,
        evidence: torch.Tensor,
        class_index: torch.Tensor,
        words: Sequence[Sequence[str]],
        weights: torch.Tensor | None = None,
    ) -> None:
        """Measure each class's words on its own normal images, or on all where it has none.

        Args:
            evidence: (k, V, N, words).
            class_index: (k,) index of the images' classes.
            words: Of each class.
            weights: See :meth:`fit`.
        """
        measured, start = [], 0
        for number, own in enumerate(words):
            rows = class_index == number
            self.fit(evidence[rows] if rows.any() else evidence, weights)
            measured.append(self.mean[start : start + len(own)])
            start += len(own)
        self.mean = torch.cat(measured)

    def reset(self) -> None:
        """Know no normal images."""
        self.mean = self.mean[:0]

    def forward(self, values: torch.Tensor, own: slice) -> torch.Tensor:
        """Evidence of one class's words, ``own``, beyond that of normal images where there are any."""
        return values - self.mean[own].clamp(min=0) if len(self.mean) else values


def region_means(evidence: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted means over patches: (B, V, N, words) and (B, V, N) to (B, words).

    Where there are tiles, they count as in the map beside the whole picture, see :class:`Tiling`.

    Example:
        >>> region_means(torch.tensor([[[[1.0], [4.0]]]]), torch.tensor([[[2.0, 1.0]]]))
        tensor([[2.]])
    """
    sums = torch.stack(
        [(evidence * weights[..., None]).sum(dim=2), weights.sum(dim=2)[..., None].expand_as(evidence[:, :, 0])]
    )
    whole, tiles = (values / total for values, total in (sums[:, :, 0], sums[:, :, 1:].sum(dim=2)))
    return whole if evidence.shape[1] == 1 else torch.lerp(whole, tiles, TILES_WEIGHT)
