"""How far a whole map lies above those of normal images. Ours, not the paper's."""

from collections.abc import MutableMapping
from typing import Any

import torch

from anomalib_clipad.components.class_choice import rows_of
from anomalib_clipad.components.float32 import Float32Buffers


class MapOffset(Float32Buffers):
    r"""Takes away what all pixels of a map have in common, as far as no normal image has it.

    The class token weighs the two text vectors for all patches of an image alike (section 3.3 of the paper). So a small
    defect raises the whole map, and a threshold from normal images then marks most of it. With m the least value of a
    map and :math:`m_0` the largest least value of a normal image's map, :math:`\max(0, m - m_0)` is taken away. No map
    rises, so no more normal images show a marked pixel than without.

    Example:
        >>> offset = MapOffset()
        >>> offset(torch.tensor([[[3.0, 4.0]]])).tolist()
        [[[3.0, 4.0]]]
        >>> offset.take(1.0)
        >>> offset(torch.tensor([[[3.0, 4.0]], [[0.0, 4.0]]])).tolist()
        [[[1.0, 2.0]], [[0.0, 4.0]]]
    """

    growing = ("largest_least",)
    added = True

    largest_least: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        # (classes,) m_0 of each, NaN where unknown; empty where no class has one.
        self.register_buffer("largest_least", torch.empty(0))

    def take(self, value: float, classes: int = 1, number: int | None = None) -> None:
        """Take over the largest least value of normal images' maps.

        Args:
            value: The value; NaN for maps that are to stay as they are.
            classes: How many classes there are.
            number: Index of the class that it belongs to; all by default.
        """
        before = self.largest_least
        values = before.clone() if len(before) == classes else before.new_full((classes,), torch.nan)
        values[slice(None) if number is None else number] = value
        self.largest_least = values[:0] if values.isnan().all() else values

    def forward(self, maps: torch.Tensor, class_index: torch.Tensor | None = None) -> torch.Tensor:
        """Maps without their offset.

        Args:
            maps: (B, H, W), outside of a region not below the least value inside.
            class_index: (B,) index of the images' classes; the first one for all by default.
        """
        if not len(self.largest_least):
            return maps
        largest_least = rows_of(self.largest_least, class_index, dims=2)
        offset = (maps.amin(dim=(-2, -1), keepdim=True) - largest_least.nan_to_num()).clamp(min=0)
        return maps - torch.where(largest_least.isnan(), 0.0, offset)


def with_least_values(state: MutableMapping[str, Any], prefix: str) -> None:
    """Give the summaries of normal images that an earlier version has written their least map values, NaN.

    Example:
        >>> state = {"normal": torch.zeros(2, 5)}
        >>> with_least_values(state, "")
        >>> state["normal"].shape
        torch.Size([2, 6])
    """
    summary = state.get(f"{prefix}normal")
    if isinstance(summary, torch.Tensor) and summary.ndim == 2 and summary.shape[1] == 5:
        unknown = torch.full_like(summary[:, :1], torch.nan)
        state[f"{prefix}normal"] = torch.cat([summary[:, :4], unknown, summary[:, 4:]], dim=1)
