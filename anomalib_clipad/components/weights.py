"""Tensors from files: read without executing the file, and refused in a sentence where they do not fit.

The weights of a CLIP, adapters and checkpoints are all read here.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, cast
from zipfile import is_zipfile

import torch
from anomalib.utils.serialization import anomalib_safe_globals
from safetensors import safe_open

from anomalib_clipad.errors import InputError

ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def is_file(path: str | PathLike[str]) -> bool:
    """Whether a file exists; False for a name that the file system does not accept.

    Example:
        >>> is_file("missing.pt"), is_file("n" * 5000)
        (False, False)
    """
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: str | PathLike[str]) -> bool:
    """Whether a folder exists; False for an empty name, and for one that the file system does not accept.

    Example:
        >>> is_folder("."), is_folder(""), is_folder("n" * 5000)
        (True, False, False)
    """
    try:
        return bool(str(path)) and Path(path).is_dir()
    except (OSError, ValueError):
        return False


def looks_like_file(name: str | PathLike[str]) -> bool:
    """Whether a name means a file, whether it exists or not, rather than a tag of open_clip.

    Example:
        >>> looks_like_file("laion400m_e31"), looks_like_file("weights.pt"), looks_like_file("runs/weights")
        (False, True, True)
    """
    return Path(name).suffix.lower() in ENDINGS or Path(name).name != str(name) or is_file(name)


def read_tensors(path: Path, what: str, checkpoint: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a file of tensors without executing it.

    Args:
        path: A ``.safetensors`` file, or one that ``torch.save`` wrote.
        what: Name of the file's role for messages, such as ``adapter``.
        checkpoint: Whether the types that anomalib stores in its checkpoints are accepted beside tensors.

    Returns:
        The file's content, not checked further (see :func:`check_tensors`), and the header of a ``.safetensors`` file.

    Raises:
        InputError: If the file is missing, empty, damaged, or holds anything but plain data.

    Example:
        >>> torch.save({"weight": torch.zeros(2)}, "layer.pt")
        >>> read_tensors(Path("layer.pt"), "layer")
        ({'weight': tensor([0., 0.])}, {})
    """
    with _readable(path, what):
        if _is_safetensors(path):
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        with anomalib_safe_globals() if checkpoint else nullcontext():
            content = torch.load(path, map_location="cpu", weights_only=True)
        return _named(content, path, what), {}


class TensorInFile(NamedTuple):
    """A tensor of a ``.safetensors`` file, which reads its values ahead as soon as it gives them."""

    file: Any
    key: str
    path: Path
    what: str


def map_tensors(path: Path, what: str) -> dict[str, Any]:
    """As :func:`read_tensors`, but values stay in the file until they are used, which saves memory and time.

    Returns:
        Its content, to be used by :func:`stand_in` and :func:`values_of`.

    Example:
        >>> torch.save({"weight": torch.zeros(2)}, "layer.pt")
        >>> values_of(map_tensors(Path("layer.pt"), "layer")["weight"])
        tensor([0., 0.])
    """
    with _readable(path, what):
        if _is_safetensors(path):
            file = safe_open(path, framework="pt")
            return {key: TensorInFile(file, key, path, what) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        # Only the present format of torch.save, a zip file, can be mapped.
        return _named(torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path)), path, what)


def stand_in(mapped: object) -> object:
    """What has shape and kind of a value of :func:`map_tensors`, for :func:`check_tensors`, without reading it."""
    if not isinstance(mapped, TensorInFile):
        return mapped
    header = mapped.file.get_slice(mapped.key)
    kind = header.get_dtype()  # such as F32, BF16, C64, I64, U8, BOOL
    dtype = torch.float32 if kind.startswith(("F", "BF")) else torch.complex64 if kind.startswith("C") else torch.int64
    return torch.zeros((), dtype=dtype).expand(header.get_shape())


def values_of(mapped: Any) -> torch.Tensor:  # noqa: ANN401 - a tensor in a file, or one in memory
    """A tensor of :func:`map_tensors` that :func:`check_tensors` accepted.

    Raises:
        InputError: If its values cannot be read.
    """
    if not isinstance(mapped, TensorInFile):
        return cast("torch.Tensor", mapped)
    with _readable(mapped.path, mapped.what):
        return cast("torch.Tensor", mapped.file.get_tensor(mapped.key))


def _is_safetensors(path: Path) -> bool:
    return path.suffix.lower() == ".safetensors"


@contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    """One sentence for a file that the readers cannot read."""
    if not is_file(path):
        msg = f"The {what} {path} does not exist or is not a file; give the path of an existing one."
        raise InputError(msg)
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # damaged files make the readers raise errors of every kind
        # The error's own text is left out: torch's recommends to execute the file.
        msg = (
            f"The {what} {path} cannot be read as tensors ({type(error).__name__}): the file is damaged, of another "
            "format, or holds more than plain data; save it by torch.save(model.state_dict(), ...) or as .safetensors."
        )
        raise InputError(msg) from error


def _named(content: object, path: Path, what: str) -> dict[str, Any]:
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        msg = f"The {what} {path} holds a {type(content).__name__} instead of named tensors; save a state dict."
        raise InputError(msg)
    return dict(content)


def check_tensors(
    state: Mapping[str, Any],
    expected: Mapping[str, torch.Tensor],
    what: str,
    advice: str,
    read: Collection[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Compare the tensors of a file with those that they are to replace: names, shapes, types, and finite values.

    Args:
        state: What was read.
        expected: What the module has.
        what: Subject of the message, such as ``The weights w.pt``.
        advice: End of the message: what to do.
        read: Names of the tensors whose values are looked at, which reads them from a mapped file; all by default.

    Returns:
        ``state``, every value a dense tensor in memory, of the wanted shape and kind.

    Raises:
        InputError: If a tensor is missing, unknown, of another shape or type, or not finite.

    Example:
        >>> own = {"weight": torch.zeros(2)}
        >>> check_tensors({"weight": torch.ones(3)}, own, "The weights w.pt", "choose others")
        Traceback (most recent call last):
        ...
        anomalib_clipad.errors.InputError: The weights w.pt do not fit: weight has shape (3,) instead of (2,); choose
        others.
    """
    problems = [f"{key} is missing" for key in expected if key not in state]
    problems += [f"{key} is unknown" for key in state if key not in expected]
    problems += [
        f"{key} {found}"
        for key in expected
        if key in state and (found := _difference(state[key], expected[key], read is None or key in read))
    ]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        msg = f"{what} do not fit: {problems[0]}{more}; {advice}."
        raise InputError(msg)
    return dict(state)


def _difference(found: object, expected: torch.Tensor, with_values: bool) -> str:
    """What is wrong with a tensor, or nothing."""
    if not isinstance(found, torch.Tensor):
        return f"is a {type(found).__name__} instead of a tensor"
    if found.layout != torch.strided or found.is_quantized or found.is_nested or found.device.type != "cpu":
        return f"is not a dense tensor ({found.layout}, {found.device})"
    if found.shape != expected.shape:
        return f"has shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    if found.is_floating_point() != expected.is_floating_point() or found.is_complex() != expected.is_complex():
        return f"is of type {found.dtype} instead of {expected.dtype}"
    if with_values and not _is_finite(found.to(expected.dtype)):  # where large values of a wider type overflow
        return "has values that are not finite"
    return ""


def _is_finite(values: torch.Tensor) -> bool:
    # A sum is three times as fast, and finite only if all values are; one of large values may overflow.
    return bool(values.sum().isfinite()) or all(bool(end.isfinite()) for end in values.aminmax())
