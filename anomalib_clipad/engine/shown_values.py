"""Scores and maps in [0, 1], the threshold at 0.5: what users see of them."""

from typing import cast

import torch

from anomalib_clipad.components.map_offset import MapOffset
from anomalib_clipad.components.scores import MapScale
from anomalib_clipad.engine.class_pools import ClassPoolsMixin


class ShownValuesMixin(ClassPoolsMixin):
    """Brings scores and maps to [0, 1], by the thresholds of their classes or, where none is known, by a rule."""

    map_scale: MapScale | None
    map_offset: MapOffset

    def pixel_mask(
        self, anomaly_map: torch.Tensor, offsets: torch.Tensor | None = None, class_index: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """The mask of a map that :meth:`forward` gave, enlarged; ``None`` where there are to be none."""
        if not self.enable_thresholding:
            return None
        shown = anomaly_map if self.enable_normalization else self._shown_map(anomaly_map, offsets, class_index)
        return ~(shown <= 1 - self.pixel_sensitivity)

    def _shown_map(
        self, maps: torch.Tensor, offsets: torch.Tensor | None, class_index: torch.Tensor | None
    ) -> torch.Tensor:
        by_rule = maps if self.map_scale is None else self.map_scale.squash(maps)
        return self._shown("pixel", self.map_offset(maps, offsets, class_index), by_rule, class_index)

    def _shown(
        self, level: str, values: torch.Tensor, by_rule: torch.Tensor, class_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Values in [0, 1], the threshold at 0.5."""
        # Finite where unknown, since quantisers stumble over branches not taken.
        limits = self.limits(level, class_index, dims=values.ndim - 1)
        known = (limit.nan_to_num(value) for limit, value in zip(limits, (0.0, 1.0, 0.5), strict=True))
        normalised = cast("torch.Tensor", self._normalize(values, *known))
        return torch.where(limits[-1].isnan(), by_rule, normalised)
