"""A model of the comparison, built without what its job does instead."""

import inspect
from collections.abc import Mapping
from typing import Any

from anomalib.data import AnomalibDataModule
from anomalib.models import AnomalibModule, get_model

from anomalib_clipad.compare.settings import MAX_EPOCHS, model_class, short_class
from anomalib_clipad.errors import InputError


def plain_model(config: Mapping[str, Any], data: AnomalibDataModule | None, region: object) -> AnomalibModule:
    """The model without measurements and pictures of its own, with the region of the data if it can look at one.

    Args:
        config: Configuration of the model, with class_path and init_args.
        data: What it is tried on; None for unlabelled images.
        region: What of the images is looked at; None for everything.

    Raises:
        InputError: If the model takes one class, and the configuration has several.

    Example:
        >>> plain_model({"class_path": "Padim", "init_args": {"pre_trained": False}}, None, None).evaluator is None
        True
    """
    kind = model_class(config["class_path"])
    config = {key: value for key, value in config.items() if key != MAX_EPOCHS}
    if region is not None and kind is not None and "region" in inspect.signature(kind).parameters:
        config = {**config, "init_args": {**config.get("init_args", {}), "region": region}}
    name = (config.get("init_args") or {}).get("class_name")
    if not isinstance(name, str | None) and not hasattr(kind, "products"):
        msg = f"{short_class(config['class_path'])} takes one name as class_name, got {name!r}; compare by category."
        raise InputError(msg)
    model: Any = get_model(config)
    model.evaluator = model.visualizer = model.table = model.page = model.original_maps = None
    if getattr(model, "class_name", "") is None and data is not None:
        # Folder has no category, and some zero-shot models would then prompt for nothing.
        model.class_name = data.category or data.name
    return model


def no_loaders() -> list[object]:
    """Lets a zero-shot model predict without validation; its thresholds are those it has.

    Example:
        >>> no_loaders()
        []
    """
    return []
