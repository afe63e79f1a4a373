"""Every image of a comparison with what every model found in it, as the page shows it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_clipad.compare.job_files import Kept
from anomalib_clipad.compare.progress import Tell, silent
from anomalib_clipad.page import Finding, PageImage, original_for_browsers, with_folders, write_thumbnail


def page_images(
    output: Path, rows: Sequence[Mapping[str, Any]], kept: Mapping[str, Kept], tell: Tell = silent
) -> list[PageImage]:
    """All images of a comparison, with thumbnails; they are made where they are missing or older than the image.

    Args:
        output: Folder of the comparison.
        rows: A row a job; of several seeds of a model on a category, the first counts.
        kept: What the jobs kept, see :func:`anomalib_clipad.compare.predictions.read_kept`.
        tell: Is told how many thumbnails there are.

    Example:
        >>> page_images(Path("out"), [{"model": "SDP", "category": "nut", "key": "none"}], {})
        []
    """
    findings: dict[tuple[str, str], dict[str, Finding]] = {}
    truths: dict[tuple[str, str], int | None] = {}
    regions: dict[str, list[np.ndarray | None]] = {}  # of each category, of the models
    for row in rows:
        if (one := kept.get(str(row["key"]))) is None:
            continue
        regions.setdefault(str(row["category"]), []).append(one.region)
        for path, image in one.images.items():
            found = findings.setdefault((str(row["category"]), path), {})
            heat = image.heat.relative_to(output).as_posix()
            own = image.p_value, image.explanation, one.chosen_class(path)
            found.setdefault(str(row["model"]), Finding(image.shown, f"{image.score:.6g}", heat, *own))
            truths[str(row["category"]), path] = image.label
    seen = {category: common_region(own) for category, own in regions.items()}
    images = []
    for number, ((category, path), found) in enumerate(sorted(findings.items())):
        tell("thumbnails", number, len(findings))
        file = Path(path)
        truth, thumbnail = truths[category, path], write_thumbnail(file, output, seen[category])
        original = original_for_browsers(file, output)
        images.append(PageImage(path, category, truth, found, thumbnail=thumbnail, original=original))
    return with_folders(images)


def common_region(regions: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """The region that all models have looked at; nothing where they differ.

    Args:
        regions: (H, W) of each model, None for everywhere.

    Example:
        >>> here = np.array([[True, False]])
        >>> common_region([here, here]).tolist(), common_region([here, None])
        ([[True, False]], None)
    """
    first = regions[0]
    same = all(first is not None and one is not None and np.array_equal(first, one) for one in regions)
    return first if same else None
