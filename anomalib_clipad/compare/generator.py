"""From a configuration to the jobs of a comparison."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from anomalib.pipelines.components import Job, JobGenerator
from anomalib.pipelines.components.utils import get_iterator_from_grid_dict

from anomalib_clipad.compare.evaluator import METRICS, CompareEvaluator
from anomalib_clipad.compare.job import CompareJob
from anomalib_clipad.data.datamodules import build_datamodule, categories_on_disk
from anomalib_clipad.errors import InputError


class CompareJobGenerator(JobGenerator):
    """Makes a job of every model on every category.

    Args:
        accelerator: ``cpu`` or ``cuda``.

    Example:
        >>> grid = {"class_path": "ClipAdSdp", "init_args": {"rvs": {"grid": ["mean", "kde"]}}}
        >>> len(CompareJobGenerator("cpu").generate_jobs({"models": [grid, "WinClip"], "images": "photos"}))
        3
    """

    def __init__(self, accelerator: str) -> None:
        self.accelerator = accelerator

    @property
    def job_class(self) -> type[Job]:
        """Kind of the jobs."""
        return CompareJob

    def generate_jobs(self, args: dict | None = None, prev_stage_result: object = None) -> Sequence[CompareJob]:
        """All jobs of a configuration, category by category; a list, so that a progress bar knows its length.

        Raises:
            InputError: If the configuration lacks models or data, or has unknown keys.
        """
        del prev_stage_result
        args = dict(args or {})
        known = {"models", "data", "images", "seed", "map_size", "metrics", "output"}
        if unknown := sorted(set(args) - known):
            msg = f"compare takes the keys {', '.join(sorted(known))}, got {', '.join(unknown)}."
            raise InputError(msg)
        if not args.get("models") or not (args.get("data") or args.get("images")):
            msg = "compare needs models, a list of class_path and init_args, and data or images to try them on."
            raise InputError(msg)
        metrics = args.get("metrics") or list(METRICS)
        CompareEvaluator(1, metrics)  # an unknown name is told before the first job
        models = [model for entry in args["models"] for model in _grid(_as_config(entry))]
        data = list(_data(args.get("data")))
        return [
            CompareJob(
                model,
                one,
                args.get("images"),
                int(args.get("seed", 42)),
                int(args.get("map_size", 256)),
                Path(args.get("output", "results/compare")),
                self.accelerator,
                metrics,
            )
            for one in data
            for model in models
        ]


def _as_config(entry: str | Mapping[str, Any]) -> dict[str, Any]:
    config = {"class_path": entry} if isinstance(entry, str) else dict(entry)
    if "class_path" not in config:
        msg = f"Every model and data set needs a class_path, got {config}."
        raise InputError(msg)
    return config


def _grid(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    # anomalib's grids flatten what they are given, lists of mappings included; a plain entry has nothing to expand.
    return get_iterator_from_grid_dict(config) if "grid" in json.dumps(config, default=str) else iter([config])


def _data(entries: object) -> Iterator[dict[str, Any] | None]:
    if entries is None:
        yield None
        return
    for entry in entries if isinstance(entries, list) else [entries]:
        config = _as_config(entry)
        arguments = dict(config.get("init_args", {}))
        if arguments.get("category") == "all":
            arguments.pop("category")
            names = categories_on_disk(build_datamodule({**config, "init_args": arguments}))
            if not names:
                msg = f"No category of {config['class_path']} is on disk under {arguments.get('root', 'its root')}."
                raise InputError(msg)
            arguments["category"] = {"grid": names}
        yield from _grid({**config, "init_args": arguments})
