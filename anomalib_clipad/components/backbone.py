"""CLIP models of open_clip, with weights from a tag, a file or a hub, loaded without executing them."""

import json
import logging
import math
from collections.abc import Callable
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, cast

import open_clip
import torch
from huggingface_hub import constants
from open_clip.pretrained import get_pretrained_cfg
from torch import nn

from anomalib_clipad.components.clip import Architecture, load_clip
from anomalib_clipad.components.pretrained import (
    HUB_PREFIX,
    OPENAI,
    URL_CACHE,
    WEIGHT_NAMES,
    check_names,
    find_cached,
    from_tag,
    hub_file,
    tags_of,
    unreachable,
)
from anomalib_clipad.components.text_cache import TextVectorCache
from anomalib_clipad.components.text_encoder import Tokenizer
from anomalib_clipad.components.weights import is_file, is_folder, looks_like_file
from anomalib_clipad.errors import InputError
from anomalib_clipad.plugin import DEMO, DEMO_FOLDER

__all__ = ["Backbone", "OpenedBackbone", "find_cached", "load_backbone", "open_backbone"]

logger = logging.getLogger(__name__)

CONFIG_NAME = "open_clip_config.json"
QUICK_GELU = "-quickgelu"  # ending of an architecture whose activation is QuickGELU
UNTOLD = ("ViT-B-16", "dfn2b")  # of that activation, too, which only newer open_clip versions tell
DEMO_REFERENCE_LAYERS = (3,)  # chosen on surfaces for validation, see benchmarks/references.md


class Backbone(NamedTuple):
    """A CLIP with its tokenizer and the normalisation of its input.

    Attributes:
        clip: The open_clip model, in eval mode, frozen.
        tokenizer: Turns a list of sentences into (P, context length) tokens.
        mean: Mean of the images' channels it was trained with.
        std: Standard deviation of the channels.
        reference_layers: Blocks at which it compares with references best, where that is known.

    Example:
        >>> loaded = load_backbone(small_clip)
        >>> loaded.tokenizer(["a bottle"]).shape, loaded.clip.training
        (torch.Size([1, 77]), False)
    """

    clip: nn.Module
    tokenizer: Tokenizer
    mean: tuple[float, float, float] = open_clip.OPENAI_DATASET_MEAN
    std: tuple[float, float, float] = open_clip.OPENAI_DATASET_STD
    reference_layers: tuple[int, ...] | None = None


class LazyTokenizer:
    """open_clip's tokenizer, which reads its vocabulary when it is first used.

    Args:
        name: See ``open_clip.get_tokenizer``.
        **options: Likewise.

    Example:
        >>> LazyTokenizer("ViT-B-32", context_length=12)(["a bottle"]).shape
        torch.Size([1, 12])
    """

    def __init__(self, name: str, **options: Any) -> None:  # noqa: ANN401 - handed on to open_clip.get_tokenizer
        self.name, self.options = name, options

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer itself."""
        return open_clip.get_tokenizer(self.name, **self.options)

    def __call__(self, prompts: list[str]) -> torch.Tensor:
        """Tokens of sentences."""
        return self.tokenizer(prompts)


def _nothing() -> None:
    """The text tower is complete."""


class OpenedBackbone(NamedTuple):
    """A CLIP whose text tower is not there yet.

    Attributes:
        loaded: The CLIP.
        fill_text: Builds the text tower and reads its weights; to be called before it is used.
        cache: Where its text vectors are kept; nowhere for random weights, with which the text tower is complete.

    Example:
        >>> opened = open_backbone(small_clip)
        >>> before = opened.loaded.clip.token_embedding.weight.is_meta
        >>> opened.fill_text()
        >>> before, opened.loaded.clip.token_embedding.weight.is_meta
        (True, False)
    """

    loaded: Backbone
    fill_text: Callable[[], None] = _nothing
    cache: TextVectorCache | None = None


def load_backbone(
    backbone: str | PathLike[str] = "ViT-B-16-plus-240", pretrained: str | PathLike[str] | None = "laion400m_e31"
) -> Backbone:
    """Build a CLIP and load its weights.

    Weights already on disk are used without access to the network.

    Args:
        backbone: An architecture that open_clip knows, ``hf-hub:ORG/NAME``, or a folder with open_clip's
            ``open_clip_config.json`` (as ``open_clip.push_to_hf_hub`` saves it); or ``demo``, a small CLIP in this
            package, trained on rendered textures, to try things out with and not for inspection work.
        pretrained: open_clip's tag of the weights, or a file with a state dict (``.pt``, ``.bin``, ``.safetensors``);
            write a file that has the name of a tag as ``./NAME``. ``None`` means random weights, unless ``backbone``
            is ``demo``, a folder or a hub name, which bring their own; these ignore a tag.

    Returns:
        The model in eval mode, frozen, its tokenizer and its normalisation.

    Raises:
        InputError: If the backbone is unknown, or the weights cannot be found, reached, read or fitted.

    Example:
        >>> import torch
        >>> clip, tokenizer, mean, std, _ = load_backbone(small_clip)
        >>> clip.encode_image(torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 24])
    """
    opened = open_backbone(backbone, pretrained)
    opened.fill_text()
    lazy = cast("LazyTokenizer", opened.loaded.tokenizer)
    return opened.loaded._replace(tokenizer=lazy.tokenizer)


def open_backbone(
    backbone: str | PathLike[str] = "ViT-B-16-plus-240", pretrained: str | PathLike[str] | None = "laion400m_e31"
) -> OpenedBackbone:
    """As :func:`load_backbone`, but the text tower, which is not needed where text vectors are kept, is read later.

    Example:
        >>> open_backbone(small_clip).cache.weights.name
        'open_clip_model.safetensors'
    """
    backbone, pretrained = check_names(backbone, pretrained)
    folder = DEMO_FOLDER if backbone == DEMO else Path(backbone.removeprefix("local-dir:"))
    logger.info("Loading the CLIP %s.", backbone)
    if backbone == DEMO:
        logger.warning("The demonstration backbone was trained on rendered textures; it is not for inspection work.")
    local = is_folder(folder)
    tag = pretrained if pretrained and get_pretrained_cfg(backbone, pretrained) else None
    weights = Path(pretrained) if pretrained and not tag and is_file(pretrained) else None
    if pretrained and not tag and weights is None and looks_like_file(pretrained):
        msg = f"pretrained must be a file that exists or a tag {tags_of(backbone)}, got {pretrained!r}."
        raise InputError(msg)
    if local or backbone.startswith(HUB_PREFIX):
        config, found = _from_folder(folder) if local else _from_hub(backbone)
        preprocess = config["preprocess_cfg"]
        weights = weights or found
        architecture = Architecture(backbone, config["model_cfg"])
        tokenizer = LazyTokenizer("ViT-B-32", **_tokenizer_options(backbone, config["model_cfg"]))
        trusted = False
    else:
        model_config = open_clip.get_model_config(backbone)
        if model_config is None:
            msg = (
                f"backbone must be a name from open_clip.list_models(), {HUB_PREFIX}ORG/NAME, {DEMO} or a folder with "
                f"{CONFIG_NAME}, got {backbone!r}."
            )
            raise InputError(msg)
        preprocess = get_pretrained_cfg(backbone, tag) if tag else {}
        openai = tag is not None and tag.lower() == OPENAI
        # Older open_clip versions tell by a twin of the architecture, or in the code that loads OpenAI's weights.
        twin = get_pretrained_cfg(f"{backbone}{QUICK_GELU}", tag) if tag else None
        quick_gelu = openai or bool(preprocess.get("quick_gelu") or twin) or (backbone, tag) == UNTOLD
        architecture = Architecture(backbone, model_config, quick_gelu)
        if pretrained and weights is None:
            weights = from_tag(backbone, pretrained)
        # open_clip compares downloads from a URL with their checksum.
        trusted = openai and weights is not None and weights.parent == URL_CACHE.expanduser()
        tokenizer = LazyTokenizer(backbone)

    if weights is None:
        logger.warning(
            "RANDOM WEIGHTS: %s is used without pretrained weights, so its maps and scores mean nothing. "
            "Give pretrained a tag or a file.",
            backbone,
        )
    mean = _channels(preprocess.get("mean") or open_clip.OPENAI_DATASET_MEAN)
    std = _channels(preprocess.get("std") or open_clip.OPENAI_DATASET_STD)
    suited = DEMO_REFERENCE_LAYERS if backbone == DEMO else None
    if weights is None:
        return OpenedBackbone(Backbone(architecture.build(), tokenizer, mean, std, suited))
    clip, fill_text = load_clip(architecture, weights, trusted)
    loaded = Backbone(clip, tokenizer, mean, std, suited)
    return OpenedBackbone(loaded, fill_text, TextVectorCache(weights, architecture.config))


def _tokenizer_options(backbone: str, config: dict[str, Any]) -> dict[str, Any]:
    text = config["text_cfg"]
    if "hf_tokenizer_name" in text or "hf_model_name" in text:
        msg = f"backbone {backbone} has a text tower that is not open_clip's own, which a folder or a hub cannot bring."
        raise InputError(msg)
    return {"context_length": text.get("context_length", 77)}


def _channels(values: tuple[float, ...]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def _from_folder(folder: Path) -> tuple[dict[str, Any], Path | None]:
    config = _read_config(folder / CONFIG_NAME)
    return config, next((folder / name for name in WEIGHT_NAMES if is_file(folder / name)), None)


def _from_hub(backbone: str) -> tuple[dict[str, Any], Path]:
    name = backbone.removeprefix(HUB_PREFIX)
    try:
        config, weights = hub_file(name, CONFIG_NAME), hub_file(name, *WEIGHT_NAMES)
    except Exception as error:  # the hub's client raises a dozen kinds of error, some of them its transport's
        msg = unreachable(f"backbone {backbone}", Path(constants.HF_HUB_CACHE), error)
        raise InputError(msg) from error
    return _read_config(config), weights


def _read_config(path: Path) -> dict[str, Any]:
    """Content of a CLIP's configuration, with model_cfg and preprocess_cfg as open_clip needs them."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        msg = f"backbone folder {path.parent} needs a readable {CONFIG_NAME} ({type(error).__name__} at {path})."
        raise InputError(msg) from error
    advice = "save it as open_clip.push_to_hf_hub does"
    model = config.get("model_cfg") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(model, dict):
        msg = f"{path} has no mapping model_cfg; {advice}."
        raise InputError(msg)
    for key, kind in (("embed_dim", int), ("vision_cfg", dict), ("text_cfg", dict)):
        if not isinstance(model.get(key), kind):
            msg = f"{path} has {model.get(key)!r} as {key} of its model_cfg; {advice}."
            raise InputError(msg)
    config["preprocess_cfg"] = config.get("preprocess_cfg") or {}
    if not isinstance(config["preprocess_cfg"], dict):
        msg = f"{path} has {config['preprocess_cfg']!r} as preprocess_cfg; {advice}."
        raise InputError(msg)
    for key, lowest in (("mean", -math.inf), ("std", 0.0)):
        values = config["preprocess_cfg"].get(key)
        if values is None:
            continue
        numbers = isinstance(values, list) and all(type(value) in {int, float} for value in values)
        if not numbers or len(values) != 3 or not all(lowest < value < math.inf for value in values):
            msg = f"{path} has {values!r} as {key} of its preprocess_cfg; give three finite numbers, std above 0."
            raise InputError(msg)
    return config
