"""Arguments of the models as configurations bring them: in containers of OmegaConf and jsonargparse."""

from typing import Any

from jsonargparse import Namespace, namespace_to_dict
from omegaconf import OmegaConf


def plain(value: Any) -> Any:  # noqa: ANN401 - any argument
    """A value with lists and dictionaries of Python in place of a configuration's.

    anomalib's ``get_model`` hands on OmegaConf's. A checkpoint that holds them as hyperparameters cannot be read with
    ``weights_only=True``.

    Example:
        >>> plain(OmegaConf.create({"plate": ["dent", "hole"]})), plain((32, 48)), plain("nut")
        ({'plate': ['dent', 'hole']}, (32, 48), 'nut')
    """
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    return namespace_to_dict(value) if isinstance(value, Namespace) else value
