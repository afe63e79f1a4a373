"""What of a batch is inside its region."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch

from anomalib_clipad.data.batch import ZeroShotBatch


def cut_ground_truth(batch: ZeroShotBatch) -> None:
    """Leave in a batch's ground truth what is inside its region.

    An image is normal there if its mask says so. Where there is no mask, its label stays.

    Example:
        >>> halves = torch.tensor([[[True, False]], [[True, False]]])
        >>> truth = {"gt_mask": ~halves, "gt_label": torch.tensor([True, True])}
        >>> batch = ZeroShotBatch(image=torch.zeros(2, 3, 1, 2), **truth, region=halves)
        >>> cut_ground_truth(batch)
        >>> batch.gt_label.tolist(), int(batch.gt_mask.sum())
        ([False, False], 0)
    """
    if batch.region is None or batch.gt_mask is None:
        return
    region = batch.region.reshape(batch.gt_mask.shape)
    inside = batch.gt_mask.bool() & region
    if batch.gt_label is not None:
        marked, left = (mask.flatten(1).any(dim=1) for mask in (batch.gt_mask, inside))
        batch.gt_label = batch.gt_label.bool() & (left | ~marked)
    batch.gt_mask = inside


def inside_only(batch: Any, fields: Iterable[str]) -> Any:  # noqa: ANN401 - a batch, or what has the fields of one
    """A batch with those pixels of maps and masks that are inside its region; the batch itself where there is none.

    Args:
        batch: With a field ``region``, or without.
        fields: Names of its maps and masks, (B, H, W) each.

    Returns:
        What has these fields, as (n,) each.

    Example:
        >>> batch = SimpleNamespace(raw_map=torch.tensor([[[1.0, 2.0]]]), region=torch.tensor([[[False, True]]]))
        >>> inside_only(batch, ["raw_map"]).raw_map
        tensor([2.])
    """
    region: torch.Tensor | None = getattr(batch, "region", None)
    if region is None:
        return batch
    values = {name: getattr(batch, name, None) for name in fields}
    return SimpleNamespace(
        **{name: None if one is None else one[region.reshape(one.shape)] for name, one in values.items()}
    )


def chosen_rows(batch: ZeroShotBatch, chosen: torch.Tensor) -> Any:  # noqa: ANN401 - what has the fields of a batch
    """Some images of a batch, with what thresholds are made from.

    Args:
        batch: Of B images.
        chosen: (B,) bool.

    Example:
        >>> batch = ZeroShotBatch(image=torch.zeros(2, 3, 1, 1), gt_label=torch.tensor([True, False]))
        >>> chosen_rows(batch, torch.tensor([False, True])).gt_label
        tensor([False])
    """
    names = ("gt_label", "gt_mask", "region", "anomaly_map", "class_index", "text_score")
    values = {name: getattr(batch, name, None) for name in names}
    return SimpleNamespace(**{name: None if one is None else one[chosen] for name, one in values.items()})
