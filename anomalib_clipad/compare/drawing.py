"""What all figures of a report have in common: colours, names, and that only what has changed is drawn again."""

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from PIL import Image

from anomalib_clipad import __version__
from anomalib_clipad.files import write_atomically
from anomalib_clipad.pictures.text import shortened

COLOURS = ("#1b6ca8", "#d95f02", "#3a9679", "#8e5ea2", "#c2a83e", "#7a4a2b", "#5c6b73", "#d4526e")
INPUTS = "Inputs"  # name of a text in the PNG file: digest of what was drawn


def draw_once(path: Path, inputs: Sequence[object], draw: Callable[[], Figure]) -> None:
    """Draw a figure, unless the file is there and was drawn of the same inputs.

    Args:
        path: PNG file to write.
        inputs: What the figure depends on: tables, and values with a faithful ``repr``.
        draw: Makes the figure.

    Example:
        >>> drawn = []
        >>> for value in (1, 1, 2):
        ...     draw_once(Path("figure.png"), [value], lambda: drawn.append(1) or Figure((1, 1)))
        >>> len(drawn)
        2
    """
    texts = [
        one.to_json(orient="split", double_precision=15) if isinstance(one, pd.DataFrame) else one for one in inputs
    ]
    digest = hashlib.sha256(repr((__version__, mpl.__version__, texts)).encode(errors="backslashreplace")).hexdigest()
    if _drawn_of(path) == digest:
        return
    buffer = io.BytesIO()
    draw().savefig(buffer, format="png", metadata={INPUTS: digest})
    write_atomically(path, buffer.getvalue())


def _drawn_of(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            image.load()
            return image.info.get(INPUTS)
    except (OSError, SyntaxError, ValueError):  # no file, or a damaged one
        return None


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches.

    Example:
        >>> new_figure(3, 2).get_size_inches().tolist()
        [3.0, 2.0]
    """
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def colours_of(count: int) -> list[str]:
    """A colour a model, no two the same.

    Example:
        >>> colours_of(2)
        ['#1b6ca8', '#d95f02']
    """
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [mpl.colors.to_hex(colour) for colour in mpl.colormaps["turbo"](np.linspace(0.05, 0.95, count))]


def labels_of(names: pd.Index) -> list[str]:
    """Names that fit beside an axis.

    Example:
        >>> labels_of(pd.Index(["SDP"]))
        ['SDP']
    """
    return [shortened(str(name)) for name in names]


def plain(legend: Legend) -> None:
    """Dollars in a name are no formula.

    Example:
        >>> figure = new_figure(3, 2)
        >>> _ = figure.subplots().plot([1], label="$5")
        >>> plain(figure.legend())
    """
    for text in legend.get_texts():
        text.set_parse_math(False)
