"""Buffers that stay in float32 while the tower around them goes to a lower precision."""

from collections.abc import Callable

import torch
from torch import nn


class Float32Buffers(nn.Module):
    """A module whose own buffers follow it to another device, but not to another precision.

    Thresholds, text vectors and smoothing weights cost nothing and decide at the third digit.

    Example:
        >>> class Scale(Float32Buffers):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("factor", torch.tensor(1.2345))
        >>> Scale().to(torch.bfloat16).factor
        tensor(1.2345)
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = self._buffers[name]
            if value is not None and moved is not None:
                self._buffers[name] = value.to(moved.device)
        return self
