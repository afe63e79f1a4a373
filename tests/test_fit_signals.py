"""Training that is interrupted at any moment is resumed, and learns the same."""

import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml

from .commands import run_in_process
from .conftest import ANOMALIB, LAYOUT, start_command

EPOCHS = 24  # several seconds, in which the signals come


def configuration(small_clip: str, data: Path) -> str:
    parts = [
        {"class_path": "Folder", "init_args": {"name": name, "root": str(data / name), **LAYOUT, "num_workers": 0}}
        for name in ("gear", "plate")
    ]
    arguments = {"datamodules": parts, "num_workers": 0, "train_batch_size": 4, "cache_features": "cache"}
    return yaml.safe_dump(
        {
            "model": {"class_path": "ClipAdSdpPlus", "init_args": {"backbone": small_clip, "visualizer": False}},
            "data": {"class_path": "anomalib_clipad.data.AuxiliaryDataModule", "init_args": arguments},
            "trainer": {"max_epochs": EPOCHS, "accelerator": "cpu"},
        }
    )


@pytest.mark.slow
def test_interrupted_training_goes_on_and_learns_the_same(
    small_clip: str, auxiliary_root: Path, tmp_path: Path
) -> None:
    first, whole, cut = (tmp_path / name for name in ("first", "whole", "cut"))
    for folder in (first, whole, cut):
        folder.mkdir()
        (folder / "train.yaml").write_text(configuration(small_clip, auxiliary_root))
    # One epoch that both go on from, because anomalib's command ignores its seed_everything.
    assert run_in_process("fit", "--config", "train.yaml", "--trainer.max_epochs", 1, cwd=first).returncode == 0
    for folder in (whole, cut):
        shutil.copy(newest(first), folder / "last.ckpt")
    assert run_in_process(*command(whole)[1:], cwd=whole).returncode == 0
    rng = random.Random(0)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = start_command(*command(cut), cwd=cut)
        wait_for_epochs(cut, process, rng.randint(1, 4))
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(number)
        process.communicate(timeout=300)
        assert number != signal.SIGKILL or process.returncode == -number, "training ended before the signal"
        for path in cut.rglob("*.ckpt"):
            assert torch.load(path, weights_only=True)["state_dict"], path
    done = run_in_process(*command(cut)[1:], cwd=cut)
    assert done.returncode == 0, done.stderr[-3000:]
    expected, ours = (torch.load(newest(folder), weights_only=True) for folder in (whole, cut))
    assert ours["epoch"] == expected["epoch"]
    for key, value in expected["state_dict"].items():
        if key.startswith("model.adapter."):
            torch.testing.assert_close(ours["state_dict"][key], value, atol=1e-6, rtol=0)


def command(where: Path) -> list[object]:
    """Resume what was saved last."""
    return [ANOMALIB, "fit", "--config", "train.yaml", "--ckpt_path", newest(where)]


def newest(where: Path) -> Path:
    return max(where.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)


def wait_for_epochs(where: Path, process: subprocess.Popen, count: int) -> None:
    """Until the run has saved so many epochs."""
    before = newest(where).stat().st_mtime_ns
    while count and process.poll() is None:
        time.sleep(0.01)
        with suppress(FileNotFoundError):  # at the moment in which the next one takes its place
            if (now := newest(where).stat().st_mtime_ns) > before:
                before, count = now, count - 1
