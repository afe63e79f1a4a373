"""The paper's seven metrics, on the model's own scores.

Two traps are kept out. anomalib's post-processor clamps scores before metrics see them, so these metrics read the
fields ``raw_score`` and ``raw_map`` that our models leave on a test batch. And torchmetrics' curve metrics apply a
sigmoid to those batches whose scores leave [0, 1], which would make a figure depend on the batch size; anomalib's
``BinaryPrecisionRecallCurve`` takes scores as they are.
"""

import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from anomalib import metrics as anomalib_metrics
from anomalib.metrics import AnomalibMetric, BinaryPrecisionRecallCurve, Evaluator
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn
from torchmetrics import Metric
from torchmetrics.aggregation import MaxMetric, MinMetric
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision

from anomalib_clipad.data.inside import inside_only
from anomalib_clipad.engine.naming_metrics import NamingAccuracy, NamingF1Score

logger = logging.getLogger(__name__)

IMAGE_FIELDS = ("raw_score", "gt_label")
PIXEL_FIELDS = ("raw_map", "gt_mask")
GROUND_TRUTH = ("gt_label", "gt_mask")


class InsideMixin:
    """A metric that, of pixels, measures those that are inside a batch's region."""

    fields: Sequence[str]

    def update(self, batch: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - anomalib's
        """Update with a batch."""
        seen = inside_only(batch, self.fields) if "gt_mask" in self.fields else batch
        super().update(seen, *args, **kwargs)  # type: ignore[misc]  # of the class that it is mixed into


class F1Max(InsideMixin, anomalib_metrics.F1Max):  # type: ignore[misc]  # anomalib's way of mixing
    """anomalib's, inside a batch's region.

    Example:
        >>> F1Max(fields=IMAGE_FIELDS).name
        'F1Max'
    """

    def reset(self) -> None:
        """Forget what was seen, also that anything was, which anomalib's goes on to say."""
        super().reset()
        Metric.reset(self)


class F1Score(InsideMixin, anomalib_metrics.F1Score):  # type: ignore[misc]  # as above
    """anomalib's, inside a batch's region.

    Example:
        >>> F1Score(fields=["pred_label", "gt_label"]).name
        'F1Score'
    """


class AUPRO(anomalib_metrics.AUPRO):
    """anomalib's, inside a batch's region: what is outside is neither a defect nor a false positive.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> left, maps = torch.tensor([[[True, True, False]]]), torch.tensor([[[0.9, 0.1, 0.5]]])
        >>> metric = AUPRO(fields=PIXEL_FIELDS, fpr_limit=1.0)
        >>> metric.update(SimpleNamespace(raw_map=maps, gt_mask=maps > 0.8, region=left))
        >>> metric.compute()
        tensor(1.)
    """

    def update(self, batch: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]  # noqa: ANN401 - anomalib's
        """Update with a batch; regions of defects need whole masks, so what is outside is marked in the map."""
        region = getattr(batch, "region", None)
        if region is not None:
            scores, masks = (getattr(batch, name, None) for name in self.fields)
            if scores is not None and masks is not None:
                region = region.reshape(scores.shape)
                values = (torch.where(region, scores, -torch.inf), masks.bool() & region)
                batch = SimpleNamespace(**dict(zip(self.fields, values, strict=True)))
        super().update(batch, *args, **kwargs)

    def compute_pro(self, cca: torch.Tensor, preds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`anomalib.metrics.AUPRO.compute_pro`."""
        inside = preds != -torch.inf
        return super().compute_pro(cca.reshape(preds.shape)[inside], preds[inside])


class AUROC(InsideMixin, AnomalibMetric, BinaryPrecisionRecallCurve, BinaryAUROC):  # type: ignore[misc]  # as above
    """Area under the ROC curve of scores of any range.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> metric = AUROC(fields=["raw_score", "gt_label"])
        >>> for scores, labels in (([0.2, 0.4], [0, 1]), ([-3.0, 0.3], [0, 0])):
        ...     metric.update(SimpleNamespace(raw_score=torch.tensor(scores), gt_label=torch.tensor(labels)))
        >>> metric.compute()
        tensor(1.)
    """


class AP(InsideMixin, AnomalibMetric, BinaryPrecisionRecallCurve, BinaryAveragePrecision):  # type: ignore[misc]  # as above
    """Average precision (step-wise area under the precision-recall curve) of scores of any range.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> metric = AP(fields=["raw_score", "gt_label"])
        >>> metric.update(SimpleNamespace(raw_score=torch.tensor([-1.0, 2.0]), gt_label=torch.tensor([1, 0])))
        >>> metric.compute()
        tensor(0.5000)
    """


class GroundTruthKinds(nn.Module):
    """Which ground truth was seen, over all processes: normal, anomalous, or both.

    Example:
        >>> kinds = GroundTruthKinds()
        >>> kinds.update(SimpleNamespace(gt_label=torch.tensor([False]), gt_mask=torch.tensor([[True, False]])))
        >>> kinds.of_one_kind()
        {'gt_label'}
    """

    def __init__(self) -> None:
        super().__init__()
        # Least and largest ground truth.
        self.extremes = nn.ModuleDict({key: nn.ModuleList([MinMetric(), MaxMetric()]) for key in GROUND_TRUTH})

    def update(self, batch: Any) -> None:  # noqa: ANN401 - anomalib's
        """See a batch, its masks inside its region."""
        for key, extremes in self.extremes.items():
            truth = getattr(inside_only(batch, [key]) if key == "gt_mask" else batch, key)
            for extreme in cast("list[Any]", extremes) if truth is not None else ():
                extreme.update(truth.float())

    def of_one_kind(self) -> set[str]:
        """The fields that were seen, and of only one kind: there is nothing to tell apart."""
        return {key for key, extremes in self.extremes.items() if _all_alike(cast("list[Metric]", extremes))}

    def reset(self) -> None:
        """Forget what was seen."""
        for extremes in self.extremes.values():
            for extreme in cast("list[Metric]", extremes):
                extreme.reset()


class PaperEvaluator(Evaluator):
    """anomalib's evaluator, silent about metrics that the data do not define.

    Without labels or masks there is nothing to measure; with normal images only, or anomalous ones only, nothing to
    tell apart.

    Example:
        >>> PaperEvaluator(test_metrics=[AP(fields=IMAGE_FIELDS)]).test_metrics[0].name
        'AP'
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - anomalib's
        super().__init__(*args, **kwargs)
        self._kinds = GroundTruthKinds()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the images of a run that failed."""
        del trainer, pl_module
        for metric in cast("list[Metric]", self.val_metrics):
            metric.reset()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was measured; without masks nothing was."""
        if all(metric.update_called for metric in cast("list[Metric]", self.val_metrics)):
            super().on_validation_epoch_end(trainer, pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the images of a run that failed."""
        del trainer, pl_module
        self._kinds.reset()
        for metric in cast("list[Metric]", self.test_metrics):
            metric.reset()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT | None,
        batch: Any,  # noqa: ANN401 - anomalib's
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the metrics, and what is known of the ground truth."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        self._kinds.update(batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was measured; torchmetrics would warn of the rest, or give 0."""
        del pl_module
        one_kind = self._kinds.of_one_kind()
        if "gt_label" in one_kind:
            logger.warning("The test images are all normal or all anomalous, so AUROC, AP and F1 are not defined.")
        for metric in cast("list[Any]", self.test_metrics):  # each an anomalib and a torchmetrics metric
            if not metric.update_called:
                continue
            if metric.fields[1] in one_kind or not getattr(metric, "defined", True):
                metric.reset()
                continue
            cast("Any", self).log(metric.name, metric)
            if trainer.barebones:  # where nothing is logged, as anomalib has it
                trainer.callback_metrics[metric.name] = trainer.logged_metrics[metric.name] = metric.compute()


def _all_alike(extremes: list[Metric]) -> bool:
    values = [float(extreme.compute()) for extreme in extremes if extreme.update_called]
    return len(values) == 2 and values[0] == values[1]


def paper_metrics() -> list[AnomalibMetric]:
    """The paper's seven; those without labels or masks to compare with stay silent.

    Example:
        >>> [metric.name for metric in paper_metrics()][-2:]
        ['pixel_AP', 'pixel_AUPRO']
    """
    return [
        *(kind(fields=IMAGE_FIELDS, prefix="image_", strict=False) for kind in (AUROC, F1Max, AP)),
        *(kind(fields=PIXEL_FIELDS, prefix="pixel_", strict=False) for kind in (AUROC, F1Max, AP)),
        AUPRO(fields=PIXEL_FIELDS, prefix="pixel_", strict=False, fpr_limit=0.3),
    ]


def paper_evaluator(validate: bool = False) -> Evaluator:
    """Evaluator with the paper's metrics and anomalib's F1 of the thresholded prediction.

    Image level: AUROC, F1Max, AP. Pixel level, where there are masks: AUROC, F1Max, AP, AUPRO up to 30 % false
    positives. Where a model has words for defects and folders tell the truth, how often the words are right.

    Args:
        validate: Whether to measure AUROC and AP of pixels on validation data too, to choose a checkpoint by.

    Example:
        >>> [metric.name for metric in paper_evaluator().test_metrics][:4]
        ['image_AUROC', 'image_F1Max', 'image_AP', 'image_F1Score']
    """
    return PaperEvaluator(
        val_metrics=(
            [kind(fields=PIXEL_FIELDS, prefix="pixel_", strict=False) for kind in (AUROC, AP)] if validate else None
        ),
        test_metrics=[
            *(kind(fields=IMAGE_FIELDS, prefix="image_", strict=False) for kind in (AUROC, F1Max, AP)),
            F1Score(fields=("pred_label", "gt_label"), prefix="image_", strict=False),
            *(kind(fields=PIXEL_FIELDS, prefix="pixel_", strict=False) for kind in (AUROC, F1Max, AP)),
            AUPRO(fields=PIXEL_FIELDS, prefix="pixel_", strict=False, fpr_limit=0.3),
            F1Score(fields=("pred_mask", "gt_mask"), prefix="pixel_", strict=False),
            *(kind(prefix="image_", strict=False) for kind in (NamingAccuracy, NamingF1Score)),
        ],
    )
