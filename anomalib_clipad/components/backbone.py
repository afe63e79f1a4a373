"""CLIP models of open_clip, with weights from a tag, a file or a hub, loaded without executing them."""

import hashlib
import json
import logging
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any, NamedTuple

import open_clip
import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from anomalib_clipad.components.text_encoder import Tokenizer
from anomalib_clipad.errors import InputError
from anomalib_clipad.plugin import DEMO, DEMO_FOLDER

logger = logging.getLogger(__name__)

HUB_PREFIX = "hf-hub:"
CONFIG_NAME = "open_clip_config.json"
# The names under which open_clip saves to a folder or a hub, the safe one first.
WEIGHT_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
URL_CACHE = Path("~/.cache/clip")  # open_clip's own folder for weights that are not on a hub


class Backbone(NamedTuple):
    """A CLIP and what it takes to feed it.

    Attributes:
        clip: The open_clip model, in eval mode, frozen.
        tokenizer: Turns a list of sentences into (P, context length) tokens.
        mean: Mean of the images' channels it was trained with.
        std: Standard deviation of the channels.

    Example:
        >>> loaded = load_backbone(small_clip)
        >>> loaded.tokenizer(["a bottle"]).shape, loaded.clip.training
        (torch.Size([1, 77]), False)
    """

    clip: nn.Module
    tokenizer: Tokenizer
    mean: tuple[float, float, float] = open_clip.OPENAI_DATASET_MEAN
    std: tuple[float, float, float] = open_clip.OPENAI_DATASET_STD


def load_backbone(backbone: str = "ViT-B-16-plus-240", pretrained: str | None = "laion400m_e31") -> Backbone:
    """Build a CLIP and load its weights.

    Weights already on disk are used without reaching for the network.

    Args:
        backbone: An architecture that open_clip knows, ``hf-hub:ORG/NAME``, or a folder with open_clip's
            ``open_clip_config.json`` (as ``open_clip.push_to_hf_hub`` saves it); or ``demo``, a small CLIP in this
            package, trained on rendered textures, to try things out with and not for inspection work.
        pretrained: open_clip's tag of the weights, or a file with a state dict (``.pt``, ``.bin``, ``.safetensors``).
            ``None`` means random weights, unless ``backbone`` is a folder or a hub name, which bring their own; these
            ignore a tag.

    Returns:
        The model in eval mode, frozen, its tokenizer and its normalisation.

    Raises:
        InputError: If the backbone is unknown, or the weights cannot be found, reached, read or fitted.

    Example:
        >>> clip, tokenizer, mean, std = load_backbone(small_clip)
        >>> clip.encode_image(torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 24])
    """
    folder = DEMO_FOLDER if backbone == DEMO else Path(str(backbone).removeprefix("local-dir:"))
    if backbone == DEMO:
        logger.warning("The demonstration backbone was trained on rendered textures; it is not for inspection work.")
    brings_weights = backbone.startswith(HUB_PREFIX) or folder.is_dir()
    weights = Path(pretrained) if pretrained and Path(pretrained).is_file() else None
    if brings_weights:
        config, found = _from_folder(folder) if folder.is_dir() else _from_hub(backbone)
        preprocess = config.get("preprocess_cfg", {})
        clip = _build(backbone, config["model_cfg"])
        weights = weights or found
        tokenizer = open_clip.get_tokenizer("ViT-B-32", **_tokenizer_options(backbone, config["model_cfg"]))
    else:
        if open_clip.get_model_config(backbone) is None:
            msg = (
                f"backbone must be a name from open_clip.list_models(), {HUB_PREFIX}ORG/NAME, {DEMO} or a folder with "
                f"{CONFIG_NAME}, got {backbone!r}."
            )
            raise InputError(msg)
        preprocess = get_pretrained_cfg(backbone, pretrained) if pretrained and weights is None else {}
        clip = _build(
            backbone, open_clip.get_model_config(backbone), quick_gelu=_needs_quick_gelu(pretrained, preprocess)
        )
        if pretrained and weights is None:
            weights = _from_tag(backbone, pretrained)
        tokenizer = open_clip.get_tokenizer(backbone)

    if weights is None:
        logger.warning(
            "RANDOM WEIGHTS: %s is used without pretrained weights, so its maps and scores mean nothing. "
            "Give pretrained a tag or a file.",
            backbone,
        )
    else:
        _load_weights(clip, weights, trusted=pretrained == "openai")
    return Backbone(
        clip.eval().requires_grad_(requires_grad=False),
        tokenizer,
        tuple(preprocess.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        tuple(preprocess.get("std") or open_clip.OPENAI_DATASET_STD),
    )


def fingerprint(module: nn.Module) -> str:
    """A short name for a module's weights: equal weights, equal name, at the cost of a glance.

    Args:
        module: Any module; its parameters are sampled, not read whole.

    Returns:
        Twelve hexadecimal digits.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> before = fingerprint(layer)
        >>> _ = layer.weight.data.add_(1)
        >>> before == fingerprint(layer)
        False
    """
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        values = parameter.detach().flatten()
        sample = values[:: max(1, values.numel() // 256)].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:12]


def _build(backbone: str, config: dict[str, Any], quick_gelu: bool = False) -> nn.Module:
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
    try:
        # Random weights, where they stay, are the same in every process: a checkpoint made with them fits again.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**config)
    except TypeError as error:
        msg = f"open_clip {version('open_clip_torch')} cannot build backbone {backbone}: {error}."
        raise InputError(msg) from error


def _tokenizer_options(backbone: str, config: dict[str, Any]) -> dict[str, Any]:
    text = config["text_cfg"]
    if "hf_tokenizer_name" in text or "hf_model_name" in text:
        msg = f"backbone {backbone} has a text tower that is not open_clip's own, which a folder or a hub cannot bring."
        raise InputError(msg)
    return {"context_length": text.get("context_length", 77)}


def _needs_quick_gelu(pretrained: str | None, preprocess: dict[str, Any]) -> bool:
    # Older open_clip versions say so only in the code that loads OpenAI's weights.
    return pretrained == "openai" or bool(preprocess.get("quick_gelu"))


def _from_folder(folder: Path) -> tuple[dict[str, Any], Path | None]:
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"backbone folder {folder} needs a readable {CONFIG_NAME} ({error.__class__.__name__} at {path})."
        raise InputError(msg) from error
    if "model_cfg" not in config:
        msg = f"backbone folder {folder}: {CONFIG_NAME} has no model_cfg; save it as open_clip.push_to_hf_hub does."
        raise InputError(msg)
    return config, next((folder / name for name in WEIGHT_NAMES if (folder / name).is_file()), None)


def _from_hub(backbone: str) -> tuple[dict[str, Any], Path]:
    name = backbone.removeprefix(HUB_PREFIX)
    try:
        config = json.loads(_hub_file(name, CONFIG_NAME).read_text(encoding="utf-8"))
        return config, _hub_file(name, *WEIGHT_NAMES)
    except Exception as error:  # the hub's client raises a dozen kinds of error, some of them its transport's
        msg = _unreachable(f"backbone {backbone}", Path(constants.HF_HUB_CACHE), error)
        raise InputError(msg) from error


def _hub_file(name: str, *files: str) -> Path:
    for file in files:
        if isinstance(cached := try_to_load_from_cache(name, file), str):
            return Path(cached)
    for file in files[:-1]:
        try:
            return Path(hf_hub_download(name, file))
        except Exception:  # noqa: BLE001, S112 - the same kinds as above; the last name's error is the one to tell
            continue
    return Path(hf_hub_download(name, files[-1]))


def _from_tag(backbone: str, tag: str) -> Path:
    config = get_pretrained_cfg(backbone, tag)
    if not config:
        tags = ", ".join(list_pretrained_tags_by_model(backbone)) or "none"
        msg = f"pretrained must be a file that exists or a tag of {backbone} ({tags}), got {tag!r}."
        raise InputError(msg)
    url, hub = config.get("url", ""), config.get("hf_hub", "")
    cache = URL_CACHE.expanduser() if url else Path(constants.HF_HUB_CACHE)
    try:
        if (found := find_cached(backbone, tag)) is not None:
            # Of a file from a URL open_clip checks the sum, and downloads nothing if it holds.
            return Path(download_pretrained({"url": url})) if found.parent == cache and url else found
        if hub:
            name, _, file = hub.rpartition("/")
            return _hub_file(name, *([file] if file else WEIGHT_NAMES))
        return Path(download_pretrained(config))
    except Exception as error:  # urllib's, the hub's and the operating system's errors all mean the same to a user
        raise InputError(_unreachable(f"weights {tag!r} of {backbone}", cache, error)) from error


def find_cached(backbone: str, tag: str) -> Path | None:
    """Where the weights of a tag are on disk, if they are.

    Example:
        >>> find_cached("ViT-B-16-plus-240", "no such tag") is None
        True
    """
    config = get_pretrained_cfg(backbone, tag)
    url, hub = config.get("url", ""), config.get("hf_hub", "")
    file = URL_CACHE.expanduser() / PurePosixPath(url).name
    if url and file.is_file():
        return file
    name, _, wanted = hub.rpartition("/")
    names = [wanted] if wanted else WEIGHT_NAMES
    cached = [try_to_load_from_cache(name, file) for file in names] if hub else []
    return next((Path(path) for path in cached if isinstance(path, str)), None)


def _unreachable(what: str, cache: Path, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"The {what} are not in the cache folder {cache} and could not be downloaded ({reason}); set pretrained to a "
        f"local file (.pt, .bin or .safetensors), or copy the weights into that folder from a machine that has them."
    )


def _read_state_dict(path: Path, trusted: bool) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError:
        if not trusted:
            raise
        # OpenAI published its weights as TorchScript; open_clip has compared the file with their checksum.
        content = torch.jit.load(path, map_location="cpu").state_dict()
        content = {k: v for k, v in content.items() if k not in {"input_resolution", "context_length", "vocab_size"}}
    return content.get("state_dict", content)


def _load_weights(clip: nn.Module, path: Path, trusted: bool = False) -> None:
    try:
        state = _read_state_dict(path, trusted)
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError, UnpicklingError) as error:
        msg = (
            f"The weights {path} are not a plain state dict ({str(error).splitlines()[0]}); "
            "save them with torch.save(model.state_dict(), ...) or as .safetensors."
        )
        raise InputError(msg) from error
    state = {key.removeprefix("module."): value for key, value in state.items()}
    state.pop("text.transformer.embeddings.position_ids", None)
    if hasattr(clip, "text"):
        state = convert_to_custom_text_state_dict(state)
    own = clip.state_dict()
    problems = [f"lacks {key}" for key in own if key not in state]
    problems += [f"has an unknown {key}" for key in state if key not in own]
    problems += [
        f"has {key} of shape {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        msg = f"The weights {path} do not fit the backbone: the file {problems[0]}{more}; choose its backbone."
        raise InputError(msg)
    clip.load_state_dict(state)
