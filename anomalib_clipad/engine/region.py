"""``region``: what of the pictures is looked at; its mask is to fit the pictures."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from anomalib.models.components import AnomalibModule
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_clipad.engine.automatic_size import shape_of_first_picture
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
        """Look at the first picture of each data set."""
        super().setup(stage)
        if self.trainer.state.fn != TrainerFn.FITTING:
            self.check_region(datasets_of(self.trainer))

    def check_region(self, datasets: Iterable[Any]) -> None:
        """Refuse data sets whose pictures have another shape than the region's mask.

        Raises:
            InputError: If their first picture has.
        """
        region = self.model.region.given
        if region is None or region.mask is None:
            return
        for dataset in datasets:
            if (shape := shape_of_first_picture([dataset])) is not None:
                region.check_shape(*shape)
