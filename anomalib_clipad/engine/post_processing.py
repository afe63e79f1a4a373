"""From scores to what a user sees: values in [0, 1], labels and masks."""

from types import SimpleNamespace
from typing import Any, cast

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torchmetrics.aggregation import CatMetric

from anomalib_clipad.components.float32 import Float32Buffers
from anomalib_clipad.components.scores import MapScale, Prediction, ScoreFusion
from anomalib_clipad.data.batch import ZeroShotBatch

STEP = 0.01  # as far below a score as its threshold may look for the next one


class ClipAdPostProcessor(Float32Buffers, PostProcessor):
    """anomalib's post-processor for a model whose image score is made of two.

    With labelled validation data the model's score fusion is fitted, and the thresholds of labels and masks are those
    of the best F1. Without, an image is anomalous if its text score is above 0.5, a pixel if its map value is above the
    centre of the model's scale, and that scale brings the map into (0, 1).

    Args:
        map_scale: The model's, which brings its maps into (0, 1).
        enable_normalization: Bring scores and maps into [0, 1].
        enable_thresholding: Give labels and masks.
        image_sensitivity: Above 0.5 more images are called anomalous, below fewer.
        pixel_sensitivity: Likewise for pixels.

    Example:
        >>> raw = Prediction(torch.tensor([0.6]), torch.zeros(1, 4, 4), torch.tensor([0.7]), torch.tensor([0.0]))
        >>> processed = ClipAdPostProcessor(MapScale(centre=0.0, slope=50.0))(raw)
        >>> processed.anomaly_map.unique(), processed.pred_label
        (tensor([0.5000]), tensor([True]))
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

    def on_validation_batch_end(  # type: ignore[override]  # anomalib hands on batches, not what Lightning names
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: ZeroShotBatch,
        *args: Any,  # noqa: ANN401 - Lightning's
        **kwargs: Any,  # noqa: ANN401 - Lightning's
    ) -> None:
        """Collect the scores of a labelled batch; they can be normalised only when all are known."""
        del pl_module, args, kwargs
        if outputs.gt_label is None or trainer.state.fn == TrainerFn.FITTING:
            return  # nothing to learn a threshold from, or not the data that thresholds are for
        self._text_scores.update(cast("torch.Tensor", outputs.text_score))
        self._map_scores.update(cast("torch.Tensor", outputs.map_score))
        self._labels.update(outputs.gt_label)
        self._pixel_threshold_metric.update(outputs)
        self._pixel_min_max_metric.update(outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the score ranges fitted, and set the thresholds."""
        if not self._labels.update_called:
            return
        text, maps = self._text_scores.compute().reshape(-1), self._map_scores.compute().reshape(-1)
        scores = cast("ScoreFusion", cast("Any", pl_module).model.fusion).fit(text, maps)
        labels = self._labels.compute().reshape(-1).int()
        epoch = cast("Batch", SimpleNamespace(pred_score=scores, gt_label=labels))
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

    def post_process_batch(self, batch: Batch) -> None:
        """Normalise and threshold a batch in place."""
        ours = cast("ZeroShotBatch", batch)
        prediction = Prediction(*(getattr(ours, name) for name in Prediction._fields))
        batch.update(**self(prediction)._asdict())

    def forward(self, predictions: Prediction) -> InferenceBatch:  # type: ignore[override]  # it needs both scores
        """Normalise and threshold what the network returned.

        Args:
            predictions: The network's output.

        Returns:
            Scores and maps in [0, 1]; labels and masks by threshold where one is known, else by rule.
        """
        score, anomaly_map, text_score, _ = predictions
        label = mask = None
        if self.enable_thresholding:
            # What is not a number is anomalous.
            label = self._threshold(score, ~(text_score <= 0.5), "image", self.image_sensitivity)
            mask = self._threshold(
                anomaly_map, ~(anomaly_map <= self.map_scale.centre), "pixel", self.pixel_sensitivity
            )
        if self.enable_normalization:
            score = score.clamp(0, 1)
            anomaly_map = torch.where(
                self.pixel_threshold.isnan(),
                self.map_scale.squash(anomaly_map),
                cast("torch.Tensor", self._normalize(anomaly_map, *self._range("pixel"))),
            )
        return InferenceBatch(score, label, anomaly_map, mask)

    def _threshold(self, scores: torch.Tensor, by_rule: torch.Tensor, level: str, sensitivity: float) -> torch.Tensor:
        threshold = getattr(self, f"{level}_threshold")
        above = cast("torch.Tensor", self._normalize(scores, *self._range(level))) > 1 - sensitivity
        # Not torch.where, which ONNX Runtime has no implementation of for truth values.
        return (by_rule & threshold.isnan()) | (above & ~threshold.isnan())

    def _range(self, level: str) -> tuple[torch.Tensor, ...]:
        """Minimum, maximum and threshold; finite where unknown, since quantisers stumble over branches not taken."""
        unknown = {"min": 0.0, "max": 1.0, "threshold": 0.5}
        return tuple(getattr(self, f"{level}_{key}").nan_to_num(value) for key, value in unknown.items())
