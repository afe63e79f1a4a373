"""Files that are complete or not there at all, and names that a file system takes."""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

ABANDONED = 3600  # seconds without a change, after which a draft belongs to nobody
LONGEST_NAME = 100  # characters; a file system takes 255 bytes, and endings are added


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a draft's path beside ``path``; when the block succeeds the draft takes its place, else it is removed.

    Readers see the old file or the new one, whoever writes at the same time: another thread, process or machine.

    Example:
        >>> with replacing(Path("table.csv")) as draft:
        ...     _ = draft.write_text("a,b")
        >>> Path("table.csv").read_text()
        'a,b'
    """
    # The ending stays: some writers choose the format by it.
    draft = path.with_name(f".{path.stem[:LONGEST_NAME]}.{uuid4().hex[:12]}{path.suffix}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole, see :func:`replacing`.

    Example:
        >>> write_atomically(Path("report.md"), b"# Report")
        >>> Path("report.md").read_bytes()
        b'# Report'
    """
    with replacing(path) as draft:
        draft.write_bytes(content)


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Remove drafts, files or folders, that a process left which was interrupted by a signal or a power cut.

    Args:
        folder: Where they lie.
        pattern: What their names are like.

    Example:
        >>> _ = Path(".table.1234.csv").write_text("a,")
        >>> os.utime(".table.1234.csv", (0, 0))
        >>> remove_abandoned(Path(), ".*.csv")
        >>> Path(".table.1234.csv").exists()
        False
    """
    for draft in folder.glob(pattern):
        # Another process may write or remove it at this moment, on another machine too.
        try:
            inside = [draft, *draft.rglob("*")] if draft.is_dir() else [draft]
            if time.time() - max(path.stat().st_mtime for path in inside) < ABANDONED:
                continue
            if draft.is_dir():
                shutil.rmtree(draft)
            else:
                draft.unlink()
        except OSError:
            continue


def common_folder(paths: Sequence[str]) -> str | None:
    """The folder that all paths have in common; none of no paths, of several drives, or of relative and absolute ones.

    Example:
        >>> common_folder(["line/a/1.png", "line/b/1.png"]), common_folder(["1.png"]), common_folder([])
        ('line', '.', None)
    """
    try:
        return os.path.commonpath([str(Path(path).parent) for path in paths]) or "."
    except ValueError:
        return None


def relative_path(path: str | Path, folder: str | Path) -> str | None:
    """A path seen from a folder, with slashes; none where they are on different drives.

    Example:
        >>> relative_path("line/a/1.png", "line"), relative_path("1.png", "results")
        ('a/1.png', '../1.png')
    """
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        return None


def slug(name: str) -> str:
    """A name as part of a file's name: readable, and another one for every other name.

    Example:
        >>> slug("bottle"), slug("metal nut")
        ('bottle', 'metal_nut-27b5f3')
    """
    readable = "".join(c if c.isalnum() and c.isascii() else "_" for c in name)[:LONGEST_NAME]
    if readable == name:
        return name
    return f"{readable}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:6]}"
