"""Gaussian smoothing of anomaly maps, equal to scipy's ``gaussian_filter`` that the authors use."""

import torch

from anomalib_clipad.components.float32 import Float32Buffers
from anomalib_clipad.errors import InputError

LONGEST_SIDE, LARGEST_SIGMA = 8192, 8192.0  # pixels; more would take all memory
TRUNCATE = 4.0  # radius of the kernel in standard deviations, scipy's default


def gaussian_matrix(size: int, sigma: float) -> torch.Tensor:
    """Smoothing of a line of ``size`` values as a matrix, edges mirrored with the edge value repeated.

    Args:
        size: Length of the line, 1 to 8192.
        sigma: Standard deviation in pixels, 0 to 8192; 0 leaves the line as it is.

    Returns:
        (size, size) in float64; every row sums to 1.

    Raises:
        InputError: If ``size`` or ``sigma`` is out of range.

    Example:
        >>> gaussian_matrix(3, 0.5).sum(dim=1)
        tensor([1., 1., 1.], dtype=torch.float64)
    """
    if type(size) is not int or not 1 <= size <= LONGEST_SIDE:
        msg = f"A side of a map must be 1 to {LONGEST_SIDE} pixels, got {size!r}; choose a smaller image_size."
        raise InputError(msg)
    if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 <= sigma <= LARGEST_SIGMA:
        msg = (
            f"sigma must be a number of pixels, 0 or more, got {sigma!r}; the largest possible is {LARGEST_SIGMA:.0f}."
        )
        raise InputError(msg)
    if sigma == 0:
        return torch.eye(size, dtype=torch.float64)
    radius = int(TRUNCATE * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    weights = weights / weights.sum()
    if radius >= size:  # the mirrored line repeats itself after 2 * size values: no more weights than that
        weights = weights.new_zeros(2 * size).scatter_add_(0, offsets % (2 * size), weights)
        offsets = torch.arange(2 * size)
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

    Raises:
        InputError: If a side or ``sigma`` is out of range, see :func:`gaussian_matrix`.

    Example:
        >>> GaussianSmoothing((12, 16), sigma=2.0)(torch.ones(5, 12, 16)).shape
        torch.Size([5, 12, 16])
    """

    rows: torch.Tensor
    columns: torch.Tensor

    def __init__(self, image_size: tuple[int, int], sigma: float) -> None:
        super().__init__()
        if not isinstance(image_size, tuple | list) or len(image_size) != 2:
            msg = f"image_size must be a height and a width in pixels, got {image_size!r}."
            raise InputError(msg)
        height, width = image_size
        self.register_buffer("rows", gaussian_matrix(height, sigma).float(), persistent=False)
        self.register_buffer("columns", gaussian_matrix(width, sigma).float().T, persistent=False)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Smooth maps of shape (..., H, W).

        Raises:
            InputError: If the maps are not a floating-point tensor of this shape.
        """
        size = (len(self.rows), len(self.columns))
        if not isinstance(maps, torch.Tensor) or not maps.is_floating_point() or maps.shape[-2:] != size:
            found = tuple(maps.shape) if isinstance(maps, torch.Tensor) else type(maps).__name__
            msg = f"maps must be a floating-point tensor (..., {size[0]}, {size[1]}), got {found}."
            raise InputError(msg)
        return self.rows @ maps @ self.columns
