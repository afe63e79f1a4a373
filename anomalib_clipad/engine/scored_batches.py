"""Callbacks that act on every batch that test or predict has scored."""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from anomalib_clipad.data.batch import ZeroShotBatch

logger = logging.getLogger(__name__)

T = TypeVar("T")
MOST_THREADS = 8  # each has a picture in memory


def side_by_side(call: Callable[..., T], *columns: Sequence[Any]) -> list[T]:
    """What a call gives for every image of a batch, in order, by several threads.

    Threads are enough: Pillow lets others run while it decodes, resizes and encodes. Nothing in the call should use
    torch, which has threads of its own for each thread that calls it.

    Args:
        call: Of one image.
        *columns: Its arguments, one of each column an image.

    Example:
        >>> side_by_side(pow, [2, 3], [3, 2])
        [8, 9]
    """
    if len(columns[0]) == 1:
        return [call(*(column[0] for column in columns))]
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
        return list(threads.map(call, *columns))


class Background(Generic[T]):
    """Does for the images of a batch what a call does, while the next batch is read and scored.

    No more than one batch is under way, so that few pictures are in memory.

    Example:
        >>> background = Background()
        >>> background.start(pow, [2, 3], [3, 2])
        []
        >>> background.start(pow, [4], [2]), background.wait()
        ([8, 9], [16])
    """

    def __init__(self) -> None:
        self._under_way: Future[list[T]] | None = None

    def start(self, call: Callable[..., T], *columns: Sequence[Any]) -> list[T]:
        """Begin with a batch; see :func:`side_by_side`.

        Returns:
            What :meth:`wait` does, of the batch before.
        """
        before = self.wait()
        thread = ThreadPoolExecutor(1)
        self._under_way = thread.submit(side_by_side, call, *columns)
        thread.shutdown(wait=False)  # it ends with the batch
        return before

    def wait(self) -> list[T]:
        """Wait for the batch under way.

        Returns:
            What the call gave for each of its images, once; nothing where no batch is under way.

        Raises:
            Exception: Whatever the call raised.
        """
        if self._under_way is None:
            return []
        wait([self._under_way])  # Ctrl-C leaves it under way
        done, self._under_way = self._under_way, None
        return done.result()


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

    longest_side: int = 0  # pixels of the pictures that it draws of the images, if it draws any

    def begin(self, trainer: Trainer, model: LightningModule) -> None:
        """Act before the first batch, behind the model's own start."""

    def on_scored(self, trainer: Trainer, model: LightningModule, batch: ZeroShotBatch, number: str) -> None:
        """Act on a batch.

        Args:
            trainer: The run's.
            model: That has scored it.
            batch: As the callbacks before this one have left it.
            number: Of the batch, another one in every process and of every loader.
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
        del batch
        number = f"{dataloader_idx}-{batch_idx}" if dataloader_idx else str(batch_idx)
        number = f"{trainer.global_rank}-{number}" if trainer.world_size > 1 else number
        self.on_scored(trainer, pl_module, ZeroShotBatch.of(outputs), number)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See :meth:`end`."""
        self.end(trainer, pl_module)

    on_predict_epoch_start, on_predict_batch_end, on_predict_end = on_test_epoch_start, on_test_batch_end, on_test_end


def planes(values: torch.Tensor | None, count: int) -> list[np.ndarray] | list[None]:
    """Maps or masks of a batch, taken from the device at once.

    Args:
        values: (B, H, W), or (B, 1, H, W) as some models give them; None where there are none.
        count: B.

    Returns:
        (H, W) of every image.

    Example:
        >>> planes(torch.zeros(2, 1, 3, 4), 2)[0].shape, planes(None, 2)
        ((3, 4), [None, None])
    """
    if values is None:
        return [None] * count
    values = values.detach().cpu()
    numbers: np.ndarray = (values.float() if values.is_floating_point() else values).numpy()
    return list(numbers.reshape(count, *numbers.shape[-2:]))


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
