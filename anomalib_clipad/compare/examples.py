"""Which images of a job are shown, and what they are called."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from anomalib_clipad.files import common_folder, relative_path
from anomalib_clipad.pictures.text import printable

EXAMPLES = 6  # images shown of every category
NORMAL = 2  # of them, where there are labels


def choose_examples(paths: Sequence[str], labels: Sequence[int | None]) -> list[str]:
    """Choose images evenly over all folders, and within each folder; normal ones last.

    Args:
        paths: All images.
        labels: 0 for a normal image, None without labels.

    Returns:
        At most ``EXAMPLES`` of the paths.

    Example:
        >>> choose_examples([f"{folder}/{n}.png" for folder in "abcdefg" for n in (0, 1)], [None] * 14)
        ['a/0.png', 'b/0.png', 'c/0.png', 'e/0.png', 'f/0.png', 'g/0.png']
    """
    normal = [path for path, label in zip(paths, labels, strict=True) if label == 0]
    others = [path for path, label in zip(paths, labels, strict=True) if label != 0]
    chosen = _evenly_by_folder(normal, min(NORMAL, EXAMPLES) if others else EXAMPLES)
    return _evenly_by_folder(others, EXAMPLES - len(chosen)) + chosen


def extremes(
    paths: Sequence[str], labels: Sequence[int | None], scores: Sequence[float]
) -> tuple[str | None, str | None]:
    """The worst good image and the best-hidden defect of a job.

    Args:
        paths: All images.
        labels: 0 for a normal image, 1 for an anomalous one, None without labels.
        scores: Their scores.

    Returns:
        The good image of the largest score, and the anomalous image of the lowest; None where there is none.

    Example:
        >>> extremes(["a.png", "b.png", "c.png", "d.png"], [0, 0, 1, 1], [0.1, 0.7, 0.4, 0.9])
        ('b.png', 'c.png')
    """
    ordered = sorted(zip(scores, paths, labels, strict=True))
    good = [path for _, path, label in ordered if label == 0]
    bad = [path for _, path, label in ordered if label == 1]
    return (good[-1] if good else None), (bad[0] if bad else None)


def _evenly_by_folder(paths: Sequence[str], count: int) -> list[str]:
    folders: dict[str, list[str]] = {}
    for path in sorted(paths):
        folders.setdefault(str(Path(path).parent), []).append(path)
    wanted = _evenly(list(folders.values()), count)
    quota = [0] * len(wanted)
    while sum(quota) < min(count, sum(map(len, wanted))):
        open_folders = [i for i, folder in enumerate(wanted) if quota[i] < len(folder)]
        quota[min(open_folders, key=quota.__getitem__)] += 1
    return [path for folder, number in zip(wanted, quota, strict=True) for path in _evenly(folder, number)]


def _evenly(items: list, count: int) -> list:
    """The first, the last, and others at equal distances between them."""
    if count >= len(items):
        return items
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, count)]


def short_names(paths: Sequence[str]) -> list[str]:
    """Paths below the folder that all of them have in common, so that images of one name can be told apart.

    Example:
        >>> short_names(["line/a/1.png", "line/b/1.png"])
        ['a/1.png', 'b/1.png']
    """
    folder = common_folder(paths)
    return [printable((folder and relative_path(path, folder)) or path) for path in paths]
