"""Tokens of normal images, as they are and turned, on their way into a bank of references."""

from collections.abc import Iterator

import torch


class ReferenceTokens:
    """Tokens of normal images, collected batch by batch for :meth:`ReferenceBank.fit`.

    Example:
        >>> tokens = ReferenceTokens()
        >>> for turn in (0, 1, 0, 1):
        ...     tokens.add(turn, [torch.randn(2, 13, 8), torch.randn(2, 13, 8)])
        >>> [tap.shape for tap in tokens.taps()]
        [torch.Size([8, 13, 8]), torch.Size([8, 13, 8])]
    """

    def __init__(self) -> None:
        self._turns: dict[int, list[list[torch.Tensor]]] = {}

    def add(self, turn: int, original: list[torch.Tensor]) -> None:
        """Add a batch, of images as they are if ``turn`` is 0: one (b, N + 1, W) tensor a tap."""
        self._turns.setdefault(turn, []).append(original)

    def extend(self, other: "ReferenceTokens") -> None:
        """Add those of further images."""
        for turn, batches in other._turns.items():
            self._turns.setdefault(turn, []).extend(batches)

    def taps(self) -> list[torch.Tensor]:
        """One tensor a tap, images as they are first."""
        batches = [batch for _, turned in sorted(self._turns.items()) for batch in turned]
        return [torch.cat(tap) for tap in zip(*batches, strict=True)]


def turns(images: torch.Tensor) -> Iterator[torch.Tensor]:
    """Images as they are, then flipped and turned: eight ways, four if they are not square.

    Example:
        >>> len(list(turns(torch.rand(1, 3, 8, 8)))), len(list(turns(torch.rand(1, 3, 8, 16))))
        (8, 4)
    """
    square = images.shape[-2] == images.shape[-1]
    for quarters in range(4) if square else (0, 2):
        turned = images.rot90(quarters, (-2, -1))
        yield turned
        yield turned.flip(-1)
