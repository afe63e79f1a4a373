"""Checkpoints of a zero-shot CLIP model: everything but the CLIP, which comes from its own weights."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from anomalib_clipad.components import PromptEnsemble, fingerprint
from anomalib_clipad.engine.checkpoint_file import UNREADABLE, check_is_checkpoint, unreadable
from anomalib_clipad.engine.checkpoint_parts import VERSION, check_parts, damaged, difference
from anomalib_clipad.engine.checkpoint_state import EXTRA_STATE, as_written_today, check_state
from anomalib_clipad.engine.classes import ClassesMixin
from anomalib_clipad.engine.host import has_validation
from anomalib_clipad.engine.products import Products
from anomalib_clipad.errors import InputError

logger = logging.getLogger(__name__)

SIGMA, SIZE = "sigma", "image_size"
IDENTITY = "clip_ad"  # key of our part of a checkpoint
# Arguments of which a checkpoint holds the outcome.
OUTCOMES = ("k_shot", "few_shot_source", "augment_references", "false_alarm_rate")
# Not saved: CLIP comes from its own weights, the metrics from the arguments.
NOT_SAVED = ("model.visual.", "evaluator.")


class CheckpointMixin(ClassesMixin):
    """Saves and restores a model without its CLIP; see :class:`anomalib_clipad.engine.module.ZeroShotMixin`."""

    fingerprint: str  # of the CLIP's weights as they were loaded, before any change of precision
    automatic_size: bool

    def restore_size(self, identity: Mapping[str, Any]) -> None:
        """Take over the size of the input; for the models to fill."""
        raise NotImplementedError

    def identify(self, visual: nn.Module) -> None:
        """Remember which CLIP this is."""
        self.fingerprint = fingerprint(visual)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        tile_size, region = self.model.tile_size, self.model.region.given
        layers = list(self.model.visual.layers)
        references = [layers[tap] for tap in self.model.reference_taps]
        return {
            "model": type(self).__name__,
            "backbone": str(self.hparams.get("backbone")),
            "weights": self.fingerprint,
            "layers": layers,
            "image_size": list(self.model.image_size),
            "tiles": None if tile_size is None else [*tile_size, self.model.tile_overlap],
            "region": None if region is None else region.digest,
            "reference_layers": None if references == layers else references,
            SIGMA: self.hparams.get(SIGMA),
        }

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # noqa: ANN401 - Lightning's
        """Build a model from a checkpoint, see :meth:`anomalib.models.components.AnomalibModule.load_from_checkpoint`.

        Raises:
            InputError: If the file cannot be read, or is another model's.
        """
        check_is_checkpoint(checkpoint_path)
        try:
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        except InputError:
            raise
        except UNREADABLE as error:
            raise InputError(unreadable(checkpoint_path, error)) from error

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as torch has it
        """Load a state dict, also one without the CLIP, as checkpoints have it."""
        extra = state_dict.get(EXTRA_STATE)
        size = extra.get(SIZE) if isinstance(extra, Mapping) else None
        if size not in (None, here := list(self.model.image_size)):
            if not self.automatic_size:
                msg = f"The state dict is of a model with image_size {size}, and this one has {here}; give it that one."
                raise InputError(msg)
            self.restore_size({SIZE: size})
        self.forget_measured()
        own = {key: value for key, value in self.state_dict().items() if key.startswith((*NOT_SAVED, EXTRA_STATE))}
        return super().load_state_dict({**own, **as_written_today(state_dict)}, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is not CLIP, and the name of the CLIP it belongs to."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"] = {
            key: value for key, value in checkpoint["state_dict"].items() if not key.startswith(NOT_SAVED)
        }
        prompts = checkpoint["hyper_parameters"].get("prompts")
        if isinstance(prompts, PromptEnsemble):
            checkpoint["hyper_parameters"]["prompts"] = asdict(prompts)
        for name in ("few_shot_source", "region"):  # paths become texts, which any reader takes
            if isinstance(checkpoint["hyper_parameters"].get(name), Path):
                checkpoint["hyper_parameters"][name] = str(checkpoint["hyper_parameters"][name])
        fitted = self.trainer.state.fn == TrainerFn.FITTING
        checkpoint[IDENTITY] = {**self.identity(), "class_names": list(self.model.class_names), "fitted": fitted}
        if folders := Products(self.class_name).folders:
            checkpoint[IDENTITY]["folders"] = folders

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over text vectors, score ranges and thresholds, if they were made with this CLIP.

        Raises:
            InputError: If the checkpoint is another model's, of another CLIP, or damaged.
        """
        found = checkpoint.get(IDENTITY)
        if not isinstance(found, Mapping):
            msg = f"The checkpoint is not one of {type(self).__name__}; give the model.ckpt that its test run wrote."
            raise InputError(msg)
        own = self.identity()
        differing = [key for key in own if found.get(key) != own[key]]
        if SIGMA not in found or found.get("fitted") is True:  # an earlier version's, or layers, which know no sigma
            differing = [key for key in differing if key != SIGMA]
        if self.automatic_size and "image_size" in differing:
            differing.remove("image_size")  # taken over below
        if differing and differing != ["backbone"]:  # the same weights under another name are the same CLIP
            sides = "; ".join(f"{key} was {found.get(key)!r}, here it is {own[key]!r}" for key in differing)
            msg = f"The checkpoint does not fit this model: {sides}; give the model the arguments it was made with."
            raise InputError(msg)
        self._check_components(checkpoint)
        try:
            super().on_load_checkpoint(checkpoint)
        except UNREADABLE as error:
            problem = f"has settings of a component that cannot be used ({type(error).__name__})"
            raise damaged(problem) from error
        self.restore_size(found)
        self._restore_folders(found.get("folders"))
        if found.get("fitted") is not True:
            self._warn_of_unused(checkpoint.get("hyper_parameters"))
        names = found.get("class_names", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            problem = f"has the classes {names!r}"
            raise damaged(problem)
        if not isinstance(checkpoint.get("state_dict"), Mapping):
            problem = "has no state_dict"
            raise damaged(problem)
        state = as_written_today(checkpoint["state_dict"])
        state.setdefault(EXTRA_STATE, {"class_names": names})
        expected = {key: value for key, value in self.state_dict().items() if not key.startswith(NOT_SAVED)}
        check_state(state, expected, fitted=found.get("fitted") is True)
        checkpoint["state_dict"] = state
        self.restored = True
        self.forget_measured()

    def _warn_of_unused(self, of_checkpoint: object) -> None:
        kept = of_checkpoint if isinstance(of_checkpoint, Mapping) else {}
        asked = {name: value for name in OUTCOMES if (value := self.hparams.get(name))}
        if self._trainer is not None and self.trainer.validating and has_validation(self.trainer):
            asked.pop("false_alarm_rate", None)  # by which the thresholds are set anew
        if unused := [f"{name} {value}" for name, value in asked.items() if str(value) != str(kept.get(name))]:
            logger.warning(
                "The checkpoint's references and thresholds are used, %s is not; leave the checkpoint out for that.",
                ", ".join(unused),
            )

    def _restore_folders(self, folders: object) -> None:
        if folders is None or self.class_name is not None:
            return
        try:
            self.class_name = dict(cast("Mapping[str, str]", folders))
            Products(self.class_name)
        except (InputError, *UNREADABLE) as error:
            self.class_name, problem = None, f"has the folders {folders!r}"
            raise damaged(problem) from error

    def _check_components(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse settings and states that do not fit the components, which take over anything."""
        check_parts({VERSION: "0", **checkpoint})
        for key, component in self._checkpointable_components().items():
            own = component.checkpoint_config() if isinstance(component, PostProcessor) else {}
            if problem := difference(checkpoint.get(key, {}), own, key):
                raise damaged(problem)
        for component in self.children():
            states = checkpoint.get("callbacks", {})
            if not isinstance(component, Callback) or not isinstance(component, nn.Module):
                continue
            found, own = states.get(component.state_key, {}), component.state_dict()
            for path, module in component.named_modules():
                for name in getattr(module, "growing", ()):  # of any length, and absent from earlier versions
                    key = f"{path}.{name}" if path else name
                    own.pop(key)
                    found = {other: value for other, value in found.items() if other != key}
            if problem := difference(found, own, component.state_key):
                raise damaged(problem)
            if found and set(found) != set(own):
                problem = f"has other values than {component.state_key}"
                raise damaged(problem)
