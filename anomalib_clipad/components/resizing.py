"""Antialiased bicubic resizing as a matrix: the same in every format that a model is exported to."""

import torch
from timm.layers import resample_abs_pos_embed

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


def resample_positions(positions: torch.Tensor, grid: tuple[int, int], of: tuple[int, int]) -> torch.Tensor:
    """Position embeddings of another grid, by timm, or by matrices in an exported model.

    OpenVINO reads antialiased resizing out of an ONNX file wrongly, see
    :class:`anomalib_clipad.engine.pre_processing.ClipAdPreProcessor`.

    Args:
        positions: (1, N + 1, W), class token first.
        grid: Rows and columns wanted.
        of: Rows and columns of ``positions``.

    Returns:
        (1, rows * columns + 1, W).

    Example:
        >>> resample_positions(torch.rand(1, 5, 8), (3, 4), (2, 2)).shape
        torch.Size([1, 13, 8])
    """
    if not torch.compiler.is_compiling():
        return resample_abs_pos_embed(positions, list(grid), list(of))
    rows, columns = (bicubic_matrix(old, new, positions.device) for old, new in zip(of, grid, strict=True))
    class_token, patches = positions[:, :1], positions[0, 1:].float().unflatten(0, of)  # (rows, columns, W)
    resized = rows @ (columns @ patches).flatten(1)
    return torch.cat([class_token, resized.view(1, grid[0] * grid[1], -1).to(positions.dtype)], dim=1)
