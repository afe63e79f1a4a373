"""Models side by side on the same few normal images."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule
from lightning.pytorch.trainer.states import TrainerFn
from pandas import DataFrame

from anomalib_clipad.compare.settings import Config, model_class
from anomalib_clipad.data.datamodules import build_datamodule
from anomalib_clipad.errors import InputError

K_SHOT = "k_shot"  # how anomalib's few-shot models call their number of normal images
SOURCE = "few_shot_source"  # and the folder that they may take them from


def variants(
    model: Config, shots: Sequence[int] | None, seeds: Sequence[int]
) -> Iterator[tuple[Config, int | None, int]]:
    """What a model is tried with: its configuration, a number of normal images, and a seed.

    A model that takes a number of normal images is tried with each; one that is trained on normal images with each
    above 0; any other once, with none. Where no image is drawn, one seed is enough.

    Args:
        model: Configuration of the model, without grids, with a name.
        shots: Numbers of normal images; None for the whole training split.
        seeds: Seeds of the draw.

    Raises:
        InputError: If the model has normal images of its own, or several classes.

    Example:
        >>> model = {"class_path": "Padim", "name": "PaDiM"}
        >>> [(config["name"], count, seed) for config, count, seed in variants(model, [0, 1, 4], [42])]
        [('PaDiM, 1 image', 1, 42), ('PaDiM, 4 images', 4, 42)]
    """
    if shots is None:
        yield from ((model, None, seed) for seed in seeds)
        return
    kind = model_class(model["class_path"])
    takes = kind is not None and K_SHOT in inspect.signature(kind).parameters
    arguments = model.get("init_args") or {}
    if takes and (own := next((key for key in (K_SHOT, SOURCE) if arguments.get(key) is not None), None)):
        msg = f"{model['name']} has {own} in its init_args, and shots gives every model the same images; leave one out."
        raise InputError(msg)
    if takes and not isinstance(names := arguments.get("class_name"), str | None) and len(names) > 1:
        msg = (
            f"{model['name']} takes k_shot normal images of each class of class_name, and shots gives every model the "
            "same images; compare one class at a time, or leave shots out."
        )
        raise InputError(msg)
    if not takes:
        trained = _learning_type(kind) == LearningType.ONE_CLASS
        shots = [count for count in shots if count] if trained else [0]
    for count in shots:
        config = {**model, "name": f"{model['name']}, {count} image{'' if count == 1 else 's'}"}
        if takes:
            config["init_args"] = {**arguments, K_SHOT: count}
        for seed in seeds if count else seeds[:1]:
            yield config, count, seed


def take(datamodule: AnomalibDataModule, count: int, seed: int) -> list[str]:
    """Leave some normal images in the training split, the same for every model.

    Args:
        datamodule: Set up here, as a trainer would do it, so that no trainer does it again.
        count: How many images; 0 leaves the split as it is, since no model looks at it.
        seed: Seed of the draw.

    Returns:
        Their files.

    Raises:
        InputError: If there are fewer.

    Example:
        >>> paths = take(widgets, 1, seed=0)
        >>> len(paths), len(widgets.train_data)
        (1, 1)
    """
    normal = _normal(datamodule)
    if not count:
        return []
    _check_enough(count, len(normal), "the training split")
    chosen = torch.randperm(len(normal), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    drawn = normal.iloc[chosen].reset_index(drop=True)
    drawn.attrs.update(datamodule.train_data.samples.attrs)
    datamodule.train_data.samples = drawn
    return [str(path) for path in drawn.image_path]


def check_shots(count: int, data: Mapping[str, Any], category: str) -> None:
    """Ask a data set that is on disk whether it has enough normal images.

    Args:
        count: How many images are wanted.
        data: Configuration of the data module.
        category: What to call it.

    Raises:
        InputError: If there are fewer; where the data are made by the job, only the job can tell.

    Example:
        >>> check_shots(4, {"class_path": "MVTecAD", "init_args": {"root": "nowhere"}}, "bottle")
    """
    try:
        available = len(_normal(build_datamodule(data)))
    except Exception:  # noqa: BLE001 - the job will say what is wrong with the data
        return
    _check_enough(count, available, f"the training split of {category}")


def _normal(datamodule: AnomalibDataModule) -> DataFrame:
    datamodule.setup(TrainerFn.FITTING)
    samples = datamodule.train_data.samples
    return samples[samples.label_index == 0].sort_values("image_path")


def _check_enough(count: int, available: int, where: str) -> None:
    if available < count:
        msg = f"shots asks for {count} normal images, and {where} has {available}; ask for fewer."
        raise InputError(msg)


def _learning_type(kind: type | None) -> LearningType:
    """What anomalib's engine does with a model, asked of its class: to build it may need weights."""
    try:
        found: Any = inspect.getattr_static(kind, "learning_type")
        return found.fget(None)
    except Exception:  # noqa: BLE001 - one that depends on the model's state; trained ones are the rule
        return LearningType.ONE_CLASS
