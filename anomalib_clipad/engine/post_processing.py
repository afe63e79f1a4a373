"""From scores to what a user sees: values in [0, 1], labels and masks."""

import logging
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import torch
from anomalib.data import Batch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn import functional as F
from torchmetrics.aggregation import CatMetric

from anomalib_clipad.components.conformal import conformal_threshold
from anomalib_clipad.components.float32 import Float32Buffers
from anomalib_clipad.components.map_offset import MapOffset
from anomalib_clipad.components.region import RegionOfPictures
from anomalib_clipad.components.scores import MapScale, Prediction, Scores
from anomalib_clipad.data.batch import ZeroShotBatch
from anomalib_clipad.data.inside import chosen_rows, inside_only
from anomalib_clipad.engine.class_pools import Pool, may_use_validation
from anomalib_clipad.engine.network import ZeroShotNetwork
from anomalib_clipad.engine.shown_values import ShownValuesMixin
from anomalib_clipad.engine.summaries import are_numbers, classes_of, summary_of
from anomalib_clipad.engine.threshold_messages import (
    announce,
    warn_of_degenerate,
    warn_of_no_numbers,
    warn_of_one_label,
)
from anomalib_clipad.errors import InputError

logger = logging.getLogger(__name__)

# anomalib's, of which thresholds and ranges are made.
METRICS = tuple(f"_{level}_{kind}_metric" for level in ("image", "pixel") for kind in ("threshold", "min_max"))
STEP = 0.01  # as far below a score as its threshold may look for the next one; the least range of scores, too
LEAST_SPREAD = 1e-6  # of maps of one value, which is not to be lost beside it
# Of the range of scores. In float32 a normal image differs by less in another batch, which is not to change its label.
ROUNDING = 5e-6


class ClipAdPostProcessor(ShownValuesMixin, Float32Buffers, PostProcessor):
    """anomalib's post-processor, with thresholds from labelled images, from normal ones alone, or from neither.

    - Labelled validation images: the thresholds of the best F1.
    - Normal images alone, references among them: what they score at most, or less for a higher false-alarm rate, see
      :func:`anomalib_clipad.components.conformal_threshold`. A mask's threshold is made likewise from the largest map
      value of each image, so that as many normal images show any marked pixel.
    - Neither: an image is anomalous if its score is above 0.5, a pixel if its value is above the centre of the model's
      scale, which brings the map into (0, 1).

    A score or a pixel at its threshold becomes 0.5, so labels and masks follow what is shown.

    Args:
        map_scale: Brings maps into (0, 1) where no threshold is known; by default that of the model it is given to.
        enable_normalization: Bring scores and maps into [0, 1].
        enable_thresholding: Give labels and masks.
        image_sensitivity: Above 0.5 more images are called anomalous, below fewer.
        pixel_sensitivity: Likewise for pixels.
        false_alarm_rate: Share of normal images that may be called anomalous. The thresholds are then set from normal
            images alone, also where there are labelled ones.

    Example:
        >>> raw = Prediction(torch.tensor([0.6]), torch.zeros(1, 4, 4), torch.tensor([0.7]), torch.tensor([0.0]))
        >>> processed = ClipAdPostProcessor(MapScale(centre=0.0, slope=50.0))(raw)
        >>> processed.anomaly_map.unique(), processed.pred_label
        (tensor([0.5000]), tensor([True]))
    """

    growing = ("good_scores", "normal", "normal_class")
    added = True

    good_scores: torch.Tensor
    normal: torch.Tensor
    normal_class: torch.Tensor

    def __init__(
        self,
        map_scale: MapScale | None = None,
        enable_normalization: bool = True,
        enable_thresholding: bool = True,
        image_sensitivity: float = 0.5,
        pixel_sensitivity: float = 0.5,
        false_alarm_rate: float | None = None,
    ) -> None:
        super().__init__(
            enable_normalization=enable_normalization,
            enable_thresholding=enable_thresholding,
            enable_threshold_matching=False,  # image and map scores have different ranges
            image_sensitivity=image_sensitivity,
            pixel_sensitivity=pixel_sensitivity,
        )
        self.map_scale = map_scale
        self.region: RegionOfPictures | None = None  # that of the model it is given to
        self.false_alarm_rate = false_alarm_rate
        self.register_buffer("good_scores", torch.empty(0))  # image scores of normal images, ascending
        # Normal images from outside of the validation data: their summary, and 1 for a reference. Buffers: they belong
        # to the classes at hand as the thresholds do.
        self.register_buffer("normal", torch.empty(0, 6))
        self.register_buffer("normal_class", torch.empty(0))  # (n,) their classes, where there are several
        self.map_offset = MapOffset()
        self._validated, self._labels = CatMetric(), CatMetric()
        self._given: list[torch.Tensor] = []  # labels of this run
        self._left_out = False  # whether images of this validation score no number
        self._unsaid = False  # whether thresholds of normal images wait for validation images

    def set_from_normal(
        self, network: ZeroShotNetwork, scored: Iterable[Scores], references: int, more_follow: bool = False
    ) -> None:
        """Set the thresholds from normal images.

        Args:
            network: What scored them.
            scored: Their scores; those of references come first, each compared with the others. That takes for granted
                that one reference fewer changes little; it rather raises the threshold.
            references: How many of them are references.
            more_follow: Whether validation images follow.
        """
        found = [(summary_of(scores, network.region), classes_of(scores)) for scores in scored]
        if not found:
            return
        summary, classes = (torch.cat(values) for values in zip(*found, strict=True))
        is_reference = torch.arange(len(summary), device=summary.device) < references
        known = are_numbers(summary)
        summary, classes, is_reference = summary[known], classes[known], is_reference[known]
        self.normal = torch.cat([summary, is_reference[:, None]], dim=1).to(self.normal)
        self.normal_class = classes.to(self.normal) if len(network.class_names) > 1 else self.normal_class[:0]
        self._unsaid = more_follow
        self._set_from_normal(network, more_follow)

    def _set_from_normal(self, network: ZeroShotNetwork, more_follow: bool = False) -> None:
        none = self.normal[:0, :5]
        pool = Pool(none, none[:, 0].int(), self.normal, self.normal_class.long())
        self.set_pools(network, pool, None, more_follow)

    def on_validation_batch_end(  # type: ignore[override]  # anomalib hands on batches, not what Lightning names
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: ZeroShotBatch,
        *args: Any,  # noqa: ANN401 - Lightning's
        **kwargs: Any,  # noqa: ANN401 - Lightning's
    ) -> None:
        """Collect the scores of a labelled batch; they can be normalised only when all are known."""
        del args, kwargs
        if outputs.gt_label is None or trainer.state.fn == TrainerFn.FITTING:
            return  # nothing to learn a threshold from, or not the data that thresholds are for
        summary = summary_of(outputs, self.region)
        known = are_numbers(summary)
        if not known.all():
            warn_of_no_numbers(outputs.image_path, known)
            outputs, summary = chosen_rows(outputs, known), summary[known]
            self._left_out = True
            if not len(summary):
                return
        self._validated.update(summary)
        self._labels.update(cast("torch.Tensor", outputs.gt_label))
        inside = inside_only(outputs, self._pixel_threshold_metric.fields)
        if len(cast("ZeroShotNetwork", pl_module.model).class_names) > 1:
            self.collect_classes(outputs)
        self._pixel_threshold_metric.update(inside)
        self._pixel_min_max_metric.update(outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the score ranges fitted, and set the thresholds."""
        unsaid, self._unsaid = self._unsaid, False
        if not self._labels.update_called:
            if self._left_out and trainer.world_size > 1:  # the others would wait for this one for ever
                msg = (
                    "No validation image of one process has a score that is a number; replace them, or use one process."
                )
                raise InputError(msg)
            if unsaid:  # nothing has followed
                self._set_from_normal(cast("ZeroShotNetwork", pl_module.model))
            return
        network = cast("ZeroShotNetwork", pl_module.model)
        summary = self._validated.compute().reshape(-1, 5)
        labels = self._labels.compute().reshape(-1).int()
        classes = self.normal_class.to(summary).long()
        if self._classes.update_called:
            classes = torch.cat([classes, self._classes.compute().reshape(-1).long()])
        self.set_pools(network, Pool(summary, labels, self.normal.to(summary), classes), trainer)
        self.forget_images()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the images of a run that failed."""
        del trainer, pl_module
        self.forget_images()

    def forget_images(self) -> None:
        """Have seen no validation image."""
        self._left_out = False
        for name in ("_validated", "_labels", "_classes", "_pixel_classes", *METRICS):
            getattr(self, name).reset()

    def set_from(
        self,
        network: ZeroShotNetwork,
        pool: Pool,
        trainer: Trainer | None,
        number: int | None = None,
        of: str | None = "",
    ) -> None:
        """See :meth:`ClassPoolsMixin.set_from`."""
        summary, labels, normal, _ = pool
        given, validated = pool.of_normal, pool.of_validated
        has_masks = self._pixel_threshold_metric.update_called
        self._take_offset(network, torch.nan, number)
        if labels.any():
            network.fit_fusion(summary[:, 0], summary[:, 1], number)
            scores = network.fuse(summary[:, 0], summary[:, 1], validated)
            epoch = cast("Batch", SimpleNamespace(pred_score=scores, gt_label=labels))
            self._image_threshold_metric.update(epoch)
            self._image_min_max_metric.update(epoch)
            super().on_validation_epoch_end(cast("Trainer", trainer), cast("LightningModule", None))
            self._between_scores(scores, labels)
            if of is not None:
                warn_of_degenerate(scores, labels, float(self._image_threshold), of)
        if self.false_alarm_rate is not None or not labels.any():
            if may_use_validation(trainer, normal):
                normal = torch.cat([normal, F.pad(summary[labels == 0], (0, 1))])
                if given is not None and validated is not None:
                    given = torch.cat([given, validated[labels == 0]])
            self._set_conformal(network, normal, given, number, of)
        elif len(normal):
            self.good_scores = (network.fuse(normal[:, 0], normal[:, 1], given) + ROUNDING).sort().values
            if not has_masks:
                self._set_pixels(network, normal, number)

    def _between_scores(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        if self.enable_thresholding and not labels.all():
            # The best threshold is an image's own score, which is to be above it, in every format and precision.
            threshold = self._image_threshold
            lower = torch.where(scores < threshold, scores, -torch.inf).max().clamp(min=threshold - STEP)
            threshold.copy_((threshold + lower) / 2)

    def _set_conformal(
        self,
        network: ZeroShotNetwork,
        normal: torch.Tensor,
        class_index: torch.Tensor | None,
        number: int | None,
        of: str | None,
    ) -> None:
        if not len(normal):
            logger.warning(
                "There is no normal image to keep false_alarm_rate %s with, so the labels follow the best F1; give "
                "normal images.",
                self.false_alarm_rate,
            )
            return
        scores = network.fuse(normal[:, 0], normal[:, 1], class_index) + ROUNDING
        image = conformal_threshold(scores, self.false_alarm_rate)
        self.good_scores = scores.sort().values.to(self.good_scores.device)
        low, high = network.score_limits
        reach = max(min(image.value - low, high - image.value), STEP)
        self._set("image", image.value, reach)
        self._set_pixels(network, normal, number)
        if of is not None:
            announce(image, self.false_alarm_rate, int(normal[:, 5].sum()), of)

    def _set_pixels(self, network: ZeroShotNetwork, normal: torch.Tensor, number: int | None) -> None:
        pixel = conformal_threshold(normal[:, 2], self.false_alarm_rate)
        # Most pixels of a normal image are shown as 0; those above the threshold have a part of the map raised.
        quiet = normal[normal[:, 2] <= pixel.value, 3]
        spread = max(pixel.value - float(quiet.mean()), LEAST_SPREAD * max(1.0, abs(pixel.value)))
        self._set("pixel", pixel.value + ROUNDING * spread, spread)
        self._take_offset(network, float(normal[:, 4].max()), number)

    def _take_offset(self, network: ZeroShotNetwork, largest: float, number: int | None) -> None:
        self.map_offset.take(largest, max(1, len(network.class_names)), number)

    def post_process_batch(self, batch: Batch) -> None:
        """Normalise and threshold a batch in place, and give p-values where scores of normal images are known."""
        ours = cast("ZeroShotBatch", batch)
        prediction = Prediction(*(getattr(ours, name) for name in Prediction._fields))
        ours.p_value = self.p_values(prediction.pred_score, prediction.class_index)
        processed = self(prediction)
        batch.update(**processed._asdict())
        if processed.pred_label is not None:
            self._given.append(processed.pred_label)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the labels of a run that failed."""
        del trainer, pl_module
        self._given = []

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See :func:`warn_of_one_label`."""
        del trainer, pl_module
        warn_of_one_label(self._given)

    on_predict_epoch_start, on_predict_epoch_end = on_test_epoch_start, on_test_epoch_end
