"""Tables of a comparison, from the rows of its jobs."""

from typing import Any

import pandas as pd

from anomalib_clipad.compare.evaluator import METRICS
from anomalib_clipad.compare.naming import WORDS
from anomalib_clipad.pictures.text import printable


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
    done, metrics = done_jobs(pd.DataFrame(rows))
    return means_of(done, metrics)


def done_jobs(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The jobs that did not fail, and the metrics measured."""
    done = table[table["error"].isna()] if "error" in table else table
    return done, [name for name in METRICS if name in done and done[name].notna().any()]


def over_shots(done: pd.DataFrame) -> bool:
    """Whether several numbers of normal images were tried."""
    return "shots" in done and done["shots"].nunique() > 1


def first_seed(done: pd.DataFrame) -> pd.DataFrame:
    """One job a model and category, for pictures and lists of images."""
    return done.drop_duplicates(["model", "category"])


def means_of(done: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """Means over the categories of the means over the seeds, so that a failed job does not shift the weights."""
    of_category = done.groupby(["model", "category"], sort=False)[metrics].mean()
    return of_category.groupby("model", sort=False).mean()


def flat(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a column a version, and a number in place of the list of skipped images."""
    table = table.drop(columns=["inputs", "scales", WORDS], errors="ignore")
    if "skipped" in table:
        table = table.assign(skipped=[len(found) if isinstance(found, list) else 0 for found in table["skipped"]])
    if "versions" not in table:
        return table
    versions = pd.json_normalize([v if isinstance(v, dict) else {} for v in table["versions"]]).add_prefix("version_")
    return pd.concat([table.drop(columns="versions"), versions.set_index(table.index)], axis=1)


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
