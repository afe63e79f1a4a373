"""Buffers that stay in float32 while the tower around them goes to a lower precision."""

from collections.abc import Callable, MutableMapping
from typing import Any, ClassVar

import torch
from torch import nn


class Float32Buffers(nn.Module):
    """A module whose own buffers follow it to another device, but not to another precision.

    Thresholds, text vectors and smoothing weights cost nothing and decide at the third digit.

    Attributes:
        growing: Names of buffers that a state dict may hold in any length.
        added: Whether a state dict of an earlier version may lack them; they are then empty.

    Example:
        >>> class Scale(Float32Buffers):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("factor", torch.tensor(1.2345))
        >>> Scale().to(torch.bfloat16).factor
        tensor(1.2345)
    """

    growing: ClassVar[tuple[str, ...]] = ()
    added: ClassVar[bool] = False

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = self._buffers[name]
            if value is not None and moved is not None:
                self._buffers[name] = value.to(moved.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: MutableMapping[str, torch.Tensor],
        prefix: str,
        *args: Any,  # noqa: ANN401 - handed on to torch's method
        **kwargs: Any,  # noqa: ANN401 - handed on to torch's method
    ) -> None:
        for name in self.growing:
            if self.added:
                state_dict.setdefault(prefix + name, getattr(self, name)[:0])
            found, ours = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(found, torch.Tensor) and found.shape[1:] == ours.shape[1:]:
                setattr(self, name, torch.empty_like(found, dtype=ours.dtype, device=ours.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
