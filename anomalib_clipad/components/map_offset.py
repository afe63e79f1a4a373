"""How far the class token raises a whole map above those of normal images. Ours, not the paper's."""

from collections.abc import MutableMapping
from typing import Any

import torch

from anomalib_clipad.components.class_choice import rows_of
from anomalib_clipad.components.float32 import Float32Buffers


class MapOffset(Float32Buffers):
    r"""Takes away what the class token adds to a map, as far as it adds more than to any normal image's.

    The class token weighs the two text vectors for all patches of an image alike (section 3.3 of the paper). So a small
    defect raises the whole map, of which a threshold from normal images then marks most. With o the map's offset, see
    :func:`anomalib_clipad.components.surgery.surgery_scores`, and :math:`o_0` the largest one of normal images,
    :math:`\max(0, o - o_0)` is taken away. No map rises, so no more normal images show a marked pixel than without.

    Example:
        >>> offset, maps = MapOffset(), torch.tensor([[[3.0, 4.0]], [[3.0, 4.0]]])
        >>> torch.equal(offset(maps, torch.tensor([0.5, 2.0])), maps)
        True
        >>> offset.take(1.0)
        >>> offset(maps, torch.tensor([0.5, 2.0])).tolist()
        [[[3.0, 4.0]], [[2.0, 3.0]]]
    """

    growing = ("largest",)
    added = True

    largest: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        # (classes,) o_0 of each, NaN where unknown; empty where no class has one.
        self.register_buffer("largest", torch.empty(0))

    def take(self, value: float, classes: int = 1, number: int | None = None) -> None:
        """Take over the largest offset of normal images.

        Args:
            value: The offset; NaN for maps that are to stay as they are.
            classes: How many classes there are.
            number: Index of the class that it belongs to; all by default.
        """
        before = self.largest
        values = before.clone() if len(before) == classes else before.new_full((classes,), torch.nan)
        values[slice(None) if number is None else number] = value
        self.largest = values[:0] if values.isnan().all() else values

    def forward(
        self, maps: torch.Tensor, offsets: torch.Tensor | None, class_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Maps without what is taken away.

        Args:
            maps: (B, H, W).
            offsets: (B,) in the maps' units; maps stay as they are without.
            class_index: (B,) index of the images' classes; the first one for all by default.
        """
        if offsets is None or not len(self.largest):
            return maps
        largest = rows_of(self.largest, class_index)
        above = (offsets - largest.nan_to_num()).clamp(min=0)
        return maps - torch.where(largest.isnan(), 0.0, above)[:, None, None]


def with_offsets(state: MutableMapping[str, Any], prefix: str) -> None:
    """Give the summaries of normal images that an earlier version has written their map offsets, NaN.

    Example:
        >>> state = {"normal": torch.zeros(2, 5)}
        >>> with_offsets(state, "")
        >>> state["normal"].shape
        torch.Size([2, 6])
    """
    summary = state.get(f"{prefix}normal")
    if isinstance(summary, torch.Tensor) and summary.ndim == 2 and summary.shape[1] == 5:
        unknown = torch.full_like(summary[:, :1], torch.nan)
        state[f"{prefix}normal"] = torch.cat([summary[:, :4], unknown, summary[:, 4:]], dim=1)
