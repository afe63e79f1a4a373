"""``region``: what of the pictures is looked at; its mask is to fit the pictures."""

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

from anomalib.models.components import AnomalibModule
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_clipad.data.picture_shape import check_pictures
from anomalib_clipad.data.readable import ReadableDataset
from anomalib_clipad.engine.host import datasets_of
from anomalib_clipad.engine.network import ZeroShotNetwork

if TYPE_CHECKING:
    _Module = AnomalibModule
else:
    _Module = object  # anomalib takes every direct subclass of its module for a model


class RegionMixin(_Module):
    """Refuses pictures that a mask does not fit, before any is scored."""

    model: ZeroShotNetwork  # type: ignore[assignment]  # a module that satisfies the protocol

    def setup(self, stage: str) -> None:
        """Look at the shape of every picture of the run."""
        super().setup(stage)
        if self.trainer.state.fn != TrainerFn.FITTING:
            self.check_region(datasets_of(self.trainer))

    def check_region(self, datasets: Iterable[Any]) -> None:
        """See :func:`anomalib_clipad.data.picture_shape.check_pictures`; pictures without a file have no shape yet."""
        paths = chain.from_iterable(ReadableDataset(dataset).image_paths() for dataset in datasets)
        check_pictures(self.model.region.given, paths)
