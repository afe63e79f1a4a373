"""Arguments of the models as configurations bring them: in containers of OmegaConf and jsonargparse."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any


def plain(value: Any) -> Any:  # noqa: ANN401 - any argument
    """A value with lists and dictionaries of Python in place of other sequences and mappings, at any depth.

    anomalib's ``get_model`` hands on OmegaConf's. A checkpoint that holds them as hyperparameters cannot be read with
    ``weights_only=True``.

    Example:
        >>> from omegaconf import OmegaConf
        >>> plain(OmegaConf.create({"plate": ["dent", "hole"]})), plain((32, 48)), plain("nut")
        ({'plate': ['dent', 'hole']}, (32, 48), 'nut')
    """
    if isinstance(value, Namespace):  # jsonargparse's is one
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(one) for one in value]
    return value
