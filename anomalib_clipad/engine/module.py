"""What a CLIP-AD model needs to run in anomalib's engine; the models only add their network.

A mixin and not a base class: anomalib lists and finds direct subclasses of ``AnomalibModule`` only.
"""

import logging
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, Batch
from anomalib.metrics import Evaluator
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize

from anomalib_clipad.components import DualPathFeatures, PromptEnsemble, fingerprint
from anomalib_clipad.data import ReadableDataLoader
from anomalib_clipad.engine.export import WholeExportMixin
from anomalib_clipad.engine.metrics import paper_evaluator
from anomalib_clipad.engine.post_processing import ClipAdPostProcessor
from anomalib_clipad.engine.pre_processing import ClipAdPreProcessor
from anomalib_clipad.errors import InputError

if TYPE_CHECKING:
    from anomalib_clipad.sdp.torch_model import ClipAdSdpModel

logger = logging.getLogger(__name__)

FALLBACK_CLASS = "object"
IDENTITY = "clip_ad"  # key of our part of a checkpoint
# Not saved: CLIP comes from its own weights, the metrics from the arguments.
NOT_SAVED = ("model.visual.", "evaluator.")


class ZeroShotMixin(WholeExportMixin):
    """Class names, calibration, checkpoints and steps of a zero-shot CLIP model; its user calls :meth:`adopt`."""

    model: "ClipAdSdpModel"
    class_name: str | None
    _fingerprint: str  # of the CLIP's weights as they were loaded, before any change of precision
    _limit_val_batches: float | None = None  # the trainer's, while validation is left out
    _restored: bool = False  # whether text vectors and thresholds came with a checkpoint

    @property
    def learning_type(self) -> LearningType:
        """Zero-shot: nothing is fitted, validation data only set thresholds."""
        return LearningType.ZERO_SHOT

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No special arguments."""
        return {}

    @staticmethod
    def configure_optimizers() -> None:
        """Nothing to optimise."""

    @classmethod
    def configure_pre_processor(
        cls,
        image_size: tuple[int, int] | None = None,
        mean: tuple[float, float, float] = open_clip.OPENAI_DATASET_MEAN,
        std: tuple[float, float, float] = open_clip.OPENAI_DATASET_STD,
    ) -> ClipAdPreProcessor:
        """Plain bicubic resize of the whole image, so that masks line up, and CLIP's normalisation."""
        resize = Resize(image_size or (240, 240), interpolation=InterpolationMode.BICUBIC, antialias=True)
        return ClipAdPreProcessor(transform=Compose([resize, Normalize(mean=mean, std=std)]))

    @classmethod
    def components_for(
        cls,
        model: "ClipAdSdpModel",
        pre_processor: nn.Module | bool,
        post_processor: nn.Module | bool,
    ) -> tuple[nn.Module | bool, nn.Module | bool]:
        """Pre- and post-processor that belong to a network, where the user asks for the default."""
        if pre_processor is True:
            pre_processor = cls.configure_pre_processor(model.image_size, model.mean, model.std)
        if post_processor is True:
            post_processor = ClipAdPostProcessor(model.map_scale)
        return pre_processor, post_processor

    def adopt(self, model: "ClipAdSdpModel", class_name: str | None) -> None:
        """Take over the network, and the class name as the user gave it."""
        self.model = model
        self.class_name = class_name
        if class_name is not None:
            model.prompts.prompts(class_name)  # an empty name is told now
        self._fingerprint = fingerprint(model.visual)

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """The paper's metrics, see :func:`anomalib_clipad.engine.metrics.paper_evaluator`."""
        return paper_evaluator()

    def setup(self, stage: str) -> None:
        """Have the trainer skip unreadable images and name unusable checkpoints, while it runs this model."""
        datamodule = self.trainer.datamodule
        if stage == "validate" and isinstance(datamodule, AnomalibDataModule) and not hasattr(datamodule, "val_data"):
            # anomalib validates zero-shot models first, also where there is nothing to validate on.
            self._limit_val_batches, self.trainer.limit_val_batches = self.trainer.limit_val_batches, 0
        trainer, strategy = self.trainer, self.trainer.strategy
        process_dataloader, load_checkpoint = strategy.process_dataloader, strategy.load_checkpoint

        def process(dataloader: object) -> object:
            dataloader = process_dataloader(dataloader)
            ours = trainer.lightning_module is self and ReadableDataLoader.can_wrap(dataloader)
            # Not while fitting, where the processes wait for each other at every batch.
            each_once = trainer.state.fn != TrainerFn.FITTING
            return ReadableDataLoader(dataloader, each_once) if ours else dataloader

        def load(path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401 - Lightning's
            if trainer.lightning_module is self:
                _check_is_checkpoint(Path(path))
            return load_checkpoint(path, *args, **kwargs)

        strategy.process_dataloader, strategy.load_checkpoint = process, load

    def teardown(self, stage: str) -> None:
        """Leave the trainer as it was, for the next model."""
        del stage
        if self._limit_val_batches is not None:
            self.trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None
        for name in ("process_dataloader", "load_checkpoint"):
            self.trainer.strategy.__dict__.pop(name, None)

    def on_validation_start(self) -> None:
        """See :meth:`prepare_classes`."""
        self.prepare_classes()

    on_test_start = on_predict_start = on_validation_start

    def prepare_classes(self) -> None:
        """Encode the prompts of the class at hand, see :meth:`choose_class`."""
        self.choose_class(self.class_name or _class_of(self.trainer.datamodule))

    def prepare_export(self, datamodule: AnomalibDataModule | None = None) -> None:
        """Likewise; the class is the argument's, else that of the data, else the one that was used last."""
        self.choose_class(self.class_name or _class_of(datamodule))

    def choose_class(self, name: str | None) -> None:
        """Encode the prompts of a class, unless a checkpoint has brought its text vectors."""
        if self._restored:
            if name is not None and name not in self.model.class_names:
                logger.warning(
                    "The checkpoint's class %s is used, not %r; leave the checkpoint out to use that.",
                    ", ".join(map(repr, self.model.class_names)),
                    name,
                )
            return
        if name is None and not self.model.class_names:
            logger.warning(
                "No class name is known, so the images are taken for an %r; "
                "set class_name to what they show for better results.",
                FALLBACK_CLASS,
            )
            name = FALLBACK_CLASS
        if name is not None and self.model.class_names != (name,):
            self.model.set_classes([name])
            if isinstance(self.post_processor, ClipAdPostProcessor):
                self.post_processor.forget()

    def val_dataloader(self) -> list:
        """No data: lets anomalib predict and benchmark without a datamodule; a datamodule's own comes first."""
        return []

    def validation_step(self, batch: Batch, *args: object, **kwargs: object) -> STEP_OUTPUT:
        """Score a batch; the post-processor collects the scores."""
        return self.test_step(batch, *args, **kwargs)

    def test_step(self, batch: Batch, *args: object, **kwargs: object) -> STEP_OUTPUT:
        """Score a batch, and keep the model's own scores on it for the metrics."""
        del args, kwargs
        batch = self._score(batch)
        batch.raw_score, batch.raw_map = batch.pred_score, batch.anomaly_map
        return batch

    def predict_step(self, batch: Batch, *args: object, **kwargs: object) -> STEP_OUTPUT:
        """Score a batch."""
        del args, kwargs
        return self._score(batch)

    def _score(self, batch: Batch) -> Batch:
        class_index, features = getattr(batch, "class_index", None), self.features(batch)
        if features is None:
            scores = self.model.scores(batch.image, class_index)
        else:
            scores = self.model.scores_of(features, class_index)
        batch.text_score, batch.map_score = scores.text_score, scores.map_score
        return batch.update(**self.model.predictions(scores)._asdict())

    def on_validation_batch_end(self, outputs: Batch, *args: object, **kwargs: object) -> None:
        """See :meth:`tell_not_finite`."""
        del args, kwargs
        self.tell_not_finite(outputs)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    @staticmethod
    def tell_not_finite(batch: Batch) -> None:
        """Name images that could not be scored; when a batch is done, since a device has to be waited for to know."""
        if not batch.text_score.isfinite().all():
            bad = (~batch.text_score.isfinite()).nonzero()[:, 0].tolist()
            names = ", ".join(str(batch.image_path[i]) if batch.image_path else f"number {i} of a batch" for i in bad)
            logger.warning("Not finite, so scored NaN and called anomalous: image %s; look at its pixel values.", names)

    def calibrate(self) -> None:
        """Set score ranges and thresholds from validation data, as anomalib does where there is no checkpoint."""
        data, trainer = self.trainer.datamodule, self.trainer
        if not isinstance(self.post_processor, ClipAdPostProcessor) or not hasattr(data, "val_data"):
            return
        logger.info("Setting thresholds from %d validation images.", len(data.val_data))
        loader = trainer.strategy.process_dataloader(data.val_dataloader())
        for number, batch in enumerate(loader):
            batch = trainer.strategy.batch_to_device(batch)
            if self.pre_processor:
                self.pre_processor.on_validation_batch_start(trainer, self, batch, number)
            with trainer.precision_plugin.val_step_context():
                self.post_processor.on_validation_batch_end(trainer, self, self.validation_step(batch))
        self.post_processor.on_validation_epoch_end(trainer, self)

    def features(self, batch: Batch) -> DualPathFeatures | None:
        """Taps that came with a batch instead of its images, see :class:`anomalib_clipad.data.AuxiliaryDataModule`."""
        features = getattr(batch, "features", None)
        return features and DualPathFeatures(*([tokens.to(self.device) for tokens in taps] for taps in features))

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> "ZeroShotMixin":  # noqa: ANN401 - Lightning's
        """Build a model from a checkpoint, see :meth:`anomalib.models.components.AnomalibModule.load_from_checkpoint`.

        Raises:
            InputError: If the file is none.
        """
        _check_is_checkpoint(Path(checkpoint_path))
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is not CLIP, and the name of the CLIP it belongs to."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"] = {
            key: value for key, value in checkpoint["state_dict"].items() if not key.startswith(NOT_SAVED)
        }
        prompts = checkpoint["hyper_parameters"].get("prompts")
        if isinstance(prompts, PromptEnsemble):
            checkpoint["hyper_parameters"]["prompts"] = asdict(prompts)
        fitted = self.trainer.state.fn == TrainerFn.FITTING
        checkpoint[IDENTITY] = {**self._identity(), "class_names": list(self.model.class_names), "fitted": fitted}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over text vectors, score ranges and thresholds, if they were made with this CLIP.

        Raises:
            InputError: If the checkpoint is another model's, or of another CLIP.
        """
        super().on_load_checkpoint(checkpoint)
        found = checkpoint.get(IDENTITY)
        if not isinstance(found, Mapping):
            msg = f"The checkpoint is not one of {type(self).__name__}; give the model.ckpt that its test run wrote."
            raise InputError(msg)
        own = self._identity()
        differing = [key for key in own if found.get(key) != own[key]]
        if differing and differing != ["backbone"]:  # the same weights under another name are the same CLIP
            sides = "; ".join(f"{key} was {found.get(key)!r}, here it is {own[key]!r}" for key in differing)
            msg = f"The checkpoint does not fit this model: {sides}; give the model the arguments it was made with."
            raise InputError(msg)
        state = checkpoint["state_dict"]
        self.model.class_names = tuple(found["class_names"])
        self._restored = True
        self.model.text_features = torch.empty_like(state["model.text_features"], device=self.device)
        state.update({key: value for key, value in self.state_dict().items() if key.startswith(NOT_SAVED)})

    def _identity(self) -> dict[str, Any]:
        return {
            "model": type(self).__name__,
            "backbone": str(self.hparams.get("backbone")),
            "weights": self._fingerprint,
            "layers": list(self.model.visual.layers),
            "image_size": list(self.model.image_size),
        }


def _class_of(datamodule: object) -> str | None:
    names = (getattr(datamodule, key, None) for key in ("category", "name"))
    return next((name for name in names if isinstance(name, str) and name.strip()), None)


def _check_is_checkpoint(path: Path) -> None:
    if not path.is_file() or not zipfile.is_zipfile(path):
        what = "is not a checkpoint" if path.exists() else "does not exist"
        msg = f"ckpt_path {path} {what}; give the model.ckpt that a test run of this model wrote."
        raise InputError(msg)
