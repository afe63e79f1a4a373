"""A line of the tables of ``benchmarks/``: what was measured, its limit, and on what machine."""

import platform
from typing import NamedTuple

import torch

HEADER = "| what | at | measured | wanted | met |\n|---|---|---|---|---|"


class Line(NamedTuple):
    """A figure and its limit.

    Attributes:
        name: What was measured.
        detail: At what, and the figures behind the figure.
        figure: The figure.
        limit: What it is to be; nothing for a figure without a limit.
        at_most: Whether the limit is the largest figure wanted, or the smallest.
        unit: Of figure and limit.
    """

    name: str
    detail: str
    figure: float
    limit: float | None = None
    at_most: bool = True
    unit: str = "x"

    @property
    def met(self) -> bool:
        """Whether the figure is within its limit."""
        if self.limit is None:
            return True
        return self.figure <= self.limit if self.at_most else self.figure >= self.limit

    def __str__(self) -> str:
        """The line as a row of a table in Markdown, below ``HEADER``."""
        wanted = "" if self.limit is None else f"{'at most' if self.at_most else 'at least'} {self.limit:g} {self.unit}"
        met = "" if self.limit is None else ("yes" if self.met else "NO")
        return f"| {self.name} | {self.detail} | {self.figure:.3g} {self.unit} | {wanted} | {met} |"


def machine() -> str:
    """What the figures were measured on."""
    available = torch.cpu.get_capabilities()
    kinds = ", ".join(kind for kind in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if available.get(kind))
    name = available.get("cpu_name")
    return f"{platform.machine()} ({name}) with {kinds}, {torch.get_num_threads()} threads, torch {torch.__version__}"
