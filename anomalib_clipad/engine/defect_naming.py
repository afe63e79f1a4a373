"""Words for what was found, in a batch's explanation."""

import logging
from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer

from anomalib_clipad.components import DefectName, DefectNames, NamingFigures, region_weights
from anomalib_clipad.components.defect_words import word_of_folder
from anomalib_clipad.data.batch import ZeroShotBatch
from anomalib_clipad.engine.network import ZeroShotNetwork
from anomalib_clipad.engine.scored_batches import ScoredBatches
from anomalib_clipad.engine.shown_map import map_on_the_scale

logger = logging.getLogger(__name__)

UNSPECIFIED, NOT_CALLED, UNKNOWN = -1, -2, -1  # in place of a word's index


class DefectNaming(ScoredBatches):
    """Writes into ``explanation`` of a batch what its anomalous images resemble, where a model has words for it.

    It acts when the region is known, that is behind the post-processor. A normal image's explanation is empty. The word
    and, where folders tell, the true one are in ``defect_word`` and ``defect_truth``. A test ends with how
    often the words were right, beside what guessing gives.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_clipad import ClipAdSdp
        >>> model = ClipAdSdp("nut", small_clip, defects=["scratch", "dent"])  # which has DefectNaming
        >>> batches = Engine(logger=False, enable_progress_bar=False).predict(model, data_path=image_folder)
        >>> [len(batch.explanation) for batch in batches]
        [1, 1]
    """

    def __init__(self) -> None:
        self._known: list[tuple[int, int]] = []  # truth and word

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
        vocabulary, device = network.defect_names.vocabulary, evidence.device
        batch.defect_word = torch.tensor([_index(name, vocabulary) for name in names], device=device)
        if batch.gt_label is not None and batch.image_path:
            truth = _truth(batch, network.defect_names)
            batch.defect_truth = torch.tensor(truth, device=device)
            words = batch.defect_word.tolist()
            self._known += [pair for pair in zip(truth, words, strict=True) if pair[0] != UNKNOWN]

    def end(self, trainer: Trainer, model: LightningModule) -> None:
        """Say how often the words were right, where the data tell."""
        known = self._known
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, known)
            known = list(chain.from_iterable(parts))
        if known and trainer.is_global_zero:
            vocabulary = cast("ZeroShotNetwork", model.model).defect_names.vocabulary
            truth, given = zip(*known, strict=True)
            figures = NamingFigures.of(
                [vocabulary[index] for index in truth],
                [vocabulary[index] if index >= 0 else None for index in given],
                vocabulary,
            )
            logger.info("Attribution, not diagnosis: %s.", figures)


def _index(name: DefectName | None, vocabulary: Sequence[str]) -> int:
    if name is None:
        return NOT_CALLED
    return UNSPECIFIED if name.word is None else vocabulary.index(name.word)


def _truth(batch: ZeroShotBatch, names: DefectNames) -> list[int]:
    """Index of the word that the folder of each anomalous image is named by."""
    found = [UNKNOWN] * batch.batch_size
    for row in cast("torch.Tensor", batch.gt_label).bool().nonzero()[:, 0].tolist():
        own = names.words[0 if batch.class_index is None else int(batch.class_index[row])]
        word = word_of_folder(cast("list[str]", batch.image_path)[row], own)
        if word is not None:
            found[row] = names.vocabulary.index(word)
    return found
