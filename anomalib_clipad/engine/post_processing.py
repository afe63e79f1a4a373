"""From scores to what a user sees: values in [0, 1], labels and masks."""

from types import SimpleNamespace

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torchmetrics.aggregation import CatMetric

from anomalib_clipad.components.float32 import Float32Buffers
from anomalib_clipad.components.scores import MapScale, Scores

STEP = 0.01  # as far below a score as its threshold may look for the next one


class ClipAdPostProcessor(Float32Buffers, PostProcessor):
    """anomalib's post-processor for a model whose image score is made of two.

    With labelled validation data: both scores are min-max normalised over it, added and halved (the paper's image
    score), and the thresholds of labels and masks are those of the best F1. Without: labels and masks follow the
    model's fixed rules, and the map is brought into (0, 1) by the model's scale.

    Args:
        map_scale: The model's, which brings its maps into (0, 1).
        enable_normalization: Bring scores and maps into [0, 1].
        enable_thresholding: Give labels and masks.
        image_sensitivity: Above 0.5 more images are called anomalous, below fewer.
        pixel_sensitivity: Likewise for pixels.

    Example:
        >>> raw = InferenceBatch(torch.tensor([0.6]), torch.tensor([True]), torch.zeros(1, 4, 4), None)
        >>> ClipAdPostProcessor(MapScale(centre=0.0, slope=50.0))(raw).anomaly_map.unique()
        tensor([0.5000])
    """

    def __init__(
        self,
        map_scale: MapScale,
        enable_normalization: bool = True,
        enable_thresholding: bool = True,
        image_sensitivity: float = 0.5,
        pixel_sensitivity: float = 0.5,
    ) -> None:
        super().__init__(
            enable_normalization=enable_normalization,
            enable_thresholding=enable_thresholding,
            enable_threshold_matching=False,  # image and map scores have different ranges
            image_sensitivity=image_sensitivity,
            pixel_sensitivity=pixel_sensitivity,
        )
        self.map_scale = map_scale
        self._text_scores, self._map_scores, self._labels = CatMetric(), CatMetric(), CatMetric()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Batch,
        *args: object,
        **kwargs: object,
    ) -> None:
        """Collect the scores of a labelled batch; they can be normalised only when all are known."""
        del pl_module, args, kwargs
        if outputs.gt_label is None or trainer.state.fn == TrainerFn.FITTING:
            return  # nothing to learn a threshold from, or not the data that thresholds are for
        self._text_scores.update(outputs.text_score)
        self._map_scores.update(outputs.map_score)
        self._labels.update(outputs.gt_label)
        self._pixel_threshold_metric.update(outputs)
        self._pixel_min_max_metric.update(outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the score ranges and the thresholds."""
        if not self._labels.update_called:
            return
        text, maps = self._text_scores.compute().reshape(-1), self._map_scores.compute().reshape(-1)
        both = torch.stack([text, maps], dim=-1)
        pl_module.model.set_score_range(both.amin(dim=0), both.amax(dim=0))
        scores = pl_module.model.image_score(Scores(torch.empty(0), text, maps))
        labels = self._labels.compute().reshape(-1).int()
        epoch = SimpleNamespace(pred_score=scores, gt_label=labels)
        self._image_threshold_metric.update(epoch)
        self._image_min_max_metric.update(epoch)
        for metric in (self._text_scores, self._map_scores, self._labels):
            metric.reset()
        super().on_validation_epoch_end(trainer, pl_module)
        if self.enable_thresholding and labels.any() and not labels.all():
            # The best threshold is an image's own score, which is to be above it, in every format and precision.
            threshold = self._image_threshold
            lower = torch.where(scores < threshold, scores, -torch.inf).max().clamp(min=threshold - STEP)
            threshold.copy_((threshold + lower) / 2)

    def forget(self) -> None:
        """Forget thresholds and ranges, which belong to other classes."""
        for buffer in self.buffers(recurse=False):
            buffer.fill_(float("nan"))

    def post_process_batch(self, batch: Batch) -> None:
        """Normalise and threshold a batch in place."""
        batch.update(
            **self(
                InferenceBatch(batch.pred_score, batch.pred_label, batch.anomaly_map, batch.pred_mask),
            )._asdict(),
        )

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Normalise and threshold what the model returned.

        Args:
            predictions: The model's output: image scores, labels by rule, raw maps, masks by rule.

        Returns:
            Scores and maps in [0, 1]; labels and masks by threshold where one is known, else as given.
        """
        score, label, anomaly_map, mask = predictions
        if self.enable_thresholding:
            label = self._threshold(score, label, "image", self.image_sensitivity)
            mask = self._threshold(anomaly_map, mask, "pixel", self.pixel_sensitivity)
        else:
            label = mask = None
        if self.enable_normalization:
            score = score.clamp(0, 1)
            anomaly_map = torch.where(
                self.pixel_threshold.isnan(),
                self.map_scale.squash(anomaly_map),
                self._normalize(anomaly_map, *self._range("pixel")),
            )
        return InferenceBatch(score, label, anomaly_map, mask)

    def _threshold(
        self,
        scores: torch.Tensor,
        by_rule: torch.Tensor | None,
        level: str,
        sensitivity: float,
    ) -> torch.Tensor:
        threshold = getattr(self, f"{level}_threshold")
        above = self._normalize(scores, *self._range(level)) > 1 - sensitivity
        # Not torch.where, which ONNX Runtime has no implementation of for truth values.
        return above if by_rule is None else (by_rule & threshold.isnan()) | (above & ~threshold.isnan())

    def _range(self, level: str) -> tuple[torch.Tensor, ...]:
        """Minimum, maximum and threshold; finite where unknown, since quantisers stumble over branches not taken."""
        unknown = {"min": 0.0, "max": 1.0, "threshold": 0.5}
        return tuple(getattr(self, f"{level}_{key}").nan_to_num(value) for key, value in unknown.items())
