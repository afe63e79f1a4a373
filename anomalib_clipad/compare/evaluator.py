"""How every model of the comparison is measured."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.data.utils import read_mask
from anomalib.metrics import Evaluator
from lightning.pytorch import LightningModule, Trainer
from torch.nn import functional as F

from anomalib_clipad.engine.metrics import AP, AUPRO, AUROC, IMAGE_FIELDS, PIXEL_FIELDS, F1Max
from anomalib_clipad.errors import InputError

# The paper's seven, and how they are called in tables and pictures.
METRICS = {
    "image_AUROC": "image AUROC",
    "image_F1Max": "image F1-max",
    "image_AP": "image AP",
    "pixel_AUROC": "pixel AUROC",
    "pixel_F1Max": "pixel F1-max",
    "pixel_AP": "pixel AP",
    "pixel_AUPRO": "pixel AUPRO",
}


class CompareEvaluator(Evaluator):
    """The seven metrics on a model's own scores and on maps of one size, whatever the model's input size is.

    Goes to the trainer as a callback, before the model's own: so it sees scores that no post-processor has touched.
    Masks are read from their files, not from what the model's transform made of them.

    Args:
        map_size: Side of the maps and masks that are measured.
        metrics: Names of those to measure, all seven by default.

    Raises:
        InputError: If there is no metric of a name.

    Example:
        >>> [metric.name for metric in CompareEvaluator(map_size=256).test_metrics][:3]
        ['image_AUROC', 'image_F1Max', 'image_AP']
    """

    def __init__(self, map_size: int, metrics: Sequence[str] = tuple(METRICS)) -> None:
        if unknown := [name for name in metrics if name not in METRICS]:
            msg = f"metrics takes any of {', '.join(METRICS)}, got {', '.join(map(str, unknown))}."
            raise InputError(msg)
        image = [kind(fields=IMAGE_FIELDS, prefix="image_", strict=False) for kind in (AUROC, F1Max, AP)]
        pixel = [kind(fields=PIXEL_FIELDS, prefix="pixel_", strict=False) for kind in (AUROC, F1Max, AP)]
        aupro = AUPRO(fields=PIXEL_FIELDS, prefix="pixel_", strict=False, fpr_limit=0.3)
        super().__init__(test_metrics=[metric for metric in (*image, *pixel, aupro) if metric.name in metrics])
        self.map_size = (map_size, map_size)
        self.mask_paths: dict[str, str] = {}
        self.paths: list[str] = []
        self.labels: list[int | None] = []
        self.scores: list[float] = []
        self.maps: list[np.ndarray] = []
        self.figures: dict[str, float] = {}
        self.seconds = 0.0

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the masks' files up; a batch loses them when it begins with a normal image."""
        del pl_module
        samples = trainer.datamodule.test_data.samples
        if "mask_path" in samples:
            paths = zip(samples.image_path, samples.mask_path, strict=True)
            self.mask_paths = {str(image): str(mask) for image, mask in paths}

    def on_test_batch_start(self, trainer: Trainer, *args: object, **kwargs: object) -> None:
        """Start the clock."""
        del trainer, args, kwargs
        self._start = now()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop the clock, bring the maps to one size, and measure."""
        self.seconds += now() - self._start
        maps = batch.anomaly_map.detach().float().cpu()
        maps = maps.reshape(len(maps), 1, *maps.shape[-2:])
        batch.raw_map = F.interpolate(maps, self.map_size, mode="bilinear", align_corners=False)[:, 0]
        scores = batch.pred_score if batch.pred_score is not None else maps.amax(dim=(-3, -2, -1))
        batch.raw_score = scores.detach().float().cpu().reshape(-1)
        own_masks, batch.gt_mask = batch.gt_mask, self._masks(batch)
        own_labels = batch.gt_label
        if own_labels is not None:
            batch.gt_label = own_labels.cpu()
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        batch.gt_mask, batch.gt_label = own_masks, own_labels
        self.paths += [str(path) for path in batch.image_path]
        self.labels += [None] * len(maps) if own_labels is None else own_labels.int().tolist()
        self.scores += batch.raw_score.tolist()
        self.maps += list(batch.raw_map.half().numpy())

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the figures; the trainer could not log them, since they are no part of the model."""
        del trainer, pl_module
        measured = [metric for metric in self.test_metrics if metric.update_called]
        self.figures = {metric.name: float(metric.compute()) for metric in measured}

    on_predict_batch_start = on_test_batch_start

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - those of on_test_batch_end
        """As in testing; without labels there is nothing to measure but time."""
        self.on_test_batch_end(*args, **kwargs)

    def _masks(self, batch: ImageBatch) -> torch.Tensor | None:
        if batch.gt_mask is None:
            return None
        masks = []
        for image_path, mask in zip(batch.image_path, batch.gt_mask, strict=True):
            path = self.mask_paths.get(str(image_path), "")
            # Normal images have no file, which anomalib writes in more than one way.
            whole = read_mask(path, as_tensor=True) if path and Path(path).is_file() else mask.cpu()
            masks.append(F.interpolate(whole[None, None].float(), self.map_size, mode="nearest")[0, 0])
        return torch.stack(masks).bool()


def now() -> float:
    """Seconds on the clock, once the GPU has done what it was asked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
