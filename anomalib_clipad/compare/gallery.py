"""Every image of a comparison with what every model found in it, for a page to show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anomalib_clipad.compare.job_files import Kept
from anomalib_clipad.engine.table import VERDICTS


@dataclass(frozen=True)
class Judged:
    """An image as one model judged it.

    Args:
        score: On the common scale, 0.5 at the threshold, not clamped.
        text: The model's own score.
        heat: Its heat layer, relative to the comparison's folder, with slashes.
        known: Whether the model has a threshold; without one 0.5 is no verdict.

    Example:
        >>> Judged(score=0.6, text="7.213", heat="jobs/SDP-nut-0123456789/heat/00000.png", known=True).text
        '7.213'
    """

    score: float
    text: str
    heat: str
    known: bool


@dataclass
class GalleryImage:
    """An image and its verdicts.

    Args:
        path: Its file.
        category: What it belongs to.
        truth: "normal" or "anomalous"; None where that is not known.
        judged: By the name of the model; a model that has skipped the image is missing.

    Example:
        >>> GalleryImage("a.png", "nut", "normal").judged
        {}
    """

    path: str
    category: str
    truth: str | None
    judged: dict[str, Judged] = field(default_factory=dict)


def gallery(output: Path, rows: Sequence[Mapping[str, Any]], kept: Mapping[str, Kept]) -> list[GalleryImage]:
    """All images of a comparison, category by category, in the order of their paths.

    Args:
        output: Folder of the comparison.
        rows: A row a job; of several seeds of a model on a category, the first counts.
        kept: What the jobs kept, see :func:`anomalib_clipad.compare.predictions.read_kept`.

    Example:
        >>> gallery(Path("out"), [{"model": "SDP", "category": "nut", "key": "none"}], {})
        []
    """
    found: dict[tuple[str, str], GalleryImage] = {}
    for row in rows:
        if (one := kept.get(str(row["key"]))) is None:
            continue
        model, category = str(row["model"]), str(row["category"])
        for path, image in one.images.items():
            truth = None if image.label is None else VERDICTS[image.label]
            entry = found.setdefault((category, path), GalleryImage(path, category, truth))
            heat = image.heat.relative_to(output).as_posix()
            entry.judged.setdefault(model, Judged(image.shown, f"{image.score:.6g}", heat, one.scales.score.known))
    order = list(dict.fromkeys(category for category, _ in found))
    return sorted(found.values(), key=lambda image: (order.index(image.category), image.path))
