"""Histograms of scores: how far good and anomalous images are apart, and where the threshold is."""

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from anomalib_clipad.compare.drawing import COLOURS, new_figure
from anomalib_clipad.data.verdict import VERDICTS
from anomalib_clipad.pictures.heatmap import THRESHOLD
from anomalib_clipad.pictures.text import shortened

MOST_MODELS, MOST_CATEGORIES = 6, 8
BINS = 24
UNLABELLED = "unlabelled"
KINDS = {VERDICTS[0]: COLOURS[0], VERDICTS[1]: COLOURS[1], UNLABELLED: COLOURS[6]}


def scores_figure(table: pd.DataFrame) -> Figure:
    """A histogram a model and category, of good and anomalous images, on the common scale.

    Args:
        table: As :func:`anomalib_clipad.compare.predictions.predictions` returns it; the first models and categories
            are drawn, see :func:`left_out`.

    Example:
        >>> rows = {"model": ["SDP"] * 2, "category": ["nut"] * 2, "true_label": ["normal", "anomalous"]}
        >>> len(scores_figure(pd.DataFrame({**rows, "scaled_score": [0.2, 0.9], "threshold": [0.1, 0.1]})).axes)
        1
    """
    models, categories = table["model"].unique()[:MOST_MODELS], table["category"].unique()[:MOST_CATEGORIES]
    figure = new_figure(width=1 + 2.3 * max(len(models), 2), height=1.3 + 1.5 * len(categories))
    axes = figure.subplots(len(categories), len(models), squeeze=False)
    for row, category in enumerate(categories):
        for column, model in enumerate(models):
            part = table[(table["model"] == model) & (table["category"] == category)]
            _draw(axes[row, column], part)
        axes[row, 0].set_ylabel(shortened(str(category), 24), fontsize=9, parse_math=False)
    for column, model in enumerate(models):
        axes[0, column].set_title(shortened(str(model), 28), fontsize=9, parse_math=False)
    figure.supxlabel("score on the common scale, 0.5 = threshold", fontsize=9)
    kinds = table["true_label"].fillna(UNLABELLED).unique()
    handles: list[Artist] = [
        Patch(color=colour, alpha=0.7, label=kind) for kind, colour in KINDS.items() if kind in kinds
    ]
    handles.append(Line2D([], [], color="black", label="threshold"))
    if table["threshold"].isna().any():
        handles.append(Line2D([], [], color="black", linestyle=":", label="no threshold: the largest score"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9)
    return figure


def _draw(axis: Axes, part: pd.DataFrame) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=7)
    axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    scores = part["scaled_score"].to_numpy(dtype=float)
    finite = np.isfinite(scores)
    if not finite.any():  # the job failed
        axis.text(0.5, 0.5, "no scores", ha="center", va="center", transform=axis.transAxes, fontsize=8)
        axis.set_axis_off()
        return
    edges = np.linspace(min(scores[finite].min(), 0.45), max(scores[finite].max(), 0.55), BINS + 1).tolist()
    truth = part["true_label"].fillna(UNLABELLED).to_numpy()
    for kind, colour in KINDS.items():
        chosen = scores[finite & (truth == kind)]
        if len(chosen):
            axis.hist(chosen, edges, color=colour, alpha=0.35)
            axis.hist(chosen, edges, color=colour, histtype="step", linewidth=1.2)
    axis.axvline(THRESHOLD, color="black", linewidth=1, linestyle=":" if part["threshold"].isna().any() else "-")


def left_out(table: pd.DataFrame) -> str | None:
    """A sentence on the models and categories that the figure leaves out; None if it has all.

    Args:
        table: As :func:`scores_figure` takes it.

    Example:
        >>> left_out(pd.DataFrame({"model": list("abcdefg"), "category": "nut"}))
        'The first 6 of 7 models are drawn; predictions.csv has all scores.'
    """
    both = (
        ("models", table["model"].nunique(), MOST_MODELS),
        ("categories", table["category"].nunique(), MOST_CATEGORIES),
    )
    parts = [f"the first {most} of {count} {name}" for name, count, most in both if count > most]
    if not parts:
        return None
    words = " and ".join(parts)
    return f"{words[0].upper()}{words[1:]} are drawn; predictions.csv has all scores."
