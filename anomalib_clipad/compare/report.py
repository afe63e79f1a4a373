"""Tables and pictures of a comparison, from the rows of its jobs."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from anomalib_clipad.compare import pictures
from anomalib_clipad.compare.evaluator import METRICS
from anomalib_clipad.compare.job import write_whole

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
    done, metrics = _done(table)
    if metrics:
        pictures.draw_means(output / "means.png", _means(done, metrics))
        pictures.draw_categories(output / "per_category.png", done, metrics)
        pictures.draw_speed(output / "speed_accuracy.png", done, metrics)
    for category, part in done.groupby("category", sort=False):
        pictures.draw_examples(output, str(category), part)
    text = _markdown(
        output, table, done, metrics, published or next((name for name in PUBLISHED if name in title), None)
    )
    if title:
        text += f"\n## Configuration\n```yaml\n{title.strip()}\n```\n"
    write_whole(output / "report.md", text.encode())


def mean_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Plain means over the categories.

    Args:
        rows: As :func:`write_report` takes them.

    Returns:
        A row a model, in the order of the configuration; a column a metric that was measured, in [0, 1].

    Example:
        >>> rows = [{"model": "SDP", "category": name, "image_AUROC": 0.5} for name in ("nut", "bolt")]
        >>> mean_table(rows).to_dict()
        {'image_AUROC': {'SDP': 0.5}}
    """
    done, metrics = _done(pd.DataFrame(rows))
    return _means(done, metrics)


def _done(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The jobs that did not fail, and the metrics measured."""
    done = table[table["error"].isna()] if "error" in table else table
    return done, [name for name in METRICS if name in done and done[name].notna().any()]


def _means(done: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
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
    lines += [
        f"![{category}](examples/{pictures.file_name(str(category))}.png)" for category in done["category"].unique()
    ]
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
