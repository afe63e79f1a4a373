"""The text of a report."""

from collections.abc import Mapping

import pandas as pd

from anomalib_clipad.compare.evaluator import METRICS
from anomalib_clipad.compare.examples import short_names
from anomalib_clipad.compare.job_files import Kept
from anomalib_clipad.compare.known import PUBLISHED
from anomalib_clipad.compare.naming import Naming, naming_picture, naming_table, namings
from anomalib_clipad.compare.predictions import COUNTS, confusion, predictions
from anomalib_clipad.compare.remarks import remarks, scale_remarks
from anomalib_clipad.compare.score_figure import left_out
from anomalib_clipad.compare.tables import done_jobs, first_seed, means_of, over_shots, skipped_images
from anomalib_clipad.files import slug


def markdown(
    table: pd.DataFrame, metrics: list[str], kept: Mapping[str, Kept], drawn: set[str], published: str | None
) -> str:
    """The report without its configuration.

    Args:
        table: A row a job.
        metrics: The metrics measured.
        kept: What the jobs kept.
        drawn: Names of the pictures there are.
        published: Name of the data set whose published figures belong beside the measured ones.

    Example:
        >>> rows = pd.DataFrame([{"model": "SDP", "category": "nut", "error": "no data", "key": "none"}])
        >>> "- **Failed**: SDP on nut: no data" in markdown(rows, [], {}, set(), None)
        True
    """
    done = done_jobs(table)[0]
    lines = ["# Comparison", ""]
    if found := remarks(done.to_dict("records")):
        lines += ["- **{}**:{}".format(*line.split(":", 1)) for line in found]
        lines.append("")
    if "error" in table:
        seeds = "seed" in table and table["seed"].nunique() > 1
        for _, row in table[table["error"].notna()].iterrows():
            seed = f", seed {row['seed']}" if seeds else ""
            lines.append(f"- **Failed**: {row['model']} on {row['category']}{seed}: {row['error']}")
        lines.append("")
    if skipped := skipped_images(done):
        lines += [
            f"- **Skipped**, because it cannot be read: {path} ({', '.join(who)})" for path, who in skipped.items()
        ]
        lines.append("")
    if metrics:
        lines += _mean_lines(done, metrics, published)
        lines += ["## By category, in per cent", ""]
        lines += ["![By category](per_category.png)", ""] if "per_category.png" in drawn else []
        means = means_of(done, metrics)
        for name in metrics:
            wide = 100 * done.pivot_table(index="category", columns="model", values=name, sort=False)
            wide = wide.reindex(columns=means.index)
            bold = pd.DataFrame([_bold(row) for _, row in wide.iterrows()], index=wide.index)
            lines += [f"### {METRICS[name]}", "", _table(bold), ""]
    else:
        lines += ["No labels, so no metrics: heatmaps, and scores in each model's own unit.", ""]
        for category, part in first_seed(done).groupby("category", sort=False):
            lines += [f"### Scores on {category}", "", _table(_scores(part, kept)), ""]
    lines += _verdict_lines(done, kept, drawn)
    lines += _naming_lines(namings(first_seed(done).to_dict("records"), kept), drawn)
    lines += ["## Examples", ""]
    paths = {category: f"examples/{slug(str(category))}.png" for category in done["category"].unique()}
    lines += [f"![{category}]({path})" for category, path in paths.items() if path in drawn]
    return "\n".join(lines) + "\n"


def _mean_lines(done: pd.DataFrame, metrics: list[str], published: str | None) -> list[str]:
    categories = done["category"].nunique()
    counts = done.groupby("model", sort=False)["category"].nunique()
    speed = done.groupby("model", sort=False)[["images_per_second", "peak_memory_mib"]].mean()
    means = means_of(done, metrics)
    mean = pd.DataFrame({METRICS[name]: _bold(100 * means[name]) for name in metrics}, index=means.index)
    mean["images/s"] = speed["images_per_second"].map("{:.2f}".format)
    mean["peak MiB"] = speed["peak_memory_mib"].map(lambda peak: "" if pd.isna(peak) else f"{peak:.0f}")
    mean["categories"] = [f"{count} of {categories}" for count in counts]
    lines = [
        f"## Means over {categories} categories, in per cent" if categories > 1 else "## Metrics, in per cent",
        "",
        _table(mean),
        "",
        "![Means](means.png)",
        "",
    ]
    if over_shots(done):
        lines += ["![Over the number of normal images](shots.png)", ""]
        if done["seed"].nunique() > 1:
            lines += ["Bands: from the lowest to the highest mean of a seed.", ""]
    if "seed" in done and done["seed"].nunique() > 1:
        lines += [f"Means over {done['seed'].nunique()} seeds, where normal images are drawn.", ""]
    lines += ["Peak MiB: memory that a job added to what its process held before it.", ""]
    lines += ["![Speed and accuracy](speed_accuracy.png)", ""]
    return lines + _published(done, means, published)


def _verdict_lines(done: pd.DataFrame, kept: Mapping[str, Kept], drawn: set[str]) -> list[str]:
    """Scores on the common scale, and what the thresholds make of them."""
    if "scores.png" not in drawn:
        return []
    judged = predictions(first_seed(done).to_dict("records"), kept)
    lines = ["## Scores and verdicts", ""]
    lines += [
        "All scores and heatmaps are on one scale: 0.5 is the model's own threshold, and the range is that of its "
        "post-processor. `predictions.csv` has every score.",
        "",
    ]
    if sentences := scale_remarks(done.to_dict("records")):
        lines += [*(f"- {sentence}" for sentence in sentences), ""]
    lines += ["![Scores](scores.png)", "", *([capped, ""] if (capped := left_out(judged)) else [])]
    if len(counts := confusion(judged, ["model"])):
        lines += ["### Verdicts by model", "", _table(counts), ""]
    if len(counts) and judged["category"].nunique() > 1:
        each = confusion(judged, ["category", "model"])
        cells = pd.Series([" / ".join(map(str, row)) for row in each.to_numpy()], index=each.index)
        lines += ["### Verdicts by category", "", f"{' / '.join(COUNTS).capitalize()}.", ""]
        lines += [_table(cells.unstack("model", fill_value="", sort=False)), ""]
    lines += _class_lines(done, judged, kept)
    if "seed" in done and done["seed"].nunique() > 1:
        lines += ["Verdicts, histograms, examples and words are those of a model's first seed.", ""]
    return lines


def _class_lines(done: pd.DataFrame, judged: pd.DataFrame, kept: Mapping[str, Kept]) -> list[str]:
    """What became of each class, for models that have several."""
    rows = done.to_dict("records")
    models = {str(row["model"]) for row in rows if row["key"] in kept and kept[row["key"]].scales.of_class}
    if not models:
        return []
    by = ["model", "category", "class"]
    several = judged[judged["model"].isin(models)]
    found = several.groupby(by, sort=False).agg(images=("path", "size"), threshold=("threshold", "first"))
    found["threshold"] = found["threshold"].map(lambda value: "" if pd.isna(value) else f"{value:.4g}")
    if len(counts := confusion(several, by)):
        found = found.join(counts.reindex(found.index, fill_value=0))
    table = _table(found.reset_index().set_index("model"))
    return ["### Classes", "", "0.5 is the threshold of the image's class, here in the model's unit.", "", table, ""]


def _naming_lines(found: list[Naming], drawn: set[str]) -> list[str]:
    """How often words for defects were right."""
    if not found:
        return []
    lines = ["## Words for what was found, in per cent", ""]
    lines += [
        "Attribution, not diagnosis. Anomalous images whose folder is named by one of the words. Wrong words, "
        "`unspecified`, and images that are not called anomalous count as wrong.",
        "",
        _table(naming_table(found)),
        "",
    ]
    pictures = {one.title: naming_picture(one) for one in found}
    lines += [f"![Words of {title}]({path})" for title, path in pictures.items() if path in drawn]
    return [*lines, ""]


def _scores(part: pd.DataFrame, kept: Mapping[str, Kept]) -> pd.DataFrame:
    """A row an image, a column a model."""
    scores = {
        row["model"]: {path: _score(kept[row["key"]], path) for path in kept[row["key"]].images}
        for _, row in part.iterrows()
        if row["key"] in kept
    }
    shown = pd.DataFrame(scores).sort_index().fillna("")
    shown.index = pd.Index(short_names(list(shown.index)), name="image")
    return shown


def _score(one: Kept, path: str) -> str:
    name = one.chosen_class(path)
    return f"{one.images[path].score:.4f}" + (f" ({name})" if name else "")


def _published(done: pd.DataFrame, means: pd.DataFrame, data: str | None) -> list[str]:
    if data not in PUBLISHED:
        return []
    one = done.groupby("model", sort=False).first()
    kinds = one["class"] if "class" in one else {name: name for name in means.index}
    # The figures are of no normal image, or of all: those of a few are not to be compared with them.
    few = {model for model, row in one.iterrows() if row.get("learning_type") == "few_shot" or row.get("shots", 0) > 0}
    rows = [
        {"model": model, "metric": METRICS[name], "measured": f"{100 * means.loc[model, name]:.1f}", "published": value}
        for model in means.index
        if model not in few
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
