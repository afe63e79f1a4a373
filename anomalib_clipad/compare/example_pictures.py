"""Example pictures of a category: each model's heatmap and verdict side by side, all on the common scale."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from anomalib_clipad.compare.drawing import new_figure
from anomalib_clipad.compare.examples import choose_examples, extremes, short_names
from anomalib_clipad.compare.job_files import Kept
from anomalib_clipad.data.verdict import VERDICTS, telling_digits
from anomalib_clipad.pictures.heatmap import GROUND_TRUTH, LEVELS, THRESHOLD, dimmed, legend, outline, overlay
from anomalib_clipad.pictures.image_file import read_picture
from anomalib_clipad.pictures.text import shortened

MOST_EXTREMES = 6  # rows beside the examples
SIDE = 320  # pixels of the longer side of a picture in its cell
CELL, CAPTION, NAMES = 1.9, 0.42, 1.6  # inches: a cell's width, what is written under it, the column of names
LINE = 0.14  # inches: the class under a cell, where a model has several
FLATTEST, TALLEST = 0.3, 1.4  # height by width of a cell
RIGHT, WRONG = "#1a1a1a", "#a33b00"


@dataclass(frozen=True)
class Row:
    """A row of an example picture.

    Args:
        path: The image.
        why: What is special about it, nothing for an ordinary example.

    Example:
        >>> Row("good/000.png").why
        ''
    """

    path: str
    why: str = ""


def choose_rows(kept: Mapping[str, Kept]) -> tuple[list[Row], int]:
    """The images to show: examples from every folder, each model's worst good image and best-hidden defect.

    Args:
        kept: What the models' jobs kept, by the names of the models.

    Returns:
        The rows, each image once, and the number of images that would be too many.

    Example:
        >>> choose_rows({})
        ([], 0)
    """
    if not kept:
        return [], 0
    first = next(iter(kept.values()))
    shared = sorted(set.intersection(*(set(one.images) for one in kept.values())))
    labels = [first.images[path].label for path in shared]
    reasons: dict[str, dict[str, list[str]]] = {path: {} for path in choose_examples(shared, labels)}
    extra: list[str] = []
    for model, one in kept.items():
        both = extremes(shared, labels, [one.images[path].shown for path in shared])
        for path, words in zip(both, ("worst good image", "best-hidden defect"), strict=True):
            if path is None:
                continue
            if path not in reasons and path not in extra:
                extra.append(path)
            if path in reasons or extra.index(path) < MOST_EXTREMES:
                reasons.setdefault(path, {}).setdefault(words, []).append(shortened(model, 24))
    texts = {
        path: "\n".join(f"{words} of {'; '.join(models)}" for words, models in why.items())
        for path, why in reasons.items()
    }
    return [Row(path, why) for path, why in texts.items()], max(0, len(extra) - MOST_EXTREMES)


def examples_figure(kept: Mapping[str, Kept], rows: Sequence[Row], notes: Sequence[str]) -> Figure:
    """Rows of images: the image, its ground truth, each model's heatmap, and what the model says of it.

    Args:
        kept: What the models' jobs kept, by the names of the models.
        rows: The images to show, at least one.
        notes: Sentences for the foot of the picture.

    Example:
        >>> from anomalib_clipad.compare.job_files import KeptImage
        >>> from anomalib_clipad.compare.scale import choose_scales
        >>> image = KeptImage(score=0.3, shown=0.3, label=0, heat=Path("none.png"))
        >>> kept = {"SDP": Kept({"a.png": image}, {}, choose_scales(None, [0.3], [(0, 1)], [0]), "digest")}
        >>> len(examples_figure(kept, [Row("a.png")], []).axes)
        3
    """
    masks = {path: mask for one in kept.values() for path, mask in one.masks.items()}
    pictures = [_picture(row.path) for row in rows]
    everything = sorted(set().union(*(one.images for one in kept.values())))
    names = dict(zip(everything, short_names(everything), strict=True))
    columns = ["image", *(["ground truth"] if masks else []), *kept]

    caption = CAPTION + LINE * any(one.scales.of_class for one in kept.values())
    heights = [CELL * min(max(picture.height / picture.width, FLATTEST), TALLEST) + caption for picture in pictures]
    width = NAMES + CELL * len(columns)
    foot = _foot(kept, notes, width)
    bottom = 0.5 + 0.16 * len(foot)
    figure = new_figure(width, sum(heights) + 0.3 + bottom)
    layout = cast("ConstrainedLayoutEngine", figure.get_layout_engine())
    layout.set(rect=(0, bottom / figure.get_figheight(), 1, 1 - bottom / figure.get_figheight()))
    ratios = {"height_ratios": heights, "width_ratios": [NAMES, *([CELL] * len(columns))]}
    axes = figure.subplots(len(rows), 1 + len(columns), squeeze=False, gridspec_kw=ratios)
    for line, row, picture in zip(axes, rows, pictures, strict=True):
        truth = next(iter(kept.values())).images[row.path].label
        _write_name(line[0], names[row.path], truth, row.why)
        line[1].imshow(picture)
        if masks:
            mask = masks.get(row.path)
            line[2].imshow(picture if mask is None else outline(picture, mask, GROUND_TRUTH))
        for axis, one in zip(line[1 + len(columns) - len(kept) :], kept.values(), strict=True):
            axis.imshow(_heat(picture, one, row.path))
            _write_verdict(axis, one, row.path)
    for axis, text in zip(axes[0, 1:], columns, strict=True):
        axis.set_title(shortened(text, 26), fontsize=9, parse_math=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        axis.set_anchor("N")  # beside the first line of its name
    _write_foot(figure, foot)
    return figure


def _picture(path: str) -> Image.Image:
    """The image, or a grey one where it has gone since it was measured."""
    try:
        return read_picture(Path(path), SIDE)
    except (OSError, SyntaxError, ValueError):
        return Image.new("RGB", (SIDE, SIDE), "grey")


def _heat(picture: Image.Image, one: Kept, path: str) -> Image.Image:
    """The picture under its heat layer, with the contour of the threshold where there is one; pale outside."""
    picture = picture if one.region is None else dimmed(picture, one.region)
    try:
        with Image.open(one.images[path].heat) as layer:
            levels = np.asarray(layer, dtype=np.float32)
    except (OSError, SyntaxError, ValueError):
        return picture
    values = np.where(levels < LEVELS - 1, levels / (LEVELS - 2), np.nan)
    drawn = overlay(picture, values)
    if not one.scales.of(one.images[path].class_name).map.known:
        return drawn
    sized = Image.fromarray(values).resize(picture.size, Image.Resampling.BILINEAR)
    return outline(drawn, np.asarray(sized) > THRESHOLD)


def _write_name(axis: Axes, name: str, truth: int | None, why: str) -> None:
    lines = textwrap.wrap(shortened(name, 60), 22)
    lines += [] if truth is None else [f"({VERDICTS[truth]})"]
    axis.text(0, 0.98, "\n".join(lines), fontsize=8, va="top", transform=axis.transAxes, parse_math=False)
    below = "\n" * len(lines) + "\n".join(textwrap.fill(line, 24) for line in why.splitlines())
    axis.text(0, 0.98, below, fontsize=8, va="top", style="italic", transform=axis.transAxes, parse_math=False)


def _write_verdict(axis: Axes, one: Kept, path: str) -> None:
    image, name = one.images[path], one.chosen_class(path)
    of_class = f"{shortened(name, 22)}\n" if name else ""
    if not one.scales.of(image.class_name).score.known:
        axis.set_xlabel(f"{of_class}score {image.shown:.3f}\nno verdict", fontsize=8, parse_math=False)
        return
    called = int(image.shown > THRESHOLD)
    digits = telling_digits(image.shown, THRESHOLD)
    words, colour = f"{of_class}score {image.shown:.{digits}f}, {VERDICTS[called]}", RIGHT
    if image.label is not None:
        wrong = "✗ false alarm" if called else "✗ missed"
        words += "\n" + ("✓ right" if called == image.label else wrong)
        colour = RIGHT if called == image.label else WRONG
    weight = "bold" if colour == WRONG else "normal"
    axis.set_xlabel(words, fontsize=8, color=colour, weight=weight, parse_math=False)


def _foot(kept: Mapping[str, Kept], notes: Sequence[str], width: float) -> list[str]:
    several = any(one.scales.of_class for one in kept.values())
    key = [f"Scores and heatmaps: 0.5 = threshold{' of the class' if several else ''}."]
    if any(one.scales.map.known for one in kept.values()):
        key.append("White line: above the map's threshold.")
    if any(one.masks for one in kept.values()):
        key.append("Cyan line: ground truth.")
    if any(one.region is not None for one in kept.values()):
        key.append("Pale: outside of the region.")
    return [line for text in (" ".join(key), *notes) for line in textwrap.wrap(text, int(14 * width))]


def _write_foot(figure: Figure, lines: Sequence[str]) -> None:
    height = figure.get_figheight()
    figure.figimage(
        np.asarray(legend(240)), xo=round(0.1 * figure.dpi), yo=round((0.16 * len(lines) + 0.1) * figure.dpi)
    )
    figure.text(0.1 / figure.get_figwidth(), 0.05 / height, "\n".join(lines), fontsize=8, va="bottom", parse_math=False)
