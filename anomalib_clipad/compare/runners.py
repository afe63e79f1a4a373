"""anomalib's runners with a bar that says what is at work and how long it will take."""

from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from anomalib.pipelines.components.base import Runner
from anomalib.pipelines.components.runners import ParallelRunner, SerialRunner
from anomalib.pipelines.components.runners.parallel import ParallelExecutionError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from anomalib_clipad.compare.job import CompareJob
from anomalib_clipad.pictures.text import shortened

DIED = "A process of the comparison died, perhaps for lack of memory; start it again for what is missing."


class SerialCompareRunner(SerialRunner):
    """Runs the jobs one by one.

    Args:
        generator: Makes the jobs.

    Example:
        >>> from anomalib_clipad.compare import CompareJobGenerator
        >>> rows = SerialCompareRunner(CompareJobGenerator("cpu")).run({"models": ["Nobody"], "images": "photos"})
        >>> rows[0]["error"]
        'UnknownModelError: Nobody'
    """

    def run(self, args: dict, prev_stage_results: object = None) -> list[dict[str, Any]]:
        """Run what is missing; a row a job."""
        del prev_stage_results
        jobs = _jobs(self, args)
        rows = []
        with _progress() as progress:
            task = progress.add_task("compare", total=len(jobs))
            for job in jobs:
                progress.update(task, description=_title(job))
                rows.append(job.run())
                _tell(progress, rows[-1])
                progress.advance(task)
        return rows


class ParallelCompareRunner(ParallelRunner):
    """Runs as many jobs at once as there are GPUs, each in a process of its own.

    Args:
        generator: Makes the jobs.
        n_jobs: Number of processes; a job's number among them is the number of its GPU.

    Example:
        >>> from anomalib_clipad.compare import CompareJobGenerator
        >>> ParallelCompareRunner(CompareJobGenerator("cuda"), n_jobs=2).n_jobs
        2
    """

    def run(self, args: dict, prev_stage_results: object = None) -> list[dict[str, Any]]:
        """Run what is missing; a row a job, in the jobs' order. When a process dies, what is done stays."""
        jobs = _jobs(self, args)
        with _progress() as self._bar:
            self._task = self._bar.add_task(f"{self.n_jobs} at once", total=len(jobs))
            try:
                super().run(args, prev_stage_results)
            except (ParallelExecutionError, BrokenProcessPool):
                self._bar.console.print(f"[red]{DIED}[/red]")
        done = {row["key"]: row for row in self.results}
        return [done.get(job.key) or job.result() or job.failed(DIED) for job in jobs]

    def _await_cleanup_processes(self, blocking: bool = False) -> None:
        before = len(self.results)
        # anomalib asks again and again without a pause, which takes a core from the jobs.
        wait([one for one in self.processes.values() if one is not None], timeout=1, return_when=FIRST_COMPLETED)
        super()._await_cleanup_processes(blocking)
        for row in self.results[before:]:
            _tell(self._bar, row)
        self._bar.update(self._task, completed=len(self.results))


def _jobs(runner: Runner, args: dict) -> list[CompareJob]:
    return [job for job in runner.generator(args, None) if isinstance(job, CompareJob)]


def _progress() -> Progress:
    words = TextColumn("{task.description}", markup=False)
    left = (TextColumn("left"), TimeRemainingColumn())
    return Progress(words, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *left, console=Console(stderr=True))


def _title(job: CompareJob) -> str:
    return shortened(f"{job.model_name} on {job.category}")


def _tell(progress: Progress, row: dict[str, Any]) -> None:
    if "error" in row:
        words = f"{row['model']} on {row['category']}: {row['error']}"
        progress.console.print(Text.assemble(("failed ", "red"), words))
