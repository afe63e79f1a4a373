"""The files of a job: ``KEY/heat/`` with heat layers, ``KEY.npz`` with masks of examples, ``KEY.csv`` with scores.

``KEY.json`` with the row comes last. It names the digests of the others and of itself, and names and sizes of the heat
layers. A job is done if all of them agree; whatever else lies there, the job runs again.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from anomalib_clipad.compare.scale import Scales
from anomalib_clipad.engine.table import BOXES
from anomalib_clipad.files import remove_abandoned, replacing, write_atomically

KEPT = (".npz", ".csv")
IMAGE_COLUMNS = (  # of KEY.csv
    *("path", "class_name", "label", "score", "p_value", "marked_area"),
    *(*BOXES, "explanation", "defect", "true_defect"),
)
ERRORS = "surrogateescape"  # a file's name may be no valid text


def write_row(file: Path, row: dict[str, Any]) -> None:
    """Write the row, and with it the digests that make the job done."""
    kept = {ending: _digest(file.with_suffix(ending).read_bytes()) for ending in KEPT}
    whole = {"row": row, "files": kept, "heat": _listing(heat_folder(file))}
    content = {**whole, "digest": _digest(_text(whole))}
    write_atomically(file, json.dumps(content, indent=1, default=str).encode())


def read_row(file: Path) -> dict[str, Any] | None:
    """The row of a job whose files are whole.

    Example:
        >>> _ = Path("job.json").write_text("{}")
        >>> read_row(Path("job.json")) is None
        True
    """
    return None if (found := _read_whole(file)) is None else found[0]


def _read_whole(file: Path) -> tuple[dict[str, Any], str] | None:
    """The row, and a digest of all that the job has kept."""
    try:
        content = json.loads(file.read_bytes())
        digest: str = content.pop("digest")
        row: dict[str, Any] = content["row"]
        whole = digest == _digest(_text(content)) and isinstance(row, dict)
        kept = all(content["files"][end] == _digest(file.with_suffix(end).read_bytes()) for end in KEPT)
        kept = kept and content["heat"] == _listing(heat_folder(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return (row, digest) if whole and kept else None


def _text(content: object) -> bytes:
    # Once through JSON, so that the digest is that of what will be read.
    return json.dumps(json.loads(json.dumps(content, default=str)), sort_keys=True).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _listing(folder: Path) -> str:
    """Digest of the names and sizes of a folder's files: the content of thousands would take long to read."""
    with os.scandir(folder) as entries:
        return _digest(repr(sorted((entry.name, entry.stat().st_size) for entry in entries)).encode())


def heat_folder(file: Path) -> Path:
    """Where a job's heat layers are.

    Example:
        >>> heat_folder(Path("jobs/SDP-nut-0123456789.json")).as_posix()
        'jobs/SDP-nut-0123456789/heat'
    """
    return file.with_suffix("") / "heat"


def write_heat(file: Path, layers: Iterable[Image.Image]) -> None:
    """Write the heat layers of a job, in the order of their images' paths, and remove those of an earlier run."""
    folder = heat_folder(file)
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder, ".*")
    written = set()
    for number, layer in enumerate(layers):
        name = _heat_name(number)
        content = io.BytesIO()
        layer.save(content, format="png")
        write_atomically(folder / name, content.getvalue())
        written.add(name)
    for path in folder.iterdir():
        if path.name not in written and not path.name.startswith("."):
            path.unlink(missing_ok=True)


def _heat_name(number: int) -> str:
    return f"{number:05d}.png"


def write_masks(file: Path, masks: Mapping[str, np.ndarray], region: np.ndarray | None = None) -> None:
    """Write the masks of the examples by their paths, and the region that was looked at."""
    arrays: dict[str, Any] = {"masks": np.stack(list(masks.values()))} if masks else {}
    arrays |= {} if region is None else {"region": region}
    with replacing(file.with_suffix(".npz")) as draft:
        np.savez_compressed(draft, paths=np.array(list(masks), dtype=str), **arrays)


def write_images(file: Path, table: pd.DataFrame) -> None:
    """Write a line an image, in the order of their paths.

    Args:
        file: Of the job's row.
        table: ``IMAGE_COLUMNS`` of every image.
    """
    content = table.sort_values("path").to_csv(index=False, columns=list(IMAGE_COLUMNS))
    write_atomically(file.with_suffix(".csv"), content.encode(errors=ERRORS))


@dataclass(frozen=True)
class KeptImage:
    """An image as a job judged it.

    Args:
        score: The model's own score.
        shown: The same on the common scale, 0.5 at the threshold.
        label: 1 if the image is anomalous, 0 if it is normal, None if that is not known.
        heat: Its heat layer.
        class_name: What the model has taken it for, where it tells.
        p_value: Share of normal images that score as high, where scores of normal images are known.
        marked_area: Share of the image above the map's threshold, where that is known.
        box: Of the largest marked region, see :func:`anomalib_clipad.engine.table.largest_box`; or nothing.
        explanation: What the model says in words.
        defect: The word that it gives, or ``unspecified``; nothing where it names none.
        true_defect: The word that the image's folder is named by.

    Example:
        >>> KeptImage(score=7.2, shown=0.6, label=1, heat=Path("00000.png")).shown > 0.5
        True
    """

    score: float
    shown: float
    label: int | None
    heat: Path
    class_name: str | None = None
    p_value: float | None = None
    marked_area: float | None = None
    box: tuple[float, ...] = ()
    explanation: str | None = None
    defect: str | None = None
    true_defect: str | None = None


@dataclass(frozen=True)
class Kept:
    """What a job kept for pictures, tables and the page.

    Args:
        images: Its images by path.
        masks: Ground truth of the examples by path, (H, W) bool, empty without masks.
        scales: The scales of its scores and maps, one for each class where it has several.
        digest: Changes when any of it does.
        region: (H, W), true where the images were looked at; None for everywhere.

    Example:
        >>> Kept.read(Path("nowhere.json")) is None
        True
    """

    images: dict[str, KeptImage]
    masks: dict[str, np.ndarray]
    scales: Scales
    digest: str
    region: np.ndarray | None = None

    def chosen_class(self, path: str) -> str | None:
        """The class of an image, where the model has several to choose from."""
        return self.images[path].class_name if self.scales.of_class else None

    @classmethod
    def read(cls, file: Path) -> "Kept | None":
        """Read a job's files; None where they are not whole."""
        if (found := _read_whole(file)) is None:
            return None
        row, digest = found
        scales = Scales.read(row["scales"])
        table = pd.read_csv(file.with_suffix(".csv"), encoding_errors=ERRORS, dtype=str, keep_default_na=False).reindex(
            columns=IMAGE_COLUMNS, fill_value=""
        )
        scores = pd.to_numeric(table["score"], errors="coerce").astype(float)
        images = {
            row.path: KeptImage(
                score,
                float(scales.of(row.class_name).score.shown(score)),
                label=int(float(row.label)) if row.label else None,
                heat=heat_folder(file) / _heat_name(number),
                class_name=row.class_name or None,
                p_value=float(row.p_value) if row.p_value else None,
                marked_area=float(row.marked_area) if row.marked_area else None,
                box=tuple(float(getattr(row, side)) for side in BOXES if getattr(row, side)),
                explanation=row.explanation or None,
                defect=row.defect or None,
                true_defect=row.true_defect or None,
            )
            for number, (row, score) in enumerate(zip(table.itertuples(), scores.tolist(), strict=True))
        }
        with np.load(file.with_suffix(".npz"), allow_pickle=False) as arrays:
            masks = dict(zip(arrays["paths"].tolist(), arrays["masks"], strict=True)) if "masks" in arrays else {}
            region = arrays.get("region")
        return cls(images, masks, scales, digest, region)
