"""Tables and pictures of a comparison, from the rows of its jobs."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from anomalib_clipad.compare import pictures
from anomalib_clipad.compare.evaluator import METRICS
from anomalib_clipad.compare.examples import short_names
from anomalib_clipad.compare.job_files import Kept
from anomalib_clipad.compare.known import PUBLISHED
from anomalib_clipad.errors import InputError
from anomalib_clipad.files import slug, write_atomically
from anomalib_clipad.pictures.text import printable


def write_report(output: Path, rows: list[dict[str, Any]], title: str = "", published: str | None = None) -> None:
    """Write tables and pictures of a comparison into its folder.

    Args:
        output: Folder of the comparison; ``jobs/`` in it holds the jobs' examples.
        rows: A row a job, as :class:`anomalib_clipad.compare.CompareJob` returns it.
        title: The configuration, printed at the end of the report.
        published: Name of the data set whose published figures belong beside the measured ones; found in ``title``
            by default.

    Raises:
        InputError: If two rows are of one model on one category, which a table cannot tell apart.

    Example:
        >>> row = {"model": "SDP", "category": "bottle", "image_AUROC": 0.9, "key": "none"}
        >>> write_report(Path(), [{**row, "images_per_second": 3.0, "peak_memory_mib": 900.0}])
        >>> "| SDP | **90.0** | 3.00 | 900 | 1 of 1 |" in Path("report.md").read_text()
        True
    """
    table = pd.DataFrame(rows)
    of_one_job = [name for name in ("model", "category", "seed") if name in table]
    if (twice := table.duplicated(of_one_job)).any():
        model, category = table.loc[twice, ["model", "category"]].iloc[0]
        msg = f"There are several rows of {model} on {category}; give each model a name of its own."
        raise InputError(msg)
    write_atomically(output / "results.csv", _flat(table).to_csv(index=False).encode())
    write_atomically(output / "results.json", json.dumps(rows, indent=1, default=str).encode())
    done, metrics = _done(table)
    if metrics:
        pictures.draw_means(output / "means.png", _means(done, metrics))
        pictures.draw_categories(output / "per_category.png", done, metrics)
        pictures.draw_speed(output / "speed_accuracy.png", done, metrics)
        if _over_shots(done):
            pictures.draw_shots(output / "shots.png", done, metrics)
    for category, part in _first_seed(done).groupby("category", sort=False):
        pictures.draw_examples(output, str(category), part)
    text = _markdown(
        output, table, done, metrics, published or next((name for name in PUBLISHED if name in title), None)
    )
    if title:
        text += f"\n## Configuration\n```yaml\n{title.strip()}\n```\n"
    write_atomically(output / "report.md", text.encode(errors="backslashreplace"))


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


def _over_shots(done: pd.DataFrame) -> bool:
    """Whether several numbers of normal images were tried."""
    return "shots" in done and done["shots"].nunique() > 1


def _first_seed(done: pd.DataFrame) -> pd.DataFrame:
    """One job a model and category, for pictures and lists of images."""
    return done.drop_duplicates(["model", "category"])


def _means(done: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """Means over the categories of the means over the seeds, so that a failed job does not shift the weights."""
    of_category = done.groupby(["model", "category"], sort=False)[metrics].mean()
    return of_category.groupby("model", sort=False).mean()


def _flat(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a column a version, and a number in place of the list of skipped images."""
    table = table.drop(columns="inputs", errors="ignore")
    if "skipped" in table:
        table = table.assign(skipped=[len(found) if isinstance(found, list) else 0 for found in table["skipped"]])
    if "versions" not in table:
        return table
    versions = pd.json_normalize([v if isinstance(v, dict) else {} for v in table["versions"]]).add_prefix("version_")
    return pd.concat([table.drop(columns="versions"), versions.set_index(table.index)], axis=1)


def _markdown(output: Path, table: pd.DataFrame, done: pd.DataFrame, metrics: list[str], published: str | None) -> str:
    lines = ["# Comparison", ""]
    if "error" in table:
        for _, row in table[table["error"].notna()].iterrows():
            lines.append(f"- **Failed**: {row['model']} on {row['category']}: {row['error']}")
        lines.append("")
    if skipped := skipped_images(done):
        lines += [
            f"- **Skipped**, because it cannot be read: {path} ({', '.join(who)})" for path, who in skipped.items()
        ]
        lines.append("")
    if metrics:
        categories = done["category"].nunique()
        counts = done.groupby("model", sort=False)["category"].nunique()
        speed = done.groupby("model", sort=False)[["images_per_second", "peak_memory_mib"]].mean()
        means = _means(done, metrics)
        mean = pd.DataFrame({METRICS[name]: _bold(100 * means[name]) for name in metrics}, index=means.index)
        mean["images/s"] = speed["images_per_second"].map("{:.2f}".format)
        mean["peak MiB"] = speed["peak_memory_mib"].map(lambda peak: "" if pd.isna(peak) else f"{peak:.0f}")
        mean["categories"] = [f"{count} of {categories}" for count in counts]
        lines += [
            f"## Means over {categories} categories, in per cent",
            "",
            _table(mean),
            "",
            "![Means](means.png)",
            "",
        ]
        if _over_shots(done):
            lines += ["![Over the number of normal images](shots.png)", ""]
            if done["seed"].nunique() > 1:
                lines += ["Bands: from the lowest to the highest mean of a seed.", ""]
        if "seed" in done and done["seed"].nunique() > 1:
            lines += [f"Means over {done['seed'].nunique()} seeds, where normal images are drawn.", ""]
        lines += ["Peak MiB: memory that a job added to what its process held before it.", ""]
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
        for category, part in _first_seed(done).groupby("category", sort=False):
            lines += [f"### Scores on {category}", "", _table(_scores(output, part)), ""]
    lines += ["## Examples", ""]
    lines += [f"![{category}](examples/{slug(str(category))}.png)" for category in done["category"].unique()]
    return "\n".join(lines) + "\n"


def skipped_images(done: pd.DataFrame) -> dict[str, list[str]]:
    """Images that could not be read, and the models that therefore went without them.

    Example:
        >>> skipped_images(pd.DataFrame([{"model": "SDP", "skipped": ["a.png"]}]))
        {'a.png': ['SDP']}
    """
    found: dict[str, list[str]] = {}
    for _, row in done.iterrows():
        for path in row.get("skipped") if isinstance(row.get("skipped"), list) else []:
            found.setdefault(printable(str(path)), []).append(row["model"])
    return found


def _scores(output: Path, part: pd.DataFrame) -> pd.DataFrame:
    """A row an image, a column a model."""
    kept = {row["model"]: Kept.read(output / "jobs" / f"{row['key']}.json") for _, row in part.iterrows()}
    wide = pd.DataFrame({model: one.scores for model, one in kept.items() if one is not None}).sort_index()
    shown = wide.map("{:.4f}".format)
    shown.index = pd.Index(short_names(list(wide.index)), name="image")
    return shown


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
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [header, ["---"] * len(header), *rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)
