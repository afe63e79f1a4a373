"""Which of several classes an image shows, from its class token alone. Ours, not the paper's."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from anomalib_clipad.components.float32 import Float32Buffers


class ClassChoice(Float32Buffers):
    r"""Chooses the class whose prompts an image resembles most, the normal and the anomalous ones together.

    So a broken bottle is still a bottle. With :math:`t_p` the unit vectors of all prompts of a class c, and z the unit
    class token of the last tap, an image's class is

    .. math:: \arg\max_c\; z \cdot q_c, \qquad q_c = \frac{\sum_{p \in c} t_p}{\lVert \sum_{p \in c} t_p \rVert}

    Of equals the first one is taken.

    Args:
        embed_dim: Length D of the vectors.

    Example:
        >>> choice = ClassChoice(2)
        >>> choice.ready
        False
        >>> choice.take([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])])
        >>> choice([torch.tensor([[[0.1, 0.9]], [[0.7, 0.2]]])])
        tensor([1, 0])
    """

    growing = ("vectors",)
    added = True

    vectors: torch.Tensor

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.empty(0, embed_dim))  # (classes, D), empty where nothing is to be chosen

    @property
    def ready(self) -> bool:
        """Whether there is anything to choose from."""
        return len(self.vectors) > 0

    def take(self, vectors: Sequence[torch.Tensor]) -> None:
        """Choose among classes from now on, by their vectors (D,), see :meth:`TextEncoder.class_vector`, or not."""
        self.vectors = torch.stack(list(vectors)).to(self.vectors) if vectors else self.vectors[:0]

    def forward(self, surgery: Sequence[torch.Tensor]) -> torch.Tensor:
        """Choose.

        Args:
            surgery: Taps of the surgery path, (B, N + 1, D) each, class token first.

        Returns:
            (B,) index into the classes.
        """
        class_token = F.normalize(surgery[-1][:, 0].float(), dim=-1)
        return (class_token @ self.vectors.T).argmax(dim=1)


def rows_of(values: torch.Tensor, class_index: torch.Tensor | None, dims: int = 0) -> torch.Tensor:
    """What a batch takes of values that each class has its own of.

    Args:
        values: (classes, ...).
        class_index: (B,) index into the classes; the first class for all images by default.
        dims: How many dimensions of size 1 are put behind the first, for values that meet maps.

    Returns:
        (...), the first class's, or (B, 1, ..., ...).

    Example:
        >>> rows_of(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), None)
        tensor([1., 2.])
        >>> rows_of(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 1, 0]), dims=2).shape
        torch.Size([3, 1, 1, 2])
    """
    if class_index is None:
        return values[0]
    rows = values[class_index]
    for _ in range(dims):
        rows = rows.unsqueeze(1)
    return rows
