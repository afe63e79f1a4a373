"""Defects painted on rendered pictures, each with its mask."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scipy.ndimage import minimum_filter

SUPERSAMPLING = 2  # strokes are drawn larger and reduced, for smooth edges


class _Brush:
    """A place on the picture, a colour that stands out there, and shapes around it."""

    def __init__(self, picture: np.ndarray, inside: np.ndarray, rng: np.random.Generator) -> None:
        self.picture, self.inside, self.rng, self.size = picture, inside, rng, len(picture)
        # Away from the edges of the picture and of the object.
        margin = max(1, self.size // 16)
        shrunk = minimum_filter(inside, 2 * margin + 1)
        rows, columns = np.nonzero(shrunk[margin:-margin, margin:-margin])
        chosen = rng.integers(len(rows))
        self.centre = np.array([columns[chosen], rows[chosen]]) + margin + 0.5
        self.local = picture[rows[chosen] + margin, columns[chosen] + margin]
        self.mean = picture[inside].mean(axis=0)

    def colour(self, dark: bool | None = None) -> np.ndarray:
        """A colour that differs from the surface, darker or lighter as its own brightness allows."""
        if dark is None:
            dark = bool(self.rng.random() < 0.5 + 1.2 * (self.mean.mean() - 0.5))
        target = self.rng.uniform(0.0, 0.12) if dark else self.rng.uniform(0.88, 1.0)
        return np.clip(target + self.rng.normal(0, 0.05, 3), 0, 1)

    def vivid(self) -> np.ndarray:
        """A saturated colour far from the surface's."""
        colours = self.rng.uniform(0, 1, (8, 3))
        return colours[np.abs(colours - self.mean).sum(axis=1).argmax()]

    def strokes(self, lines: list[np.ndarray], width: float) -> np.ndarray:
        """Coverage in [0, 1] of lines of (x, y) pixel positions."""
        sheet = Image.new("L", (self.size * SUPERSAMPLING,) * 2)
        draw = ImageDraw.Draw(sheet)
        for line in lines:
            thick = max(1, round(width * SUPERSAMPLING))
            draw.line([tuple(p) for p in line * SUPERSAMPLING], fill=255, width=thick, joint="curve")
        return np.asarray(sheet.resize((self.size,) * 2, Image.Resampling.BOX), dtype=np.float32) / 255

    def blob(self, radius: float, roughness: float = 0.35, sharpness: float = 8.0) -> np.ndarray:
        """Coverage of a round patch with an irregular edge."""
        row, column = np.mgrid[: self.size, : self.size] + 0.5
        stretch, turn = self.rng.uniform(1, 1.7), self.rng.uniform(0, np.pi)
        dx, dy = column - self.centre[0], row - self.centre[1]
        a, b = np.cos(turn) * dx + np.sin(turn) * dy, -np.sin(turn) * dx + np.cos(turn) * dy
        distance, around = np.hypot(a / stretch, b) / radius, np.arctan2(b, a)
        edge = 1 + sum(
            roughness / k * np.sin(k * around + phase) for k, phase in enumerate(self.rng.uniform(0, 6.3, 5), start=2)
        )
        return np.clip((edge - distance) * sharpness + 0.5, 0, 1).astype(np.float32)

    def walk(self, length: float, steps: int, wildness: float) -> np.ndarray:
        """A wandering line through the centre."""
        angles = self.rng.uniform(0, 2 * np.pi) + np.cumsum(self.rng.normal(0, wildness, steps))
        path = np.cumsum(np.stack([np.cos(angles), np.sin(angles)], axis=1), axis=0) * length / steps
        return path - path[steps // 2] + self.centre

    def blend(self, cover: np.ndarray, colour: np.ndarray) -> np.ndarray:
        return self.picture * (1 - cover[..., None]) + colour * cover[..., None]


def _scratch(b: _Brush) -> tuple[np.ndarray, np.ndarray]:
    first = b.walk(b.size * b.rng.uniform(0.25, 0.6), 12, 0.06)
    lines = [first + b.rng.normal(0, 0.02 * b.size, 2) * number for number in range(b.rng.integers(1, 4))]
    cover = b.strokes(lines, b.size * b.rng.uniform(0.012, 0.022))
    return b.blend(cover * 0.9, b.colour()), cover


def _crack(b: _Brush) -> tuple[np.ndarray, np.ndarray]:
    trunk = b.walk(b.size * b.rng.uniform(0.3, 0.6), 24, 0.5)
    branches = [trunk]
    for _ in range(b.rng.integers(1, 4)):
        start = trunk[b.rng.integers(4, 20)]
        branches.append(b.walk(b.size * b.rng.uniform(0.1, 0.25), 10, 0.5) - b.centre + start)
    cover = b.strokes(branches, b.size * b.rng.uniform(0.012, 0.024))
    return b.blend(cover * 0.95, b.colour(dark=bool(b.mean.mean() > 0.25))), cover


def _stain(b: _Brush) -> tuple[np.ndarray, np.ndarray]:
    cover = b.blob(b.size * b.rng.uniform(0.06, 0.13), sharpness=4)
    return b.blend(cover * b.rng.uniform(0.6, 0.85), b.vivid()), cover


def _hole(b: _Brush) -> tuple[np.ndarray, np.ndarray]:
    cover = b.blob(b.size * b.rng.uniform(0.045, 0.1), roughness=0.2, sharpness=12)
    rim = np.clip(np.roll(cover, (b.size // 64 + 1,) * 2, axis=(0, 1)) - cover, 0, 1)
    dark = b.mean.mean() > 0.22
    picture = b.blend(cover, b.colour(dark=bool(dark)))
    return np.clip(picture + 0.5 * rim[..., None], 0, 1), cover


def _contamination(b: _Brush) -> tuple[np.ndarray, np.ndarray]:
    colour, cover, centre = b.vivid(), np.zeros((b.size, b.size), np.float32), b.centre
    for _ in range(b.rng.integers(3, 9)):
        b.centre = centre + b.rng.normal(0, 0.05 * b.size, 2)
        cover = np.maximum(cover, b.blob(b.size * b.rng.uniform(0.012, 0.035)))
    if b.rng.random() < 0.4:  # a fibre among the crumbs
        b.centre = centre
        cover = np.maximum(cover, b.strokes([b.walk(0.3 * b.size, 16, 0.4)], 0.014 * b.size))
    return b.blend(cover * 0.95, colour), cover


def _dent(b: _Brush) -> tuple[np.ndarray, np.ndarray]:
    cover = b.blob(b.size * b.rng.uniform(0.07, 0.13), roughness=0.15, sharpness=1.5)
    down, right = np.gradient(cover)
    shade = (down + right) * b.size * 0.025
    return np.clip(b.picture * (1 - 0.25 * cover[..., None]) + shade[..., None], 0, 1), cover


def _misprint(b: _Brush) -> tuple[np.ndarray, np.ndarray]:
    sheet = Image.new("L", (b.size,) * 2)
    text = "".join(b.rng.choice(list("ABEFHKNRSTXZ2358"), b.rng.integers(2, 4)))
    font = ImageFont.load_default(size=b.size * b.rng.uniform(0.12, 0.2))
    ImageDraw.Draw(sheet).text(tuple(b.centre), text, fill=255, font=font, anchor="mm", stroke_width=b.size // 128)
    turned = sheet.rotate(b.rng.uniform(-40, 40), center=tuple(b.centre), resample=Image.Resampling.BILINEAR)
    cover = np.asarray(turned, dtype=np.float32) / 255
    return b.blend(cover * 0.9, b.colour()), cover


def _missing_part(b: _Brush) -> tuple[np.ndarray, np.ndarray]:
    corners = b.rng.uniform(0, 2 * np.pi) + np.sort(b.rng.uniform(0, 2 * np.pi, 6))
    radius = b.size * b.rng.uniform(0.07, 0.16, 6)[:, None]
    polygon = b.centre + radius * np.stack([np.cos(corners), np.sin(corners)], axis=1)
    sheet = Image.new("L", (b.size,) * 2)
    ImageDraw.Draw(sheet).polygon([tuple(p) for p in polygon], fill=255)
    cover = np.asarray(sheet.filter(ImageFilter.GaussianBlur(b.size / 200)), dtype=np.float32) / 255
    behind = b.picture[~b.inside].mean(axis=0) if not b.inside.all() else b.colour()
    return b.blend(cover, behind), cover


DEFECTS: dict[str, Callable[[_Brush], tuple[np.ndarray, np.ndarray]]] = {
    "scratch": _scratch,
    "crack": _crack,
    "stain": _stain,
    "hole": _hole,
    "contamination": _contamination,
    "dent": _dent,
    "misprint": _misprint,
    "missing part": _missing_part,
}


def paint_defect(
    picture: np.ndarray, inside: np.ndarray, kind: str, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Paint one defect that can be seen.

    Args:
        picture: (S, S, 3) float in [0, 1].
        inside: (S, S) bool, where the object is.
        kind: One of ``DEFECTS``.
        rng: Randomness of the defect.

    Returns:
        The broken picture, and the mask of the defect, (S, S) bool.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> whole = np.full((64, 64, 3), 0.5, dtype=np.float32)
        >>> broken, mask = paint_defect(whole, np.ones((64, 64), dtype=bool), "hole", rng)
        >>> bool((broken != whole).any(axis=-1)[mask].all())
        True
    """
    for _ in range(10):
        broken, cover = DEFECTS[kind](_Brush(picture, inside, rng))
        mask = (cover > 0.4) & inside
        # Some are hardly visible: a dark stain on a dark edge, a stroke beside the object.
        if mask.sum() > 4e-4 * mask.size and np.abs(broken - picture)[mask].mean() > 0.12:
            break
    broken = np.where(inside[..., None], broken, picture)
    return np.clip(broken, 0, 1).astype(np.float32), mask
