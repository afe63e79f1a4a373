"""Maps as they are shown, with any post-processor or with none."""

from typing import cast

import torch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule

from anomalib_clipad.data.batch import ZeroShotBatch, ZeroShotItem
from anomalib_clipad.engine.post_processing import ClipAdPostProcessor


def map_on_the_scale(of: ZeroShotBatch | ZeroShotItem, model: LightningModule) -> torch.Tensor:
    """Maps in [0, 1], 0.5 at the threshold; by the model's own rule where no post-processor has brought them there.

    Args:
        of: A batch, or an item, at the end of a step.
        model: The one that has scored it.

    Returns:
        Its maps, 0 outside of a region.

    Example:
        >>> from anomalib_clipad import ClipAdSdp
        >>> model = ClipAdSdp("nut", small_clip, post_processor=False)
        >>> map_on_the_scale(ZeroShotItem(image=torch.zeros(3, 1, 2), anomaly_map=torch.zeros(1, 2)), model)
        tensor([[0.5000, 0.5000]])
    """
    post_processor = getattr(model, "post_processor", None)
    shown = isinstance(post_processor, PostProcessor) and post_processor.enable_normalization
    if shown and not isinstance(post_processor, ClipAdPostProcessor):
        shown = not cast("PostProcessor", post_processor).pixel_min.isnan()
    scale = getattr(model.model, "map_scale", None)
    anomaly_map = cast("torch.Tensor", of.anomaly_map)
    if not shown and scale is not None:
        anomaly_map = scale.squash(anomaly_map)
    return anomaly_map if of.region is None else torch.where(of.region.reshape(anomaly_map.shape), anomaly_map, 0.0)
