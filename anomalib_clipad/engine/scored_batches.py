"""Callbacks that act on every batch that test or predict has scored."""

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from anomalib_clipad.data.batch import ZeroShotBatch

logger = logging.getLogger(__name__)


class ScoredBatches(Callback):
    """Does the same in test and in predict; subclasses fill :meth:`begin`, :meth:`on_scored` and :meth:`end`.

    Example:
        >>> class Count(ScoredBatches):
        ...     def on_scored(self, trainer, model, batch, number):
        ...         print(number, batch.batch_size)
        >>> import torch
        >>> trainer = Trainer(logger=False, accelerator="cpu")
        >>> Count().on_predict_batch_end(trainer, None, ZeroShotBatch(image=torch.zeros(2, 3, 8, 8)), None, 7)
        7 2
    """

    def begin(self, trainer: Trainer, model: LightningModule) -> None:
        """Act before the first batch, behind the model's own start."""

    def on_scored(self, trainer: Trainer, model: LightningModule, batch: ZeroShotBatch, number: str) -> None:
        """Act on a batch.

        Args:
            trainer: The run's.
            model: That has scored it.
            batch: As the callbacks before this one have left it.
            number: Of the batch, another one in every process.
        """
        raise NotImplementedError

    def end(self, trainer: Trainer, model: LightningModule) -> None:
        """Act behind the last batch."""

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See :meth:`begin`."""
        self.begin(trainer, pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's hook names no type, and anomalib's are batches
        batch: Any,  # noqa: ANN401 - likewise
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """See :meth:`on_scored`."""
        del batch, dataloader_idx
        number = f"{trainer.global_rank}-{batch_idx}" if trainer.world_size > 1 else str(batch_idx)
        self.on_scored(trainer, pl_module, ZeroShotBatch.of(outputs), number)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See :meth:`end`."""
        self.end(trainer, pl_module)

    on_predict_epoch_start, on_predict_batch_end, on_predict_end = on_test_epoch_start, on_test_batch_end, on_test_end


def warn_of_not_finite(batch: ZeroShotBatch) -> None:
    """Name images that could not be scored.

    Args:
        batch: As the network has scored it.

    Example:
        >>> import torch
        >>> warn_of_not_finite(ZeroShotBatch(image=torch.zeros(1, 3, 8, 8), text_score=torch.tensor([0.5])))
    """
    if batch.text_score is not None and not batch.text_score.isfinite().all():
        bad = (~batch.text_score.isfinite()).nonzero()[:, 0].tolist()
        names = ", ".join(str(batch.image_path[i]) if batch.image_path else f"number {i} of a batch" for i in bad)
        logger.warning("Not finite, so scored NaN and called anomalous: image %s; look at its pixel values.", names)
