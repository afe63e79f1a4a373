"""What a job is doing: from inside of it, where all output is hidden, to whoever shows it."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

Tell = Callable[[str, int, int | None], None]  # what is being done, how much of it, and of how much, None if unknown


def silent(what: str, done: int = 0, total: int | None = None) -> None:
    """Tell nobody.

    Example:
        >>> silent("drawing", 1, 4)
    """
    del what, done, total


class ImageProgress(Callback):
    """Tells how many images of a run are done, in training, validation, testing and prediction.

    Args:
        tell: Is called after every batch.

    Example:
        >>> ImageProgress(print).state_key
        'ImageProgress'
    """

    def __init__(self, tell: Tell) -> None:
        self.tell = tell
        self._done = 0

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        del trainer, pl_module
        self._done = 0

    on_train_epoch_start = on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *outputs_and_batch: object) -> None:
        """Count a batch."""
        del pl_module
        epochs = f", epoch {trainer.current_epoch + 1} of {trainer.max_epochs}" if (trainer.max_epochs or 0) > 1 else ""
        self._count(f"training{epochs}", outputs_and_batch[1], trainer.train_dataloader)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *outputs_and_batch: object) -> None:
        """Count a batch."""
        del pl_module
        if not trainer.sanity_checking:
            self._count("validation", outputs_and_batch[1], trainer.val_dataloaders)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *outputs_and_batch: object) -> None:
        """Count a batch."""
        del pl_module
        self._count("images", outputs_and_batch[1], trainer.test_dataloaders)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *outputs_and_batch: object) -> None:
        """Count a batch."""
        del pl_module
        self._count("images", outputs_and_batch[1], trainer.predict_dataloaders)

    def _count(self, what: str, batch: Any, loaders: Any) -> None:  # noqa: ANN401 - Lightning types neither
        self._done += len(batch.image)
        several = loaders if isinstance(loaders, list | tuple) else [loaders]
        self.tell(what, self._done, sum(len(loader.dataset) for loader in several))
