"""What a reader must know before the figures of a comparison, in sentences for the report, the screen and the page."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from anomalib_clipad.compare.evaluator import METRICS
from anomalib_clipad.compare.scale import ALL, NOTHING, Scales
from anomalib_clipad.pictures.text import printable

CHANCE = 0.5
AUROCS = ("image_AUROC", "pixel_AUROC")


def remarks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which figures are not those of a model in use, and which are worse than chance.

    Args:
        rows: A row a job, as :class:`anomalib_clipad.compare.CompareJob` returns it.

    Returns:
        Sentences that begin with a title and a colon.

    Example:
        >>> remarks([{"model": "SDP", "category": "nut", "image_AUROC": 0.41}])
        ['Worse than chance: SDP on nut, image AUROC 41.0 %.']
    """
    table = pd.DataFrame([row for row in rows if not isinstance(row.get("error"), str)])
    found = []
    for reason in ("demonstration backbone", "random weights"):
        if "not_for_use" in table and (models := table.loc[table["not_for_use"] == reason, "model"].unique()).size:
            names = "; ".join(models)
            found.append(f"{reason.capitalize()}: {names}. These figures say nothing of pretrained weights.")
    if "only" in table:
        for (category, only), part in table[table["only"].notna()].groupby(["category", "only"], sort=False):
            models = "; ".join(part["model"].unique())
            found.append(
                f"Nothing to tell apart: all images of {category} are {only}, so {models} has no AUROC, AP, F1."
            )
    measured = [name for name in AUROCS if name in table]
    if measured:
        means = table.groupby(["model", "category"], sort=False)[measured].mean()
        for (model, category), values in means.iterrows():
            worse = [f"{METRICS[name]} {100 * values[name]:.1f} %" for name in measured if values[name] < CHANCE]
            if worse:
                found.append(f"Worse than chance: {model} on {category}, {' and '.join(worse)}.")
    return found


def scale_remarks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For which models 0.5 on the common scale is no threshold, and what it is instead.

    Args:
        rows: As :func:`remarks` takes them.

    Returns:
        A sentence a model and kind of scale, with its categories.

    Example:
        >>> from anomalib_clipad.compare.scale import choose_scales
        >>> scales = choose_scales(None, [1.0, 2.0], [(0.0, 1.0)] * 2, [0, 1])
        >>> scale_remarks([{"model": "PaDiM", "category": "nut", "scales": scales.row()}])
        ['PaDiM on nut has no threshold, ...: 0.5 is the largest score of its good images, 0 the lowest; ...']
    """
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if not isinstance(row.get("scales"), Mapping):
            continue
        whole = Scales.read(row["scales"])
        for class_name, scales in (whole.of_class or {"": whole}).items():
            if (words := _without_threshold(scales)) is not None:
                categories = found.setdefault((str(row["model"]), words), [])
                category = f"{row['category']} ({class_name})" if class_name else str(row["category"])
                if category not in categories:
                    categories.append(category)
    return [printable(f"{model} on {', '.join(names)} {words}") for (model, words), names in found.items()]


def _without_threshold(scales: Scales) -> str | None:
    """What 0.5 is where it is no threshold."""
    if scales.score.known and scales.map.source == NOTHING:
        return "gives no anomaly maps: its heatmaps are grey."
    if not scales.score.known:
        whose = "all images" if scales.score.source == ALL else "its good images"
        ending = "; likewise for heatmaps" if not scales.map.known else ""
        ending = "; it gives no anomaly maps, its heatmaps are grey" if scales.map.source == NOTHING else ending
        return f"has no threshold, so no verdicts: 0.5 is the largest score of {whose}, 0 the lowest{ending}."
    if not scales.map.known:
        whose = "all images" if scales.map.source == ALL else "its good images"
        return f"has no threshold for maps: 0.5 in its heatmaps is the largest value of {whose}, 0 the lowest."
    return None
