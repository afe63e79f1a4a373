"""Materials that fill a picture: rendered ones, and photographs of scikit-image's own, which are CC0."""

from collections.abc import Callable

import numpy as np
import skimage
from PIL import Image

from anomalib_clipad.demo.canvas import Canvas, Relief


def _lines(phase: np.ndarray, width: float) -> np.ndarray:
    """1 on thin lines at whole numbers, 0 between; ``width`` is a part of the distance."""
    return np.clip((width - np.abs(phase - np.round(phase))) / (0.4 * width) + 0.5, 0, 1)


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


def _terrazzo(c: Canvas) -> Relief:
    first, second, number = c.cells(60)
    chip = ((second - first) > 0.35) & (number % 3 > 0)
    return np.where(chip, (number * 0.37) % 1, 0.5 + 0.1 * c.noise(60)), None


def _honeycomb(c: Canvas) -> Relief:
    repeats = 9 * c.style.scale
    cosines = [np.cos(2 * np.pi * repeats * (np.cos(a) * c.x + np.sin(a) * c.y)) for a in np.arange(3) * np.pi / 3]
    return np.clip(0.5 + 0.4 * np.sum(cosines, axis=0), 0, 1) * 0.9 + 0.1 * c.noise(60), None


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


MATERIALS: dict[str, Callable[[Canvas], Relief]] = {
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
    "terrazzo": _terrazzo,
    "honeycomb": _honeycomb,
    "grass": _photograph("grass"),
    "gravel": _photograph("gravel"),
    "linen": _linen,
    "tread plate": _tread_plate,
}
