"""Figures of a comparison's metrics: means, categories, speed, and over the number of normal images."""

import matplotlib as mpl
import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from anomalib_clipad.compare.drawing import COLOURS, colours_of, labels_of, new_figure, plain
from anomalib_clipad.compare.evaluator import METRICS
from anomalib_clipad.pictures.text import shortened

OVER_SHOTS = ("image_AUROC", "pixel_AUROC", "pixel_AP", "pixel_AUPRO")


def means_figure(means: pd.DataFrame) -> Figure:
    """Bars of every metric's mean over the categories.

    Args:
        means: A row a model, a column a metric, in [0, 1].

    Example:
        >>> len(means_figure(pd.DataFrame({"image_AUROC": [0.9]}, index=["SDP"])).axes)
        1
    """
    figure = new_figure(width=2 + 1.4 * len(means.columns), height=4.2)
    axes = figure.subplots()
    positions, width, colours = np.arange(len(means.columns)), 0.8 / len(means), colours_of(len(means))
    for number, (model, row) in enumerate(means.iterrows()):
        offset = (number - (len(means) - 1) / 2) * width
        bars = axes.bar(positions + offset, 100 * row, width, color=colours[number])
        bars.set_label(shortened(str(model)))
        if len(means) <= len(COLOURS):  # the numbers of more would overlap; the table has them
            axes.bar_label(bars, fmt="%.0f", fontsize=7 if len(means) > 3 else 8, padding=1)
    axes.set_xticks(positions, [METRICS[name] for name in means.columns])
    axes.set_ylabel("mean over categories, %")
    axes.set_ylim(0, 108)
    axes.spines[["top", "right"]].set_visible(False)
    plain(figure.legend(loc="outside upper center", ncols=min(len(means), 5), frameon=False))
    return figure


def categories_figure(done: pd.DataFrame, metrics: list[str]) -> Figure:
    """A table in colours, a row a category and a column a model, for one image and one pixel metric.

    Args:
        done: A row a job, with ``model``, ``category`` and the metrics.
        metrics: The metrics measured.

    Example:
        >>> rows = pd.DataFrame({"model": ["SDP"], "category": ["nut"], "image_AUROC": [0.9]})
        >>> len(categories_figure(rows, ["image_AUROC"]).axes)
        1
    """
    models, categories = done["model"].nunique(), done["category"].nunique()
    figure = new_figure(width=3 + 0.95 * models * 2, height=1.9 + 0.36 * categories)
    wanted = [name for name in ("image_AUROC", "pixel_AP") if name in metrics] or metrics[:1]
    axes = figure.subplots(1, len(wanted), squeeze=False, sharey=True)[0]
    for axis, name in zip(axes, wanted, strict=True):
        wide = 100 * done.pivot_table(index="category", columns="model", values=name, sort=False)
        # All panels share the categories, also those of which a metric is not measured.
        wide = wide.reindex(index=done["category"].unique(), columns=done["model"].unique())
        axis.imshow(wide, cmap="YlGnBu", vmin=0, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(wide.to_numpy()):
            if np.isfinite(value):
                axis.text(
                    column, row, f"{value:.0f}", ha="center", va="center", color="white" if value > 60 else "black"
                )
        turned = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
        models_shown, categories_shown = map(labels_of, (wide.columns, wide.index))
        axis.set_xticks(range(len(models_shown)), models_shown, parse_math=False, **turned)
        axis.set_yticks(range(len(categories_shown)), categories_shown, parse_math=False)
        axis.set_title(f"{METRICS[name]}, %", fontsize=11)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    return figure


def speed_figure(done: pd.DataFrame, metrics: list[str]) -> Figure:
    """Accuracy against images per second, a point a model.

    Args:
        done: A row a job, with ``model``, ``images_per_second`` and the metrics.
        metrics: The metrics measured; pixel AP is drawn, or the next best there is.

    Example:
        >>> rows = pd.DataFrame({"model": ["SDP"], "images_per_second": [3.0], "image_AUROC": [0.9]})
        >>> len(speed_figure(rows, ["image_AUROC"]).axes)
        1
    """
    figure = new_figure(width=7.5, height=5)
    name = next(metric for metric in ("pixel_AP", "pixel_AUPRO", "image_AUROC", *metrics) if metric in metrics)
    axes = figure.subplots()
    points = done.groupby("model", sort=False)[[name, "images_per_second"]].mean()
    for colour, (model, row) in zip(colours_of(len(points)), points.iterrows(), strict=True):
        axes.scatter(
            row["images_per_second"],
            100 * row[name],
            s=80,
            color=colour,
            alpha=0.85,
            zorder=3,
            label=shortened(str(model)),
        )
    plain(figure.legend(loc="outside right upper", frameon=False))
    axes.set_xscale("log")
    low, high = points["images_per_second"].min(), points["images_per_second"].max()
    axes.set_xlim(low / 2, high * 2)
    axes.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.margins(y=0.2)
    axes.grid(alpha=0.3, which="both")
    device = f" ({done['device'].iloc[0]})" if "device" in done else ""
    axes.set_xlabel(f"images per second, batches as configured{device}")
    axes.set_ylabel(f"{METRICS[name]}, mean over categories, %")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def shots_figure(done: pd.DataFrame, metrics: list[str]) -> Figure:
    """Metrics over the number of normal images: a line a model, and the range over the seeds as a band.

    Args:
        done: A row a job, with ``family``, ``category``, ``shots``, ``seed`` and the metrics.
        metrics: The metrics measured; the four of ``OVER_SHOTS`` are drawn, or the first there is.

    Example:
        >>> rows = {"family": ["SDP"] * 2, "category": ["nut"] * 2, "shots": [0, 4], "seed": [0, 0]}
        >>> len(shots_figure(pd.DataFrame({**rows, "image_AUROC": [0.8, 0.9]}), ["image_AUROC"]).axes)
        1
    """
    wanted = [name for name in OVER_SHOTS if name in metrics] or metrics[:1]
    tried = done[done["shots"].notna()]
    counts = sorted(tried["shots"].unique())
    figure = new_figure(width=0.8 + 3.1 * len(wanted), height=3.9)
    axes = figure.subplots(1, len(wanted), squeeze=False)[0]
    for axis, name in zip(axes, wanted, strict=True):
        groups = tried.groupby("family", sort=False)
        for colour, (family, part) in zip(colours_of(len(groups)), groups, strict=True):
            middle, low, high = _over_seeds(100 * part.groupby(["shots", "category", "seed"])[name].mean())
            places = [counts.index(count) for count in middle.index]
            axis.plot(places, middle, "o-", color=colour, label=shortened(str(family)), markersize=4)
            axis.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_xticks(range(len(counts)), [f"{count:.0f}" for count in counts])
        least, most = axis.get_ylim()
        axis.set_yticks([tick for tick in axis.get_yticks() if max(least, 0) <= tick <= min(most, 100)])  # no 104 %
        axis.set_xlabel("normal images")
        axis.set_title(f"{METRICS[name]}, %", fontsize=11)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    plain(figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 5), frameon=False))
    return figure


def _over_seeds(values: pd.Series) -> tuple[pd.Series, pd.Series, pd.Series]:
    """Means over the categories by number of images, and the lowest and highest of a seed.

    A seed counts by how far it is from the mean of its categories: one whose job failed then moves nothing.
    """
    of_category = values.groupby(["shots", "category"])
    middle = of_category.mean().groupby("shots").mean()
    away = (values - of_category.transform("mean")).groupby(["shots", "seed"]).mean().groupby("shots")
    return middle, middle + away.min(), middle + away.max()
