"""Data modules by name, and what of them is on disk."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule, get_datamodule

from anomalib_clipad.errors import InputError


def build_datamodule(config: Mapping[str, Any]) -> AnomalibDataModule:
    """Build a data module: anomalib's by its name, anybody's by its full path.

    Args:
        config: ``class_path`` and, if wanted, ``init_args``.

    Raises:
        InputError: If a class of another package cannot be imported; anomalib words its own errors.

    Example:
        >>> build_datamodule({"class_path": "anomalib_clipad.data.DemoTextures"}).category
        'linen'
    """
    package, _, name = config["class_path"].rpartition(".")
    if not package or package.partition(".")[0] == "anomalib":
        return get_datamodule({"data": dict(config)})
    try:
        kind = getattr(import_module(package), name)
    except (ImportError, AttributeError) as error:
        msg = f"There is no data module {config['class_path']} ({error}); give the full path of its class."
        raise InputError(msg) from error
    return kind(**config.get("init_args", {}))


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
