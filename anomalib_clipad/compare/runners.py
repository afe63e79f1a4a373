"""anomalib's runners with bars that say what is at work and how long it will take, and a line a job."""

from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from anomalib.pipelines.components.base import Runner
from anomalib.pipelines.components.runners import ParallelRunner, SerialRunner
from anomalib.pipelines.components.runners.parallel import ParallelExecutionError

from anomalib_clipad.compare.bars import Bars
from anomalib_clipad.compare.job import CompareJob
from anomalib_clipad.compare.predictions import GrowingPredictions
from anomalib_clipad.compare.screen import check_interrupted

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
        with Bars(len(jobs)) as bars:
            growing = GrowingPredictions(jobs[0].output)
            for job in jobs:
                check_interrupted()
                bars.begin(f"{job.model_name} on {job.category}")
                job.tell = bars.tell
                rows.append(job.run())
                bars.finish(rows[-1], job.resumed)
                growing.add(rows[-1])
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
        with Bars(len(jobs), f"{self.n_jobs} at once") as self._bars:
            self._growing = GrowingPredictions(jobs[0].output)
            try:
                super().run(args, prev_stage_results)
            except (ParallelExecutionError, BrokenProcessPool):
                self._bars.say(DIED)
        done = {row["key"]: row for row in self.results}
        return [done.get(job.key) or job.result() or job.failed(DIED) for job in jobs]

    def _await_cleanup_processes(self, blocking: bool = False) -> None:
        check_interrupted()
        before = len(self.results)
        # anomalib asks again and again without a pause, which takes a core from the jobs.
        wait([one for one in self.processes.values() if one is not None], timeout=1, return_when=FIRST_COMPLETED)
        super()._await_cleanup_processes(blocking)
        for row in self.results[before:]:
            self._bars.finish(row)
            self._growing.add(row)


def _jobs(runner: Runner, args: dict) -> list[CompareJob]:
    return [job for job in runner.generator(args, None) if isinstance(job, CompareJob)]
