"""SDP+ in anomalib's engine and command line."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType
from anomalib.callbacks.checkpoint import ModelCheckpoint
from anomalib.data import AnomalibDataModule, Batch, ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn

from anomalib_clipad.components import DualPathFeatures
from anomalib_clipad.data import AuxiliaryDataModule
from anomalib_clipad.engine.metrics import paper_evaluator
from anomalib_clipad.engine.module import IDENTITY, ZeroShotMixin
from anomalib_clipad.errors import InputError
from anomalib_clipad.sdp_plus.adapter import load_adapter, save_adapter
from anomalib_clipad.sdp_plus.torch_model import ClipAdSdpPlusModel

logger = logging.getLogger(__name__)

PAPER_EPOCHS = 5
LIGHTNINGS_EPOCHS = 1000  # what its trainer takes when nothing is said


class ClipAdSdpPlus(ZeroShotMixin, AnomalibModule):
    """CLIP-AD's SDP+: SDP with linear layers, trained once on another data set (arXiv 2311.00453).

    Train it with anomalib fit on an AuxiliaryDataModule, never on the data it is meant for; or give it trained layers.
    From then on it is a zero-shot model like SDP.

    Args:
        adapter: Trained linear layers: a file of save_adapter (.safetensors), a checkpoint of a training run (.ckpt),
            or the authors' release (.pth); demo for those of the demonstration backbone. None for layers that are
            still to be trained.
        class_name: What the images show, such as "metal nut". By default the data module's category, else its name,
            else "object".
        backbone: CLIP architecture: a name that open_clip knows, hf-hub:ORG/NAME, or a folder with an
            open_clip_config.json; or demo, a small one in this package, to try things out with.
        pretrained: Weights of the backbone: open_clip's tag, or a local file (.pt, .bin, .safetensors). None means
            random weights, unless the backbone is a folder or on a hub, which bring their own.
        layers: Blocks of the vision tower to look at, counted from 1. By default the ends of the tower's four stages.
        rvs: How one text vector is chosen from many prompts: mean, pca, kde, dbscan or mean_shift, or a mapping of
            method and its options, such as {method: dbscan, eps: 1.5, min_samples: 25} for VisA.
        prompts: Prompt ensemble: industrial (the paper's), medical (ours), the path of a YAML file, or a mapping with
            normal_states, anomalous_states and templates.
        image_size: Side of the input in pixels, or height and width; multiples of the patch size.
        sigma: Standard deviation, in pixels, of the smoothing of the anomaly map. By default 8 at 240 pixels and in
            proportion at other sizes; the paper's VisA runs use 2.
        lr: Learning rate of Adam.
        pre_processor: Pre-processor, or whether to use the default: bicubic resize and CLIP's normalisation.
        post_processor: Post-processor, or whether to use the default: scores and maps in [0, 1], labels and masks.
        evaluator: Evaluator, or whether to use the default: AUROC, F1Max, AP of images and pixels, AUPRO, F1Score.
        visualizer: Visualizer, or whether to use anomalib's default.

    Raises:
        InputError: If an argument cannot be used.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_clipad.data import AuxiliaryDataModule
        >>> model = ClipAdSdpPlus(backbone=small_clip)
        >>> engine = Engine(max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False)
        >>> engine.fit(model, datamodule=AuxiliaryDataModule(widgets, num_workers=0))
        >>> model.save_adapter("adapter.safetensors")
        >>> ClipAdSdpPlus(adapter="adapter.safetensors", backbone=small_clip).trained_on
        ['widget']
    """

    model: ClipAdSdpPlusModel
    _uncalibrated: bool = False  # whether the layers came with a checkpoint that holds no thresholds

    def __init__(
        self,
        adapter: str | None = None,
        class_name: str | None = None,
        backbone: str = "ViT-B-16-plus-240",
        pretrained: str | None = "laion400m_e31",
        layers: list[int] | None = None,
        rvs: str | dict[str, Any] = "dbscan",
        prompts: str | dict[str, Any] = "industrial",
        image_size: int | tuple[int, int] | None = None,
        sigma: float | None = None,
        lr: float = 1e-4,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        model = ClipAdSdpPlusModel(
            backbone=backbone,
            pretrained=pretrained,
            layers=layers,
            rvs=rvs,
            prompts=prompts,
            image_size=image_size,
            sigma=sigma,
        )
        if evaluator is True and adapter is None:
            evaluator = paper_evaluator(validate=True)
        super().__init__(*self.components_for(model, pre_processor, post_processor), evaluator, visualizer)
        self.adopt(model, class_name)
        self.lr = lr
        self.trained = adapter is not None
        self.trained_on = load_adapter(model.adapter, adapter, self._fingerprint) if adapter is not None else []

    @property
    def learning_type(self) -> LearningType:
        """Zero-shot once it is trained; until then anomalib's engine must be willing to train it."""
        return LearningType.ZERO_SHOT if self.trained else LearningType.ONE_CLASS

    def save_adapter(self, path: str | Path) -> None:
        """Write the trained layers as safetensors, with the CLIP, the taps and the categories they belong to.

        Raises:
            InputError: If there is nothing trained to save, or the file cannot be written.
        """
        self._check_trained()
        identity = {**self._identity(), "trained_on": self.trained_on}
        save_adapter(self.model.adapter, path, **identity)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on the linear layers."""
        return torch.optim.Adam(self.model.adapter.parameters(), lr=self.lr)

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Keep the best checkpoint by validation pixel AP while training."""
        callbacks = list(super().configure_callbacks())
        if self.trainer.state.fn == TrainerFn.FITTING and self.evaluator and len(self.evaluator.val_metrics):
            folder = Path(self.trainer.default_root_dir) / "weights" / "lightning"
            callbacks.append(ModelCheckpoint(folder, "model", monitor="pixel_AP", mode="max", save_weights_only=True))
            # Resuming needs the latest state, and the optimiser's.
            callbacks.append(ModelCheckpoint(folder, save_top_k=0, save_last=True))
        return callbacks

    def setup(self, stage: str) -> None:
        """Prepare the trainer."""
        super().setup(stage)
        if stage == "fit" and self.trainer.max_epochs == LIGHTNINGS_EPOCHS:
            logger.info("max_epochs was not set; %d as in the paper.", PAPER_EPOCHS)
            self.trainer.fit_loop.max_epochs = PAPER_EPOCHS

    def on_fit_start(self) -> None:
        """Encode the prompts of all categories, and compute the features if they are to be cached."""
        data = self.trainer.datamodule
        if not isinstance(data, AuxiliaryDataModule):
            msg = (
                f"SDP+ is trained on an AuxiliaryDataModule, got {type(data).__name__}; see configs/"
                "sdp_plus_train_visa.yaml."
            )
            raise InputError(msg)
        self.trained_on = list(data.class_names)
        self.model.set_classes(data.class_names)
        data.cache(self._taps, f"{self._fingerprint} {self.model.visual.layers} {self.model.image_size}")

    def on_train_end(self) -> None:
        """From now on a zero-shot model, of no class yet."""
        self.trained = True
        self.model.forget_classes()

    def _taps(self, batch: ImageBatch) -> tuple[DualPathFeatures, torch.Tensor]:
        transform = self.pre_processor.transform if self.pre_processor else None
        images, masks = transform(batch.image, batch.gt_mask) if transform else (batch.image, batch.gt_mask)
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            features = self.model.visual(images.to(self.device))
        return DualPathFeatures(*([tokens.cpu() for tokens in taps] for taps in features)), masks

    def training_step(self, batch: Batch, *args: object, **kwargs: object) -> STEP_OUTPUT:
        """Focal and Dice loss, summed over the taps."""
        del args, kwargs
        features = self.features(batch)
        if features is None:
            with torch.no_grad():
                features = self.model.visual(batch.image)
        focal, dice = self.model.loss(features.original, batch.gt_mask, batch.class_index.to(self.device))
        loss = focal + dice
        parts = {"train_loss": loss, "train_focal": focal, "train_dice": dice}
        self.log_dict(parts, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=len(batch.gt_mask))
        return loss

    def prepare_classes(self) -> None:
        """Refuse to judge with layers that nobody trained; else as SDP, with a word on categories trained on."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            return
        self._check_trained()
        super().prepare_classes()
        if self._uncalibrated:
            # anomalib takes a checkpoint's thresholds for granted, but a training run has none for these data.
            self._uncalibrated = False
            self.calibrate()
        if seen := sorted(set(self.model.class_names) & set(self.trained_on)):
            logger.warning(
                "The layers were trained on %s: what they score there is not a zero-shot result.", ", ".join(seen)
            )

    def prepare_export(self, datamodule: AnomalibDataModule | None = None) -> None:
        """Refuse to export layers that nobody trained."""
        self._check_trained()
        super().prepare_export(datamodule)

    def _check_trained(self) -> None:
        if not self.trained:
            msg = (
                "SDP+ has no trained layers yet; give adapter a file, or train it: "
                "anomalib fit --config configs/sdp_plus_train_visa.yaml."
            )
            raise InputError(msg)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the layers and what they were trained on."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[IDENTITY]["trained_on"] = self.trained_on
        checkpoint["hyper_parameters"]["adapter"] = None  # it is in the checkpoint itself

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the layers; a training run's checkpoint leaves the class open."""
        super().on_load_checkpoint(checkpoint)
        self.trained = True
        self.trained_on = list(checkpoint[IDENTITY]["trained_on"])
        if checkpoint[IDENTITY]["fitted"]:
            self._restored, self._uncalibrated = False, True
            state = checkpoint["state_dict"]
            self.model.forget_classes()
            state["model.text_features"] = self.model.text_features
