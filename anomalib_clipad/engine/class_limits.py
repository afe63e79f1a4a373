"""Thresholds of several classes: which of a class's own, and which of all classes together."""

import torch

from anomalib_clipad.components.class_choice import rows_of
from anomalib_clipad.components.conformal import p_values
from anomalib_clipad.components.float32 import Float32Buffers

LEVELS, KEYS = ("image", "pixel"), ("min", "max", "threshold")


class ClassLimits(Float32Buffers):
    """Thresholds, ranges and scores of normal images of each class; empty where there is one class.

    The values of one class are the post-processor's own.

    Example:
        >>> limits = ClassLimits()
        >>> limits.take(torch.arange(6.0), torch.tensor([0.1, 0.4]), classes=2)
        >>> limits.take(torch.arange(6.0) + 1, torch.tensor([0.2]), classes=2, number=1)
        >>> [values.tolist() for values in limits("image", torch.tensor([0, 1]))]
        [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]
        >>> limits.p_values(torch.tensor([0.3, 0.3]), torch.tensor([0, 1])).tolist()
        [0.66..., 0.5]
    """

    growing = ("values", "good_scores", "good_class")
    added = True

    values: torch.Tensor
    good_scores: torch.Tensor
    good_class: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("values", torch.empty(0, len(LEVELS) * len(KEYS)))  # (classes, 6)
        self.register_buffer("good_scores", torch.empty(0))  # (n,) image scores of normal images
        self.register_buffer("good_class", torch.empty(0))  # (n,) their classes

    @property
    def known(self) -> bool:
        """Whether there is more than one class."""
        return len(self.values) > 0

    def take(self, values: torch.Tensor, good_scores: torch.Tensor, classes: int, number: int | None = None) -> None:
        """Take over what was set for a class.

        Args:
            values: (6,), minimum, maximum and threshold of the image score, then of the map.
            good_scores: (n,) image scores of the class's normal images.
            classes: How many classes there are.
            number: Index of the class; what belongs to all classes together by default, which each of them takes.
        """
        if number is None:
            self.values = values.to(self.values).repeat(classes, 1)
            self.good_class = torch.arange(classes).to(self.values).repeat_interleave(len(good_scores))
            self.good_scores = good_scores.to(self.values).repeat(classes)
            return
        self.values[number] = values.to(self.values)
        others = self.good_class != number
        self.good_scores = torch.cat([self.good_scores[others], good_scores.to(self.values)])
        self.good_class = torch.cat([self.good_class[others], torch.full_like(good_scores, number).to(self.values)])

    def forward(self, level: str, class_index: torch.Tensor, dims: int = 0) -> tuple[torch.Tensor, ...]:
        """Minimum, maximum and threshold of a batch.

        Args:
            level: ``image`` or ``pixel``.
            class_index: (B,) index of the images' classes.
            dims: 0 for scores, 2 for maps.

        Returns:
            Three tensors (B,), or (B, 1, 1).
        """
        start = LEVELS.index(level) * len(KEYS)
        rows = rows_of(self.values, class_index, dims)
        return rows[..., start : start + len(KEYS)].unbind(dim=-1)

    def p_values(self, scores: torch.Tensor, class_index: torch.Tensor) -> torch.Tensor:
        """Conformal p-values of scores (B,), each among the normal images of its class; NaN where there are none."""
        # Masks and not a loop over the classes, which an exported file cannot have.
        own = self.good_class == class_index[:, None]  # (B, n)
        return torch.where(own.any(dim=1), p_values(scores, self.good_scores, own), torch.nan)

    @property
    def normal_images(self) -> list[int]:
        """How many normal images of each class have scores."""
        return [int((self.good_class == number).sum()) for number in range(len(self.values))]

    def forget(self) -> None:
        """Have the values of one class, which are kept elsewhere."""
        for name in self.growing:
            setattr(self, name, getattr(self, name)[:0])
