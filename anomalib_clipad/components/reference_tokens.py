"""Tokens of normal images, as they are and turned, on their way into a bank of references."""

from collections.abc import Iterator, Sequence

import torch

from anomalib_clipad.errors import InputError


class ReferenceTokens:
    """Patches of normal images in half precision, collected batch by batch for :meth:`ReferenceBank.fit_patches`.

    Example:
        >>> tokens = ReferenceTokens()
        >>> for turn in (0, 1, 0, 1):
        ...     tokens.add(turn, torch.randn(2 * 12, 4, 8).half())
        >>> tokens.patches().shape
        torch.Size([96, 4, 8])
    """

    def __init__(self) -> None:
        self._turns: dict[int, list[torch.Tensor]] = {}

    def add(self, turn: int, patches: torch.Tensor) -> None:
        """Add those of a batch, of images as they are if ``turn`` is 0: (b * N, taps, W)."""
        self._turns.setdefault(turn, []).append(patches)

    def extend(self, other: "ReferenceTokens") -> None:
        """Add those of further images."""
        for turn, batches in other._turns.items():
            self._turns.setdefault(turn, []).extend(batches)

    def patches(self) -> torch.Tensor:
        """All in one tensor, images as they are first; they are kept once, as parts of it."""
        batches = [batch for turned in self._turns.values() for batch in turned]
        rest = whole = batches[0].new_empty(sum(map(len, batches)), *batches[0].shape[1:])
        del batches
        for _, turned in sorted(self._turns.items()):
            own, rest = rest.tensor_split([sum(map(len, turned))])
            for part in own.split([len(batch) for batch in turned]):
                part.copy_(turned.pop(0))  # each is given up once it is copied, so there are never two of all
            turned.append(own)
        return whole


def reference_taps(wanted: Sequence[int] | None, suited: Sequence[int] | None, layers: Sequence[int]) -> list[int]:
    """At which of a tower's taps images are compared with references.

    Args:
        wanted: Blocks of these taps; by default those that suit the weights, or else all, as in APRIL-GAN.
        suited: Blocks that are known to suit the weights, see :class:`anomalib_clipad.components.Backbone`.
        layers: Blocks of all taps.

    Returns:
        Numbers of the taps, counted from 0.

    Raises:
        InputError: If ``wanted`` are not some of ``layers``.

    Example:
        >>> reference_taps([3, 9], None, [3, 6, 9, 12]), reference_taps(None, [3], [3, 6, 9, 12])
        ([0, 2], [0])
    """
    if wanted is None:
        wanted = suited if suited and set(suited) <= set(layers) else layers
    blocks = list(wanted) if isinstance(wanted, list | tuple) else []
    if not blocks or not all(type(block) is int for block in blocks) or blocks != [b for b in layers if b in blocks]:
        msg = f"reference_layers must be some of the layers {list(layers)}, in this order, got {wanted!r}."
        raise InputError(msg)
    return [list(layers).index(block) for block in blocks]


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
