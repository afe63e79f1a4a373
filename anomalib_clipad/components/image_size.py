"""The size of the input: as it is given, or the one that keeps the shape of the pictures."""

import math
from collections.abc import Sequence

from anomalib_clipad.errors import InputError

AUTO = "auto"
TOLERANCE = 0.1  # by which the number of patches may differ from the tower's own, so that the shape can be met
STEEPEST = 1000.0  # ratio of sides


def parse_image_size(
    image_size: int | Sequence[int] | str | None, own: tuple[int, int], patch: tuple[int, int]
) -> tuple[int, int]:
    """Height and width of the input in pixels.

    Args:
        image_size: A side, a height and a width, or ``auto:RATIO``, width over height. ``auto`` alone, which waits for
            the first picture, and ``None`` are the tower's own size.
        own: Height and width of the tower's own input.
        patch: Height and width of a patch.

    Raises:
        InputError: If it is of another form.

    Example:
        >>> parse_image_size(64, (96, 96), (8, 8)), parse_image_size("auto:2.5", (96, 96), (8, 8))
        ((64, 64), (64, 152))
    """
    if image_size is None or image_size == AUTO:
        return own
    if isinstance(image_size, str):
        return keep_shape(1.0, _ratio(image_size), own, patch)
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        msg = f"image_size must be one or two positive numbers of pixels, got {image_size!r}."
        raise InputError(msg)
    return sides


def keep_shape(height: float, width: float, own: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """The size whose shape is nearest to that of a picture, among those of about as many patches as the tower's own.

    The position embeddings were learned for that many, and the time stays what it is.

    Args:
        height: Height of the picture, in any unit.
        width: Width of the picture, in the same.
        own: Height and width of the tower's own input.
        patch: Height and width of a patch.

    Returns:
        Height and width in multiples of the patch size; ``own`` where that has the picture's shape.

    Example:
        >>> keep_shape(1270, 500, (240, 240), (16, 16)), keep_shape(700, 700, (240, 240), (16, 16))
        ((368, 144), (240, 240))
    """
    patches = (own[0] // patch[0]) * (own[1] // patch[1])
    least, most = math.ceil(patches * (1 - TOLERANCE)), math.floor(patches * (1 + TOLERANCE))
    grids = [
        (rows, columns)
        for rows in range(1, most + 1)
        for columns in range(max(1, math.ceil(least / rows)), most // rows + 1)
    ]

    def misfit(grid: tuple[int, int]) -> tuple[float, int]:
        stretch = math.log((grid[0] * patch[0] / height) / (grid[1] * patch[1] / width))
        return round(abs(stretch), 6), abs(grid[0] * grid[1] - patches)

    rows, columns = min(grids, key=misfit)
    return rows * patch[0], columns * patch[1]


def _ratio(image_size: str) -> float:
    name, _, number = image_size.partition(":")
    try:
        ratio = float(number)
    except ValueError:
        ratio = math.nan
    if name != AUTO or not 1 / STEEPEST <= ratio <= STEEPEST:
        msg = (
            f"image_size must be numbers of pixels, {AUTO}, or {AUTO}:RATIO with the pictures' width over their height "
            f"({AUTO}:2.5), got {image_size!r}."
        )
        raise InputError(msg)
    return ratio
