"""Files of SDP+'s linear layers: ours, a checkpoint's, and the authors' release, none of them executed."""

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from anomalib_clipad.components.weights import check_tensors, is_file, read_tensors
from anomalib_clipad.errors import InputError
from anomalib_clipad.files import replacing
from anomalib_clipad.plugin import DEMO, DEMO_FOLDER

PREFIX = "fc."  # the authors' name for the layers, kept in our files
CHECKPOINT_PREFIX = "model.adapter."
TORCH = (".pth", ".pt", ".ckpt", ".bin")  # what reads these by their name would fail
KINDS = "a .safetensors of save_adapter, a checkpoint of ClipAdSdpPlus, or the authors' .pth"


def load_adapter(
    layers: nn.ModuleList,
    path: str | PathLike[str],
    weights: str | None = None,
    taps: Sequence[int] | None = None,
) -> list[str]:
    """Load linear layers from a file.

    Args:
        layers: One ``nn.Linear`` a tap, filled in place.
        path: A file of :func:`save_adapter`, a Lightning checkpoint of SDP+, or the authors' ``.pth``; ``demo`` for
            the layers that belong to the demonstration backbone.
        weights: Fingerprint of the CLIP's weights; a file that names others is refused.
        taps: Blocks that the model taps, counted from 1; a file that names others is refused.

    Returns:
        Categories the layers were trained on, as far as the file says.

    Raises:
        InputError: If the file is missing, of another kind, of another CLIP, of other taps, or has values that are not
            finite.

    Example:
        >>> layers = nn.ModuleList([nn.Linear(4, 3)])
        >>> save_adapter(layers, "adapter.safetensors", trained_on=["candle"])
        >>> load_adapter(layers, "adapter.safetensors")
        ['candle']
    """
    _check_layers(layers)
    if not isinstance(path, str | PathLike) or not str(path):
        msg = f"adapter must be the path of a file, or {DEMO}, got {path!r}."
        raise InputError(msg)
    path = DEMO_FOLDER / "adapter.safetensors" if path == DEMO else Path(path)
    if not is_file(path):
        what = "is a folder" if path.is_dir() else "does not exist"
        msg = f"The adapter {path} {what}; train one with anomalib fit, or give the file of another."
        raise InputError(msg)
    state, metadata = _read(path)
    if len(state) // 2 != len(layers):
        msg = (
            f"The adapter {path} has {len(state) // 2} layers, but the model taps {len(layers)} blocks; "
            "set layers accordingly."
        )
        raise InputError(msg)
    if weights and metadata.get("weights", weights) != weights:
        msg = (
            f"The adapter {path} was trained with other weights of {metadata.get('backbone')} ({metadata['weights']}, "
            f"here {weights}); give the backbone the same pretrained weights."
        )
        raise InputError(msg)
    if taps is not None and metadata.get("layers", list(taps)) != list(taps):
        msg = (
            f"The adapter {path} was trained on the taps {metadata['layers']}, but the model taps {list(taps)}; "
            f"set layers to {metadata['layers']}."
        )
        raise InputError(msg)
    advice = "choose the backbone it was trained with, or train it again"
    layers.load_state_dict(check_tensors(state, layers.state_dict(), f"The layers of the adapter {path}", advice))
    return list(metadata.get("trained_on", ()))


def save_adapter(layers: nn.ModuleList, path: str | PathLike[str], /, **metadata: Any) -> None:  # noqa: ANN401 - any JSON
    """Save linear layers as safetensors, with what they belong to.

    Args:
        layers: One ``nn.Linear`` a tap.
        path: Where to; a file there is replaced once the new one is complete.
        **metadata: Plain data kept in the file's header, such as ``backbone`` or ``trained_on``.

    Raises:
        InputError: If the file cannot be written, the layers are not finite, or the metadata are not plain data.

    Example:
        >>> save_adapter(nn.ModuleList([nn.Linear(4, 3)]), "adapter.safetensors", backbone="ViT-B-32")
    """
    _check_layers(layers)
    if not isinstance(path, str | PathLike) or not Path(path).name:
        msg = f"path must be that of a file to write, got {path!r}."
        raise InputError(msg)
    if Path(path).suffix in TORCH:
        msg = f"Layers are saved as safetensors, got {path}; give it the ending .safetensors."
        raise InputError(msg)
    state = {PREFIX + key: value.detach().cpu().contiguous() for key, value in layers.state_dict().items()}
    if not all(value.isfinite().all() for value in state.values()):
        msg = "The layers have values that are not finite, so they are not saved; train them with a smaller lr."
        raise InputError(msg)
    try:
        header = {key: json.dumps(value) for key, value in metadata.items()}
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"An adapter's metadata must be plain data that JSON can hold, got {metadata!r} ({error})."
        raise InputError(msg) from error
    try:
        with replacing(Path(path)) as draft:
            save_file(state, draft, metadata=header)
    except (OSError, ValueError, SafetensorError) as error:
        msg = (
            f"The adapter could not be written to {path} ({error}); choose a folder that exists and can be written to."
        )
        raise InputError(msg) from error


def _check_layers(layers: nn.ModuleList) -> None:
    if not isinstance(layers, nn.ModuleList) or not all(isinstance(layer, nn.Linear) for layer in layers):
        msg = f"layers must be a ModuleList of linear layers, one a tap, got a {type(layers).__name__}."
        raise InputError(msg)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    """Values with keys ``0.weight``, ``0.bias``, ... and metadata."""
    content, header = read_tensors(path, "adapter", checkpoint=True)
    values: object = content
    metadata: object = {key: _plain(value) for key, value in header.items()}
    prefix = PREFIX
    if "linear_layers" in content:
        values = content["linear_layers"]
    elif "clip_ad" in content:
        values, metadata, prefix = content.get("state_dict"), content["clip_ad"], CHECKPOINT_PREFIX
    if not isinstance(values, Mapping) or not isinstance(metadata, Mapping):
        values, metadata = {}, {}
    state = {str(key).removeprefix(prefix): value for key, value in values.items() if str(key).startswith(prefix)}
    names = {f"{tap}.{kind}" for tap in range(len(state) // 2) for kind in ("weight", "bias")}
    if not state or set(state) != names:
        msg = f"The file {path} is not an adapter: it has no linear layers {PREFIX}0, {PREFIX}1, ...; give {KINDS}."
        raise InputError(msg)
    _check_metadata(path, metadata)
    return state, metadata


def _plain(value: str) -> object:
    """A value of the header; other programs write text there that is not JSON."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _check_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    for key, kind, items in (("weights", str, str), ("layers", list, int), ("trained_on", list, str)):
        value = metadata.get(key, kind())
        if not isinstance(value, kind) or not all(type(item) is items for item in value):
            msg = f"The adapter {path} is damaged: its {key} are {value!r}; save it again, or train it again."
            raise InputError(msg)
