"""What thresholds are made from: a few numbers an image."""

from typing import cast

import torch

from anomalib_clipad.components.region import RegionOfPictures
from anomalib_clipad.components.scores import Scores
from anomalib_clipad.data.batch import ZeroShotBatch


def summary_of(scores: Scores | ZeroShotBatch, region: RegionOfPictures | None) -> torch.Tensor:
    """(B, 5) of a batch: text score, map score, largest and mean map value inside a region, and the map's offset.

    Example:
        >>> scores = Scores(torch.tensor([[[0.25, 0.75]]]), torch.tensor([0.5]), torch.tensor([0.75]))
        >>> summary_of(scores, None)
        tensor([[0.5000, 0.7500, 0.7500, 0.5000,    nan]])
    """
    maps = cast("torch.Tensor", scores.anomaly_map)
    if region is not None and region.inside is not None:
        maps = region.values(maps)[:, None]
    largest, mean = maps.amax(dim=(-2, -1)), maps.mean(dim=(-2, -1))
    text, whole = cast("torch.Tensor", scores.text_score), cast("torch.Tensor", scores.map_score)
    offset = torch.full_like(text, torch.nan) if scores.map_offset is None else scores.map_offset
    return torch.stack([text, whole, largest, mean, offset], dim=1).float()


def are_numbers(summary: torch.Tensor) -> torch.Tensor:
    """(B,) whether the scores of a summary (B, 5) are finite; an offset may be unknown.

    Example:
        >>> are_numbers(torch.tensor([[0.5, 0.1, 0.1, 0.0, torch.nan], [torch.nan, 0.1, 0.1, 0.0, 0.0]]))
        tensor([ True, False])
    """
    return summary[:, :4].isfinite().all(dim=1)


def classes_of(scores: Scores | ZeroShotBatch) -> torch.Tensor:
    """(B,) classes of a batch, the first one where it does not say.

    Example:
        >>> classes_of(Scores(torch.zeros(2, 1, 1), torch.zeros(2), torch.zeros(2)))
        tensor([0, 0])
    """
    if scores.class_index is not None:
        return scores.class_index
    return torch.zeros_like(cast("torch.Tensor", scores.text_score), dtype=torch.long)
