"""Which classes a model looks for: their text vectors, and what was measured on each."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from torch import nn

from anomalib_clipad.engine.class_pools import check_post_processor
from anomalib_clipad.engine.network import ZeroShotNetwork
from anomalib_clipad.engine.products import FALLBACK_CLASS, Products, class_of, joined_classes

if TYPE_CHECKING:
    _Module = AnomalibModule
else:
    _Module = object  # anomalib takes every direct subclass of its module for a model

logger = logging.getLogger(__name__)


class ClassesMixin(_Module):
    """The class or the classes at hand; its user sets ``model`` and calls :meth:`adopt_classes`.

    Score ranges, references and thresholds of classes that are left are kept for when these are chosen again.
    """

    model: ZeroShotNetwork  # type: ignore[assignment]  # a module that satisfies the protocol
    class_name: str | Sequence[str] | Mapping[str, str] | None
    restored: bool = False  # whether text vectors and thresholds came with a checkpoint
    # What the present references and thresholds were made from; nothing where they were not made here.
    _normal_key: tuple[Any, ...] | None = None
    _blank: dict[str, torch.Tensor]  # the post-processor's thresholds before any were set
    _statistics: dict[tuple[str, ...], tuple[tuple[Any, ...] | None, list[dict[str, torch.Tensor]] | None]]

    def adopt_classes(self, class_name: str | Sequence[str] | Mapping[str, str] | None) -> None:
        """Take over the argument.

        Raises:
            InputError: If it is of another kind or has an empty name, or the post-processor takes one class only.
        """
        self.class_name = class_name
        self._blank = _copy(self._thresholds().state_dict())
        self._statistics = {}
        for name in (class_name,) if isinstance(class_name, str) else self.products.names:
            self.model.prompts.prompts(name)  # refuses an empty name
        if self.products.several:
            check_post_processor(self.post_processor)

    @property
    def products(self) -> Products:
        """What ``class_name`` says."""
        return Products(self.class_name)

    def _names(self, datamodule: AnomalibDataModule | None) -> tuple[str, ...]:
        joined = joined_classes(datamodule)
        if len(joined) > 1 or (joined and self.products.several):
            return joined  # each image says which one it is of
        return self.products.names or class_of(datamodule)

    def classes_at_hand(self, datamodule: AnomalibDataModule | None) -> tuple[str, ...]:
        """The argument's classes, else the data's, else those that were used last."""
        return self._names(datamodule) or self.model.class_names or (FALLBACK_CLASS,)

    def leave_class(self) -> None:
        """Keep what was measured on the present class for its return, and have none."""
        network = self.model
        if network.class_names:
            states = [_copy(module.state_dict()) for module in self._calibrated()]
            self._statistics[network.class_names] = (self._normal_key, states)
            network.forget_classes()

    def forget_measured(self) -> None:
        """Have measured nothing, on any class: what is loaded is of another model."""
        self._normal_key, self._statistics = None, {}

    def choose_class(self, *names: str) -> None:
        """Encode the prompts of classes, unless a checkpoint has brought their text vectors."""
        network = self.model
        if self.restored:
            known = set(names) <= set(network.class_names)
            if not known or (1 < len(names) < len(network.class_names) and self.products.folders is None):
                logger.warning(
                    "The checkpoint's class %s is used, not %s; leave the checkpoint out to use that.",
                    ", ".join(map(repr, network.class_names)),
                    ", ".join(map(repr, names)),
                )
            network.name_as_asked()
            return
        if not names and not network.class_names:
            logger.warning(
                "No class name is known, so the images are taken for an %r; "
                "set class_name to what they show for better results.",
                FALLBACK_CLASS,
            )
            names = (FALLBACK_CLASS,)
        if names and network.class_names != names:
            self.leave_class()
            network.set_classes(names, choose=len(names) > 1)
            self._normal_key, states = self._statistics.get(names, (None, None))
            if states is None:
                self._thresholds().load_state_dict(self._blank)
                return
            for module, state in zip(self._calibrated(), states, strict=True):
                module.load_state_dict(state)

    def _calibrated(self) -> list[nn.Module]:
        """What holds statistics of the classes at hand."""
        network = self.model
        references = (network.references, network.tile_references, network.reference_fusion)
        modules = (network.fusion, *references, network.defect_names.baseline, self._thresholds())
        return [module for module in modules if isinstance(module, nn.Module)]

    def _thresholds(self) -> nn.Module:
        return self.post_processor if isinstance(self.post_processor, nn.Module) else nn.Identity()


def _copy(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in state.items()}
