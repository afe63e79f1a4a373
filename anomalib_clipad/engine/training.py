"""Training of a model's own layers on auxiliary data, after which it is a zero-shot model like the others.

CLIP-AD (arXiv 2311.00453), section 3.4; what is learned belongs to the network, see :class:`TrainableNetwork`.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from anomalib import LearningType
from anomalib.callbacks.checkpoint import ModelCheckpoint
from anomalib.data import AnomalibDataModule, Batch, ImageBatch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn

from anomalib_clipad.components import DualPathFeatures
from anomalib_clipad.data import AuxiliaryDataModule
from anomalib_clipad.data.batch import ZeroShotBatch
from anomalib_clipad.engine.checkpoint import IDENTITY
from anomalib_clipad.engine.checkpoint_parts import damaged, difference
from anomalib_clipad.engine.checkpoint_state import OF_CLASSES
from anomalib_clipad.engine.host import RunGuard, datamodule_of
from anomalib_clipad.engine.module import ZeroShotMixin
from anomalib_clipad.engine.network import ZeroShotNetwork
from anomalib_clipad.engine.normal_images import NormalImages, lightning_seed
from anomalib_clipad.engine.post_processing import ClipAdPostProcessor
from anomalib_clipad.engine.run_folder import share_folder
from anomalib_clipad.errors import InputError
from anomalib_clipad.plugin import DEMO

logger = logging.getLogger(__name__)

PAPER_EPOCHS = 5
BEST = "pixel_AP"  # of validation, by which the best epoch is chosen
NOT_FOR_TRAINING = ("class_name", "k_shot", "few_shot_source", "false_alarm_rate", "defects")


class TrainableNetwork(ZeroShotNetwork, Protocol):
    """A network with layers that are trained."""

    @property
    def trained_layers(self) -> nn.Module:
        """What the optimiser sees and a checkpoint keeps."""

    def loss(
        self, original: list[torch.Tensor], masks: torch.Tensor, class_index: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Focal and Dice loss of taps against masks."""

    def loss_of_pictures(
        self, images: torch.Tensor, masks: torch.Tensor, class_index: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Likewise of pictures and their tiles."""


class AuxiliaryTrainingMixin(ZeroShotMixin):
    """Adds training on an :class:`anomalib_clipad.data.AuxiliaryDataModule`; its user calls :meth:`adopt_training`."""

    model: TrainableNetwork  # type: ignore[assignment]  # a module that satisfies the protocol
    lr: float
    trained: bool = False
    trained_on: list[str]
    _uncalibrated: bool = False  # whether the layers came with a checkpoint that holds no thresholds

    def adopt_training(self, lr: float, trained_on: Sequence[str] | None) -> None:
        """Take over the learning rate, and the categories that were trained on.

        ``None`` for untrained layers, which begin with random values by Lightning's seed, so that trainings can be
        repeated.
        """
        self.lr = lr
        self.trained = trained_on is not None
        self.trained_on = list(trained_on or ())
        if not self.trained:
            with torch.random.fork_rng(devices=[]):
                # anomalib's command line seeds nothing; torch.manual_seed would seed GPUs, too, and for good.
                torch.default_generator.manual_seed(lightning_seed())
                for layer in self.model.trained_layers.children():
                    cast("nn.Linear", layer).reset_parameters()

    @property
    def learning_type(self) -> LearningType:
        """Zero-shot or few-shot once it is trained; until then anomalib's engine must be willing to train it."""
        return super().learning_type if self.trained else LearningType.ONE_CLASS

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on the trained layers."""
        return torch.optim.Adam(self.model.trained_layers.parameters(), lr=self.lr)

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Keep the best checkpoint by validation pixel AP while training."""
        callbacks = list(cast("Sequence[Callback]", super().configure_callbacks()))
        if self.trainer.state.fn == TrainerFn.FITTING and getattr(self.evaluator, "val_metrics", None):
            folder = Path(self.trainer.default_root_dir) / "weights" / "lightning"
            best = ModelCheckpoint(folder, "model", monitor=BEST, mode="max", save_weights_only=True)
            # Resuming needs the latest state, and the optimiser's, at the end of every epoch. Lightning's save_last
            # writes only beside another checkpoint, which save_top_k=0 would never be.
            last = ModelCheckpoint(folder, "last", enable_version_counter=False)
            for guard in callbacks:
                if isinstance(guard, RunGuard):
                    guard.add_checkpoints(self.trainer, [best, last])
            callbacks += [best, last]
        return callbacks

    @property
    def trainer(self) -> Trainer:
        """Lightning's trainer."""
        return cast("Trainer", super().trainer)

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        # Lightning attaches the trainer before it replaces an unset limit by 1000 epochs.
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            timed = any(isinstance(callback, Timer) for callback in cast("Any", trainer).callbacks)
            if trainer.fit_loop.max_epochs is None and trainer.max_steps == -1 and not timed:
                logger.info("max_epochs was not set; %d as in the paper.", PAPER_EPOCHS)
                trainer.fit_loop.max_epochs = PAPER_EPOCHS
        LightningModule.trainer.fset(self, trainer)  # type: ignore[attr-defined]  # a property's setter

    def on_fit_start(self) -> None:
        """Encode the prompts of all categories, and compute the features if they are to be cached."""
        data = datamodule_of(self.trainer)
        if not isinstance(data, AuxiliaryDataModule):
            msg = (
                f"SDP+ is trained on an AuxiliaryDataModule, got {type(data).__name__}; see configs/"
                "sdp_plus_train_visa.yaml."
            )
            raise InputError(msg)
        if self.trainer.precision == "16-true":
            msg = "In precision 16-true the layers of SDP+ become NaN; train with bf16-true, bf16-mixed or 32-true."
            raise InputError(msg)
        if self.model.region.given is not None:
            msg = (
                "SDP+ is trained on whole pictures, since its layers look at single patches; train without region, and "
                "give the layers as adapter to a model with region."
            )
            raise InputError(msg)
        if self.model.tile_size is not None and data.cache_features:
            msg = "cache_features keeps the features of whole pictures, not of tiles; leave it, or tile_size, out."
            raise InputError(msg)
        if self.few_shot_source:
            NormalImages.of_folder(self.few_shot_source, nn.Identity())  # a wrong folder is said now
        if unused := [name for name in NOT_FOR_TRAINING if self.hparams.get(name)]:
            logger.info("Training takes no notice of %s; tests and predictions do.", ", ".join(unused))
        share_folder(self.trainer)
        self.say_size()
        self.trained_on = list(data.class_names)
        self.model.set_classes(data.class_names, words=False)  # which may be those of other classes
        network, transform = self.model, getattr(self.pre_processor, "transform", None)
        made_by = self.fingerprint, network.visual.layers, network.image_size, transform, self.trainer.precision
        data.cache(self._taps, " ".join(map(str, made_by)))

    def on_train_end(self) -> None:
        """From now on a zero-shot model, of no class yet."""
        self.trained = True
        self.model.forget_classes()
        kept = [one for one in self.trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
        best = next((one for one in kept if one.monitor == BEST), None)
        if best is not None and best.best_model_score is not None and self.trainer.is_global_zero:
            logger.info(
                "The best layers, with a pixel AP of %.1f %% on held-out images, are in %s; the model at hand has "
                "those of the last epoch.",
                *(100 * float(best.best_model_score), best.best_model_path),
            )

    def _taps(self, batch: ImageBatch) -> tuple[DualPathFeatures, torch.Tensor]:
        images, masks = cast("torch.Tensor", batch.image), cast("torch.Tensor", batch.gt_mask)
        if transform := getattr(self.pre_processor, "transform", None):
            images, masks = transform(images, masks)
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            features = self.model.visual(images.to(self.device))
        return DualPathFeatures(*([tokens.cpu() for tokens in taps] for taps in features)), masks

    def training_step(self, batch: ZeroShotBatch, batch_idx: int = 0) -> STEP_OUTPUT:
        """Focal and Dice loss, summed over the taps."""
        del batch_idx
        masks = cast("torch.Tensor", batch.gt_mask)
        if batch.features is None:
            focal, dice = self.model.loss_of_pictures(cast("torch.Tensor", batch.image), masks, batch.class_index)
        else:
            focal, dice = self.model.loss(batch.features.original, masks, batch.class_index)
        loss = focal + dice
        parts = {"train_loss": loss, "train_focal": focal, "train_dice": dice}
        self.log_dict(parts, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=len(masks))
        return loss

    def prepare_classes(self) -> None:
        """Refuse to score with untrained layers; else as SDP, with a warning of categories that were trained on."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            return
        self.check_trained()
        if self.trainer.validating and isinstance(datamodule_of(self.trainer), AuxiliaryDataModule):
            logger.info("The layers are trained already; fit validates them and does not go on with them.")
        super().prepare_classes()
        if self._uncalibrated:
            # anomalib takes a checkpoint's thresholds for granted, but a training run has none for these data.
            self._uncalibrated = False
            self.calibrate()
        if seen := sorted(set(self.model.class_names) & set(self.trained_on)):
            logger.warning(
                "The layers were trained on %s: what they score there is not a zero-shot result.", ", ".join(seen)
            )

    @property
    def _more_follow(self) -> bool:
        return super()._more_follow or (self._uncalibrated and hasattr(datamodule_of(self.trainer), "val_data"))

    def prepare_export(self, datamodule: AnomalibDataModule | None = None) -> None:
        """Refuse to export untrained layers."""
        self.check_trained()
        super().prepare_export(datamodule)

    def check_trained(self) -> None:
        """Refuse to go on with untrained layers.

        Raises:
            InputError: If nothing was trained or loaded.
        """
        if not self.trained:
            what = f"{DEMO} or a file" if self.hparams.get("backbone") == DEMO else "a file"
            msg = (
                f"SDP+ has no trained layers yet; give adapter {what}, or train it: "
                "anomalib fit --config configs/sdp_plus_train_visa.yaml."
            )
            raise InputError(msg)

    def calibrate(self) -> None:
        """Set score ranges and thresholds from validation data, as anomalib does where there is no checkpoint."""
        data, post_processor = datamodule_of(self.trainer), self.post_processor
        if not isinstance(post_processor, ClipAdPostProcessor) or data is None or not hasattr(data, "val_data"):
            return
        logger.info("Setting thresholds from %d validation images.", len(data.val_data))
        trainer = self.trainer
        post_processor.forget_images()
        for number, batch in enumerate(self._validation_batches(data)):
            if isinstance(self.pre_processor, PreProcessor):
                self.pre_processor.on_validation_batch_start(trainer, self, batch, number)
            with trainer.precision_plugin.val_step_context():
                post_processor.on_validation_batch_end(trainer, self, self.predict_step(batch))
        post_processor.on_validation_epoch_end(trainer, self)

    def _validation_batches(self, data: AnomalibDataModule) -> Iterator[Batch]:
        strategy = self.trainer.strategy
        for batch in cast("Iterator[Batch]", strategy.process_dataloader(data.val_dataloader())):
            yield strategy.batch_to_device(batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the layers and what they were trained on."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[IDENTITY]["trained_on"] = self.trained_on
        checkpoint["hyper_parameters"]["adapter"] = None  # it is in the checkpoint itself

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the layers; a training run's checkpoint leaves the class open."""
        super().on_load_checkpoint(checkpoint)
        found = checkpoint[IDENTITY]
        fitted, trained_on = found.get("fitted"), found.get("trained_on", [])
        if problem := difference({"fitted": fitted}, {"fitted": True}, IDENTITY):
            raise damaged(problem)
        if not isinstance(trained_on, list) or not all(isinstance(name, str) for name in trained_on):
            problem = f"has trained_on {trained_on!r}"
            raise damaged(problem)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._check_resumable(checkpoint)
        self.trained = True
        self.trained_on = trained_on
        if fitted:
            self.restored, self._uncalibrated = False, True
            self.model.forget_classes()
            own = self.state_dict()
            checkpoint["state_dict"] |= {
                key: own[key]
                for key in own
                if key.startswith(("model.text_features", "model._extra_state", *OF_CLASSES))
            }

    def _check_resumable(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint without the state of a training run, or with one that does not fit."""
        if "optimizer_states" not in checkpoint or "lr_schedulers" not in checkpoint:
            msg = "The checkpoint cannot be resumed, because it has no optimiser; give the last.ckpt beside it."
            raise InputError(msg)
        optimizer = self.configure_optimizers()
        parameters = list(self.model.trained_layers.parameters())
        state = {index: {"exp_avg": value, "exp_avg_sq": value} for index, value in enumerate(parameters)}
        expected = [{**optimizer.state_dict(), "state": state}]
        problem = difference(checkpoint["optimizer_states"], expected, "the optimiser")
        loops = {"fit_loop": self.trainer.fit_loop.state_dict()}
        problem = problem or difference(checkpoint.get("loops"), loops, "loops")
        if problem:
            raise damaged(problem)
