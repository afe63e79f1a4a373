"""What defect words' evidence is on normal images."""

from collections.abc import Sequence

import torch

from anomalib_clipad.components.float32 import Float32Buffers
from anomalib_clipad.components.tiling import TILES_WEIGHT


class DefectBaseline(Float32Buffers):
    """What the words' evidence is on normal images: its mean, which becomes zero, and its spread, which becomes equal.

    Values are divided by their word's standard deviation over patches, and multiplied by the mean of these over the
    words: they stay differences of cosines, so that one temperature serves with and without normal images.

    Example:
        >>> baseline = DefectBaseline()
        >>> baseline.fit(torch.tensor([[[[0.0, 0.1], [0.2, 0.2]]]]))
        >>> baseline(torch.tensor([0.1, 0.15]), slice(0, 2))
        tensor([0., 0.])
    """

    growing = ("mean", "std")
    added = True

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in self.growing:  # (words,), empty without normal images
            self.register_buffer(name, torch.empty(0))

    def fit(self, evidence: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Measure normal images.

        Args:
            evidence: (k, V, N, words).
            weights: (V, N), 0 for patches that do not count; by default all do.
        """
        ones = evidence.new_ones(evidence.shape[:-1])
        everywhere = ones if weights is None else ones * weights
        mean = region_means(evidence, everywhere).mean(dim=0)
        variance = region_means((evidence - mean).square(), everywhere).mean(dim=0)
        self.mean, self.std = mean, variance.sqrt().clamp(min=1e-6)

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
            measured.append(torch.stack([self.mean, self.std])[:, start : start + len(own)])
            start += len(own)
        self.mean, self.std = torch.cat(measured, dim=1)

    def reset(self) -> None:
        """Know no normal images."""
        self.mean, self.std = self.mean[:0], self.std[:0]

    def forward(self, values: torch.Tensor, own: slice) -> torch.Tensor:
        """Evidence of one class's words, ``own``, counted from that of normal images where there are any."""
        if not len(self.mean):
            return values
        mean, std = self.mean[own], self.std[own]
        return (values - mean) / std * std.mean()


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
