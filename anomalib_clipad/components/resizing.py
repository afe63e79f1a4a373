"""Antialiased bicubic resizing as a matrix: the same in every format that a model is exported to."""

import torch

CUBIC = -0.5  # the kernel's parameter where Pillow and torch smooth against aliasing


def bicubic_matrix(length: int, size: int, device: torch.device | None = None) -> torch.Tensor:
    """Antialiased bicubic resizing of a line of ``length`` values as a matrix.

    Args:
        length: Length of the line; may be a symbol while a model is exported.
        size: Length wanted.
        device: Where the matrix is made.

    Returns:
        (size, length) in float32; every row sums to 1.

    Example:
        >>> bicubic_matrix(4, 2).round(decimals=3)
        tensor([[ 0.4590,  0.4590,  0.1200, -0.0370],
                [-0.0370,  0.1200,  0.4590,  0.4590]])
    """
    steps = torch.scalar_tensor(length, dtype=torch.float32, device=device) / size
    centres = (torch.arange(size, dtype=torch.float32, device=device) + 0.5) * steps  # in pixels of the line
    pixels = torch.arange(length, dtype=torch.float32, device=device) + 0.5
    x = ((pixels - centres[:, None]) / steps.clamp(min=1)).abs()
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.sum(dim=1, keepdim=True)
