"""Whether a precision is worth it on the machine at hand."""

import logging
import time
from functools import cache

import torch
from lightning.pytorch import Trainer
from torch.nn import functional as F

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "16": torch.float16}  # by how Lightning's names of precisions begin
SLOWER = 1.2  # times float32; less is noise
ROUNDS, LONG_ENOUGH = 5, 0.1  # at most so many layers, and none more after so many seconds


def warn_of_slow_precision(trainer: Trainer) -> None:
    """Say in one warning that the precision is slower than float32 here, as on CPUs without instructions for it.

    Args:
        trainer: Of the run.

    Example:
        >>> warn_of_slow_precision(Trainer(logger=False, accelerator="cpu"))
    """
    dtype = DTYPES.get(str(trainer.precision).partition("-")[0])
    if dtype is not None and trainer.strategy.root_device.type == "cpu":
        _warn_once(str(trainer.precision), dtype)


def warn_of_rounded_weights(trainer: Trainer, weights: torch.dtype) -> None:
    """Say that weights were rounded by an earlier run, since Lightning leaves them so where float32 is asked for.

    Args:
        trainer: Of the run.
        weights: Their type.

    Example:
        >>> warn_of_rounded_weights(Trainer(logger=False, accelerator="cpu"), torch.float32)
    """
    if trainer.precision == "32-true" and weights != torch.float32:
        name = str(weights).removeprefix("torch.")
        logger.warning("The weights were rounded to %s before this run; build the model anew for float32.", name)


@cache
def _warn_once(precision: str, dtype: torch.dtype) -> None:
    if (times := seconds_of(dtype) / seconds_of(torch.float32)) > SLOWER:
        logger.warning(
            "Precision %s is slower than float32 on this CPU: a linear layer takes %.1f times as long. "
            "Leave trainer.precision at its default.",
            precision,
            times,
        )


@cache
def seconds_of(dtype: torch.dtype) -> float:
    """Least time of a linear layer of a vision tower's size on the CPU, measured once.

    Example:
        >>> 0 < seconds_of(torch.float32) < 1
        True
    """
    # A plain product has other kernels: in bfloat16 with AVX2 it takes nine times as long as the layer.
    tokens, weight = (torch.ones(shape, dtype=dtype) for shape in ((197, 768), (768, 768)))
    times: list[float] = []
    while len(times) < ROUNDS and sum(times) < LONG_ENOUGH:
        start = time.perf_counter()
        F.linear(tokens, weight)
        times.append(time.perf_counter() - start)
    return min(times)
