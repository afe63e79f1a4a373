"""What rendered surfaces are drawn with: the style of a category, and coordinates and noise of an image."""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

Relief = tuple[np.ndarray, np.ndarray | None]  # (S, S) in [0, 1], and where the object is if it does not fill the image


class Style(NamedTuple):
    """What the images of one category have in common.

    Attributes:
        low: Colour (3,) of the relief's valleys, in [0, 1].
        high: Colour (3,) of its heights.
        ground: Colour (3,) behind an object.
        scale: Repetitions of the pattern, relative to the surface's usual number.
        angle: Direction of the pattern in radians.

    Example:
        >>> 0.7 <= Style.random(np.random.default_rng(0)).scale <= 1.4
        True
    """

    low: np.ndarray
    high: np.ndarray
    ground: np.ndarray
    scale: float
    angle: float

    @classmethod
    def random(cls, rng: np.random.Generator, contrast: tuple[float, float] = (0.12, 0.35)) -> "Style":
        """Any style: mostly muted colours of one hue, as materials have.

        Args:
            rng: Decides.
            contrast: Range of the difference between heights and valleys.
        """
        base = rng.uniform(0.2, 0.8) + rng.normal(0, 0.12, 3) * rng.choice([0.3, 1.0])
        difference = rng.uniform(*contrast) * rng.choice([-1, 1])
        high = base + difference + rng.normal(0, 0.04, 3)
        ground = np.full(3, rng.uniform(0.02, 0.98)) + rng.normal(0, 0.03, 3)
        if abs(ground.mean() - (base.mean() + difference / 2)) < 0.25:
            ground = (ground + 0.5) % 1.0
        low, high, ground = (np.clip(colour, 0.02, 0.98) for colour in (base, high, ground))
        return cls(low, high, ground, rng.uniform(0.7, 1.4), rng.uniform(0, np.pi))


class Canvas:
    """Coordinates and noise of one image; every surface draws with them.

    Args:
        size: Side of the image in pixels.
        style: Style of the category.
        rng: Randomness of the image.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> Canvas(32, Style.random(rng), rng).noise(8).shape
        (32, 32)
    """

    def __init__(self, size: int, style: Style, rng: np.random.Generator) -> None:
        self.size, self.style, self.rng = size, style, rng
        line = (np.arange(size) + 0.5) / size - 0.5
        self.column, self.row = np.meshgrid(line, line)
        angle = style.angle + rng.normal(0, 0.03)
        shift = rng.uniform(0, 1, 2)
        # Along and across the pattern, in [-0.7, 0.7], moved at random.
        self.x = np.cos(angle) * self.column + np.sin(angle) * self.row + shift[0]
        self.y = -np.sin(angle) * self.column + np.cos(angle) * self.row + shift[1]
        # For objects, that lie in the middle and are turned a little.
        turn, move = rng.normal(0, 0.15), rng.normal(0, 0.02, 2)
        self.u = np.cos(turn) * self.column + np.sin(turn) * self.row + move[0]
        self.v = -np.sin(turn) * self.column + np.cos(turn) * self.row + move[1]

    def noise(self, cells: float, stretch: float = 1.0) -> np.ndarray:
        """Smooth noise in [0, 1] with so many cells to a side, drawn out in one direction by ``stretch``."""
        rows = max(2, round(cells * self.style.scale))
        columns = max(2, round(rows / stretch))
        if stretch != 1.0 and np.cos(self.style.angle) ** 2 < 0.5:
            rows, columns = columns, rows
        values = self.rng.random((min(rows, self.size), min(columns, self.size)), dtype=np.float32)
        return np.clip(np.asarray(Image.fromarray(values).resize((self.size,) * 2, Image.Resampling.BICUBIC)), 0, 1)

    def fractal(self, cells: float, octaves: int = 4, stretch: float = 1.0) -> np.ndarray:
        """Noise of several sizes, in [0, 1]."""
        layers = [self.noise(cells * 2**octave, stretch) / 2**octave for octave in range(octaves)]
        return np.sum(layers, axis=0) / (2 - 2.0 ** (1 - octaves))

    def wave(self, line: np.ndarray, repeats: float) -> np.ndarray:
        """A sine along ``line``, in [0, 1]."""
        return 0.5 + 0.5 * np.sin(2 * np.pi * repeats * self.style.scale * line)

    def cells(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distance to the nearest of random points and to the second nearest, in cell widths, and its number."""
        count = max(6, round(count * self.style.scale**2))
        points = self.rng.uniform(-0.6, 0.6, (round(count * 1.44), 2)).astype(np.float32)
        small = max(32, self.size // 3)
        line = ((np.arange(small) + 0.5) / small - 0.5).astype(np.float32)
        distance = np.hypot(line[:, None, None] - points[:, 0], line[None, :, None] - points[:, 1])
        nearest = np.argpartition(distance, 1, axis=-1)[..., :2]
        two = np.sort(np.take_along_axis(distance, nearest, axis=-1), axis=-1) * np.sqrt(count)

        def enlarge(values: np.ndarray, how: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
            return np.asarray(Image.fromarray(values.astype(np.float32)).resize((self.size,) * 2, how))

        number = np.take_along_axis(nearest, np.take_along_axis(distance, nearest, -1).argsort(-1), -1)[..., 0]
        return enlarge(two[..., 0]), enlarge(two[..., 1]), enlarge(number, Image.Resampling.NEAREST)

    def grains(self, count: int, size: float, aspect: float, corners: int = 12) -> np.ndarray:
        """Random grains over each other, each in a tone of its own and lit from the upper left, in [0, 1].

        Args:
            count: How many.
            size: Radius of the largest, a part of the image's side; the smallest have half of it.
            aspect: Length by width.
            corners: Of a grain: 4 are rectangles, many are ellipses.
        """
        sheet = Image.new("L", (2 * self.size,) * 2, 20)  # drawn larger and reduced, for smooth edges
        draw = ImageDraw.Draw(sheet)
        around = np.arange(corners) * 2 * np.pi / corners + np.pi / corners
        shape = np.stack([np.cos(around) * np.sqrt(aspect), np.sin(around) / np.sqrt(aspect)], axis=1)
        for x, y, turn, radius, tone in self.rng.random((round(count * self.style.scale**2), 5)):
            cosine, sine = np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn)
            grain = shape @ np.array([[cosine, sine], [-sine, cosine]]) * size * (0.5 + radius / 2) / self.style.scale
            for move, part, shade in ((0.0, 1.0, 0.55), (0.12, 0.85, 0.85), (0.25, 0.5, 1.0)):
                place = np.array([x, y]) * 1.1 - 0.05 - move * size * 0.5 / self.style.scale
                draw.polygon(
                    [tuple(p) for p in (grain * part + place) * 2 * self.size],
                    fill=round((60 + 195 * tone) * shade),
                )
        return np.asarray(sheet.resize((self.size,) * 2, Image.Resampling.BOX), dtype=np.float32) / 255
