"""A comparison that is interrupted at any moment goes on later and gives the same figures."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest

from anomalib_clipad.compare.job_files import read_row

from .test_compare import configuration, data_root, figures, home, start

__all__ = ["data_root", "home"]  # fixtures
MODELS = [
    {"class_path": "ClipAdSdp", "name": f"SDP {rvs}", "init_args": {"backbone": "demo", "rvs": rvs}}
    for rvs in ("mean", "kde", "pca")
]


@pytest.mark.slow
def test_interrupted_runs_end_with_a_status_and_can_be_resumed(data_root: Path, home: Path, tmp_path: Path) -> None:
    config = configuration(data_root, MODELS)
    (tmp_path / "whole").mkdir()
    began = time.monotonic()
    assert finish(start(config, tmp_path / "whole", home)) == 0
    whole = time.monotonic() - began
    rng = random.Random(0)
    (tmp_path / "cut").mkdir()
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = start(config, tmp_path / "cut", home)
        try:
            process.communicate(timeout=rng.uniform(0.4, 0.9) * whole)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        # An interruption while Python still imports is shown in Python's own way, with a trace.
        process.communicate(timeout=600)
        # Lightning ends its own run with status 1 when it is interrupted.
        assert process.returncode in (0, -number, 128 + number, *([1] if number == signal.SIGINT else []))
        for file in tmp_path.glob("cut/out/jobs/*.json"):
            assert read_row(file) is not None
    assert finish(start(config, tmp_path / "cut", home)) == 0
    pd.testing.assert_frame_equal(figures(tmp_path / "cut/out"), figures(tmp_path / "whole/out"), atol=1e-6)


def finish(process: subprocess.Popen) -> int:
    _, stderr = process.communicate(timeout=600)
    assert "Traceback" not in stderr
    return process.returncode
