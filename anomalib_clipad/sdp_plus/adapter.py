"""Files of SDP+'s linear layers: ours, a checkpoint's, and the authors' release, none of them executed."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from anomalib.utils.serialization import anomalib_safe_globals
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from anomalib_clipad.errors import InputError
from anomalib_clipad.plugin import DEMO, DEMO_FOLDER

PREFIX = "fc."  # the authors' name for the layers, kept in our files
CHECKPOINT_PREFIX = "model.adapter."
# What the readers of three formats raise at files that are none.
UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, UnpicklingError, SafetensorError)


def load_adapter(layers: nn.ModuleList, path: str | Path, weights: str | None = None) -> list[str]:
    """Load linear layers from a file.

    Args:
        layers: One ``nn.Linear`` a tap, filled in place.
        path: A file of :func:`save_adapter`, a Lightning checkpoint of SDP+, or the authors' ``.pth``; ``demo`` for
            the layers that belong to the demonstration backbone.
        weights: Fingerprint of the CLIP's weights; a file that names others is refused.

    Returns:
        Categories the layers were trained on, as far as the file says.

    Raises:
        InputError: If the file is missing, of another kind, or of another CLIP.

    Example:
        >>> layers = nn.ModuleList([nn.Linear(4, 3)])
        >>> save_adapter(layers, "adapter.safetensors", trained_on=["candle"])
        >>> load_adapter(layers, "adapter.safetensors")
        ['candle']
    """
    path = DEMO_FOLDER / "adapter.safetensors" if path == DEMO else Path(path)
    if not path.is_file():
        msg = f"The adapter {path} does not exist; train one with anomalib fit, or give the file of another."
        raise InputError(msg)
    try:
        state, metadata = _read(path)
    except UNREADABLE as error:
        msg = (
            f"The adapter {path} is none ({type(error).__name__}); give a .safetensors of save_adapter, a checkpoint "
            "of ClipAdSdpPlus, or the authors' .pth."
        )
        raise InputError(msg) from error
    taps, expected = len(state) // 2, len(layers)
    if taps != expected:
        msg = f"The adapter {path} has {taps} layers, but the model taps {expected} blocks; set layers accordingly."
        raise InputError(msg)
    found, own = tuple(state["0.weight"].shape), tuple(layers[0].weight.shape)
    if found != own:
        msg = (
            f"The adapter {path} maps width {found[1]} to {found[0]}, but the backbone needs {own[1]} to {own[0]}; "
            "choose the backbone it was trained with."
        )
        raise InputError(msg)
    if weights and metadata.get("weights", weights) != weights:
        msg = (
            f"The adapter {path} was trained with other weights of {metadata.get('backbone')} ({metadata['weights']}, "
            f"here {weights}); give the backbone the same pretrained weights."
        )
        raise InputError(msg)
    layers.load_state_dict(state)
    return list(metadata.get("trained_on", ()))


def save_adapter(layers: nn.ModuleList, path: str | Path, /, **metadata: Any) -> None:  # noqa: ANN401 - any JSON
    """Save linear layers as safetensors, with what they belong to.

    Args:
        layers: One ``nn.Linear`` a tap.
        path: Where to; a file there is replaced once the new one is whole.
        **metadata: Plain data kept in the file's header, such as ``backbone`` or ``trained_on``.

    Example:
        >>> save_adapter(nn.ModuleList([nn.Linear(4, 3)]), "adapter.safetensors", backbone="ViT-B-32")
    """
    path = Path(path)
    state = {PREFIX + key: value.detach().cpu().contiguous() for key, value in layers.state_dict().items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(state, partial, metadata={key: json.dumps(value) for key, value in metadata.items()})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        msg = (
            f"The adapter could not be written to {path} ({error}); choose a folder that exists and can be written to."
        )
        raise InputError(msg) from error
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    """State dict with keys ``0.weight``, ``0.bias``, ... and metadata."""
    metadata: Mapping[str, Any] = {}
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
        prefix = PREFIX
    else:
        with anomalib_safe_globals():
            content = torch.load(path, map_location="cpu", weights_only=True)
        if "linear_layers" in content:
            content, prefix = content["linear_layers"], PREFIX
        else:
            metadata = content["clip_ad"]
            content, prefix = content["state_dict"], CHECKPOINT_PREFIX
    state = {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
    if sorted(state) != sorted(f"{tap}.{kind}" for tap in range(len(state) // 2) for kind in ("weight", "bias")):
        msg = "no linear layers"
        raise ValueError(msg)
    return state, metadata
