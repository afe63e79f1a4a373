"""Programs and the ``anomalib`` command, started by tests."""

import io
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from anomalib.cli import cli

ROOT = Path(__file__).parents[1]
ANOMALIB = Path(sys.executable).with_name("anomalib")


def start_command(*command: object, cwd: Path, **environment: str) -> subprocess.Popen:
    """Start a program in a process of its own that imports this checkout; warnings are left out, tables are wide."""
    paths = [environment.pop("PYTHONPATH", ""), str(ROOT), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, paths))
    return subprocess.Popen(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "COLUMNS": "200", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_command(*command: object, cwd: Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """The same, to its end."""
    with start_command(*command, cwd=cwd, **environment) as process:
        try:
            output = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, *output)


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    """Have the system refuse to write more to a file, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def kept_log_handlers() -> Iterator[None]:
    """Remove the handlers that anomalib's command adds at each start; they print on stdout, also in later tests."""
    loggers = [logging.getLogger(name) for name in (None, "lightning.pytorch")]
    before = [list(logger.handlers) for logger in loggers]
    try:
        yield
    finally:
        for logger, handlers in zip(loggers, before, strict=True):
            logger.handlers[:] = handlers


def run_in_process(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """Run the ``anomalib`` command in this process, which spares its imports."""
    stdout, stderr = io.StringIO(), io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr), kept_log_handlers():
        patch.chdir(cwd)
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", ["anomalib", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())
