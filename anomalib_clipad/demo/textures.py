"""Rendered materials and objects, and photographs of textures: what the demonstration is made of.

Every surface is a function from a canvas, that is a style and a random generator, to a relief in [0, 1], which two
colours paint.
"""

from collections.abc import Callable

import numpy as np
import skimage
from PIL import Image

from anomalib_clipad.demo.canvas import Canvas, Style

Relief = tuple[np.ndarray, np.ndarray | None]  # (S, S) in [0, 1], and where the object is if it does not fill the image


def _lines(phase: np.ndarray, width: float) -> np.ndarray:
    """1 on thin lines at whole numbers, 0 between; ``width`` is a part of the distance."""
    return np.clip((width - np.abs(phase - np.round(phase))) / (0.4 * width) + 0.5, 0, 1)


def _disk(c: Canvas, radius: float) -> np.ndarray:
    return np.hypot(c.u, c.v) < radius


def _object(c: Canvas, inside: np.ndarray, detail: np.ndarray) -> Relief:
    """An object with its own detail, lit from the upper left."""
    return np.clip(0.5 + 0.35 * (detail - 0.5) - 0.35 * (c.u + c.v) + 0.08 * (c.noise(48) - 0.5), 0, 1), inside


def _wood(c: Canvas) -> Relief:
    return 0.75 * c.wave(c.x + 0.25 * c.noise(3, 4), 7) + 0.25 * c.noise(64, 12), None


def _fabric(c: Canvas) -> Relief:
    over = np.sign(np.sin(2 * np.pi * 9 * c.style.scale * c.x) * np.sin(2 * np.pi * 9 * c.style.scale * c.y))
    return np.where(over > 0, c.wave(c.x, 27), c.wave(c.y, 27)) * 0.7 + 0.3 * c.noise(64), None


def _leather(c: Canvas) -> Relief:
    first, second, _ = c.cells(150)
    return np.clip((second - first) * 1.8, 0, 1) * 0.7 + 0.3 * c.noise(8), None


def _carpet(c: Canvas) -> Relief:
    return 0.6 * c.noise(60) + 0.4 * c.noise(30), None


def _metal(c: Canvas) -> Relief:
    return 0.7 * c.noise(90, 30) + 0.3 * c.noise(2), None


def _marble(c: Canvas) -> Relief:
    return np.abs(np.sin(3 * c.x + 9 * c.fractal(3))) ** 0.6, None


def _plastic(c: Canvas) -> Relief:
    return 0.6 * c.noise(2) + 0.12 * c.noise(90), None


def _paper(c: Canvas) -> Relief:
    return 0.3 + 0.35 * c.fractal(16, 3), None


def _tile(c: Canvas) -> Relief:
    grout = np.maximum(_lines(4 * c.style.scale * c.x, 0.05), _lines(4 * c.style.scale * c.y, 0.05))
    return np.clip(0.75 - 0.75 * grout + 0.2 * c.fractal(6), 0, 1), None


def _concrete(c: Canvas) -> Relief:
    return c.fractal(4, 5), None


def _mesh(c: Canvas) -> Relief:
    repeats = 7 * c.style.scale
    return np.maximum(_lines(repeats * c.x, 0.16), _lines(repeats * c.y, 0.16)) * (0.8 + 0.2 * c.noise(40)), None


def _rubber(c: Canvas) -> Relief:
    studs = c.wave(c.x, 8) * c.wave(c.y, 8)
    return np.clip(2.2 * studs - 0.5, 0, 1) * 0.8 + 0.2 * c.noise(50), None


def _cork(c: Canvas) -> Relief:
    return np.clip((c.noise(26) - 0.45) * 5, 0, 1) * 0.5 + 0.5 * c.fractal(12, 3), None


def _glass(c: Canvas) -> Relief:
    return np.clip(0.5 + 0.6 * (c.column + c.row) + 0.2 * _lines(1.5 * c.x, 0.15), 0, 1), None


def _corrugated(c: Canvas) -> Relief:
    return 0.85 * c.wave(c.x, 9) + 0.15 * c.noise(40), None


def _knit(c: Canvas) -> Relief:
    zigzag = np.abs((8 * c.style.scale * c.x) % 2 - 1)
    return c.wave(c.y + 0.06 * zigzag / c.style.scale, 11) * (0.55 + 0.45 * zigzag), None


def _foam(c: Canvas) -> Relief:
    first, second, _ = c.cells(220)
    return np.clip(1.6 * first, 0, 1) * 0.6 + 0.4 * np.clip(2 - 2 * (second - first), 0, 1), None


def _sand(c: Canvas) -> Relief:
    return 0.6 * c.wave(c.x + 0.12 * c.noise(4), 8) + 0.4 * c.noise(100), None


def _bricks(c: Canvas) -> Relief:
    row = 7 * c.style.scale * c.y
    mortar = np.maximum(_lines(row, 0.09), _lines(3.5 * c.style.scale * c.x + 0.5 * (np.round(row - 0.5) % 2), 0.05))
    return np.clip(0.8 - 0.8 * mortar + 0.3 * (c.fractal(10) - 0.5), 0, 1), None


def _leaves(c: Canvas) -> Relief:
    return c.grains(260, 0.13, 2.2), None


def _chipboard(c: Canvas) -> Relief:
    return 0.3 + 0.6 * c.grains(700, 0.07, 3.0, corners=4), None


def _beans(c: Canvas) -> Relief:
    return c.grains(500, 0.07, 1.5), None


def _straw(c: Canvas) -> Relief:
    return c.grains(600, 0.12, 14.0, corners=4), None


def _granite(c: Canvas) -> Relief:
    dark, light = c.noise(55) > 0.62, c.noise(45) > 0.6
    return np.where(dark, 0.05, np.where(light, 0.95, 0.5)) + 0.1 * (c.noise(70) - 0.5), None


def _mosaic(c: Canvas) -> Relief:
    first, second, number = c.cells(130)
    return np.where(second - first > 0.1, 0.25 + 0.75 * ((number * 0.37) % 1), 0.05), None


def _stone_wall(c: Canvas) -> Relief:
    first, second, number = c.cells(45)
    stone = (0.3 + 0.45 * ((number * 0.37) % 1) + 0.4 * (c.fractal(14) - 0.5)) * np.clip(1.25 - 0.5 * first, 0, 1)
    return np.where(second - first > 0.16, stone, 0.08 * c.noise(50)), None


def _bark(c: Canvas) -> Relief:
    return np.abs(2 * c.fractal(14, 3, 3) - 1) ** 0.7, None


def _rust(c: Canvas) -> Relief:
    return np.clip(8 * (c.fractal(6, 5) - 0.5), 0, 1) * 0.7 + 0.3 * c.noise(80), None


def _camouflage(c: Canvas) -> Relief:
    return 0.5 * (c.noise(7) > 0.5) + 0.35 * (c.noise(9) > 0.6) + 0.1 * c.noise(90), None


def _basket(c: Canvas) -> Relief:
    a, b = 6 * c.style.scale * c.x, 6 * c.style.scale * c.y
    over = (np.floor(a) + np.floor(b)) % 2 > 0
    strip = np.where(over, np.sin(np.pi * (a % 1)), np.sin(np.pi * (b % 1)))
    bent = np.where(over, np.sin(np.pi * (b % 1)), np.sin(np.pi * (a % 1)))
    return np.clip(0.9 * np.sqrt(strip) * (0.5 + 0.5 * bent) + 0.15 * c.noise(70), 0, 1), None


def _perforated(c: Canvas) -> Relief:
    row = 9 * c.style.scale * c.y
    column = 9 * c.style.scale * c.x + 0.5 * (np.floor(row) % 2)
    hole = np.hypot(column % 1 - 0.5, row % 1 - 0.5) < 0.3
    return np.where(hole, 0.05, 0.75 + 0.25 * (c.noise(40, 12) - 0.5)), None


def _shingles(c: Canvas) -> Relief:
    row = 6 * c.style.scale * c.y
    column = 6 * c.style.scale * c.x + 0.5 * (np.floor(row) % 2)
    edge = np.hypot(column % 1 - 0.5, row % 1) / 0.9
    return np.clip(1.1 - 0.9 * edge**2 + 0.2 * (c.noise(50) - 0.5), 0, 1), None


def _plaster(c: Canvas) -> Relief:
    down, right = np.gradient(c.fractal(10, 4))
    return np.clip(0.5 + (down + right) * c.size / 20, 0, 1), None


def _circuit(c: Canvas) -> Relief:
    tracks = (c.noise(9, 6) > 0.6) | (c.noise(9, 1 / 6) > 0.6)
    pads = c.wave(c.column, 8) * c.wave(c.row, 8) > 0.93
    return np.where(pads, 1.0, np.where(tracks, 0.6, 0.15)) + 0.06 * c.noise(60), None


def _corduroy(c: Canvas) -> Relief:
    return c.wave(c.x, 15) ** 0.5 * (0.6 + 0.4 * c.noise(60, 1 / 4)), None


def _washer(c: Canvas) -> Relief:
    radius = np.hypot(c.u, c.v)
    return _object(c, (radius < 0.4) & (radius > 0.17), c.wave(radius, 20))


def _button(c: Canvas) -> Relief:
    holes = np.hypot(np.abs(c.u) - 0.09, np.abs(c.v) - 0.09) < 0.045
    return _object(c, _disk(c, 0.38) & ~holes, np.hypot(c.u, c.v) > 0.3)


def _gear(c: Canvas) -> Relief:
    radius, around = np.hypot(c.u, c.v), np.arctan2(c.v, c.u)
    teeth = 0.35 + 0.06 * np.clip(3 * np.sin(16 * around), -1, 1)
    return _object(c, (radius < teeth) & (radius > 0.1), radius > 0.25)


def _bolt(c: Canvas) -> Relief:
    angles = np.arange(6) * np.pi / 3
    edge = np.max([np.cos(a) * c.u + np.sin(a) * c.v for a in angles], axis=0)
    return _object(c, edge < 0.34, np.hypot(c.u, c.v) < 0.27)


def _card(c: Canvas) -> Relief:
    inside = (np.abs(c.u) < 0.42) & (np.abs(c.v) < 0.3)
    return _object(c, inside, (np.abs(c.u) < 0.34) & (np.abs(c.v) < 0.22))


def _cap(c: Canvas) -> Relief:
    radius, around = np.hypot(c.u, c.v), np.arctan2(c.v, c.u)
    return _object(c, radius < 0.4, np.where(radius > 0.31, 0.5 + 0.5 * np.sin(40 * around), 0.5))


def _tablet(c: Canvas) -> Relief:
    radius = np.hypot(c.u / 1.4, c.v)
    return _object(c, radius < 0.28, 1.5 * (np.abs(c.u) > 0.015) - radius)


def _key(c: Canvas) -> Relief:
    head = (np.hypot(c.u + 0.22, c.v) < 0.17) & (np.hypot(c.u + 0.27, c.v) > 0.05)
    teeth = (np.abs(c.u - 0.3) < 0.08) & (c.v > 0) & (c.v < 0.14) & (np.sin(60 * c.u) > -0.3)
    shaft = (np.abs(c.v) < 0.06) & (c.u > -0.1) & (c.u < 0.4)
    return _object(c, head | shaft | teeth, np.abs(c.v) < 0.02)


def _connector(c: Canvas) -> Relief:
    body = (np.abs(c.u) < 0.4) & (c.v > -0.22) & (c.v < 0.12)
    pins = (np.abs(c.u) < 0.36) & (c.v >= 0.12) & (c.v < 0.32) & (np.cos(70 * c.u) > 0.1)
    return _object(c, body | pins, np.where(body, 0.2 + 0.3 * (np.cos(70 * c.u) > 0.6), 1.4))


def _lid(c: Canvas) -> Relief:
    side = np.maximum(np.abs(c.u), np.abs(c.v))
    rounded = side + 0.4 * np.clip(np.hypot(c.u, c.v) - 0.42, 0, None)
    return _object(c, rounded < 0.38, c.wave(side, 9))


def _propeller(c: Canvas) -> Relief:
    radius, around = np.hypot(c.u, c.v), np.arctan2(c.v, c.u)
    return _object(c, (radius < 0.42 * np.abs(np.cos(1.5 * around))) | (radius < 0.12), radius < 0.1)


def _terrazzo(c: Canvas) -> Relief:
    first, second, number = c.cells(60)
    chip = ((second - first) > 0.35) & (number % 3 > 0)
    return np.where(chip, (number * 0.37) % 1, 0.5 + 0.1 * c.noise(60)), None


def _honeycomb(c: Canvas) -> Relief:
    repeats = 9 * c.style.scale
    cosines = [np.cos(2 * np.pi * repeats * (np.cos(a) * c.x + np.sin(a) * c.y)) for a in np.arange(3) * np.pi / 3]
    return np.clip(0.5 + 0.4 * np.sum(cosines, axis=0), 0, 1) * 0.9 + 0.1 * c.noise(60), None


def _coin(c: Canvas) -> Relief:
    radius, around = np.hypot(c.u, c.v), np.arctan2(c.v, c.u)
    star = (radius < 0.2 + 0.06 * np.cos(5 * around)) | (radius > 0.35)
    return _object(c, radius < 0.39, star)


def _linen(c: Canvas) -> Relief:
    threads = 0.5 * c.wave(c.x + 0.015 * c.noise(6), 17) + 0.5 * c.wave(c.y + 0.015 * c.noise(6), 17)
    return 0.65 * threads + 0.2 * c.noise(50, 12) + 0.15 * c.noise(50, 1 / 12), None


def _tread_plate(c: Canvas) -> Relief:
    a, b = 5 * c.style.scale * c.x, 5 * c.style.scale * c.y
    turned = (np.floor(a) + np.floor(b)) % 2 > 0
    p, q = a % 1 - 0.5, b % 1 - 0.5
    along, across = np.where(turned, p + q, p - q), np.where(turned, p - q, p + q)
    bump = np.clip(1.2 - (along / 0.55) ** 2 - (across / 0.2) ** 2, 0, 1)
    return np.clip(0.25 + 0.6 * bump + 0.2 * (c.noise(60) - 0.5), 0, 1), None


def _capsule(c: Canvas) -> Relief:
    distance = np.hypot(np.clip(np.abs(c.u) - 0.24, 0, None), c.v)
    shine = np.clip(1 - np.abs(c.v + 0.07) / 0.05, 0, 1)
    return _object(c, distance < 0.17, np.where(c.u > 0, 1.6, -0.6) + 0.5 * shine)


def _photograph(name: str) -> Callable[[Canvas], Relief]:
    def surface(c: Canvas) -> Relief:
        whole = Image.fromarray(getattr(skimage.data, name)())
        side = round(min(whole.size) / 2 / max(c.style.scale, 1.0))
        left, top = c.rng.integers(0, min(whole.size) - side, 2)
        turned = whole.crop((left, top, left + side, top + side)).transpose(Image.Transpose(int(c.rng.integers(0, 5))))
        grey = np.asarray(turned.resize((c.size,) * 2, Image.Resampling.BICUBIC), dtype=np.float32) / 255
        low, high = np.percentile(grey, [1, 99])
        return np.clip((grey - low) / (high - low), 0, 1), None

    return surface


# The surfaces for training the demonstration backbone, for choosing its checkpoint, and for testing.
# Photographs are scikit-image's own, CC0.
TRAINING: dict[str, Callable[[Canvas], Relief]] = {
    "wood": _wood,
    "fabric": _fabric,
    "leather": _leather,
    "carpet": _carpet,
    "metal": _metal,
    "marble": _marble,
    "plastic": _plastic,
    "paper": _paper,
    "tile": _tile,
    "concrete": _concrete,
    "mesh": _mesh,
    "rubber": _rubber,
    "cork": _cork,
    "glass": _glass,
    "corrugated sheet": _corrugated,
    "knitwear": _knit,
    "foam": _foam,
    "sand": _sand,
    "brick wall": _bricks,
    "brick": _photograph("brick"),
    "fallen leaves": _leaves,
    "chipboard": _chipboard,
    "coffee beans": _beans,
    "straw": _straw,
    "granite": _granite,
    "mosaic": _mosaic,
    "stone wall": _stone_wall,
    "bark": _bark,
    "rust": _rust,
    "camouflage": _camouflage,
    "basket": _basket,
    "perforated sheet": _perforated,
    "roof shingles": _shingles,
    "plaster": _plaster,
    "circuit board": _circuit,
    "corduroy": _corduroy,
    "washer": _washer,
    "button": _button,
    "gear": _gear,
    "bolt": _bolt,
    "card": _card,
    "bottle cap": _cap,
    "tablet": _tablet,
    "key": _key,
    "connector": _connector,
    "lid": _lid,
    "propeller": _propeller,
}
VALIDATION: dict[str, Callable[[Canvas], Relief]] = {"terrazzo": _terrazzo, "honeycomb": _honeycomb, "coin": _coin}
HELD_OUT: dict[str, Callable[[Canvas], Relief]] = {
    "capsule": _capsule,
    "grass": _photograph("grass"),
    "gravel": _photograph("gravel"),
    "linen": _linen,
    "tread plate": _tread_plate,
}
SURFACES = {**TRAINING, **VALIDATION, **HELD_OUT}


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
    canvas = Canvas(size, style, rng)
    relief, inside = SURFACES[name](canvas)
    picture = style.low + (style.high - style.low) * np.asarray(relief, dtype=np.float32)[..., None]
    if inside is None:
        inside = np.ones((size, size), dtype=bool)
    picture = np.where(inside[..., None], picture, style.ground + 0.02 * (canvas.noise(40)[..., None] - 0.5))
    light = 1 + rng.normal(0, 0.04) + rng.normal(0, 0.06) * canvas.column + rng.normal(0, 0.06) * canvas.row
    picture = picture * light[..., None] + rng.normal(0, 0.008, (size, size, 1))
    return np.clip(picture, 0, 1).astype(np.float32), inside
