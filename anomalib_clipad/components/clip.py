"""An open_clip model, built without weights and filled from a file: the vision tower at once, the text tower later."""

from collections.abc import Callable, Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import convert_to_custom_text_state_dict
from torch import nn

from anomalib_clipad.components.pretrained import first_line
from anomalib_clipad.components.weights import check_tensors, read_tensors
from anomalib_clipad.errors import InputError

SPARE = 0.1  # of a file: pages read that may stay in memory beyond its size
MASK = "attn_mask"  # the one buffer of open_clip's towers that no file holds


def build_clip(backbone: str, config: Mapping[str, Any], quick_gelu: bool = False, empty: bool = False) -> nn.Module:
    """Build an open_clip model.

    Args:
        backbone: Its name, for messages.
        config: open_clip's ``model_cfg``.
        quick_gelu: Whether it was trained with the approximate GELU.
        empty: Leave the memory of the weights out (torch's meta device) where the towers allow it, for
            :func:`fill_clip`; else the weights are random, and the same in every process.

    Raises:
        InputError: If the configuration is not that of a plain CLIP, or open_clip cannot build it.

    Example:
        >>> vision = {"image_size": 32, "layers": 4, "width": 16, "head_width": 8, "patch_size": 8}
        >>> text = {"width": 8, "heads": 1, "layers": 1}
        >>> clip = build_clip("small", {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}, empty=True)
        >>> clip.visual.proj.device
        device(type='meta')
    """
    if "multimodal_cfg" in config:
        msg = f"backbone {backbone} is a captioning model; the dual path needs a plain CLIP such as ViT-B-16-plus-240."
        raise InputError(msg)
    config = {**config, "text_cfg": {**config["text_cfg"]}}
    foreign_text = "hf_model_name" in config["text_cfg"]
    if foreign_text:  # its weights come with the CLIP's
        config["text_cfg"]["hf_model_pretrained"] = False
    custom_text = config.pop("custom_text", False) or foreign_text
    if quick_gelu:
        config["quick_gelu"] = True
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    if empty and (clip := _build_empty(kind, config)) is not None:
        return clip
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a checkpoint made with random weights fits those of another process
            return kind(**config)
    except Exception as error:  # a configuration of wrong values fails anywhere in open_clip, timm and torch
        reason = f"{type(error).__name__}: {first_line(error)}"
        msg = (
            f"open_clip {version('open_clip_torch')} cannot build backbone {backbone} ({reason}); check its model_cfg."
        )
        raise InputError(msg) from error


def _build_empty(kind: Callable[..., nn.Module], config: Mapping[str, Any]) -> nn.Module | None:
    """The model on the meta device; nothing where it cannot be built there, or holds more than a file will bring."""
    try:
        with torch.device("meta"):
            clip = kind(**config)
    except Exception:  # noqa: BLE001 - some towers compute with values while they are built
        return None
    brought = clip.state_dict()
    if any(name not in brought and name.rpartition(".")[2] != MASK for name, _ in clip.named_buffers()):
        return None
    return clip


def fill_clip(clip: nn.Module, path: Path, trusted: bool = False) -> Callable[[], None]:
    """Fill a model with the weights of a file, without its text tower.

    The file is mapped, and its tensors are copied: a model that kept to the mapping would end the process when somebody
    writes to the file. Where copies and pages read would take more memory than the file, it is mapped anew, which frees
    the pages.

    Args:
        clip: From :func:`build_clip`.
        path: See :func:`anomalib_clipad.components.weights.read_tensors`.
        trusted: Whether a TorchScript file may be read, as OpenAI published its weights.

    Returns:
        A function that fills the text tower; a second call does nothing.

    Raises:
        InputError: If the file cannot be read or does not fit, or has changed when the returned function is called,
            which alone looks at the values of the text tower.
    """
    script = _torchscript(path) if trusted else None
    expected = clip.state_dict()
    what, advice = f"The weights {path}", "choose the backbone that they were saved from"

    def read(chosen: Callable[[str], bool], copied: Collection[str]) -> dict[str, torch.Tensor]:
        def wanted(name: str) -> bool:
            # Names of the vision tower alone are the same in all files.
            return chosen is not _is_seen or (chosen(own := name.removeprefix("module.")) and own not in copied)

        state = script or read_tensors(path, "weights file", mapped=wanted)[0]
        return check_tensors(_names_of_open_clip(state, clip), expected, what, advice, read=())

    def fill(chosen: Callable[[str], bool], filled: int) -> tuple[list[str], int]:
        copies: dict[str, torch.Tensor] = {}
        state, mapped, size = read(chosen, copies), 0, path.stat().st_size
        for name in [name for name in state if chosen(name)]:  # in the order of the file, in which a disk is fastest
            bytes_read = state[name].nbytes
            if mapped > SPARE * size and filled + mapped + bytes_read > size:
                state, mapped = read(chosen, copies), 0
            copy = {name: state[name].to(expected[name].dtype, copy=True)}
            copies |= check_tensors(copy, {name: expected[name]}, what, advice)  # which the cache still has
            filled, mapped = filled + bytes_read, mapped + bytes_read
        clip.load_state_dict(copies, strict=False, assign=True)
        return [name for name in state if not chosen(name)], filled

    changed = _changed(path)
    waiting, seen = fill(_is_seen, 0)

    def fill_text() -> None:
        if not waiting:
            return
        if _changed(path) != changed:
            msg = f"{what} have changed since the model was loaded, so its text tower cannot be read; load it again."
            raise InputError(msg)
        fill(waiting.__contains__, seen)
        for module in clip.modules():
            mask = getattr(module, MASK, None)
            if isinstance(mask, torch.Tensor) and mask.is_meta:
                setattr(module, MASK, torch.full(mask.shape, -torch.inf).triu_(1))  # causal, as open_clip makes it
        waiting.clear()

    return fill_text


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
