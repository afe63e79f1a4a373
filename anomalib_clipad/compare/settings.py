"""A comparison's configuration: read, checked and spelled out before the first job."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import anomalib.models

from anomalib_clipad.compare.evaluator import METRICS
from anomalib_clipad.components import Region
from anomalib_clipad.errors import InputError

Config = dict[str, Any]
ENTRY_KEYS = ("class_path", "init_args", "name")
MAX_EPOCHS = "max_epochs"
MODEL_KEYS = (*ENTRY_KEYS, MAX_EPOCHS)
DATA_KEYS = (*ENTRY_KEYS, "region")
MOST_EPOCHS = 1_000_000
LARGEST_SEED = 2**32 - 1  # NumPy's
MOST_SHOTS = 10_000
SMALLEST_MAP, LARGEST_MAP = 8, 4096


@dataclass(frozen=True)
class Settings:
    """What stands under ``compare`` in a configuration.

    Args:
        models: Configurations of models, with class_path and, if wanted, init_args and name; with max_epochs for one
            that is trained in epochs, which are Lightning's 1000 else.
        data: Configurations of data modules, likewise; with region, what of their images is looked at and measured.
            Models that take a region get it; for the others pixels outside become copies of those inside.
        images: File or folder of unlabelled images.
        seed: Seeds of everything; a model is tried with each, and the tables have means.
        shots: Numbers of normal images to try every model with, the same images; None for the whole training split.
        map_size: Side of the maps that are measured, in pixels.
        metrics: Names of metrics.
        output: Folder of the comparison.

    Example:
        >>> Settings.read({"models": "ClipAdSdp", "images": "photos"}).models
        [{'class_path': 'ClipAdSdp'}]
    """

    models: list[Config]
    data: list[Config] | None = None
    images: str | None = None
    seed: tuple[int, ...] = (42,)
    shots: tuple[int, ...] | None = None
    map_size: int = 256
    metrics: tuple[str, ...] = tuple(METRICS)
    output: Path = Path("results/compare")

    @classmethod
    def read(cls, config: object) -> "Settings":
        """Check every key; one without a value counts as not given.

        Raises:
            InputError: If a key is unknown, a value cannot be used, or models or data are missing.
        """
        values = {key: value for key, value in _mapping("compare", config).items() if value is not None}
        if values.get("data") == []:
            del values["data"]
        if unknown := sorted(set(values) - set(READERS)):
            msg = f"compare takes the keys {', '.join(sorted(READERS))}, got {', '.join(unknown)}."
            raise InputError(msg)
        if not values.get("models") or not (values.get("data") or values.get("images")):
            msg = "compare needs models, a list of class_path and init_args, and data or images to try them on."
            raise InputError(msg)
        if values.get("shots") is not None and not values.get("data"):
            msg = "shots takes normal images of data, and images have no training split; give data, or leave shots out."
            raise InputError(msg)
        return cls(**{key: READERS[key](f"compare: {key}", value) for key, value in values.items()})


def _mapping(where: str, value: object) -> Config:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        msg = f"{where} must be keys with values, got {value!r}."
        raise InputError(msg)
    return dict(value)


def _text(where: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        msg = f"{where} must be a text, got {value!r}."
        raise InputError(msg)
    return value


def _path(where: str, value: object) -> Path:
    return Path(_text(where, str(value) if isinstance(value, Path) else value))


def _whole(low: int, high: int) -> Callable[[str, object], int]:
    def read(where: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            msg = f"{where} must be a whole number from {low} to {high}, got {value!r}."
            raise InputError(msg)
        return value

    return read


def _wholes(low: int, high: int) -> Callable[[str, object], tuple[int, ...]]:
    """One whole number, or a list of different ones."""

    def read(where: str, value: object) -> tuple[int, ...]:
        found = value if isinstance(value, (list, tuple)) else [value]
        numbers = tuple(_whole(low, high)(where, one) for one in found)
        if not numbers or len(set(numbers)) < len(numbers):
            msg = f"{where} must be a whole number or a list of different ones, got {value!r}."
            raise InputError(msg)
        return numbers

    return read


def _metrics(where: str, value: object) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        msg = f"{where} takes a list of names out of {', '.join(METRICS)}, got {value!r}."
        raise InputError(msg)
    if unknown := [name for name in names if name not in METRICS]:
        msg = f"metrics takes any of {', '.join(METRICS)}, got {', '.join(unknown)}."
        raise InputError(msg)
    return tuple(names)


def _entries(*keys: str) -> Callable[[str, object], list[Config]]:
    def read(where: str, value: object) -> list[Config]:
        return [_entry(where, entry, keys) for entry in (value if isinstance(value, (list, tuple)) else [value])]

    return read


def _entry(where: str, value: object, keys: tuple[str, ...]) -> Config:
    if isinstance(value, str):
        value = {"class_path": value}
    config = {key: item for key, item in _mapping(f"Every entry of {where}", value).items() if item is not None}
    if unknown := sorted(set(config) - set(keys)):
        usual = ", ".join(key for key in keys if key != MAX_EPOCHS)
        msg = f"An entry of {where} takes the keys {usual}, got {', '.join(unknown)}"
        msg += f"; {MAX_EPOCHS} too, for a model that is trained." if MAX_EPOCHS in keys else "."
        raise InputError(msg)
    if "class_path" not in config:
        msg = f"Every model and data set needs a class_path, got {config}."
        raise InputError(msg)
    for path in config["class_path"]["grid"] if _is_grid(config["class_path"]) else [config["class_path"]]:
        _text(f"class_path in {where}", path)
    if MAX_EPOCHS in config:
        _whole(1, MOST_EPOCHS)(f"{MAX_EPOCHS} in {where}", config[MAX_EPOCHS])
    if "region" in config:
        Region(config["region"])  # which says what is wrong with it
    if "name" in config:
        _text(f"name in {where}", config["name"])
    if "init_args" in config:
        where, arguments = f"init_args of {config['class_path']}", config["init_args"]
        _plain(where, _mapping(where, arguments))
        for one in arguments["grid"] if _is_grid(arguments) else ():
            _mapping(where, one)
    return config


def _plain(where: str, value: object) -> None:
    """Refuse mappings inside that cannot be arguments, and empty grids."""
    if isinstance(value, Mapping):
        if _is_grid(value) and not value["grid"]:
            msg = f"A grid of {where} has nothing in it; give at least one value."
            raise InputError(msg)
        for item in _mapping(where, value).values():
            _plain(where, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _plain(where, item)


READERS: dict[str, Callable[[str, object], Any]] = {
    "models": _entries(*MODEL_KEYS),
    "data": _entries(*DATA_KEYS),
    "images": lambda where, value: str(_path(where, value)),
    "seed": _wholes(0, LARGEST_SEED),
    "shots": _wholes(0, MOST_SHOTS),
    "map_size": _whole(SMALLEST_MAP, LARGEST_MAP),
    "metrics": _metrics,
    "output": _path,
}


def short_class(class_path: str) -> str:
    """The class's own name.

    Example:
        >>> short_class("anomalib.models.Patchcore")
        'Patchcore'
    """
    return class_path.rpartition(".")[2]


def model_class(class_path: str) -> type | None:
    """The model's class; None where there is none, which the job will say.

    Example:
        >>> model_class("anomalib.models.Padim").__name__
        'Padim'
    """
    package, _, name = class_path.rpartition(".")
    try:
        return getattr(anomalib.models, short_class(class_path), None) or getattr(import_module(package), name)
    except (ImportError, AttributeError, ValueError):
        return None


def spell_out(config: Config) -> Iterator[tuple[Config, dict[str, object]]]:
    """Every combination of a configuration's grids.

    Args:
        config: With ``{"grid": [...]}`` in place of any value.

    Yields:
        A configuration without grids, and the values chosen for it by the dotted names of their keys.

    Example:
        >>> list(spell_out({"class_path": "ClipAdSdp", "init_args": {"rvs": {"grid": ["mean"]}}}))
        [({'class_path': 'ClipAdSdp', 'init_args': {'rvs': 'mean'}}, {'init_args.rvs': 'mean'})]
    """
    grids = list(_grids(config, ()))
    for values in product(*(grid for _, grid in grids)):
        chosen: Config = copy.deepcopy(config)
        for (keys, _), value in zip(grids, values, strict=True):
            node = chosen
            for key in keys[:-1]:
                node = node[key]
            node[keys[-1]] = value
        yield chosen, {".".join(keys): value for (keys, _), value in zip(grids, values, strict=True)}


def _is_grid(node: object) -> bool:
    return isinstance(node, Mapping) and set(node) == {"grid"} and isinstance(node["grid"], (list, tuple))


def _grids(node: Mapping[str, Any], keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    for key, value in node.items():
        if _is_grid(value):
            yield (*keys, key), value["grid"]
        elif isinstance(value, Mapping):
            yield from _grids(value, (*keys, key))


def grid_words(chosen: Mapping[str, object], leave_out: tuple[str, ...] = ()) -> str:
    """The values chosen from grids as part of a name.

    Example:
        >>> grid_words({"init_args.rvs": "mean", "init_args.sigma": 4})
        'rvs=mean, sigma=4'
    """
    last = [key.rpartition(".")[2] for key in chosen]
    return ", ".join(
        f"{short if last.count(short) == 1 else key}={value}"
        for (key, value), short in zip(chosen.items(), last, strict=True)
        if key not in leave_out
    )
