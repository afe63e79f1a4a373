"""Where pretrained weights are: open_clip's tags and the hub's files, in their caches or to be downloaded."""

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model

from anomalib_clipad.components.text_cache import kept_digest
from anomalib_clipad.components.weights import is_folder
from anomalib_clipad.errors import InputError
from anomalib_clipad.plugin import DEMO

# The names under which open_clip saves to a folder or a hub, the safe one first.
WEIGHT_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
HUB_PREFIX = "hf-hub:"
CHECKSUM = 8  # digits at least
OPENAI = "openai"  # tag of the weights that OpenAI published
URL_CACHE = Path("~/.cache/clip")  # open_clip's own folder for weights that are not on a hub


def check_names(backbone: str | PathLike[str], pretrained: str | PathLike[str] | None) -> tuple[str, str | None]:
    """Check that the two names are text, and return them as such.

    Raises:
        InputError: If one is not.

    Example:
        >>> check_names("ViT-B-32", None)
        ('ViT-B-32', None)
    """
    if not isinstance(backbone, str | PathLike) or not str(backbone).strip():
        msg = f"backbone must be the name of an architecture, a folder or a hub, got {backbone!r}."
        raise InputError(msg)
    if pretrained is not None and (not isinstance(pretrained, str | PathLike) or not str(pretrained).strip()):
        msg = f"pretrained must be a tag, a file or nothing (null, None), got {pretrained!r}."
        raise InputError(msg)
    return str(backbone), None if pretrained is None else str(pretrained)


def tags_of(backbone: str) -> str:
    """The tags of an architecture, for messages.

    Example:
        >>> tags_of("a folder")
        'of a folder (none)'
    """
    return f"of {backbone} ({', '.join(list_pretrained_tags_by_model(backbone)) or 'none'})"


def not_for_use(arguments: Mapping[str, Any]) -> str | None:
    """Why the results of a model say nothing about the object in front of the camera.

    Args:
        arguments: Of the model, or its ``hparams``: ``backbone``, ``pretrained`` and ``adapter``, if it has them.

    Returns:
        "demonstration backbone" or "random weights", or nothing.

    Example:
        >>> not_for_use({"backbone": "demo"}), not_for_use({"backbone": "ViT-B-32", "pretrained": None})
        ('demonstration backbone', 'random weights')
    """
    backbone = str(arguments.get("backbone", ""))
    if DEMO in (backbone, arguments.get("adapter")):
        return "demonstration backbone"
    brings_its_own = backbone.startswith(HUB_PREFIX) or is_folder(backbone.removeprefix("local-dir:"))
    return "random weights" if arguments.get("pretrained", "") is None and not brings_its_own else None


def hub_file(name: str, *files: str) -> Path:
    """The first of some files in a hub's repository, from the cache if one is there, else downloaded."""
    for file in files:
        if isinstance(cached := try_to_load_from_cache(name, file), str):
            return Path(cached)
    for file in files[:-1]:
        try:
            return Path(hf_hub_download(name, file))
        except Exception:  # noqa: BLE001, S112 - the hub's client has a dozen kinds of error; the last name's is shown
            continue
    return Path(hf_hub_download(name, files[-1]))


def from_tag(backbone: str, tag: str) -> Path:
    """File of the weights of a tag, from the cache or downloaded.

    Raises:
        InputError: If the tag is unknown or the file cannot be reached.
    """
    config = get_pretrained_cfg(backbone, tag)
    if not config:
        msg = f"pretrained must be a file that exists or a tag {tags_of(backbone)}, got {tag!r}."
        raise InputError(msg)
    url, hub = config.get("url", ""), config.get("hf_hub", "")
    cache = URL_CACHE.expanduser() if url else Path(constants.HF_HUB_CACHE)
    try:
        if (found := find_cached(backbone, tag)) is not None:
            # open_clip verifies the checksum of a file from a URL, and does not download a valid one again. OpenAI's
            # may be TorchScript, which is loaded on the strength of it, so theirs is verified every time.
            known = tag.lower() != OPENAI and _is_verified(found, url)
            return Path(download_pretrained({"url": url})) if found.parent == cache and url and not known else found
        if hub:
            name, _, file = hub.rpartition("/")
            return hub_file(name, *([file] if file else WEIGHT_NAMES))
        return Path(download_pretrained(config))
    except Exception as error:  # urllib's, the hub's and the operating system's errors all mean the same to a user
        raise InputError(unreachable(f"weights {tag!r} of {backbone}", cache, error)) from error


def _is_verified(file: Path, url: str) -> bool:
    """Whether the file's SHA-256, which is known since an earlier start, is the one that a part of the URL begins."""
    digest = kept_digest(file) or ""
    return any(len(part) >= CHECKSUM and digest.startswith(part) for part in re.split(r"[/.-]", url))


def find_cached(backbone: str, tag: str) -> Path | None:
    """Where the weights of a tag are on disk, if they are.

    Raises:
        InputError: If a name is not text.

    Example:
        >>> find_cached("ViT-B-16-plus-240", "no such tag") is None
        True
    """
    config = get_pretrained_cfg(*check_names(backbone, tag))
    url, hub = config.get("url", ""), config.get("hf_hub", "")
    file = URL_CACHE.expanduser() / PurePosixPath(url).name
    if url and file.is_file():
        return file
    name, _, wanted = hub.rpartition("/")
    names = [wanted] if wanted else WEIGHT_NAMES
    cached = [try_to_load_from_cache(name, file) for file in names] if hub else []
    return next((Path(path) for path in cached if isinstance(path, str)), None)


def first_line(error: Exception) -> str:
    """First line of an error's text, or its kind where it has none.

    Example:
        >>> first_line(OSError("disk full")), first_line(OSError())
        ('disk full', 'OSError')
    """
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def unreachable(what: str, cache: Path, error: Exception) -> str:
    """Message about a file that is neither in the cache nor downloadable."""
    return (
        f"The {what} are not in the cache folder {cache} and could not be downloaded ({first_line(error)}); set "
        "pretrained to a local file (.pt, .bin or .safetensors), or copy the weights into that folder from a machine "
        "that has them."
    )
