"""The parts of a checkpoint that anomalib and Lightning restore without a check, compared with what they must be."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from packaging.version import InvalidVersion, Version

from anomalib_clipad.errors import InputError

LONGEST = 200  # characters of what is said of a value
VERSION = "pytorch-lightning_version"
TYPES: dict[str, type | tuple[type, ...]] = {
    "epoch": int,
    "global_step": int,
    "loops": Mapping,
    "callbacks": Mapping,
    "optimizer_states": list,
    "lr_schedulers": list,
    "hyper_parameters": Mapping,
    "anomalib_components_enabled": Mapping,
    "anomalib_pre_processor_config": Mapping,
    "anomalib_post_processor_config": Mapping,
}


def damaged(what: str) -> InputError:
    """The error that says what is wrong with a checkpoint.

    Example:
        >>> damaged("lacks state_dict")
        InputError('The checkpoint is damaged: it lacks state_dict; make it again with a run of this model.')
    """
    one_line = " ".join(what.split())  # values of a damaged file may be of any length and print on several lines
    if len(one_line) > LONGEST:
        one_line = f"{one_line[:LONGEST]}..."
    return InputError(f"The checkpoint is damaged: it {one_line}; make it again with a run of this model.")


def check_parts(checkpoint: Mapping[str, Any]) -> None:
    """Check the kind of every part, and the version that Lightning looks for before anything else.

    Raises:
        InputError: If a part is of another kind.

    Example:
        >>> check_parts({"pytorch-lightning_version": "2.6.0", "epoch": None})
        Traceback (most recent call last):
        ...
        anomalib_clipad.errors.InputError: The checkpoint is damaged: it has epoch None; make it again with a run of ...
    """
    try:
        Version(checkpoint[VERSION])
    except (KeyError, TypeError, InvalidVersion) as error:
        problem = f"has no valid {VERSION}"
        raise damaged(problem) from error
    for key, kind in TYPES.items():
        if key in checkpoint and not _is_a(checkpoint[key], kind):
            problem = f"has {key} {_shown(checkpoint[key])}"
            raise damaged(problem)


def difference(found: object, expected: object, name: str) -> str:
    """How a part differs in structure from what it will replace; nothing if it does not.

    Keys that are missing or more than expected are left to the reader of the part, which knows earlier versions.

    Args:
        found: What the checkpoint holds.
        expected: What the model or the trainer holds now.
        name: What to call the part.

    Example:
        >>> difference({"lr": "fast"}, {"lr": 1e-3, "eps": 1e-8}, "the optimiser")
        "has lr of the optimiser 'fast'"
        >>> difference({"lr": 1}, {"lr": 1e-3}, "the optimiser")
        ''
    """
    if isinstance(expected, torch.Tensor):
        same = isinstance(found, torch.Tensor) and (found.shape, found.layout) == (expected.shape, expected.layout)
        return "" if same else f"has {name} {_shown(found)}"
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping):
            return f"has {name} {_shown(found)}"
        pairs = [(found[key], expected[key], f"{key} of {name}") for key in expected if key in found]
    elif isinstance(expected, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(expected):
            return f"has {name} {_shown(found)}"
        pairs = [(one, other, name) for one, other in zip(found, expected, strict=True)]
    else:
        return "" if expected is None or _is_a(found, type(expected)) else f"has {name} {_shown(found)}"
    return next(filter(None, (difference(*pair) for pair in pairs)), "")


def _is_a(value: object, kind: type | tuple[type, ...]) -> bool:
    if kind is float:
        kind = (int, float)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _shown(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"as a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping) or (isinstance(value, Sequence) and not isinstance(value, str)):
        return f"as a {type(value).__name__} of {len(value)}"
    return repr(value)
