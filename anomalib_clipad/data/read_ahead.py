"""Large pictures are read while the one before is scored, where no other process reads."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

SLOW = 0.05  # seconds of a read; below, a model that keeps all cores busy is disturbed for longer than a read takes


def read_ahead(batches: Iterator[T], slow: float = SLOW) -> Iterator[T]:
    """The same batches; behind one that took long to read, the next is read by a thread while that one is in use.

    Args:
        batches: Of a loader without processes of its own.
        slow: Seconds from which on a read takes long.

    Example:
        >>> list(read_ahead(iter([1, 2, 3]), slow=0.0))
        [1, 2, 3]
    """
    with ThreadPoolExecutor(1) as thread:
        read, seconds = _timed(batches)
        while read:
            upcoming = thread.submit(_timed, batches) if seconds >= slow else None
            yield read[0]
            read, seconds = _timed(batches) if upcoming is None else upcoming.result()


def _timed(batches: Iterator[T]) -> tuple[list[T], float]:
    """The next batch, or none at the end, and the seconds that it took."""
    start = time.perf_counter()
    return list(islice(batches, 1)), time.perf_counter() - start
