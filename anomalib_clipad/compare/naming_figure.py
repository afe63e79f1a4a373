"""Which words a model gives to which defects."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from anomalib_clipad.compare.drawing import COLOURS, new_figure
from anomalib_clipad.compare.naming import Naming
from anomalib_clipad.pictures.text import shortened

CELL = 0.46  # inches
NAMES, REST = 2.3, 2.2  # inches: of the names beside the cells, of all that is above and below
DARK = 0.6  # share of a row above which its number is written in white


def confusion_figure(naming: Naming) -> Figure:
    """A row a true defect, a column a word given; numbers of images, in colours by their share of the row.

    Args:
        naming: The words of a model.

    Example:
        >>> naming = Naming("SDP", ("nut",), ("dent", "hole"), ("dent", "hole"), ("dent", "unspecified"))
        >>> len(confusion_figure(naming).axes[0].texts)
        2
    """
    counts, figures = naming.confusion, naming.figures
    rows, columns = counts.shape
    words = len(naming.words)
    figure = new_figure(NAMES + CELL * max(columns, 6), REST + CELL * max(rows, 3))
    axes = figure.subplots()
    shares = counts.div(counts.sum(axis=1), axis=0)
    axes.imshow(shares, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    for (row, column), count in np.ndenumerate(counts.to_numpy()):
        if count:
            colour = "white" if shares.iat[row, column] > DARK else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=9, color=colour)
    for row, word in enumerate(counts.index):  # where right words are
        corner = naming.words.index(word) - 0.5, row - 0.5
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=COLOURS[1], linewidth=1.6, clip_on=False))
    axes.axvline(words - 0.5, color="black", linewidth=1)  # behind it are images without a word
    names = [f"{shortened(word, 22)} ({count})" for word, count in counts.sum(axis=1).items()]
    axes.set_xticks(range(columns), [shortened(str(word), 22) for word in counts], parse_math=False)
    axes.set_yticks(range(rows), names, parse_math=False)
    for label in axes.get_xticklabels():
        label.set(rotation=40, ha="right", rotation_mode="anchor")
    axes.set_xlabel("word given")
    axes.set_ylabel("true defect (images)")
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    shares_shown = (figures.accuracy, figures.chance, figures.most_frequent)
    right, chance, frequent = (f"{100 * share:.1f} %" for share in shares_shown)
    figure.suptitle(
        f"{shortened(naming.title, 44)}\n{right} right; chance {chance}, always the most frequent {frequent}",
        fontsize=10,
        parse_math=False,
    )
    return figure
