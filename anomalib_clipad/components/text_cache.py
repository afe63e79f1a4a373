"""Text vectors that were computed before, kept in the user's cache folder."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from anomalib_clipad.files import write_atomically

logger = logging.getLogger(__name__)

VARIABLE = "ANOMALIB_CLIPAD_CACHE"  # of the environment: another folder, or 0 for no cache
CHUNK = 2**20  # bytes of the weights that are read at once
FORMAT = 1  # to be raised when the same prompts give other vectors


class TextVectorCache:
    """Keeps the text vectors of one file of weights.

    Vectors are found by the SHA-256 of the weights, of the CLIP's configuration, which the same weights can be used
    with several of, and of all that they were made from. The weights are read in whole
    for it once; their digest is kept with size and time of the file's last change. Files are replaced at once, so
    several processes can share the folder, and one that is damaged counts as missing. The environment variable
    ``ANOMALIB_CLIPAD_CACHE`` names another folder, or turns the cache off with ``0``.

    Args:
        weights: File of the CLIP's weights.
        config: open_clip's ``model_cfg``; it has what the weights do not tell, such as heads and activation.

    Example:
        >>> _ = Path("weights.pt").write_bytes(b"weights")
        >>> cache = TextVectorCache(Path("weights.pt"), {"text_cfg": {"heads": 8}})
        >>> cache.write({"prompts": ["a nut"]}, torch.ones(2, 4))
        >>> cache.read({"prompts": ["a nut"]}).shape, cache.read({"prompts": ["a bolt"]})
        (torch.Size([2, 4]), None)
    """

    def __init__(self, weights: Path, config: Mapping[str, Any]) -> None:
        self.weights, self.config = weights, config
        self._digest_of: tuple[dict[str, int], str] | None = None  # size and time of the weights, and their digest

    def read(self, source: dict[str, Any]) -> torch.Tensor | None:
        """The vectors made from ``source``, as they were written, or nothing where they are not kept."""
        if (folder := cache_folder()) is None:
            return None
        try:
            with safe_open(self._file(folder, source), framework="pt") as file:
                vectors = file.get_tensor("text_features")
                digest = (file.metadata() or {}).get("sha256")
        except (OSError, SafetensorError):
            return None
        return vectors if digest == _digest(vectors) else None

    def write(self, source: dict[str, Any], vectors: torch.Tensor) -> None:
        """Keep the vectors made from ``source``; a folder that cannot be written to is not an error."""
        if (folder := cache_folder()) is None:
            return
        vectors = vectors.detach().cpu().contiguous()
        try:
            _write(self._file(folder, source), save({"text_features": vectors}, {"sha256": _digest(vectors)}))
        except OSError as error:
            logger.info("Text vectors are not kept in %s (%s).", folder, error)

    def _file(self, folder: Path, source: dict[str, Any]) -> Path:
        made_by = {
            "format": FORMAT,
            "open_clip": version("open_clip_torch"),
            "config": self.config,
            "weights": self._weights_digest(folder),
        }
        text = json.dumps({**source, **made_by}, sort_keys=True)
        return folder / "text" / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"

    def _weights_digest(self, folder: Path) -> str:
        path = self.weights.resolve()
        state = _state(path)
        if self._digest_of is None or self._digest_of[0] != state:
            file = _digest_file(folder, path)
            digest = _read_digest(file, state)
            if digest is None:
                digest = _digest_of_file(path)
                with suppress(OSError):  # a folder that cannot be written to: the weights are read again another time
                    _write(file, json.dumps({**state, "sha256": digest}).encode())
            self._digest_of = state, digest
        return self._digest_of[1]


def kept_digest(weights: Path) -> str | None:
    """SHA-256 of a file of weights, if it is known of the file's present size and time of change.

    Example:
        >>> _ = Path("weights.pt").write_bytes(b"other weights")
        >>> before = kept_digest(Path("weights.pt"))
        >>> TextVectorCache(Path("weights.pt"), {}).write({}, torch.ones(1))
        >>> before, kept_digest(Path("weights.pt"))[:8]
        (None, '53959fa1')
    """
    if (folder := cache_folder()) is None:
        return None
    path = weights.resolve()
    return _read_digest(_digest_file(folder, path), _state(path))


def cache_folder() -> Path | None:
    """Where text vectors are kept, by default ``anomalib-clipad`` in the user's cache folder; nothing for no cache.

    Example:
        >>> cache_folder().is_absolute()
        True
    """
    chosen = os.environ.get(VARIABLE)
    if chosen == "0":
        return None
    return Path(chosen) if chosen else user_cache_path("anomalib-clipad", appauthor=False)


def _state(path: Path) -> dict[str, int]:
    found = path.stat()
    return {"size": found.st_size, "modified": found.st_mtime_ns}


def _digest_file(folder: Path, weights: Path) -> Path:
    return folder / "weights" / f"{hashlib.sha256(os.fsencode(weights)).hexdigest()}.json"


def _read_digest(file: Path, state: dict[str, int]) -> str | None:
    try:
        kept = json.loads(file.read_bytes())
        return str(kept["sha256"]) if {key: kept[key] for key in state} == state else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while part := content.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def _digest(vectors: torch.Tensor) -> str:
    return hashlib.sha256(repr(vectors.shape).encode() + vectors.numpy().tobytes()).hexdigest()
