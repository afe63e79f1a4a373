"""Files that are complete or not there at all, and names that a file system takes."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST_NAME = 100  # characters; a file system takes 255 bytes, and endings are added


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a draft's path beside ``path``; when the block succeeds the draft takes its place, else it is removed.

    Readers see the old file or the new one, whoever writes at the same time.

    Example:
        >>> with replacing(Path("table.csv")) as draft:
        ...     _ = draft.write_text("a,b")
        >>> Path("table.csv").read_text()
        'a,b'
    """
    # The ending stays: some writers choose the format by it.
    draft = path.with_name(f".{path.stem[:LONGEST_NAME]}.{os.getpid()}{path.suffix}")
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
