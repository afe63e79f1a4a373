"""What a zero-shot CLIP model needs to run in anomalib's engine; the models only add their network.

Mixins and not a base class: anomalib lists and finds direct subclasses of ``AnomalibModule`` only.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import open_clip
import torch
from anomalib.data import AnomalibDataModule, Batch, ImageBatch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn

from anomalib_clipad.components import Scores
from anomalib_clipad.components.dual_path import check_images
from anomalib_clipad.data.batch import ZeroShotBatch
from anomalib_clipad.data.inside import cut_ground_truth
from anomalib_clipad.engine.automatic_size import AutomaticSizeMixin
from anomalib_clipad.engine.checkpoint import CheckpointMixin
from anomalib_clipad.engine.defect_naming import DefectNaming
from anomalib_clipad.engine.extra_outputs import Answer, ExtraOutputsMixin
from anomalib_clipad.engine.host import RunGuard, datamodule_of, drop_components_of_other_models
from anomalib_clipad.engine.metrics import paper_evaluator
from anomalib_clipad.engine.network import ZeroShotNetwork
from anomalib_clipad.engine.normal_classes import NormalClassesMixin
from anomalib_clipad.engine.original_size import OriginalMaps, OriginalSizeMixin
from anomalib_clipad.engine.page import PageWriter
from anomalib_clipad.engine.post_processing import ClipAdPostProcessor
from anomalib_clipad.engine.pre_processing import ClipAdPreProcessor, clip_transform
from anomalib_clipad.engine.product_batch import with_class
from anomalib_clipad.engine.products import joined_classes
from anomalib_clipad.engine.region import RegionMixin
from anomalib_clipad.engine.run_folder import RunFolder, check_root, images_of, link_latest
from anomalib_clipad.engine.scored_batches import warn_of_not_finite
from anomalib_clipad.engine.single_pass import SinglePassMixin
from anomalib_clipad.engine.table import PredictionTable
from anomalib_clipad.engine.visualizer import ClipAdVisualizer

if TYPE_CHECKING:
    _Module = AnomalibModule
else:
    _Module = object  # see above


class ZeroShotMixin(  # type: ignore[misc]  # anomalib renames to_onnx's argument
    AutomaticSizeMixin,
    RegionMixin,
    OriginalSizeMixin,
    SinglePassMixin,
    NormalClassesMixin,
    CheckpointMixin,
    ExtraOutputsMixin,
    _Module,
):
    """Components, arguments and steps of a zero-shot CLIP model; its user calls :meth:`adopt` in its constructor."""

    table: PredictionTable | None  # None for no table
    page: PageWriter | None  # None for no page

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No special arguments."""
        return {}

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's type has a dozen forms
        """Nothing to optimise."""
        return None

    @classmethod
    def configure_pre_processor(  # a CLIP brings its own mean and standard deviation
        cls,
        image_size: tuple[int, int] | None = None,
        mean: tuple[float, float, float] = open_clip.OPENAI_DATASET_MEAN,
        std: tuple[float, float, float] = open_clip.OPENAI_DATASET_STD,
    ) -> ClipAdPreProcessor:
        """See :func:`anomalib_clipad.engine.pre_processing.clip_transform`."""
        return ClipAdPreProcessor(transform=clip_transform(image_size or (240, 240), mean, std))

    @classmethod
    def components_for(
        cls,
        network: ZeroShotNetwork,
        pre_processor: nn.Module | bool,
        post_processor: nn.Module | bool,
    ) -> tuple[nn.Module | bool, nn.Module | bool]:
        """Pre- and post-processor that belong to a network, where the user asks for the default."""
        if pre_processor is True:
            pre_processor = cls.configure_pre_processor(network.image_size, network.mean, network.std)
        if post_processor is True:
            post_processor = ClipAdPostProcessor()
        if isinstance(post_processor, ClipAdPostProcessor) and post_processor.map_scale is None:
            post_processor.map_scale = network.map_scale
        if isinstance(post_processor, ClipAdPostProcessor):
            post_processor.region = network.region
        return pre_processor, post_processor

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """The paper's metrics, see :func:`anomalib_clipad.engine.metrics.paper_evaluator`."""
        return paper_evaluator()

    @classmethod
    def configure_visualizer(cls) -> ClipAdVisualizer:  # type: ignore[override]  # of the base class that anomalib asks for
        """Pictures on a fixed scale, under score and verdict."""
        return ClipAdVisualizer()

    def adopt(
        self,
        network: ZeroShotNetwork,
        class_name: str | Sequence[str] | Mapping[str, str] | None,
        k_shot: int = 0,
        few_shot_source: str | Path | None = None,
        false_alarm_rate: float | None = None,
        augment_references: bool = False,
        single_pass: bool = True,
        page: bool = True,
    ) -> None:
        """Take over the network, and the arguments as the user gave them."""
        self.model = network
        self.table, self.page = PredictionTable(), PageWriter() if page else None
        self.adopt_classes(class_name)
        self.adopt_size(self.hparams.get("image_size"))
        self.adopt_single_pass(single_pass)
        self.adopt_normal(k_shot, few_shot_source, false_alarm_rate, augment_references)
        self.identify(network.visual)

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """The model's components, and what leaves the trainer as it was."""
        drop_components_of_other_models(self.trainer)
        callbacks = list(cast("Sequence[Callback]", super().configure_callbacks()))
        # Behind the post-processor, whose masks and labels it takes, and before what shows its words.
        callbacks.insert(
            1 + max((i for i, one in enumerate(callbacks) if one is self.post_processor), default=-1), DefectNaming()
        )
        # The table comes last: it names the pictures, and says at the end where everything is.
        callbacks += [writer for writer in (self.page, self.table, self.original_maps) if writer is not None]
        if any(isinstance(callback, SaveConfigCallback) for callback in cast("Any", self.trainer).callbacks):
            check_root(self.trainer)
        writers = PredictionTable | PageWriter | ClipAdVisualizer | OriginalMaps
        if any(isinstance(callback, writers) for callback in callbacks):
            callbacks.insert(0, RunFolder())
        return [RunGuard(callbacks), *callbacks]

    def on_predict_start(self) -> None:
        """See :meth:`prepare_classes`."""
        self.prepare_classes()

    on_test_start = on_predict_start

    def on_validation_start(self) -> None:
        """Likewise, and make the folder where anomalib is to save a checkpoint."""
        self.prepare_classes()
        if self.trainer.checkpoint_callback is not None:
            link_latest(self.trainer)

    def prepare_classes(self) -> None:
        """Encode the prompts of the class at hand, and prepare what comes from normal images."""
        self.say_size()
        datamodule = datamodule_of(self.trainer)
        self.choose_class(*self._names(datamodule))
        self.products.check(images_of(self.trainer), self.model.class_names)
        self.prepare_normal_images(datamodule)
        self.begin_pass(datamodule, (self._normal_key, repr(self.class_name)))

    def prepare_export(self, datamodule: AnomalibDataModule | None = None) -> None:
        """Likewise; the class is the argument's, else that of the data, else the one that was used last."""
        self.check_exportable()
        self.forget_kept()  # else the exported file would hold them
        looks_at_data = (self.k_shot or self.automatic_size) and not self.restored
        if datamodule is not None and looks_at_data and not hasattr(datamodule, "train_data"):
            datamodule.prepare_data()
            datamodule.setup()
        self.find_size(datamodule)
        self.choose_class(*self._names(datamodule))
        self.prepare_normal_images(datamodule)

    @torch.no_grad()
    def forward(self, batch: torch.Tensor, *args: Any, **kwargs: Any) -> InferenceBatch:  # noqa: ANN401 - anomalib's
        """Score images as they are: (B, 3, height, width) in [0, 1], see :func:`with_class` for several classes.

        No gradients are recorded; for these call ``model``, the network itself.

        Raises:
            InputError: If it is no floating-point tensor of this shape.
        """
        del args, kwargs
        check_images(batch, "Images must be a floating-point tensor (B, 3, height, width) in [0, 1]")
        if not self.model.class_names:
            if not self._sizes:
                self.find_size(None, (batch.shape[-2], batch.shape[-1]))
            self.choose_class(*self.products.names)
        scores = self.model.scores(self.pre_processor(batch) if self.pre_processor else batch)
        prediction = self.model.predictions(scores)
        processed = self.post_processor(prediction) if self.post_processor else prediction
        told = with_class(processed, prediction.class_index, self.model.class_names, self._tells)
        return self.with_extra(told, Answer(scores, prediction, cast("InferenceBatch", processed)))

    def val_dataloader(self) -> list:
        """No data: lets anomalib predict and benchmark without a datamodule; a datamodule's own comes first."""
        return []

    def validation_step(self, batch: Batch, batch_idx: int = 0, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Score a batch; the post-processor collects the scores."""
        return self.test_step(batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int = 0, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Score a batch, and keep the model's own map on it for the metrics."""
        scored = self.predict_step(batch, batch_idx, dataloader_idx)
        scored.raw_map = scored.anomaly_map
        return cast("STEP_OUTPUT", scored)

    def predict_step(self, batch: Batch, batch_idx: int = 0, dataloader_idx: int = 0) -> ZeroShotBatch:  # type: ignore[override]  # a batch is what anomalib returns too
        """Score a batch, and keep the model's own scores on it."""
        del batch_idx, dataloader_idx
        ours = ZeroShotBatch.of(cast("ImageBatch", batch))
        ours.class_index = self._class_index(ours)
        scores = self.kept_scores(ours)
        if scores is None:
            scores = self._scores(ours)
            self.keep_scores(ours, scores)
        ours.features = None  # not to be drawn, nor kept with the predictions
        ours.update(**self.model.predictions(scores)._asdict())
        ours.raw_score, ours.defect_evidence = ours.pred_score, scores.defect_evidence
        ours.region = self.model.region.of(scores.anomaly_map)
        cut_ground_truth(ours)
        return ours

    def _class_index(self, batch: ZeroShotBatch) -> torch.Tensor | None:
        """(B,) index of each image's class among the network's; nothing where that is to choose, or has one."""
        ours = self.model.class_names
        joined = joined_classes(None if self._trainer is None else datamodule_of(self.trainer))
        if batch.class_index is not None and (not joined or joined == ours):
            return batch.class_index
        if batch.class_index is not None and set(joined) <= set(ours):  # a checkpoint has others beside them
            return torch.tensor([ours.index(name) for name in joined], device=self.device)[batch.class_index]
        index = self.products.index(batch.image_path, ours)
        return None if index is None else torch.tensor(index, device=self.device)

    def _scores(self, batch: ZeroShotBatch) -> Scores:
        if batch.features is not None:
            return self.model.scores_of(batch.features, batch.class_index)
        return self.model.scores(cast("torch.Tensor", batch.image), batch.class_index)

    def on_predict_batch_end(self, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ANN401 - Lightning's
        """Name classes, and images that could not be scored."""
        del batch, batch_idx, dataloader_idx
        self._tell(cast("ZeroShotBatch", outputs))

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end

    def _tell(self, batch: ZeroShotBatch) -> None:
        # When a batch is done, since a device has to be waited for.
        numbers = [0] * batch.batch_size if batch.class_index is None else batch.class_index.tolist()
        batch.class_name = [self.model.class_names[number] for number in numbers]
        batch.preview = None  # it was drawn
        warn_of_not_finite(batch)
