"""Names of pictures: another one for every image, like the image's own."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from anomalib_clipad.files import common_folder, relative_path

LONGEST = 100  # bytes of a part of a path; a file system takes 255, and drafts have longer names
FORBIDDEN = '<>:"|?*\\'  # by the one file system or the other


class PictureNames:
    """Where the picture of each image of a run goes: as the images lie below the folder that they have in common.

    Args:
        paths: All images of the run. For another image a name is made too, by a hash of its folder.

    Example:
        >>> names = PictureNames(["line/a/1.png", "line/b/1.png", "line/b/2.jpg"])
        >>> [str(names(path)) for path in ("line/a/1.png", "line/b/2.jpg", "elsewhere/1.png")]
        ['a/1.png', 'b/2.png', '7b1b763e/1.png.png']
        >>> str(PictureNames(["1.png", "1.jpg"])("1.jpg"))
        '1.jpg.png'
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.folder = common_folder(paths)
        images = set(paths)
        # Case does not count on some file systems, such as network shares.
        folded = Counter(path.casefold() for path in images)
        self.alike = frozenset(path for path in images if folded[path.casefold()] > 1)
        # The ending goes where no two images differ in it alone.
        self.by_stem = len({os.path.splitext(path)[0] for path in folded}) == len(images)  # noqa: PTH122
        self.known = frozenset(paths if self.folder else ())
        # A folder may be called like a picture: a.png/1.png beside a.jpg.
        inside = (PurePosixPath(self.below(path)) for path in {os.path.dirname(path): path for path in paths}.values())  # noqa: PTH120
        self.folders = frozenset(str(folder).casefold() for one in inside for folder in one.parents)

    def __call__(self, path: str) -> PurePosixPath:
        """Path of an image's picture, relative to the folder of the pictures."""
        if path not in self.known:
            inside = PurePosixPath(_digest(os.path.dirname(path)), Path(path).name or "image")  # noqa: PTH120
            return PurePosixPath(*map(_part, inside.parts[:-1]), _part(f"{inside.name}.png"))
        inside = PurePosixPath(self.below(path))
        name = inside.stem if self.by_stem else inside.name
        if path in self.alike or str(inside.with_name(f"{name}.png")).casefold() in self.folders:
            name += f"-{_digest(path)}"
        return PurePosixPath(*map(_part, inside.parts[:-1]), _part(f"{name}.png"))

    def below(self, path: str) -> str:
        """An image's path below the common folder, for its title; the file's name where it is not there.

        Example:
            >>> PictureNames(["line/a/1.png", "line/b/1.png"]).below("line/a/1.png")
            'a/1.png'
        """
        inside = relative_path(path, self.folder) if self.folder and path in self.known else None
        return inside or Path(path).name


def _part(name: str) -> str:
    """A part of a path that every file system takes, and another one for every other name."""
    allowed = "".join(c if c.isprintable() and c not in FORBIDDEN else "_" for c in name)
    if allowed == name and len(name.encode()) <= LONGEST:
        return name
    stem, ending = os.path.splitext(allowed)  # noqa: PTH122 - a name, not a path
    half = (LONGEST - 20) // 2
    if len(stem.encode()) > LONGEST - 20:
        content = stem.encode()
        stem = "…".join(part.decode(errors="ignore") for part in (content[:half], content[-half:]))
    return f"{stem}-{_digest(name)}{ending}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
