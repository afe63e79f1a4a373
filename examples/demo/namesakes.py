"""Other drawings of what is held out, from which the demonstration backbone learns nothing but the words.

A name can be read off a picture only by who has met the name before. The surfaces held out for testing are never shown
in training. So here are others of the same names, drawn in other ways: a lawn of drawn blades where the test has a
photograph of grass, for example. They are shown flawless only, and only to the part of the loss that teaches names.
"""

from collections.abc import Callable

import numpy as np

from anomalib_clipad.demo.canvas import Canvas, Relief, Style


def _lawn(c: Canvas) -> Relief:
    length = c.rng.uniform(0.05, 0.12)
    return 0.8 * c.grains(round(14 / length**2), length, c.rng.uniform(8, 20), corners=4) + 0.2 * c.noise(70), None


def _pebbles(c: Canvas) -> Relief:
    if c.rng.random() < 0.5:  # heaped, or side by side
        size = c.rng.uniform(0.04, 0.08)
        return c.grains(round(2.5 / size**2), size, c.rng.uniform(1.1, 1.5), corners=int(c.rng.integers(6, 13))), None
    first, second, number = c.cells(c.rng.integers(120, 350))
    stone = (0.35 + 0.5 * ((number * 0.37) % 1)) * np.clip(1.2 - 0.7 * first, 0, 1) + 0.15 * (c.noise(80) - 0.5)
    return np.where(second - first > 0.12, stone, 0.05 + 0.1 * c.noise(60)), None


def _canvas_weave(c: Canvas) -> Relief:
    threads = c.rng.uniform(13, 22) * c.style.scale
    a, b = threads * (c.x + 0.01 * c.noise(8)), threads * (c.y + 0.01 * c.noise(8))
    over = (np.floor(a) + np.floor(b)) % 2 > 0
    thread = np.where(over, np.abs(np.sin(np.pi * a)) * c.noise(45, 10), np.abs(np.sin(np.pi * b)) * c.noise(45, 0.1))
    return np.clip(0.25 + 0.9 * thread, 0, 1), None


def _bar_plate(c: Canvas) -> Relief:
    repeats, bars = c.rng.uniform(2.5, 4.5) * c.style.scale, c.rng.integers(2, 6)
    a, b = repeats * c.x, repeats * c.y
    turned = (np.floor(a) + np.floor(b)) % 2 > 0
    along, across = np.where(turned, a % 1, b % 1) - 0.5, np.where(turned, b % 1, a % 1)
    raised = (np.abs(along) < 0.4) & (np.abs((across * bars) % 1 - 0.5) < 0.26)
    return np.clip(0.3 + 0.5 * raised + 0.2 * (c.noise(50) - 0.5), 0, 1), None


def _medicine(c: Canvas) -> Relief:
    inside = (np.abs(c.u) / 0.42) ** 3 + (np.abs(c.v) / 0.17) ** 2 < 1
    halves = np.where(np.abs(c.u - 0.05) < 0.012, 0.1, np.where(c.u > 0.05, 0.2, 0.8))
    return np.clip(halves + 0.5 * np.clip(1 - np.abs(c.v + 0.05) / 0.06, 0, 1) - 0.3 * c.v, 0, 1), inside


NAMESAKES: dict[str, Callable[[Canvas], Relief]] = {
    "capsule": _medicine,
    "grass": _lawn,
    "gravel": _pebbles,
    "linen": _canvas_weave,
    "tread plate": _bar_plate,
}
# Hue of valleys and heights where things have one: blades of any green, stones of any grey or brown.
_COLOURS = {"grass": ((0.1, 0.22, 0.06), (0.5, 0.75, 0.25)), "gravel": ((0.2, 0.18, 0.16), (0.75, 0.72, 0.68))}


def usual_colours(name: str, style: Style, rng: np.random.Generator) -> Style:
    """The style in the colours that such things mostly have, more or less."""
    if name not in _COLOURS or rng.random() < 0.3:
        return style
    low, high = (np.clip(np.array(c) * rng.uniform(0.7, 1.3) + rng.normal(0, 0.05, 3), 0, 1) for c in _COLOURS[name])
    return style._replace(low=low, high=high)
