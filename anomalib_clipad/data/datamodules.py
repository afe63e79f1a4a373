"""Data modules by name, and their categories on disk."""

import copy
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule, UnknownDatamoduleError, get_datamodule
from anomalib.data.datasets import AnomalibDataset
from anomalib.data.utils import ValSplitMode

from anomalib_clipad.errors import InputError


def build_datamodule(config: Mapping[str, Any]) -> AnomalibDataModule:
    """Build a data module: one of anomalib's by its name, any other by its full path.

    Args:
        config: ``class_path`` and, if wanted, ``init_args``.

    Raises:
        InputError: If the configuration is not of this form, there is no such class, or a class of another package
            cannot be built; the arguments of anomalib's own classes raise anomalib's errors.

    Example:
        >>> build_datamodule({"class_path": "anomalib_clipad.data.DemoTextures"}).category
        'linen'
    """
    if not isinstance(config, Mapping) or not isinstance(config.get("class_path"), str):
        msg = f"A data module is a mapping with a class_path and, if wanted, init_args, got {config!r}."
        raise InputError(msg)
    arguments = config.get("init_args", {})
    if not isinstance(arguments, Mapping):
        msg = f"init_args of {config['class_path']} must be a mapping of arguments, got {arguments!r}."
        raise InputError(msg)
    package, _, name = config["class_path"].rpartition(".")
    if not package or package.partition(".")[0] == "anomalib":
        try:
            return get_datamodule({"data": dict(config)})
        except UnknownDatamoduleError as error:
            msg = f"anomalib has no data module {config['class_path']!r}; correct the name, or give a full path."
            raise InputError(msg) from error
    try:
        kind = getattr(import_module(package), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        msg = f"There is no data module {config['class_path']} ({error}); give the full path of its class."
        raise InputError(msg) from error
    try:
        datamodule = kind(**arguments)
    except TypeError as error:
        msg = f"{config['class_path']} cannot be built with init_args {dict(arguments)!r} ({error}); correct them."
        raise InputError(msg) from error
    if not isinstance(datamodule, AnomalibDataModule):
        msg = f"{config['class_path']} is not a data module of anomalib; name a class that is."
        raise InputError(msg)
    return datamodule


def categories_on_disk(datamodule: AnomalibDataModule) -> list[str]:
    """Categories of a data set that have a folder, sorted."""
    folders = {Path(getattr(datamodule, key)) for key in ("root", "split_root") if hasattr(datamodule, key)}
    kinds = ("test", "Data")  # MVTec's layout, which anomalib splits VisA into, and VisA as it is downloaded
    return sorted(
        {
            path.name
            for folder in folders
            if folder.is_dir()
            for path in folder.iterdir()
            if any((path / kind).is_dir() for kind in kinds)
        }
    )


def whole_test_split(datamodule: AnomalibDataModule) -> AnomalibDataset:
    """The whole test split, including what the data module would hold out for validation.

    Example:
        >>> len(whole_test_split(widgets))
        11
    """
    one = copy.deepcopy(datamodule)
    one.val_split_mode = ValSplitMode.NONE
    one.prepare_data()
    one.setup()
    return one.test_data
