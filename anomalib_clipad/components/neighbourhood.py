"""Patches seen with their neighbours, which finds what is too large for one patch."""

import torch
from torch.nn import functional as F


def neighbourhood_means(patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Mean of every patch and its up to eight neighbours, of unit length again; padding does not count.

    Args:
        patches: (B, N, W) unit vectors, row by row.
        grid: Rows and columns of patches.

    Returns:
        (B, N, W) unit vectors.

    Example:
        >>> neighbourhood_means(torch.eye(2)[None], (1, 2))
        tensor([[[0.7071, 0.7071],
                 [0.7071, 0.7071]]])
    """
    rows, columns = (_near(side, patches) for side in grid)
    # Two small matrix products leave the vectors where they lie; a sum of unit length is the mean of unit length.
    sums = rows @ patches.unflatten(1, grid).flatten(2)  # (B, rows, columns * W)
    sums = columns @ sums.unflatten(2, (grid[1], -1))  # (B, rows, columns, W)
    return F.normalize(sums.flatten(1, 2), dim=-1)


def _near(length: int, like: torch.Tensor) -> torch.Tensor:
    """(length, length), 1 where two places of a line are the same or neighbours."""
    places = torch.arange(length, device=like.device)
    return ((places[:, None] - places).abs() <= 1).to(like.dtype)
