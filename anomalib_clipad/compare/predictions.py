"""What every model found in every image: the table ``predictions.csv``, and the counts of right and wrong verdicts."""

import csv
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from anomalib_clipad.compare.job_files import Kept
from anomalib_clipad.data.verdict import VERDICTS
from anomalib_clipad.engine.table import BOXES, NAME
from anomalib_clipad.files import write_atomically

COLUMNS = (
    *("model", "category", "seed", "shots", "path", "class", "score", "threshold", "label", "true_label"),
    *("scaled_score", "p_value", "marked_area", *BOXES, "explanation", "defect", "true_defect"),
)
COUNTS = ("true positives", "false negatives", "false positives", "true negatives")


def read_kept(output: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Kept]:
    """What jobs kept, by the key of the job; failed ones and those whose files are not whole are left out.

    Example:
        >>> read_kept(Path("out"), [{"key": "none"}])
        {}
    """
    found = {str(row["key"]): Kept.read(output / "jobs" / f"{row['key']}.json") for row in rows if _is_done(row)}
    return {key: kept for key, kept in found.items() if kept is not None}


def predictions(rows: Sequence[Mapping[str, Any]], kept: Mapping[str, Kept]) -> pd.DataFrame:
    """A row an image, model and seed.

    Args:
        rows: A row a job, as :class:`anomalib_clipad.compare.CompareJob` returns it.
        kept: What the jobs kept.

    Returns:
        ``COLUMNS``: ``score`` and ``threshold``, that of the class, in the model's own unit, ``scaled_score`` on the
        common scale.
        Threshold and label are empty where the model has no threshold, and so are marked area and box where its maps
        have none; true label, p-value, explanation, and the words for the defect where there is none.

    Example:
        >>> predictions([{"model": "SDP", "category": "nut", "key": "none"}], {}).empty
        True
    """
    found = []
    for row in rows:
        if (one := kept.get(str(row["key"])) if _is_done(row) else None) is None:
            continue
        for path, image in one.images.items():
            scale = one.scales.of(image.class_name).score
            found.append(
                (
                    *(row.get(name) for name in ("model", "category", "seed", "shots")),
                    path,
                    image.class_name,
                    image.score,
                    scale.threshold if scale.known else None,
                    VERDICTS[int(image.score > scale.threshold)] if scale.known else None,
                    None if image.label is None else VERDICTS[image.label],
                    image.shown,
                    image.p_value,
                    image.marked_area,
                    *(image.box or [None] * len(BOXES)),
                    image.explanation,
                    image.defect,
                    image.true_defect,
                )
            )
    return pd.DataFrame(found, columns=list(COLUMNS)).convert_dtypes(convert_floating=False)


def write_predictions(output: Path, table: pd.DataFrame) -> None:
    """Write ``predictions.csv`` into the folder of a comparison.

    Example:
        >>> write_predictions(Path(), predictions([], {}))
        >>> Path("predictions.csv").read_text().split(",")[:3]
        ['model', 'category', 'seed']
    """
    write_atomically(output / NAME, table.to_csv(index=False).encode(errors="backslashreplace"))


class GrowingPredictions:
    """``predictions.csv`` while the jobs run, so that an interrupted comparison leaves what it has done.

    The report replaces it by :func:`write_predictions`. Where the disk is full, nothing is said: the job or the report
    will.

    Args:
        output: Folder of the comparison.

    Example:
        >>> GrowingPredictions(Path()).add({"model": "SDP", "category": "nut", "error": "no data", "key": "none"})
        >>> Path("predictions.csv").read_text().count("SDP")
        0
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        with suppress(OSError), (output / NAME).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(COLUMNS)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add the images of a job."""
        table = predictions([row], read_kept(self.output, [row]))
        with suppress(OSError), (self.output / NAME).open("ab") as file:
            file.write(table.to_csv(index=False, header=False).encode(errors="backslashreplace"))


def confusion(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """How many verdicts were right and wrong.

    Args:
        table: As :func:`predictions` returns it; images without a verdict or a true label do not count.
        by: Columns to count by.

    Returns:
        A row a model, or whatever is counted by, in the table's order, with ``COUNTS``.

    Example:
        >>> labels = {"label": ["anomalous", "normal"], "true_label": ["anomalous", "anomalous"]}
        >>> confusion(pd.DataFrame({"model": ["SDP", "SDP"], **labels}), ["model"]).loc["SDP"].tolist()
        [1, 1, 0, 0]
    """
    known = table[table["label"].notna() & table["true_label"].notna()]
    called, is_bad = known["label"] == VERDICTS[1], known["true_label"] == VERDICTS[1]
    cells = (called & is_bad, ~called & is_bad, called & ~is_bad, ~called & ~is_bad)
    counted = known[by].assign(**dict(zip(COUNTS, cells, strict=True)))
    return counted.groupby(by, sort=False).sum().astype(int)


def _is_done(row: Mapping[str, Any]) -> bool:
    return not isinstance(row.get("error"), str)
