"""Scores of a validation pass that serve the test pass over the same images.

anomalib validates a zero-shot model before it tests it, and most of its data modules validate on the test images.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import ValSplitMode
from anomalib.models.components import AnomalibModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torchvision.transforms.v2 import Compose, Resize

from anomalib_clipad.components import Scores
from anomalib_clipad.data.batch import ZeroShotBatch
from anomalib_clipad.engine.network import ZeroShotNetwork
from anomalib_clipad.errors import check_flag

if TYPE_CHECKING:
    _Module = AnomalibModule
else:
    _Module = object  # anomalib takes every direct subclass of its module for a model

MOST_BYTES = 2**29  # of kept scores; further images are scored in both passes


class SinglePassMixin(_Module):
    """Keeps the scores of a validation pass for the test pass that follows it.

    They are those of the network, before thresholds and ranges, so the test pass gives the same figures to the last
    digit. Its user calls :meth:`begin_pass` when a pass starts and the class and the references are known.
    """

    model: ZeroShotNetwork  # type: ignore[assignment]  # a module that satisfies the protocol
    single_pass: bool
    served = 0  # images of the last test pass whose scores are those of the validation pass
    _kept: dict[str, Scores]
    _kept_bytes = 0
    # What the kept scores depend on; nothing while none are to be kept.
    _kept_for: tuple[object, ...] | None = None

    def adopt_single_pass(self, single_pass: bool) -> None:
        """Check the argument, and take it over.

        Raises:
            InputError: If it is neither true nor false.
        """
        check_flag("single_pass", single_pass)
        self.single_pass = single_pass
        self._kept = {}

    def begin_pass(self, datamodule: AnomalibDataModule | None, normal_key: object) -> None:
        """Start to keep scores, go on with those that are kept, or forget them.

        Args:
            datamodule: The data of the pass.
            normal_key: What the references were made from.
        """
        function, self.served = self.trainer.state.fn, 0
        same_images = self.single_pass and datamodule is not None and _tests_what_it_validates(datamodule)
        # A parameter's version counts its changes in place, as by an optimiser or a state dict.
        parameters = tuple((id(one), one._version) for one in cast("nn.Module", self.model).parameters())
        depends_on = (id(datamodule), self.model.class_names, normal_key, parameters) if same_images else None
        if function == TrainerFn.TESTING and depends_on == self._kept_for:
            return
        self.forget_kept()
        if function == TrainerFn.VALIDATING:
            self._kept_for = depends_on

    def forget_kept(self) -> None:
        """Have no scores of an earlier pass."""
        self._kept, self._kept_bytes, self._kept_for = {}, 0, None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Forget the scores of the model as it was."""
        super().on_load_checkpoint(checkpoint)
        self.forget_kept()

    def on_test_end(self) -> None:
        """Free the memory."""
        self.forget_kept()

    def kept_scores(self, batch: ZeroShotBatch) -> Scores | None:
        """Scores of a batch from the validation pass, if there are any of all its images."""
        if self._kept_for is None or self.trainer.state.fn != TrainerFn.TESTING or not batch.image_path:
            return None
        found = [self._kept.get(path) for path in batch.image_path]
        known = [one for one in found if one is not None]
        if len(known) < len(found):
            return None
        self.served += len(known)
        columns = zip(*known, strict=True)
        return Scores(*(None if column[0] is None else torch.stack(column).to(self.device) for column in columns))  # type: ignore[arg-type]  # mypy loses the fields

    def keep_scores(self, batch: ZeroShotBatch, scores: Scores) -> None:
        """Keep the scores of a batch of the validation pass, as far as there is room."""
        if self._kept_for is None or self.trainer.state.fn != TrainerFn.VALIDATING or not batch.image_path:
            return
        size = sum(values.nbytes for values in scores if values is not None)
        if self._kept_bytes + size > MOST_BYTES:
            return
        self._kept_bytes += size
        # A copy, so that a row does not hold its batch, and nothing later changes it.
        columns = [None if values is None else values.detach().to("cpu", copy=True) for values in scores]
        for row, path in enumerate(batch.image_path):
            self._kept[path] = Scores(*(None if column is None else column[row] for column in columns))  # type: ignore[arg-type]  # as above


def _tests_what_it_validates(datamodule: AnomalibDataModule) -> bool:
    """Whether both passes read the same images, and read them alike."""
    if getattr(datamodule, "val_split_mode", None) != ValSplitMode.SAME_AS_TEST:
        return False
    validation, test = (getattr(datamodule, name, None) for name in ("val_data", "test_data"))
    if validation is None or test is None:
        return False
    if not all(_is_resize_only(data.augmentations) for data in (validation, test)):
        return False
    return list(validation.samples.image_path) == list(test.samples.image_path)


def _is_resize_only(augmentations: object) -> bool:
    """Whether a transform is what anomalib makes of the model's own; any other may be random."""
    if isinstance(augmentations, Compose):
        return all(map(_is_resize_only, augmentations.transforms))
    return augmentations is None or isinstance(augmentations, Resize)
