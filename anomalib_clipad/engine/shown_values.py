"""Scores and maps in [0, 1], the threshold at 0.5: what users see of them."""

from typing import cast

import torch
from anomalib.data import InferenceBatch

from anomalib_clipad.components.map_offset import MapOffset
from anomalib_clipad.components.region import RegionOfPictures
from anomalib_clipad.components.scores import MapScale, Prediction
from anomalib_clipad.engine.class_pools import ClassPoolsMixin


class ShownValuesMixin(ClassPoolsMixin):
    """Brings scores and maps to [0, 1], by the thresholds of their classes or, where none is known, by a rule."""

    map_scale: MapScale | None
    map_offset: MapOffset
    region: RegionOfPictures | None

    def forward(self, predictions: Prediction) -> InferenceBatch:  # type: ignore[override]  # it needs our fields
        """Normalise and threshold what the network returned.

        Args:
            predictions: The network's output.

        Returns:
            Scores and maps in [0, 1]; labels and masks by threshold where one is known, else by rule. What is not a
            number is anomalous. Outside of a region the map is 0, and nothing is marked.
        """
        score, anomaly_map, class_index = predictions.pred_score, predictions.anomaly_map, predictions.class_index
        region = None if self.region is None else self.region.inside
        shown_score = self._shown("image", score, score.clamp(0, 1), class_index)
        shown_map = self._shown_map(anomaly_map, predictions.map_offset, class_index)
        if region is not None:
            shown_map = torch.where(region, shown_map, 0.0)
        label = mask = None
        if self.enable_thresholding:
            label = ~(shown_score <= 1 - self.image_sensitivity)
            mask = ~(shown_map <= 1 - self.pixel_sensitivity)
            mask = mask if region is None else mask & region
        if self.enable_normalization:
            score, anomaly_map = shown_score, shown_map
        return InferenceBatch(score, label, anomaly_map, mask)

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
        # anomalib gives 0.5 for NaN where the range is nothing.
        return torch.where(limits[-1].isnan(), by_rule, torch.where(values.isnan(), values, normalised))
