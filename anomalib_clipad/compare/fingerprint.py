"""Whether the files and packages that a job used are still the same."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from anomalib_clipad.components.weights import is_file, is_folder

PACKAGES = (
    *("anomalib", "anomalib-clipad", "torch", "torchvision", "torchmetrics", "lightning"),
    *("open_clip_torch", "timm"),
)


def fingerprint(paths: list[Path], leave_out: Path) -> str:
    """Digest of names, sizes and times of change of files, and of all files in folders.

    Args:
        paths: Files and folders; one that does not exist counts as such.
        leave_out: Folder whose files do not count, because the comparison writes them.

    Returns:
        Sixteen hexadecimal digits.

    Example:
        >>> _ = Path("adapter.bin").write_text("one")
        >>> before = fingerprint([Path("adapter.bin")], Path("out"))
        >>> _ = Path("adapter.bin").write_text("another")
        >>> before == fingerprint([Path("adapter.bin")], Path("out"))
        False
    """
    digest = hashlib.sha256()
    unwanted = os.path.realpath(leave_out)
    for path in sorted(set(paths)):
        for file in _files(str(path), unwanted):
            try:
                found = Path(file).stat()
                state = f"{found.st_size} {found.st_mtime_ns}"
            except OSError:
                state = "missing"
            digest.update(f"{file}\0{state}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()[:16]


def _files(path: str, unwanted: str) -> Iterator[str]:
    if not is_folder(path):
        yield path
        return
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if os.path.realpath(Path(folder, name)) != unwanted)
        yield from (str(Path(folder, name)) for name in sorted(names))


def files_named(arguments: Mapping[str, Any]) -> list[Path]:
    """Files and folders that any text of a configuration's arguments names, relative to ``root`` where there is one.

    Example:
        >>> Path("weights.pt").touch()
        >>> files_named({"backbone": "ViT-B-16", "pretrained": "weights.pt"})
        [PosixPath('weights.pt')]
    """
    root = str(arguments["root"]) if arguments.get("root") else None
    texts = list(_texts([value for key, value in arguments.items() if key != "root"]))
    candidates = ([Path(root, text) for text in texts] if root else []) + [Path(text) for text in texts]
    found = [path for path in candidates if is_file(path) or is_folder(path)]
    return found if found or root is None else [Path(root)]


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, (str, Path)) and str(value):
        yield str(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def versions() -> dict[str, str]:
    """The versions of the packages that figures depend on, where they are installed.

    Example:
        >>> "torch" in versions()
        True
    """
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
