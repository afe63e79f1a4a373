"""Rendered materials and objects, and photographs of textures: what the demonstration is made of.

Every surface is a function from a canvas, that is a style and a random generator, to a relief in [0, 1], which two
colours paint.
"""

from collections.abc import Callable

import numpy as np

from anomalib_clipad.demo.canvas import Canvas, Relief, Style
from anomalib_clipad.demo.materials import MATERIALS
from anomalib_clipad.demo.objects import OBJECTS

SURFACES: dict[str, Callable[[Canvas], Relief]] = {**MATERIALS, **OBJECTS}
# For tests, for choosing the checkpoint of the demonstration backbone, and for training it: all others, in this order.
HELD_OUT = ("capsule", "grass", "gravel", "linen", "tread plate")
VALIDATION = ("terrazzo", "honeycomb", "coin")
TRAINING = tuple(name for name in SURFACES if name not in (*HELD_OUT, *VALIDATION))


def render(name: str, style: Style, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Render one picture of a flawless surface or object.

    Args:
        name: One of ``SURFACES``.
        style: Style of the category.
        rng: Randomness of this picture.
        size: Its side in pixels.

    Returns:
        The picture, (S, S, 3) float in [0, 1], and where the object is, (S, S) bool, all true for a surface.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> picture, inside = render("capsule", Style.random(rng), rng, 64)
        >>> picture.shape, bool(inside.all())
        ((64, 64, 3), False)
    """
    return paint(SURFACES[name], style, rng, size)


def paint(
    surface: Callable[[Canvas], Relief], style: Style, rng: np.random.Generator, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Render one picture of any surface, as :func:`render` does one of ``SURFACES``.

    Args:
        surface: Draws the relief.
        style: Style of the category.
        rng: Randomness of this picture.
        size: Its side in pixels.

    Returns:
        As :func:`render` does.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> paint(lambda canvas: (canvas.noise(5), None), Style.random(rng), rng, 64)[0].shape
        (64, 64, 3)
    """
    canvas = Canvas(size, style, rng)
    relief, inside = surface(canvas)
    picture = style.low + (style.high - style.low) * np.asarray(relief, dtype=np.float32)[..., None]
    if inside is None:
        inside = np.ones((size, size), dtype=bool)
    picture = np.where(inside[..., None], picture, style.ground + 0.02 * (canvas.noise(40)[..., None] - 0.5))
    light = 1 + rng.normal(0, 0.04) + rng.normal(0, 0.06) * canvas.column + rng.normal(0, 0.06) * canvas.row
    picture = picture * light[..., None] + rng.normal(0, 0.008, (size, size, 1))
    return np.clip(picture, 0, 1).astype(np.float32), inside
