"""The bars of a comparison, and the lines that stay: one a job, also where there is no terminal to draw bars on."""

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from anomalib_clipad.compare.evaluator import METRICS
from anomalib_clipad.pictures.text import shortened


class Bars:
    """A bar of the jobs, and below it one of what the job at hand is doing.

    Args:
        total: Number of the jobs.
        name: Of the first bar, until a job begins.

    Example:
        >>> with Bars(2) as bars:
        ...     bars.begin("SDP on nut")
        ...     bars.tell("images", 4, 34)
        ...     bars.finish({"model": "SDP", "category": "nut", "error": "no data"})
    """

    def __init__(self, total: int, name: str = "compare") -> None:
        # The stream itself, since jobs hide what is written to sys.stderr.
        console = Console(file=sys.stderr)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._total, self._done = total, 0
        self._jobs = self._progress.add_task(name, total=total)
        self._now: TaskID | None = None
        self._what = ""

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forget()
        self._progress.stop()

    def begin(self, name: str) -> None:
        """Name the job that begins."""
        self._forget()
        self._progress.update(self._jobs, description=shortened(name))

    def tell(self, what: str, done: int, total: int | None) -> None:
        """Show what the job is doing.

        Args:
            what: In a few words.
            done: How much of it.
            total: Of how much; None if that is not known.
        """
        if self._now is None or what != self._what:
            self._forget()
            self._now, self._what = self._progress.add_task(f"  {what}", total=total), what
        self._progress.update(self._now, completed=done, total=total)

    def finish(self, row: Mapping[str, Any], resumed: bool = False) -> None:
        """Leave a line on what a job has come to.

        Args:
            row: Of the job.
            resumed: Whether the result was there before.
        """
        self._forget()
        self._done += 1
        self._progress.update(self._jobs, completed=self._done)
        failed = ("failed ", "red") if "error" in row else ""
        line = Text.assemble(f"{self._done}/{self._total} ", failed, job_line(row, resumed))
        self._progress.console.print(line, soft_wrap=True, highlight=False)

    def say(self, line: str) -> None:
        """Leave another line."""
        self._progress.console.print(Text(line), soft_wrap=True, highlight=False)

    def _forget(self) -> None:
        if self._now is not None:
            self._progress.remove_task(self._now)
            self._now = None


def job_line(row: Mapping[str, Any], resumed: bool = False) -> str:
    """A job in a line: what it was, how long it took, and its first metric.

    Args:
        row: Of the job.
        resumed: Whether the result was there before.

    Example:
        >>> row = {"model": "SDP", "category": "nut", "images": 34, "fit_seconds": 0.0, "test_seconds": 4.1}
        >>> job_line({**row, "image_AUROC": 0.954})
        'SDP on nut: 34 images in 4.1 s, image AUROC 95.4 %'
    """
    name = f"{row['model']} on {row['category']}"
    if "error" in row:
        return f"{name}: {row['error']}"
    name += f", seed {row['seed']}" if row.get("shots") else ""
    words = f"{row['images']} images in {row['fit_seconds'] + row['test_seconds']:.1f} s"
    metric = next((name for name in METRICS if name in row), None)
    words += f", {METRICS[metric]} {100 * row[metric]:.1f} %" if metric else ""
    return f"{name}: {words}{' (measured before)' if resumed else ''}"
