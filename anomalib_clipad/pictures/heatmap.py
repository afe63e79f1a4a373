"""Heatmaps on one fixed scale, the same colour for the same value in every picture: 0.5 is the threshold.

The colours are matplotlib's inferno, which is perceptually uniform and keeps its order for colour-blind readers and in
grey. Their opacity grows with the value, so that a normal image looks as it is.
"""

import math
from functools import cache

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from anomalib_clipad.pictures.text import font

THRESHOLD = 0.5
COLOURS = "inferno"
LEVELS = 256
STEEPNESS, OPAQUEST = 1.5, 0.85  # opacity = OPAQUEST * value ** STEEPNESS
BAND = 512  # rows drawn at once, which bounds the memory of large maps
LINE = 2  # pixels of each of the two lines of an outline
NOT_FINITE = (128, 128, 128, 200)  # red, green, blue, opacity
PREDICTED = (255, 255, 255)
GROUND_TRUTH = (0, 220, 255)
DIM, DIMMED = (255, 255, 255), 0.65  # what is not looked at is covered by this colour, of this opacity


@cache
def colours() -> np.ndarray:
    """Red, green, blue and opacity of every level.

    Returns:
        (256, 4) uint8. The last row is for values that are not finite.

    Example:
        >>> table = colours()
        >>> table.shape, int(table[0, 3]), int(table[127, 3]) < 80, int(table[254, 3]) > 200
        ((256, 4), 0, True, True)
    """
    values = np.linspace(0, 1, LEVELS - 1)
    table = np.empty((LEVELS, 4))
    table[:-1] = mpl.colormaps[COLOURS](values)
    table[:-1, 3] = OPAQUEST * values**STEEPNESS
    table[-1] = np.divide(NOT_FINITE, 255)
    return (255 * table).round().astype(np.uint8)


def heat_layer(anomaly_map: np.ndarray) -> Image.Image:
    """A map as a picture with opacity, to be laid over its image.

    Args:
        anomaly_map: (H, W) in [0, 1], 0.5 at the threshold; other values are clamped, and not finite ones grey.

    Returns:
        A picture with a palette (mode ``P``) of the map's size. Saved as PNG it has some ten kilobytes and its opacity.

    Example:
        >>> layer = heat_layer(np.array([[0.0, 1.0]])).convert("RGBA")
        >>> layer.size, layer.getpixel((0, 0))[3], layer.getpixel((1, 0))[3] > 200
        ((2, 1), 0, True)
    """
    levels = np.empty(np.shape(anomaly_map), dtype=np.uint8)
    for top in range(0, len(levels), BAND):
        values = np.asarray(anomaly_map[top : top + BAND], dtype=np.float32)
        finite = np.isfinite(values)
        shades = (np.where(finite, values, 0).clip(0, 1) * (LEVELS - 2)).round()
        levels[top : top + BAND] = np.where(finite, shades, LEVELS - 1)
    layer = Image.fromarray(levels)
    layer.putpalette(colours()[:, :3].tobytes())  # which turns a grey picture into one of mode P
    layer.info["transparency"] = colours()[:, 3].tobytes()
    return layer


def overlay(image: Image.Image, anomaly_map: np.ndarray) -> Image.Image:
    """An image with its heatmap over it, in the image's own size.

    Args:
        image: Of any mode.
        anomaly_map: As :func:`heat_layer` takes it; it is brought to the image's size.

    Returns:
        A picture of mode ``RGB``.

    Example:
        >>> calm = overlay(Image.new("RGB", (8, 4), "white"), np.zeros((2, 2)))
        >>> calm.size, calm.getpixel((0, 0))
        ((8, 4), (255, 255, 255))
    """
    values = Image.fromarray(np.asarray(anomaly_map, dtype=np.float32))
    sized = np.asarray(values.resize(image.size, Image.Resampling.BILINEAR))
    return Image.alpha_composite(image.convert("RGBA"), heat_layer(sized).convert("RGBA")).convert("RGB")


def outline(image: Image.Image, mask: np.ndarray, colour: tuple[int, int, int] = PREDICTED) -> Image.Image:
    """An image with the edges of a mask: a line in ``colour`` within, a black one around it.

    Args:
        image: Of any mode.
        mask: (H, W), true where marked; it is brought to the image's size.
        colour: Red, green and blue of the inner line.

    Returns:
        A picture of mode ``RGB``.

    Example:
        >>> drawn = outline(Image.new("RGB", (20, 20), "grey"), np.eye(2))
        >>> drawn.getpixel((0, 0)), drawn.getpixel((5, 5)), drawn.getpixel((10, 5))
        ((128, 128, 128), (128, 128, 128), (0, 0, 0))
    """
    whole = np.asarray(mask).astype(bool)
    # Where it is reduced, a thin line would vanish: it gets as wide as a pixel of the image.
    reach = [max(1, math.ceil(side / wanted)) for side, wanted in zip(whole.shape, image.size[::-1], strict=True)]
    whole = ndimage.maximum_filter(whole, reach, mode="nearest") if max(reach) > 1 else whole
    marked = Image.fromarray(255 * whole.astype(np.uint8))
    sized = np.asarray(marked.resize(image.size, Image.Resampling.BILINEAR)) >= 128  # bilinear, so without steps
    pixels = np.array(image.convert("RGB"))
    if sized.any():
        rows, columns = (np.flatnonzero(sized.any(axis=axis)) for axis in (1, 0))
        window = tuple(slice(max(int(found[0]) - LINE, 0), int(found[-1]) + LINE + 1) for found in (rows, columns))
        part, width = sized[window], 2 * LINE + 1
        pixels[window][part & ~ndimage.minimum_filter(part, width, mode="nearest")] = colour
        pixels[window][ndimage.maximum_filter(part, width, mode="nearest") & ~part] = (0, 0, 0)
    return Image.fromarray(pixels)


def dimmed(image: Image.Image, region: np.ndarray) -> Image.Image:
    """An image that is pale where it is not looked at.

    Args:
        image: Of any mode.
        region: (H, W), true where it is looked at; it is brought to the image's size.

    Returns:
        A picture of mode ``RGB``.

    Example:
        >>> drawn = dimmed(Image.new("RGB", (4, 2)), np.array([[True, False]]))
        >>> drawn.getpixel((0, 0)), drawn.getpixel((3, 0))
        ((0, 0, 0), (166, 166, 166))
    """
    inside = Image.fromarray(255 * np.asarray(region).astype(bool).astype(np.uint8))
    sized = np.asarray(inside.resize(image.size, Image.Resampling.BILINEAR)) >= 128  # as outline does it
    pale = image.convert("RGB")
    pale.paste(DIM, mask=Image.fromarray(np.where(sized, 0, round(255 * DIMMED)).astype(np.uint8)))
    return pale


def legend(width: int = 240, threshold: float | None = THRESHOLD) -> Image.Image:
    """The colours over grey, with the ends of the scale and the threshold.

    Args:
        width: In pixels, at least 160.
        threshold: Where it is marked, in [0, 1]; None for maps without one.

    Example:
        >>> legend(200).size
        (200, 30)
    """
    bar, text = 12, font(11)
    picture = Image.new("RGB", (width, 30), "white")
    layer = heat_layer(np.tile(np.linspace(0, 1, width), (bar, 1))).convert("RGBA")
    picture.paste(Image.alpha_composite(Image.new("RGBA", layer.size, (190, 190, 190, 255)), layer).convert("RGB"))
    draw = ImageDraw.Draw(picture)
    draw.text((0, bar + 4), "0", "black", text, anchor="lt")
    draw.text((width - 1, bar + 4), "1", "black", text, anchor="rt")
    if threshold is not None:
        words = f"{threshold:.4g} = threshold"
        room = text.getlength(words) / 2 + 12  # beside the ends of the scale
        place = min(max(threshold, 0), 1) * (width - 1)
        draw.line([(place, 0), (place, bar + 2)], "black")
        draw.text((min(max(place, room), width - 1 - room), bar + 4), words, "black", text, anchor="mt")
    return picture
