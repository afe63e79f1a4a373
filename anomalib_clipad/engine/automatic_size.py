"""``image_size: auto``: the shape of the input is that of the first picture that a class's data begin with."""

import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, cast

from anomalib.data import AnomalibDataModule
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_clipad.components.image_size import AUTO
from anomalib_clipad.data.picture_shape import picture_shape
from anomalib_clipad.data.readable import ReadableDataset
from anomalib_clipad.engine.checkpoint_parts import damaged
from anomalib_clipad.engine.classes import ClassesMixin
from anomalib_clipad.engine.host import datamodule_of, datasets_in, datasets_of
from anomalib_clipad.engine.pre_processing import ClipAdPreProcessor, clip_transform
from anomalib_clipad.errors import InputError

logger = logging.getLogger(__name__)

TRAINING: tuple[str, ...] = ()  # in place of classes; of a checkpoint, too


class AutomaticSizeMixin(ClassesMixin):
    """Finds the size of the input before any image is read; its user calls :meth:`adopt_size` in its constructor.

    A size belongs to a class, as thresholds and references do: it is found once, and kept in checkpoints and exports.
    """

    automatic_size: bool
    _sizes: dict[tuple[str, ...], tuple[int, int]]  # those that were found, by the classes of a run
    _after: tuple[int, int] | None = None  # height and width of the run's first picture, until it is said
    _said: tuple[int, ...] | None = None  # size of the last run, and of its first picture

    def adopt_size(self, image_size: object) -> None:
        """Take over the argument.

        Raises:
            InputError: If the pre-processor does not take its size from the model.
        """
        self.automatic_size = isinstance(image_size, str) and image_size == AUTO
        self._sizes = {}
        if self.automatic_size and not isinstance(self.pre_processor, ClipAdPreProcessor):
            msg = f"image_size {AUTO} belongs to the default pre-processor; leave pre_processor at its default."
            raise InputError(msg)

    def setup(self, stage: str) -> None:
        """Find the size. A data module, which is set up before, then asks again for the resize."""
        super().setup(stage)
        if not self.automatic_size:
            return
        if self.restored:
            with suppress(InputError):  # only for a warning
                self._after = shape_of_first_picture(datasets_of(self.trainer))
            return
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        names = TRAINING if fitting else self.classes_at_hand(datamodule_of(self.trainer))
        if fitting or names not in self._sizes:
            shape = shape_of_first_picture(datasets_of(self.trainer))
            if shape is None:
                return
            self._find(names, *shape)
        self._take_size(names, self._sizes[names])

    def find_size(self, datamodule: AnomalibDataModule | None, shape: tuple[int, int] | None = None) -> None:
        """Find the size outside of a run: from a data module that was set up, or from images of ``shape``.

        Raises:
            InputError: If there is nothing to find it from, and no run has found one before.
        """
        if not self.automatic_size or self.restored:
            return
        names = self.classes_at_hand(datamodule)
        if names not in self._sizes:
            shape = shape or (shape_of_first_picture(datasets_in(datamodule)) if datamodule is not None else None)
            if shape is None:
                if not self._sizes:
                    msg = (
                        f"image_size {AUTO} has seen no picture yet; give a checkpoint of a run, a data module, or the "
                        f"pictures' width over their height, such as {AUTO}:1.5."
                    )
                    raise InputError(msg)
                return
            self._find(names, *shape)
        self._take_size(names, self._sizes[names])
        self.say_size()

    def restore_size(self, identity: Mapping[str, Any]) -> None:
        """Take over the size of a checkpoint; that of a training gives way to the one of the data at hand."""
        if not self.automatic_size:
            return
        if identity.get("fitted") and self._sizes:
            self._take_size(TRAINING, self.model.image_size)
            return
        found = identity.get("image_size")
        size = tuple(found) if isinstance(found, list) else (0, 0)
        try:
            self.model.visual.grid(size)
        except InputError as error:
            problem = f"has the image_size {found!r}"
            raise damaged(problem) from error
        self._sizes[TRAINING] = size
        self._take_size(TRAINING, size)

    def _find(self, names: tuple[str, ...], height: int, width: int) -> None:
        self._sizes[names], self._after = self.model.keep_shape(height, width), (height, width)

    def say_size(self) -> None:
        """Say which size was found; later than it is found, since a checkpoint may bring another one."""
        after, self._after = self._after, None
        if after is None:
            return
        size = self.model.image_size
        before, self._said = self._said, (*size, *after)
        if self.model.keep_shape(*after) != size:
            if before == self._said:
                return
            logger.warning(
                "The checkpoint's image_size %d x %d is used, into which pictures of %d x %d pixels are squeezed; "
                "leave the checkpoint out to keep their shape.",
                *(*size, *after),
            )
        elif not self.restored:
            logger.info("image_size is %d x %d, after the shape of a picture of %d x %d pixels.", *size, *after)

    def _take_size(self, names: tuple[str, ...], size: tuple[int, int]) -> None:
        network = self.model
        if size != network.image_size:
            if names != network.class_names:
                self.leave_class()
            network.set_image_size(size)
            self._normal_key = None
        cast("ClipAdPreProcessor", self.pre_processor).take(clip_transform(size, network.mean, network.std))
        datamodule = datamodule_of(self.trainer) if self._trainer is not None else None
        if datamodule is not None:
            # A data module resizes before it collates, and reads the size off the model where it is set up.
            datamodule.setup(cast("str", self.trainer.state.fn))


def shape_of_first_picture(datasets: Iterable[Any]) -> tuple[int, int] | None:
    """Height and width of the first picture that can be opened; ``None`` if there is none.

    Raises:
        InputError: If a data set does not say where its pictures are.

    Example:
        >>> from anomalib.data import PredictDataset
        >>> shape_of_first_picture([PredictDataset(image_folder)])
        (40, 60)
    """
    for dataset in datasets:
        paths = ReadableDataset(dataset).image_paths()
        if not paths and len(dataset):
            msg = (
                f"image_size {AUTO} looks at the first picture's file, and {type(dataset).__name__} names none; give "
                f"the pictures' width over their height, such as {AUTO}:1.5."
            )
            raise InputError(msg)
        if (shape := next(filter(None, map(picture_shape, paths)), None)) is not None:
            return shape
    return None
