"""Words for what was found, in a batch's explanation."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from lightning.pytorch import LightningModule, Trainer

from anomalib_clipad.components import DefectName, NamingFigures, region_weights
from anomalib_clipad.data.batch import ZeroShotBatch
from anomalib_clipad.engine.network import ZeroShotNetwork
from anomalib_clipad.engine.post_processing import map_on_the_scale
from anomalib_clipad.engine.scored_batches import ScoredBatches

logger = logging.getLogger(__name__)


class DefectNaming(ScoredBatches):
    """Writes into ``explanation`` of a batch what its anomalous images resemble, where a model has words for it.

    It acts when the region is known, that is behind the post-processor. A normal image's explanation is empty. A test
    in one process ends with how often the words were right, over the anomalous images whose folder is named by one.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_clipad import ClipAdSdp
        >>> model = ClipAdSdp("nut", small_clip, defects=["scratch", "dent"])  # which has DefectNaming
        >>> batches = Engine(logger=False, enable_progress_bar=False).predict(model, data_path=image_folder)
        >>> [len(batch.explanation) for batch in batches]
        [1, 1]
    """

    def __init__(self) -> None:
        self._known: list[tuple[str, str | None]] = []  # truth and word

    def begin(self, trainer: Trainer, model: LightningModule) -> None:
        """Forget the images of an earlier run."""
        del trainer, model
        self._known = []

    def on_scored(self, trainer: Trainer, model: LightningModule, batch: ZeroShotBatch, number: str) -> None:
        """Name what was found in the images of a batch."""
        del trainer, number
        network = cast("ZeroShotNetwork", model.model)
        evidence, batch.defect_evidence = batch.defect_evidence, None  # not to be kept with the predictions
        if evidence is None or batch.pred_label is None:
            return
        rows = batch.pred_label.bool().nonzero()[:, 0]
        anomaly_map = map_on_the_scale(batch, model)[rows]
        mask = None if batch.pred_mask is None else batch.pred_mask[rows].bool()
        class_index = None if batch.class_index is None else batch.class_index[rows]
        names: list[DefectName | None] = [None] * len(evidence)
        if len(rows):
            weights = region_weights(anomaly_map, mask)
            if batch.region is not None:
                weights = weights * batch.region[rows]
            named = network.name_defects(evidence[rows], weights, class_index)
            for row, name in zip(rows.tolist(), named, strict=True):
                names[row] = name
        batch.explanation = ["" if name is None else name.explanation for name in names]
        self._known += _known(batch, names, network.defect_names.words)

    def end(self, trainer: Trainer, model: LightningModule) -> None:
        """Say how often the words were right, where the data tell."""
        network = cast("ZeroShotNetwork", model.model)
        if self._known and trainer.world_size == 1:
            truth, given = zip(*self._known, strict=True)
            figures = NamingFigures.of(
                truth, given, sorted({word for own in network.defect_names.words for word in own})
            )
            logger.info("Attribution, not diagnosis: %s.", figures)


def _known(
    batch: ZeroShotBatch, names: Sequence[DefectName | None], words: Sequence[Sequence[str]]
) -> list[tuple[str, str | None]]:
    """Truth and word of the anomalous images whose folder is named by a word."""
    if batch.gt_label is None or not batch.image_path:
        return []
    known = []
    for row in batch.gt_label.bool().nonzero()[:, 0].tolist():
        truth, name = Path(batch.image_path[row]).parent.name.replace("_", " "), names[row]
        if truth in words[0 if batch.class_index is None else int(batch.class_index[row])]:
            known.append((truth, None if name is None else name.word))
    return known
