"""An open_clip model, built and filled from a file: the vision tower at once, the text tower when it is needed."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.transformer import QuickGELU
from torch import nn

from anomalib_clipad.components.pretrained import first_line
from anomalib_clipad.components.weights import check_tensors, map_tensors, stand_in, values_of
from anomalib_clipad.errors import InputError

SPARE = 0.1  # of a file: pages read that may stay in memory beyond its size
MASK = "attn_mask"  # the one buffer of open_clip's towers that no file holds


class Architecture:
    """What open_clip builds a CLIP from.

    Args:
        backbone: Its name, for messages.
        config: open_clip's ``model_cfg``.
        quick_gelu: Whether it was trained with the approximate GELU.

    Attributes:
        config: ``config``, with ``quick_gelu`` where it is wanted.

    Raises:
        InputError: If the configuration is not that of a plain CLIP.

    Example:
        >>> vision = {"image_size": 32, "layers": 4, "width": 16, "head_width": 8, "patch_size": 8}
        >>> text = {"width": 8, "heads": 1, "layers": 2}
        >>> small = Architecture("small", {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text})
        >>> empty = small.build_empty(whole=False)
        >>> empty.visual.proj.device, len(empty.transformer.resblocks), small.build().visual.proj.device
        (device(type='meta'), 1, device(type='cpu'))
    """

    def __init__(self, backbone: str, config: Mapping[str, Any], quick_gelu: bool = False) -> None:
        if "multimodal_cfg" in config:
            msg = (
                f"backbone {backbone} is a captioning model; the dual path needs a plain CLIP such as "
                "ViT-B-16-plus-240."
            )
            raise InputError(msg)
        self.backbone = backbone
        self.config = {**config, "text_cfg": {**config["text_cfg"]}}
        self.foreign_text = "hf_model_name" in config["text_cfg"]
        if self.foreign_text:  # its weights come with the CLIP's
            self.config["text_cfg"]["hf_model_pretrained"] = False
        if quick_gelu:
            self.config["quick_gelu"] = True

    def build(self) -> nn.Module:
        """A CLIP in eval mode, frozen; its weights are random, and the same in every process.

        Raises:
            InputError: If open_clip cannot build it.
        """
        try:
            with torch.random.fork_rng(devices=[]):
                # A checkpoint made with random weights fits those of another process. Not torch.manual_seed, which
                # seeds GPUs, too.
                torch.default_generator.manual_seed(0)
                return self._build(whole=True)
        except Exception as error:  # a configuration of wrong values fails anywhere in open_clip, timm and torch
            built_by = f"open_clip {version('open_clip_torch')}"
            reason = f"{type(error).__name__}: {first_line(error)}"
            msg = f"{built_by} cannot build backbone {self.backbone} ({reason}); check its model_cfg."
            raise InputError(msg) from error

    def build_empty(self, whole: bool) -> nn.Module:
        """As :meth:`build`, without the memory of the weights (torch's meta device) where the towers allow it.

        Args:
            whole: Whether the text tower is wanted; else it has one block, as open_clip can build none without.
        """
        try:
            with torch.device("meta"):
                clip = self._build(whole)
        except Exception:  # noqa: BLE001 - some towers compute with values while they are built
            return self.build()
        brought = clip.state_dict()
        if any(name not in brought and name.rpartition(".")[2] != MASK for name, _ in clip.named_buffers()):
            return self.build()  # it holds more than a file will bring
        return clip

    def _build(self, whole: bool) -> nn.Module:
        config = {**self.config}
        custom_text = config.pop("custom_text", False) or self.foreign_text
        if not whole:
            config["text_cfg"] = {**config["text_cfg"], "layers": 1}
        clip: nn.Module = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**config)
        return clip.eval().requires_grad_(requires_grad=False)


class LateTextTower:
    """Builds and fills the text tower of a CLIP; a second call does nothing.

    An object, not a function in a function, so that a copy of a model, or a pickled one, fills its own CLIP.

    Args:
        clip: Whose vision tower is filled.
        architecture: What it was built from.
        path: File of the weights.
        trusted: See :func:`load_clip`.

    Example:
        >>> from copy import deepcopy
        >>> from anomalib_clipad.components.backbone import open_backbone
        >>> opened = open_backbone(small_clip)
        >>> own, fill_text = deepcopy((opened.loaded.clip, opened.fill_text))
        >>> fill_text()
        >>> own.token_embedding.weight.is_meta, opened.loaded.clip.token_embedding.weight.is_meta
        (False, True)
    """

    def __init__(self, clip: nn.Module, architecture: Architecture, path: Path, trusted: bool) -> None:
        self.clip, self.architecture, self.path, self.trusted = clip, architecture, path, trusted
        self.changed = _changed(path)
        self.filled = 0  # bytes that were read of the file for the vision tower
        self.has_text = False

    def __call__(self) -> None:
        """Build and fill it.

        Raises:
            InputError: If the file does not fit, or has changed since the vision tower was read.
        """
        if self.has_text:
            return
        if _changed(self.path) != self.changed:
            msg = (
                f"The weights {self.path} have changed since the model was loaded, so its text tower cannot be read; "
                "load it again."
            )
            raise InputError(msg)
        whole = self.architecture.build_empty(whole=True)
        copies, _ = _read(self.clip, self.path, self.trusted, whole.state_dict(), seen=False, filled=self.filled)
        for name, module in whole.named_children():
            if name != "visual":
                setattr(self.clip, name, module)
        self.clip.load_state_dict(copies, strict=False, assign=True)
        for module in self.clip.modules():
            mask = getattr(module, MASK, None)
            if isinstance(mask, torch.Tensor) and mask.is_meta:
                setattr(module, MASK, torch.full(mask.shape, -torch.inf).triu_(1))  # causal, as open_clip makes it
        self.has_text = True


def load_clip(architecture: Architecture, path: Path, trusted: bool = False) -> tuple[nn.Module, LateTextTower]:
    """Build a CLIP, and fill its vision tower with the weights of a file.

    The file is mapped, and its tensors are copied: a model that kept to the mapping would end the process when somebody
    writes to the file. Where copies and pages read would take more memory than the file, it is mapped anew, which frees
    the pages.

    Args:
        architecture: What the weights belong to.
        path: See :func:`anomalib_clipad.components.weights.read_tensors`.
        trusted: Whether a TorchScript file may be read, as OpenAI published its weights.

    Returns:
        The CLIP, in eval mode, frozen, and what builds and fills its text tower when it is called.

    Raises:
        InputError: If the file cannot be read or does not fit; the text tower's tensors are not looked at.
    """
    clip = architecture.build_empty(whole=False)
    text_tower = LateTextTower(clip, architecture, path, trusted)
    copies, text_tower.filled = _read(clip, path, trusted, clip.state_dict(), seen=True, filled=0)
    clip.load_state_dict(copies, strict=False, assign=True)
    return clip, text_tower


def _read(
    clip: nn.Module, path: Path, trusted: bool, expected: Mapping[str, torch.Tensor], seen: bool, filled: int
) -> tuple[dict[str, torch.Tensor], int]:
    """Copies of the tensors of the vision tower (``seen``), or of the others, and the bytes read so far."""
    what, advice = f"The weights {path}", "choose the backbone that they were saved from"
    script = _torchscript(path) if trusted else None

    def open_file() -> dict[str, Any]:
        return _names_of_open_clip(script or map_tensors(path, "weights file"), clip)

    state, mapped, size = open_file(), 0, path.stat().st_size
    expected = {name: tensor for name, tensor in expected.items() if _is_seen(name) is seen}
    names = [name for name in state if _is_seen(name) is seen]  # in the order of the file, a disk's fastest
    check_tensors({name: stand_in(state[name]) for name in names}, expected, what, advice, read=())
    copies: dict[str, torch.Tensor] = {}
    upcoming = None
    for name, following in zip_longest(names, names[1:]):
        values = values_of(state[name]) if upcoming is None else upcoming
        bytes_read = values.nbytes
        if mapped > SPARE * size and filled + mapped + bytes_read > size:
            state, mapped = open_file(), 0
            values = values_of(state[name])
        # The next values are asked for before these are copied: safetensors has them read meanwhile.
        upcoming = None if following is None else values_of(state[following])
        copy = {name: values.to(expected[name].dtype, copy=True)}
        copies |= check_tensors(copy, {name: expected[name]}, what, advice)  # which the cache still has
        filled, mapped = filled + bytes_read, mapped + bytes_read
    return copies, filled


def fingerprint(module: nn.Module) -> str:
    """A short name for a module: equal weights and activation, equal name.

    Args:
        module: Any module; a sample of each parameter is read, and whether CLIP's approximate GELU is in use, which the
            weights do not tell.

    Returns:
        Twelve hexadecimal digits.

    Raises:
        InputError: If ``module`` is not a module.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> before = fingerprint(layer)
        >>> _ = layer.weight.data.add_(1)
        >>> before == fingerprint(layer)
        False
    """
    if not isinstance(module, nn.Module):
        msg = f"fingerprint takes a torch module, got a {type(module).__name__}."
        raise InputError(msg)
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        values = parameter.detach().flatten()
        sample = values[:: max(1, values.numel() // 256)].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    for name, part in module.named_modules():
        if isinstance(part, QuickGELU):
            digest.update(name.encode())
    return digest.hexdigest()[:12]


def _is_seen(name: str) -> bool:
    """Whether a tensor is of the vision tower, or of what both towers share."""
    return name.startswith(("visual.", "logit_"))


def _names_of_open_clip(content: Mapping[str, Any], clip: nn.Module) -> dict[str, Any]:
    """The state dict in a file, with the names that open_clip has today."""
    state = content["state_dict"] if isinstance(content.get("state_dict"), Mapping) else content
    state = {str(key).removeprefix("module."): value for key, value in state.items()}
    state.pop("text.transformer.embeddings.position_ids", None)
    return convert_to_custom_text_state_dict(state) if hasattr(clip, "text") else state


def _changed(path: Path) -> tuple[int, int] | None:
    try:
        return path.stat().st_size, path.stat().st_mtime_ns
    except OSError:
        return None


def _torchscript(path: Path) -> dict[str, Any] | None:
    """State dict of a TorchScript file, as OpenAI published its weights; nothing if it is not one."""
    try:
        content = torch.jit.load(path, map_location="cpu").state_dict()
    except RuntimeError:
        return None
    return {
        key: value for key, value in content.items() if key not in {"input_resolution", "context_length", "vocab_size"}
    }
