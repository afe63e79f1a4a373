"""Objects in the middle of a picture, which leave the ground around them free."""

from collections.abc import Callable

import numpy as np

from anomalib_clipad.demo.canvas import Canvas, Relief


def _disk(c: Canvas, radius: float) -> np.ndarray:
    return np.hypot(c.u, c.v) < radius


def _object(c: Canvas, inside: np.ndarray, detail: np.ndarray) -> Relief:
    """An object with its own detail, lit from the upper left."""
    return np.clip(0.5 + 0.35 * (detail - 0.5) - 0.35 * (c.u + c.v) + 0.08 * (c.noise(48) - 0.5), 0, 1), inside


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


def _coin(c: Canvas) -> Relief:
    radius, around = np.hypot(c.u, c.v), np.arctan2(c.v, c.u)
    star = (radius < 0.2 + 0.06 * np.cos(5 * around)) | (radius > 0.35)
    return _object(c, radius < 0.39, star)


def _capsule(c: Canvas) -> Relief:
    distance = np.hypot(np.clip(np.abs(c.u) - 0.24, 0, None), c.v)
    shine = np.clip(1 - np.abs(c.v + 0.07) / 0.05, 0, 1)
    return _object(c, distance < 0.17, np.where(c.u > 0, 1.6, -0.6) + 0.5 * shine)


OBJECTS: dict[str, Callable[[Canvas], Relief]] = {
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
    "coin": _coin,
    "capsule": _capsule,
}
