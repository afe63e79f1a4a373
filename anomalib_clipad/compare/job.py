"""One job of the comparison: one model on one category, measured like all others."""

import hashlib
import json
import platform
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from anomalib import LearningType
from anomalib.data import PredictDataset
from anomalib.engine import Engine
from anomalib.pipelines.components import Job
from anomalib.utils.logging import LoggerRedirectError, hide_output
from lightning.pytorch import seed_everything
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_clipad.compare import job_files
from anomalib_clipad.compare.evaluator import METRICS, CompareEvaluator, now
from anomalib_clipad.compare.examples import choose_examples, extremes
from anomalib_clipad.compare.fingerprint import files_named, fingerprint, versions
from anomalib_clipad.compare.heat_layers import heat_layers
from anomalib_clipad.compare.known import not_for_use
from anomalib_clipad.compare.memory import AddedMemory
from anomalib_clipad.compare.naming import figures_of_job
from anomalib_clipad.compare.outside import FillOutside, fill_outside
from anomalib_clipad.compare.plain_model import no_loaders, plain_model
from anomalib_clipad.compare.progress import ImageProgress, Tell, silent
from anomalib_clipad.compare.scale import Scale, choose_scales
from anomalib_clipad.compare.settings import MAX_EPOCHS, short_class
from anomalib_clipad.compare.shots import take
from anomalib_clipad.components import Region
from anomalib_clipad.data.datamodules import build_datamodule
from anomalib_clipad.engine.region import RegionMixin
from anomalib_clipad.errors import InputError
from anomalib_clipad.files import remove_abandoned, slug
from anomalib_clipad.pictures.text import printable
from anomalib_clipad.plugin import DEMO, DEMO_FOLDER


class CompareJob(Job):
    """Fit a model if it is of the kind that is fitted, test it, and keep what was measured.

    Args:
        model: Configuration of the model: class_path, init_args and, if wanted, name and max_epochs.
        data: Configuration of the data module, of one category, with name and region if wanted; or None for ``images``
            only.
        images: Folder of unlabelled images to predict instead of testing.
        seed: Seed of everything.
        map_size: Side of the maps that are measured.
        output: Folder of the comparison.
        accelerator: ``cpu`` or ``cuda``.
        metrics: Names of the metrics to measure, see :class:`anomalib_clipad.compare.CompareEvaluator`.
        shots: Number of normal images that are left in the training split, drawn by the seed; None for all.
        family: Name of the model whatever the number of normal images; the model's name by default.

    Example:
        >>> job = CompareJob({"class_path": "ClipAdSdp"}, None, "photos", 42, 256, Path("out"), "cpu")
        >>> job.model_name, job.category, job.result() is None
        ('ClipAdSdp', 'photos', True)
    """

    name = "compare"

    def __init__(
        self,
        model: Mapping[str, Any],
        data: Mapping[str, Any] | None,
        images: str | None,
        seed: int,
        map_size: int,
        output: Path,
        accelerator: str,
        metrics: Sequence[str] = tuple(METRICS),
        shots: int | None = None,
        family: str | None = None,
    ) -> None:
        self.model_config = {key: value for key, value in model.items() if key != "name"}
        self.model_name = printable(str(model.get("name") or short_class(model["class_path"])))
        self.category = printable(category_of(data, images))
        of_data = dict(data or {})
        self.region = of_data.pop("region", None)
        self.data_config = {key: value for key, value in of_data.items() if key != "name"} or None
        self.images = images
        self.seed, self.map_size, self.output, self.accelerator = seed, map_size, output, accelerator
        self.metrics = list(metrics)
        self.shots = shots
        self.family = printable(family or self.model_name)
        self.tell: Tell = silent  # whoever shows what the job does
        self.resumed = False  # whether the result was there before

    @property
    def key(self) -> str:
        """Name of the job's files: readable, and another for every other configuration."""
        what = [
            *(self.model_name, self.category, self.model_config, self.data_config),
            *(self.images, self.seed, self.map_size, self.metrics),
            *(() if self.shots is None else (self.shots,)),
            # Not the name of results whose pictures were not filled outside of the region.
            *(() if self.region is None else ("region, filled", self.region)),
        ]
        digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:10]
        return f"{slug(self.model_name)}-{slug(self.category)}-{digest}"

    @property
    def file(self) -> Path:
        """Where the result is, once the job is done."""
        return self.output / "jobs" / f"{self.key}.json"

    def inputs(self) -> dict[str, Any]:
        """What the result depends on beside the configuration: local files and versions of packages.

        It is kept with the result and not in the job's name, because some data sets are written by the job itself.
        """
        paths = files_named(self.model_config.get("init_args") or {})
        paths += [DEMO_FOLDER] if DEMO in (self.model_config.get("init_args") or {}).values() else []
        paths += [Path(self.images)] if self.images else []
        paths += files_named({"region": self.region})
        if self.data_config is not None:
            arguments = dict(self.data_config.get("init_args") or {})
            arguments.setdefault("root", getattr(build_datamodule(self.data_config), "root", None))
            paths += files_named(arguments)
        return {
            "files": fingerprint(paths, self.output),
            "versions": versions(),
            "accelerator": self.accelerator,  # of which the speed is
        }

    def result(self) -> dict[str, Any] | None:
        """The result, if the job is done, its files are whole, and it would read today what it read then."""
        row = job_files.read_row(self.file)
        try:
            return row if row is not None and row.get("inputs") == self.inputs() else None
        except Exception:  # noqa: BLE001 - the data cannot be built any more; the job will say why
            return None

    def run(self, task_id: int | None = None) -> dict[str, Any]:
        """Run the job, or take the result that is there; a failure becomes a row that says so."""
        if (done := self.result()) is not None:
            self.resumed = True
            return done
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self.file.parent, ".*")
            row = self._row() | self._measure(task_id)
            job_files.write_row(self.file, row)
        except Exception as error:  # noqa: BLE001 - any failure of any model costs its own job only
            return self._failure(error)
        return row

    def failed(self, error: str) -> dict[str, Any]:
        """The row of a job without a result."""
        return {**self._row(), "error": error}

    def _failure(self, error: BaseException) -> dict[str, Any]:
        if isinstance(error, LoggerRedirectError) and error.__cause__ is not None:
            error = error.__cause__
        words = str(error).strip().splitlines() or [self.model_config["class_path"]]
        row = self.failed(printable(f"{type(error).__name__}: {words[0]}"))
        log = self.file.with_suffix(".log")
        try:
            log.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace")
        except OSError:  # a full disk, perhaps the failure itself
            return row
        return {**row, "log": str(log)}

    def _row(self) -> dict[str, Any]:
        return {
            "model": self.model_name,
            "category": self.category,
            "seed": self.seed,
            "key": self.key,
            **({} if self.shots is None else {"shots": self.shots, "family": self.family}),
            "class": short_class(self.model_config["class_path"]),
            **({"data": short_class(self.data_config["class_path"])} if self.data_config else {}),
            **({"not_for_use": reason} if (reason := not_for_use(self.model_config)) else {}),
        }

    @hide_output
    def _measure(self, task_id: int | None) -> dict[str, Any]:
        seed_everything(self.seed, verbose=False)
        memory = AddedMemory(self.accelerator)
        self.tell("reading the data", 0, None)
        data = build_datamodule(self.data_config) if self.data_config else None
        if data is not None:
            data.prepare_data()
        inputs = self.inputs()  # before the first image is read, so that a later change is seen
        if data is not None:
            # Here, since anomalib splits by the global generator, from which models draw their weights.
            data.setup(TrainerFn.FITTING)
            seed_everything(self.seed, verbose=False)
        if data is not None and self.shots is not None:
            take(data, self.shots, self.seed)
        self.tell("loading the model", 0, None)
        model: Any = plain_model(self.model_config, data, self.region)
        region = None if self.region is None else Region(self.region)
        fill = None if region is None or isinstance(model, RegionMixin) else FillOutside(region)
        if data is not None and fill is not None:
            fill_outside(data, fill, getattr(model.pre_processor, "transform", None))
        evaluator = CompareEvaluator(self.map_size, self.metrics, self.file.parent, region)
        row: dict[str, Any] = {}
        with closing(evaluator.stream), self._engine(evaluator, task_id) as engine:
            start = now()
            if model.learning_type == LearningType.ONE_CLASS:
                self.tell("training", 0, None)
                engine.fit(model, datamodule=data)
            row["fit_seconds"] = now() - start
            start = now()
            self.tell("preparing the model", 0, None)
            if self.images:
                if hasattr(data, "val_data") and model.learning_type != LearningType.ONE_CLASS:
                    engine.validate(model, datamodule=data, verbose=False)  # for its references and thresholds
                model.val_dataloader = no_loaders
                engine.predict(model, dataset=PredictDataset(self.images, fill), return_predictions=False)
            else:
                engine.test(model, datamodule=data, verbose=False)
                row |= evaluator.figures | evaluator.only_kind
            row["test_seconds"] = now() - start
            if not evaluator.paths:
                msg = f"No image of {self.category} could be read; look at the folder that the configuration names."
                raise InputError(msg)
            scales = choose_scales(
                model.post_processor,
                *(evaluator.scores, evaluator.map_limits, evaluator.labels),
                *(evaluator.classes, evaluator.class_names),
            )
            row |= {
                "images": len(evaluator.paths),
                "skipped": evaluator.skipped,
                "images_per_second": evaluator.images_per_second(model),
                "peak_memory_mib": memory.peak_mib(),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "learning_type": model.learning_type.value,
                "device": torch.cuda.get_device_name() if self.accelerator == "cuda" else platform.machine(),
                "scales": scales.row(),
                "versions": inputs["versions"],
                "inputs": inputs,
            }
            map_scales = scales.maps_of(evaluator.classes, evaluator.map_offsets)
            table = evaluator.table(map_scales)
            row |= figures_of_job(evaluator.vocabulary, table)
            self._keep(evaluator, map_scales, table)
        return row

    @contextmanager
    def _engine(self, evaluator: CompareEvaluator, task_id: int | None) -> Iterator[Engine]:
        with TemporaryDirectory() as folder:
            yield Engine(
                accelerator="gpu" if self.accelerator == "cuda" else "cpu",
                default_root_dir=folder,
                devices=1 if task_id is None or self.accelerator == "cpu" else [task_id],
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                max_epochs=self.model_config.get(MAX_EPOCHS),
                callbacks=[evaluator, ImageProgress(self.tell)],
            )

    def _keep(self, evaluator: CompareEvaluator, map_scales: Sequence[Scale], table: pd.DataFrame) -> None:
        numbers = {path: number for number, path in enumerate(evaluator.paths)}
        order = [numbers[path] for path in sorted(numbers)]
        shown = choose_examples(evaluator.paths, evaluator.labels)
        both = extremes(evaluator.paths, evaluator.labels, evaluator.scores)
        masks = {path: evaluator.stream.mask(numbers[path]) for path in (*shown, *both) if path is not None}
        job_files.write_heat(self.file, heat_layers(evaluator.stream, order, map_scales, self.tell))
        known = {path: mask for path, mask in masks.items() if mask is not None}
        job_files.write_masks(self.file, known, evaluator.looked_at)
        job_files.write_images(self.file, table)

    @staticmethod
    def collect(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows as they are."""
        return results

    @staticmethod
    def save(results: list[dict[str, Any]]) -> None:
        """Nothing: every job has saved itself, and the pipeline writes the report."""


def category_of(data: Mapping[str, Any] | None, images: str | None) -> str:
    """Name of what a model is tried on.

    Example:
        >>> category_of({"class_path": "MVTecAD", "init_args": {"category": "bottle"}}, None)
        'bottle'
    """
    if images or data is None:
        return Path(str(images)).name or str(images)
    arguments = data.get("init_args") or {}
    return str(
        data.get("name") or arguments.get("category") or arguments.get("name") or short_class(data["class_path"])
    )
