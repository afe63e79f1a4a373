"""Pictures of a comparison: means, categories, speed, and heatmaps side by side."""

import io
from pathlib import Path

import matplotlib as mpl
import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from PIL import Image

from anomalib_clipad.compare.evaluator import METRICS
from anomalib_clipad.compare.examples import short_names
from anomalib_clipad.compare.job_files import Kept
from anomalib_clipad.files import slug, write_atomically
from anomalib_clipad.pictures.text import shortened

OVER_SHOTS = ("image_AUROC", "pixel_AUROC", "pixel_AP", "pixel_AUPRO")
COLOURS = ("#1b6ca8", "#d95f02", "#3a9679", "#8e5ea2", "#c2a83e", "#7a4a2b", "#5c6b73", "#d4526e")


def draw_means(path: Path, means: pd.DataFrame) -> None:
    """Bars of every metric's mean over the categories.

    Args:
        path: PNG file to write.
        means: A row a model, a column a metric, in [0, 1].

    Example:
        >>> draw_means(Path("means.png"), pd.DataFrame({"image_AUROC": [0.9]}, index=["SDP"]))
        >>> Path("means.png").is_file()
        True
    """
    figure = _figure(width=2 + 1.4 * len(means.columns), height=4.2)
    axes = figure.subplots()
    positions, width, colours = np.arange(len(means.columns)), 0.8 / len(means), _colours(len(means))
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
    _plain(figure.legend(loc="outside upper center", ncols=min(len(means), 5), frameon=False))
    _save(figure, path)


def draw_categories(path: Path, done: pd.DataFrame, metrics: list[str]) -> None:
    """A table in colours, a row a category and a column a model, for one image and one pixel metric.

    Args:
        path: PNG file to write.
        done: A row a job, with ``model``, ``category`` and the metrics.
        metrics: The metrics measured.

    Example:
        >>> rows = pd.DataFrame({"model": ["SDP"], "category": ["nut"], "image_AUROC": [0.9]})
        >>> draw_categories(Path("categories.png"), rows, ["image_AUROC"])
        >>> Path("categories.png").is_file()
        True
    """
    models, categories = done["model"].nunique(), done["category"].nunique()
    figure = _figure(width=3 + 0.95 * models * 2, height=1.9 + 0.36 * categories)
    wanted = [name for name in ("image_AUROC", "pixel_AP") if name in metrics] or metrics[:1]
    axes = figure.subplots(1, len(wanted), squeeze=False, sharey=True)[0]
    for axis, name in zip(axes, wanted, strict=True):
        wide = 100 * done.pivot_table(index="category", columns="model", values=name, sort=False)
        wide = wide.reindex(columns=done["model"].unique())
        axis.imshow(wide, cmap="YlGnBu", vmin=0, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(wide.to_numpy()):
            if np.isfinite(value):
                axis.text(
                    column, row, f"{value:.0f}", ha="center", va="center", color="white" if value > 60 else "black"
                )
        turned = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
        models_shown, categories_shown = map(_labels, (wide.columns, wide.index))
        axis.set_xticks(range(len(models_shown)), models_shown, parse_math=False, **turned)
        axis.set_yticks(range(len(categories_shown)), categories_shown, parse_math=False)
        axis.set_title(f"{METRICS[name]}, %", fontsize=11)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    _save(figure, path)


def draw_speed(path: Path, done: pd.DataFrame, metrics: list[str]) -> None:
    """Accuracy against images per second, a point a model.

    Args:
        path: PNG file to write.
        done: A row a job, with ``model``, ``images_per_second`` and the metrics.
        metrics: The metrics measured; pixel AP is drawn, or the next best there is.

    Example:
        >>> rows = pd.DataFrame({"model": ["SDP"], "images_per_second": [3.0], "image_AUROC": [0.9]})
        >>> draw_speed(Path("speed.png"), rows, ["image_AUROC"])
        >>> Path("speed.png").is_file()
        True
    """
    figure = _figure(width=7.5, height=5)
    name = next(metric for metric in ("pixel_AP", "pixel_AUPRO", "image_AUROC", *metrics) if metric in metrics)
    axes = figure.subplots()
    points = done.groupby("model", sort=False)[[name, "images_per_second"]].mean()
    for colour, (model, row) in zip(_colours(len(points)), points.iterrows(), strict=True):
        axes.scatter(
            row["images_per_second"],
            100 * row[name],
            s=80,
            color=colour,
            alpha=0.85,
            zorder=3,
            label=shortened(str(model)),
        )
    _plain(figure.legend(loc="outside right upper", frameon=False))
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
    _save(figure, path)


def draw_shots(path: Path, done: pd.DataFrame, metrics: list[str]) -> None:
    """Metrics over the number of normal images: a line a model, and the range over the seeds as a band.

    Args:
        path: PNG file to write.
        done: A row a job, with ``family``, ``category``, ``shots``, ``seed`` and the metrics.
        metrics: The metrics measured; the four of ``OVER_SHOTS`` are drawn, or the first there is.

    Example:
        >>> rows = {"family": ["SDP"] * 2, "category": ["nut"] * 2, "shots": [0, 4], "seed": [0, 0]}
        >>> draw_shots(Path("shots.png"), pd.DataFrame({**rows, "image_AUROC": [0.8, 0.9]}), ["image_AUROC"])
        >>> Path("shots.png").is_file()
        True
    """
    wanted = [name for name in OVER_SHOTS if name in metrics] or metrics[:1]
    tried = done[done["shots"].notna()]
    counts = sorted(tried["shots"].unique())
    figure = _figure(width=0.8 + 3.1 * len(wanted), height=3.9)
    axes = figure.subplots(1, len(wanted), squeeze=False)[0]
    for axis, name in zip(axes, wanted, strict=True):
        groups = tried.groupby("family", sort=False)
        for colour, (family, part) in zip(_colours(len(groups)), groups, strict=True):
            middle, low, high = _over_seeds(100 * part.groupby(["shots", "category", "seed"])[name].mean())
            places = [counts.index(count) for count in middle.index]
            axis.plot(places, middle, "o-", color=colour, label=shortened(str(family)), markersize=4)
            axis.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_xticks(range(len(counts)), [f"{count:.0f}" for count in counts])
        axis.set_xlabel("normal images")
        axis.set_title(f"{METRICS[name]}, %", fontsize=11)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    _plain(figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 5), frameon=False))
    _save(figure, path)


def _over_seeds(values: pd.Series) -> tuple[pd.Series, pd.Series, pd.Series]:
    """Means over the categories by number of images, and the lowest and highest of a seed.

    A seed counts by how far it is from the mean of its categories: one whose job failed then moves nothing.
    """
    of_category = values.groupby(["shots", "category"])
    middle = of_category.mean().groupby("shots").mean()
    away = (values - of_category.transform("mean")).groupby(["shots", "seed"]).mean().groupby("shots")
    return middle, middle + away.min(), middle + away.max()


def draw_examples(output: Path, category: str, part: pd.DataFrame) -> None:
    """Rows of images: the image, its ground truth, each model's heatmap on one colour scale.

    The scale is that of percentiles, so that models whose maps differ in unit can be compared.

    Args:
        output: Folder of the comparison; the picture goes to ``examples/`` in it.
        category: Its name.
        part: A row a job on the category, with ``model`` and ``key``; jobs that kept no examples are left out.

    Example:
        >>> draw_examples(Path(), "nut", pd.DataFrame({"model": ["SDP"], "key": ["none"]}))
        >>> Path("examples").exists()
        False
    """
    found = {row["model"]: Kept.read(output / "jobs" / f"{row['key']}.json") for _, row in part.iterrows()}
    kept = {model: one for model, one in found.items() if one is not None}
    shared = sorted(set.intersection(*(set(one.maps) for one in kept.values()))) if kept else []
    if not shared:
        return
    everything = sorted(set().union(*(one.scores for one in kept.values())))
    names = dict(zip(everything, short_names(everything), strict=True))
    masks = next(iter(kept.values())).masks
    columns = 1 + bool(masks) + len(kept)

    figure = _figure(width=1.4 + 1.9 * columns, height=0.5 + 1.95 * len(shared))
    axes = figure.subplots(len(shared), columns, squeeze=False)
    for row, path in enumerate(shared):
        image = _image(path)
        frame = (0, image.width, image.height, 0)
        axes[row, 0].imshow(image)
        axes[row, 0].set_ylabel(shortened(names[path], 30), fontsize=8, parse_math=False)
        if masks:
            axes[row, 1].imshow(masks[path], cmap="gray", vmin=0, vmax=1, extent=frame)
        for column, one in enumerate(kept.values(), start=1 + bool(masks)):
            heat = one.maps[path].astype(np.float32)
            scaled = np.clip((heat - one.low) / max(one.high - one.low, 1e-12), 0, 1)
            axes[row, column].imshow(image)
            axes[row, column].imshow(scaled, cmap="turbo", alpha=0.6, vmin=0, vmax=1, extent=frame)
            axes[row, column].set_xlabel(f"score {one.scores[path]:.3f}", fontsize=8)
    titles = ["image", *(["ground truth"] if masks else []), *kept]
    for axis, text in zip(axes[0], titles, strict=True):
        axis.set_title(shortened(text, 24), fontsize=10, parse_math=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    colours = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), "turbo")
    bar = figure.colorbar(colours, ax=axes, shrink=0.6, pad=0.02)
    bar.set_label("1st to 99.5th percentile of a model's own maps of the category", fontsize=8)
    folder = output / "examples"
    folder.mkdir(exist_ok=True)
    _save(figure, folder / f"{slug(category)}.png")


def _image(path: str) -> Image.Image:
    """The image, or a grey one where it has gone since it was measured."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return Image.new("RGB", (256, 256), "grey")


def _colours(count: int) -> list[str]:
    """A colour a model, no two the same."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [mpl.colors.to_hex(colour) for colour in mpl.colormaps["turbo"](np.linspace(0.05, 0.95, count))]


def _labels(names: pd.Index) -> list[str]:
    return [shortened(str(name)) for name in names]


def _plain(legend: Legend) -> None:
    """Dollars in a name are no formula."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())
