"""Gaussian smoothing of anomaly maps, equal to scipy's ``gaussian_filter`` that the authors use."""

import torch

from anomalib_clipad.components.float32 import Float32Buffers
from anomalib_clipad.errors import InputError

TRUNCATE = 4.0  # radius of the kernel in standard deviations, scipy's default


def gaussian_matrix(size: int, sigma: float) -> torch.Tensor:
    """Smoothing of a line of ``size`` values as a matrix, edges mirrored with the edge value repeated.

    Args:
        size: Length of the line.
        sigma: Standard deviation in pixels; 0 leaves the line as it is.

    Returns:
        (size, size) in float64; every row sums to 1.

    Raises:
        InputError: If ``sigma`` is negative or not finite.

    Example:
        >>> gaussian_matrix(3, 0.5).sum(dim=1)
        tensor([1., 1., 1.], dtype=torch.float64)
    """
    if not 0 <= sigma < float("inf"):
        msg = f"sigma must be a number of pixels, 0 or more, got {sigma}."
        raise InputError(msg)
    if sigma == 0:
        return torch.eye(size, dtype=torch.float64)
    radius = int(TRUNCATE * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    weights = weights / weights.sum()
    positions = (torch.arange(size)[:, None] + offsets) % (2 * size)  # mirrored as often as the radius asks for
    positions = torch.minimum(positions, 2 * size - 1 - positions)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, positions, weights.expand(size, -1))


class GaussianSmoothing(Float32Buffers):
    """Smooths maps of one size, as ``scipy.ndimage.gaussian_filter(map, sigma)`` does, on any device.

    Two small matrix products: no kernel larger than the map, no padding, nothing to unroll when exported.

    Args:
        image_size: Height and width of the maps.
        sigma: Standard deviation in pixels.

    Example:
        >>> GaussianSmoothing((12, 16), sigma=2.0)(torch.ones(5, 12, 16)).shape
        torch.Size([5, 12, 16])
    """

    rows: torch.Tensor
    columns: torch.Tensor

    def __init__(self, image_size: tuple[int, int], sigma: float) -> None:
        super().__init__()
        height, width = image_size
        self.register_buffer("rows", gaussian_matrix(height, sigma).float(), persistent=False)
        self.register_buffer("columns", gaussian_matrix(width, sigma).float().T, persistent=False)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Smooth maps of shape (..., H, W)."""
        return self.rows @ maps @ self.columns
