"""Tables and pictures of a comparison, from the rows of its jobs."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from anomalib_clipad.compare.job import write_whole

METRICS = {
    "image_AUROC": "image AUROC",
    "image_F1Max": "image F1-max",
    "image_AP": "image AP",
    "pixel_AUROC": "pixel AUROC",
    "pixel_F1Max": "pixel F1-max",
    "pixel_AP": "pixel AP",
    "pixel_AUPRO": "pixel AUPRO",
}
COLOURS = ("#1b6ca8", "#d95f02", "#3a9679", "#8e5ea2", "#c2a83e", "#7a4a2b", "#5c6b73", "#d4526e")
# Means over the data set in per cent, as their authors or anomalib's model READMEs give them.
PUBLISHED = {
    "MVTecAD": {
        "WinClip": {"pixel_F1Max": 31.7, "pixel_AUPRO": 64.6},
        "ClipAdSdp": {"pixel_F1Max": 35.9, "pixel_AUPRO": 75.3},
        "ClipAdSdpPlus": {"pixel_F1Max": 40.0, "pixel_AUPRO": 85.1},
        "AnomalyVFM": {
            "image_AUROC": 96.4,
            "image_F1Max": 95.0,
            "pixel_AUROC": 91.9,
            "pixel_F1Max": 49.2,
            "pixel_AUPRO": 87.1,
        },
        "Patchcore": {"image_AUROC": 98.0, "pixel_AUROC": 98.0},
    },
}


def write_report(output: Path, rows: list[dict[str, Any]], title: str = "", published: str | None = None) -> None:
    """Write tables and pictures of a comparison into its folder.

    Args:
        output: Folder of the comparison; ``jobs/`` in it holds the jobs' examples.
        rows: A row a job, as :class:`anomalib_clipad.compare.CompareJob` returns it.
        title: The configuration, printed at the end of the report.
        published: Name of the data set whose published figures belong beside the measured ones; found in ``title``
            by default.

    Example:
        >>> row = {"model": "SDP", "category": "bottle", "image_AUROC": 0.9, "key": "none"}
        >>> write_report(Path(), [{**row, "images_per_second": 3.0, "peak_memory_mib": 900.0}])
        >>> "| SDP | **90.0** | 3.00 | 900 | 1 of 1 |" in Path("report.md").read_text()
        True
    """
    table = pd.DataFrame(rows)
    write_whole(output / "results.csv", _flat(table).to_csv(index=False).encode())
    write_whole(output / "results.json", json.dumps(rows, indent=1, default=str).encode())
    done = table[table["error"].isna()] if "error" in table else table
    metrics = [name for name in METRICS if name in done and done[name].notna().any()]
    if metrics:
        means = _means(done, metrics)
        _save(output / "means.png", lambda figure: _draw_means(figure, means), width=2 + 1.4 * len(metrics), height=4.2)
        size = {"width": 3 + 0.95 * len(means) * 2, "height": 1.9 + 0.36 * done["category"].nunique()}
        _save(output / "per_category.png", lambda figure: _draw_categories(figure, done, metrics), **size)
        _save(output / "speed_accuracy.png", lambda figure: _draw_speed(figure, done, metrics), width=7.5, height=5)
    for category, part in done.groupby("category", sort=False):
        _draw_examples(output, str(category), part)
    text = _markdown(
        output, table, done, metrics, published or next((name for name in PUBLISHED if name in title), None)
    )
    if title:
        text += f"\n## Configuration\n```yaml\n{title.strip()}\n```\n"
    write_whole(output / "report.md", text.encode())


def _means(done: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """Plain mean over the categories, a row a model, in the order of the configuration."""
    return done.groupby("model", sort=False)[metrics].mean()


def _flat(table: pd.DataFrame) -> pd.DataFrame:
    if "versions" not in table:
        return table
    versions = pd.json_normalize(table["versions"].map(lambda v: v if isinstance(v, dict) else {})).add_prefix(
        "version_"
    )
    return pd.concat([table.drop(columns="versions"), versions.set_index(table.index)], axis=1)


def _markdown(output: Path, table: pd.DataFrame, done: pd.DataFrame, metrics: list[str], published: str | None) -> str:
    lines = ["# Comparison", ""]
    if "error" in table:
        for _, row in table[table["error"].notna()].iterrows():
            lines.append(f"- **Failed**: {row['model']} on {row['category']}: {row['error']}")
        lines.append("")
    if metrics:
        categories = done["category"].nunique()
        counts = done.groupby("model", sort=False)["category"].nunique()
        speed = done.groupby("model", sort=False)[["images_per_second", "peak_memory_mib"]].mean()
        means = _means(done, metrics)
        mean = pd.DataFrame({METRICS[name]: _bold(100 * means[name]) for name in metrics}, index=means.index)
        mean["images/s"] = speed["images_per_second"].map("{:.2f}".format)
        mean["peak MiB"] = speed["peak_memory_mib"].map("{:.0f}".format)
        mean["categories"] = [f"{count} of {categories}" for count in counts]
        lines += [
            f"## Means over {categories} categories, in per cent",
            "",
            _table(mean),
            "",
            "![Means](means.png)",
            "",
        ]
        lines += ["![Speed and accuracy](speed_accuracy.png)", ""]
        lines += _published(done, means, published)
        lines += ["## By category, in per cent", "", "![By category](per_category.png)", ""]
        for name in metrics:
            wide = 100 * done.pivot_table(index="category", columns="model", values=name, sort=False)
            wide = wide.reindex(columns=means.index)
            bold = pd.DataFrame([_bold(row) for _, row in wide.iterrows()], index=wide.index)
            lines += [f"### {METRICS[name]}", "", _table(bold), ""]
    else:
        lines += ["No labels, so no metrics: heatmaps and scores only.", ""]
        for category, part in done.groupby("category", sort=False):
            scores = {
                row["model"]: pd.read_csv(output / "jobs" / f"{row['key']}.csv", index_col="path")["score"]
                for _, row in part.iterrows()
            }
            wide = pd.DataFrame(scores).map("{:.4f}".format)
            wide.index = [Path(path).name for path in wide.index]
            lines += [f"### Scores on {category}", "", _table(wide.rename_axis("image")), ""]
    lines += ["## Examples", ""]
    lines += [f"![{category}](examples/{_file_name(str(category))}.png)" for category in done["category"].unique()]
    return "\n".join(lines) + "\n"


def _published(done: pd.DataFrame, means: pd.DataFrame, data: str | None) -> list[str]:
    if data not in PUBLISHED:
        return []
    kinds = (
        done.groupby("model", sort=False)["class"].first() if "class" in done else {name: name for name in means.index}
    )
    rows = [
        {"model": model, "metric": METRICS[name], "measured": f"{100 * means.loc[model, name]:.1f}", "published": value}
        for model in means.index
        for name, value in PUBLISHED[data].get(kinds[model], {}).items()
        if name in means
    ]
    if not rows:
        return []
    note = "Published figures are means over all categories of the data set, with the authors' settings."
    return [
        f"## Beside published figures on {data}, in per cent",
        "",
        _table(pd.DataFrame(rows).set_index("model")),
        "",
        note,
        "",
    ]


def _bold(values: pd.Series) -> pd.Series:
    best = values.max()
    shown = values.map(lambda v: "" if pd.isna(v) else f"{v:.1f}")
    return shown.where(values != best, "**" + shown + "**")


def _table(frame: pd.DataFrame) -> str:
    """A table in Markdown, its index as the first column."""
    header = [str(frame.index.name or ""), *map(str, frame.columns)]
    rows = [[str(name), *map(str, row)] for name, row in zip(frame.index, frame.to_numpy(), strict=True)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def _save(path: Path, draw: Callable[[Figure], None], width: float, height: float) -> None:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    draw(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_whole(path, buffer.getvalue())


def _draw_means(figure: Figure, means: pd.DataFrame) -> None:
    axes = figure.subplots()
    positions, width = np.arange(len(means.columns)), 0.8 / len(means)
    for number, (model, row) in enumerate(means.iterrows()):
        offset = (number - (len(means) - 1) / 2) * width
        bars = axes.bar(positions + offset, 100 * row, width, label=model, color=COLOURS[number % len(COLOURS)])
        axes.bar_label(bars, fmt="%.0f", fontsize=7 if len(means) > 3 else 8, padding=1)
    axes.set_xticks(positions, [METRICS[name] for name in means.columns])
    axes.set_ylabel("mean over categories, %")
    axes.set_ylim(0, 108)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(len(means), 5), frameon=False)


def _draw_categories(figure: Figure, done: pd.DataFrame, metrics: list[str]) -> None:
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
        axis.set_xticks(range(len(wide.columns)), wide.columns, rotation=35, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(wide.index)), wide.index)
        axis.set_title(f"{METRICS[name]}, %", fontsize=11)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)


def _draw_speed(figure: Figure, done: pd.DataFrame, metrics: list[str]) -> None:
    name = next(metric for metric in ("pixel_AP", "pixel_AUPRO", "image_AUROC", *metrics) if metric in metrics)
    axes = figure.subplots()
    points = done.groupby("model", sort=False)[[name, "images_per_second"]].mean()
    for number, (model, row) in enumerate(points.iterrows()):
        colour = COLOURS[number % len(COLOURS)]
        axes.scatter(row["images_per_second"], 100 * row[name], s=80, color=colour, alpha=0.85, zorder=3, label=model)
    figure.legend(loc="outside right upper", frameon=False)
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


def _draw_examples(output: Path, category: str, part: pd.DataFrame) -> None:
    """Rows of images: the image, its ground truth, each model's heatmap on a colour scale of its own data."""
    kept = {row["model"]: output / "jobs" / f"{row['key']}.npz" for _, row in part.iterrows()}
    arrays = {model: np.load(path, allow_pickle=False) for model, path in kept.items() if path.is_file()}
    if not arrays:
        return
    shared = sorted(set.intersection(*(set(a["paths"].tolist()) for a in arrays.values())))
    if not shared:
        return
    scores = {
        row["model"]: pd.read_csv(kept[row["model"]].with_suffix(".csv"), index_col="path")
        for _, row in part.iterrows()
    }
    has_masks = any(_mask_of(path) is not None for path in shared)
    columns = 1 + has_masks + len(arrays)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(shared), columns, squeeze=False)
        for row, path in enumerate(shared):
            image = Image.open(path).convert("RGB")
            axes[row, 0].imshow(image)
            axes[row, 0].set_ylabel(f"{Path(path).parent.name}/{Path(path).name}", fontsize=8)
            if has_masks:
                mask = _mask_of(path)
                axes[row, 1].imshow(np.zeros(image.size[::-1]) if mask is None else mask, cmap="gray", vmin=0, vmax=1)
            for column, (model, array) in enumerate(arrays.items(), start=1 + has_masks):
                heat = array["maps"][array["paths"].tolist().index(path)].astype(np.float32)
                scaled = np.clip((heat - array["low"]) / max(float(array["high"] - array["low"]), 1e-12), 0, 1)
                axes[row, column].imshow(image, extent=(0, 1, 1, 0), aspect="auto")
                axes[row, column].imshow(
                    scaled, cmap="turbo", alpha=0.6, vmin=0, vmax=1, extent=(0, 1, 1, 0), aspect="auto"
                )
                axes[row, column].set_xlabel(f"score {scores[model].loc[path, 'score']:.3f}", fontsize=8)
        titles = ["image", *(["ground truth"] if has_masks else []), *arrays]
        for axis, text in zip(axes[0], titles, strict=True):
            axis.set_title(text, fontsize=10)
        for axis in axes.flat:
            axis.set_xticks([])
            axis.set_yticks([])
        colours = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), "turbo")
        bar = figure.colorbar(colours, ax=axes, shrink=0.6, pad=0.02)
        bar.set_label("1st to 99.5th percentile of a model's own maps of the category", fontsize=8)

    folder = output / "examples"
    folder.mkdir(exist_ok=True)
    _save(folder / f"{_file_name(category)}.png", draw, width=1.4 + 1.9 * columns, height=0.5 + 1.95 * len(shared))


def _mask_of(path: str) -> np.ndarray | None:
    """The mask that lies beside an image in MVTec's layout."""
    image = Path(path)
    folder = image.parents[2] / "ground_truth" / image.parent.name
    found = next(
        (folder / f"{image.stem}{end}" for end in ("_mask.png", ".png") if (folder / f"{image.stem}{end}").is_file()),
        None,
    )
    return None if found is None else np.asarray(Image.open(found).convert("L")) > 0


def _file_name(category: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in category)
