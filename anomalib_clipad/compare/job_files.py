"""The three files of a job: ``.npz`` with examples, ``.csv`` with scores, ``.json`` with the row, which comes last.

The row names the digests of the others and of itself. A job is done if all of them agree; whatever else lies there, the
job runs again.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from anomalib_clipad.files import replacing, write_atomically

KEPT = (".npz", ".csv")
DRAFT_AGE = 3600  # seconds after which a draft was left behind by a process that died
ERRORS = "surrogateescape"  # a file's name may be no valid text


def write_row(file: Path, row: dict[str, Any]) -> None:
    """Write the row, and with it the digests that make the job done."""
    kept = {ending: _digest(file.with_suffix(ending).read_bytes()) for ending in KEPT}
    whole = {"row": row, "files": kept}
    content = {**whole, "digest": _digest(_text(whole))}
    write_atomically(file, json.dumps(content, indent=1, default=str).encode())


def read_row(file: Path) -> dict[str, Any] | None:
    """The row of a job whose files are whole.

    Example:
        >>> _ = Path("job.json").write_text("{}")
        >>> read_row(Path("job.json")) is None
        True
    """
    try:
        content = json.loads(file.read_bytes())
        digest = content.pop("digest")
        row: dict[str, Any] = content["row"]
        whole = digest == _digest(_text(content)) and isinstance(row, dict)
        kept = all(content["files"][end] == _digest(file.with_suffix(end).read_bytes()) for end in KEPT)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return row if whole and kept else None


def _text(content: object) -> bytes:
    # Once through JSON, so that the digest is that of what will be read.
    return json.dumps(json.loads(json.dumps(content, default=str)), sort_keys=True).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_examples(
    file: Path, maps: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray], sampled: Sequence[np.ndarray]
) -> None:
    """Write the maps and masks of the examples, and the ends of the colour scale."""
    pixels = np.stack(sampled).astype(np.float32)
    paths = list(maps)
    arrays: dict[str, Any] = {"masks": np.stack([masks[path] for path in paths])} if masks else {}
    with replacing(file.with_suffix(".npz")) as draft:
        np.savez_compressed(
            draft,
            paths=np.array(paths),
            maps=np.stack(list(maps.values())),
            low=np.percentile(pixels, 1),
            high=np.percentile(pixels, 99.5),
            **arrays,
        )


def write_scores(file: Path, paths: Sequence[str], labels: Sequence[int | None], scores: Sequence[float]) -> None:
    """Write a line an image, in the order of their paths."""
    table = pd.DataFrame({"path": paths, "label": labels, "score": scores}).sort_values("path")
    write_atomically(file.with_suffix(".csv"), table.to_csv(index=False).encode(errors=ERRORS))


@dataclass(frozen=True)
class Kept:
    """What a job kept for the pictures.

    Args:
        scores: Scores by path.
        maps: Maps of the examples by path, (H, W) in float16.
        masks: Their ground truth by path, (H, W), empty without masks.
        low: Lower end of the colour scale.
        high: Upper end of the colour scale.

    Example:
        >>> Kept.read(Path("nowhere.json")) is None
        True
    """

    scores: dict[str, float]
    maps: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]
    low: float
    high: float

    @classmethod
    def read(cls, file: Path) -> "Kept | None":
        """Read a job's files; None where they are not whole."""
        if read_row(file) is None:
            return None
        table = pd.read_csv(
            file.with_suffix(".csv"), encoding_errors=ERRORS, dtype={"path": str}, keep_default_na=False
        )
        scores = dict(zip(table["path"], pd.to_numeric(table["score"], errors="coerce"), strict=True))
        with np.load(file.with_suffix(".npz"), allow_pickle=False) as arrays:
            paths = arrays["paths"].tolist()
            maps = dict(zip(paths, arrays["maps"], strict=True))
            masks = dict(zip(paths, arrays["masks"], strict=True)) if "masks" in arrays else {}
            return cls(scores, maps, masks, float(arrays["low"]), float(arrays["high"]))


def remove_drafts(folder: Path) -> None:
    """Remove what interrupted processes left; drafts of an hour ago belong to nobody."""
    for draft in folder.glob(".*"):
        try:
            if draft.is_file() and time.time() - draft.stat().st_mtime > DRAFT_AGE:
                draft.unlink()
        except OSError:  # another process was quicker
            continue
