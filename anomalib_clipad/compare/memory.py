"""How much memory a job adds, whatever ran before it in the same process."""

import ctypes
import gc
import math
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


class AddedMemory:
    """Peak of the memory that is used from now on, above what is used now.

    Memory that earlier work has freed is handed back to the system first, else a later job would seem to need less.

    Args:
        accelerator: ``cuda`` for the GPU's memory, ``cpu`` for that of the process.

    Example:
        >>> added = AddedMemory("cpu")
        >>> block = bytearray(64 * 2**20)
        >>> round(added.peak_mib()) >= 64
        True
    """

    def __init__(self, accelerator: str) -> None:
        self.cuda = accelerator == "cuda"
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
            return
        _hand_back()
        try:
            CLEAR.write_text("5", encoding="ascii")  # resets VmHWM
            self.before = _status("VmRSS")
        except OSError:  # no Linux, or one that forbids it: nothing can be said of this job alone
            self.before = math.nan

    def peak_mib(self) -> float:
        """MiB; NaN where the system cannot say it."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 2**20 - self.before
        return math.nan if math.isnan(self.before) else max(_status("VmHWM") - self.before, 0.0)


def _status(key: str) -> float:
    return int(STATUS.read_text(encoding="ascii", errors="replace").split(f"{key}:")[1].split()[0]) / 1024


def _hand_back() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # glibc's alone
        return
