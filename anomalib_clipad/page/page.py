"""The page itself: what it is told of every image, and how that gets into one HTML file."""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np
import pandas as pd

from anomalib_clipad.files import common_folder, relative_path, write_atomically
from anomalib_clipad.pictures.heatmap import THRESHOLD, colours

NAME = "report.html"
TEMPLATE = "report.html.j2"
COLOUR_STOPS = 16  # of the legend
DIGITS = 4  # of the largest number in a column of metrics, behind the point where it is below 1


@dataclass(frozen=True)
class Finding:
    """What one model found in an image.

    Args:
        score: Image score, the threshold at 0.5; values outside [0, 1] and NaN are allowed.
        raw: The model's own score, as it is to be printed.
        heat: Path of the heatmap relative to the page's folder, see :func:`anomalib_clipad.page.write_heat_layer`.
        p_value: Share of normal images that score as high, in [0, 1].
        explanation: What the model says in words.
        class_name: What the model has taken it for, where models may differ.

    Example:
        >>> Finding(0.73, raw="0.0812").heat is None
        True
    """

    score: float
    raw: str = ""
    heat: str | None = None
    p_value: float | None = None
    explanation: str | None = None
    class_name: str | None = None


@dataclass(frozen=True)
class PageImage:
    """An image on the page.

    Args:
        path: Where it lies; shown, and exported with its judgement.
        category: Name of its class.
        truth: 1 for an anomalous image, 0 for a normal one, None if not known.
        findings: What each model found, by the model's name. A model may lack images.
        folder: A group to filter by within the category, such as the kind of defect.
        thumbnail: Path relative to the page's folder, see :func:`anomalib_clipad.page.write_thumbnail`.
        original: Path of the image relative to the page's folder, if a browser can show it enlarged, see
            :func:`anomalib_clipad.page.original_for_browsers`.

    Example:
        >>> PageImage("photos/a.png", "bottle", None, {"SDP": Finding(0.2)}).folder
        ''
    """

    path: str
    category: str
    truth: int | None
    findings: Mapping[str, Finding]
    folder: str = ""
    thumbnail: str | None = None
    original: str | None = None


def write_page(
    folder: Path,
    title: str,
    images: Sequence[PageImage],
    *,
    notes: Sequence[str] = (),
    metrics: pd.DataFrame | None = None,
    threshold: float = THRESHOLD,
) -> Path:
    """Write ``report.html``, which shows the images and lets a reader filter and judge them.

    Args:
        folder: Where the page and its pictures lie.
        title: Heading of the page.
        images: What is on it, in any order.
        notes: Warnings on top.
        metrics: A table on top, a row a model; an index with names is its first columns.
        threshold: Where the slider starts; a score above it is anomalous, and one that is not a number.

    Returns:
        Path of the page.

    Raises:
        OSError: If it cannot be written.

    Example:
        >>> image = PageImage("photos/a.png", "bottle", 1, {"SDP": Finding(0.9)})
        >>> write_page(Path(), "Bottles", [image], metrics=pd.DataFrame({"model": ["SDP"], "AUROC": [0.98]}))
        PosixPath('report.html')
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("anomalib_clipad", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    html = environment.get_template(TEMPLATE).render(
        title=_text(title),
        notes=[_text(note) for note in notes],
        metrics=_cells(metrics) if metrics is not None else None,
        data=_data(images, threshold),
        gradient=_gradient(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / NAME, html.encode())
    return folder / NAME


def with_folders(images: Sequence[PageImage]) -> list[PageImage]:
    """Images, each with its folder below the one that all of its category have in common.

    Example:
        >>> images = [PageImage(f"test/{name}/1.png", "nut", None, {}) for name in ("good", "crack")]
        >>> [image.folder for image in with_folders(images)]
        ['good', 'crack']
    """
    files = [str(Path(image.path).absolute()) for image in images]
    of_category: dict[str, list[str]] = {}
    for image, file in zip(images, files, strict=True):
        of_category.setdefault(image.category, []).append(file)
    common = {category: common_folder(paths) or "" for category, paths in of_category.items()}
    placed = []
    for image, file in zip(images, files, strict=True):
        folder = relative_path(Path(file).parent, common[image.category])
        placed.append(replace(image, folder="" if folder in (None, ".") else folder))
    return placed


def _data(images: Sequence[PageImage], threshold: float) -> dict[str, Any]:
    """All images as lists of values, without the names of the fields, which would double the page's size."""
    models = list(dict.fromkeys(model for image in images for model in image.findings))
    categories, folders = (sorted({getattr(image, key) for image in images}) for key in ("category", "folder"))
    category_index, folder_index = ({name: n for n, name in enumerate(names)} for names in (categories, folders))
    paths = sorted(_text(image.path) for image in images)
    return {
        "id": hashlib.sha256("\n".join(paths).encode()).hexdigest()[:20],
        "threshold": threshold,
        "models": [_text(model) for model in models],
        "categories": [_text(name) for name in categories],
        "folders": [_text(name) for name in folders],
        "images": [
            [
                _text(image.path),
                category_index[image.category],
                folder_index[image.folder],
                image.truth,
                _url(image.thumbnail),
                _url(image.original),
                [_values(image.findings.get(model)) for model in models],
            ]
            for image in images
        ],
    }


def _values(finding: Finding | None) -> list[Any] | None:
    if finding is None:
        return None
    words, name = (_text(said) if said else None for said in (finding.explanation, finding.class_name))
    values = [_finite(finding.score), _text(finding.raw), _url(finding.heat), _finite(finding.p_value), words, name]
    while len(values) > 1 and values[-1] is None:
        values.pop()
    return values


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _url(path: str | None) -> str | None:
    return None if path is None else quote(os.fsencode(Path(path).as_posix()))


def _text(text: str) -> str:
    """A text whose bytes are valid, with the others as the table of predictions has them."""
    return text.encode(errors="backslashreplace").decode()


def _cells(metrics: pd.DataFrame) -> dict[str, Any]:
    """Texts of a table, each with the number that it is sorted by."""
    frame = metrics if isinstance(metrics.index, pd.RangeIndex) else metrics.reset_index()
    columns = [_column(frame[name]) for name in frame.columns]
    return {
        "columns": [
            {"name": _text(str(name)), "numeric": bool(pd.api.types.is_numeric_dtype(frame[name]))} for name in frame
        ],
        "rows": list(zip(*columns, strict=True)),
    }


def _column(column: pd.Series) -> list[dict[str, Any]]:
    if not pd.api.types.is_numeric_dtype(column):
        return [{"text": _text(str(value)), "sort": None} for value in column]
    values = column.astype(float).to_numpy()
    largest = np.abs(values[np.isfinite(values)]).max(initial=1e-9)
    whole = pd.api.types.is_integer_dtype(column)
    decimals = 0 if whole else int(np.clip(DIGITS - np.ceil(np.log10(largest)), 0, DIGITS))
    return [
        {"text": f"{value:.{decimals}f}", "sort": value} if np.isfinite(value) else {"text": "n/a", "sort": None}
        for value in values
    ]


def _gradient() -> str:
    """Colours of the legend as stops of a CSS gradient."""
    table = colours()[:-1]
    rows = np.linspace(0, len(table) - 1, COLOUR_STOPS + 1).round().astype(int)
    stops = (f"rgba({r},{g},{b},{a / 255:.2f})" for r, g, b, a in table[rows].tolist())
    return ",".join(stops)
