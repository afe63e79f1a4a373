"""One job of the comparison: one model on one category, measured like all others."""

import hashlib
import json
import logging
import os
import platform
import resource
import traceback
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models import AnomalibModule, get_model
from anomalib.pipelines.components import Job
from anomalib.utils.logging import LoggerRedirectError, hide_output
from lightning.pytorch import seed_everything

from anomalib_clipad.compare.evaluator import METRICS, CompareEvaluator, now
from anomalib_clipad.data.datamodules import build_datamodule

logger = logging.getLogger(__name__)

EXAMPLES = 6  # pictures kept of every job, two of them normal where there are any
PACKAGES = ("anomalib", "anomalib-clipad", "torch", "open_clip_torch", "lightning")


class CompareJob(Job):
    """Fit a model if it is of the kind that is fitted, test it, and keep what was measured.

    Args:
        model: Configuration of the model: class_path, init_args and, if wanted, name.
        data: Configuration of the data module, of one category; or None to judge ``images`` only.
        images: Folder of unlabelled images to judge instead of testing.
        seed: Seed of everything.
        map_size: Side of the maps that are measured.
        output: Folder of the comparison.
        accelerator: ``cpu`` or ``cuda``.
        metrics: Names of the metrics to measure, see :class:`anomalib_clipad.compare.CompareEvaluator`.

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
    ) -> None:
        self.model_config = {key: value for key, value in model.items() if key != "name"}
        self.model_name = str(model.get("name") or model["class_path"].rpartition(".")[2])
        self.data_config, self.images = data, images
        self.seed, self.map_size, self.output, self.accelerator = seed, map_size, output, accelerator
        self.metrics = list(metrics)
        self.category = _category(data, images)

    @property
    def key(self) -> str:
        """Name of the job's files: readable, and another for every other configuration."""
        what = [
            self.model_name,
            self.model_config,
            self.data_config,
            self.images,
            self.seed,
            self.map_size,
            self.metrics,
        ]
        digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:10]
        readable = "".join(c if c.isalnum() else "_" for c in f"{self.model_name}-{self.category}")
        return f"{readable}-{digest}"

    @property
    def file(self) -> Path:
        """Where the result is, once the job is done."""
        return self.output / "jobs" / f"{self.key}.json"

    def result(self) -> dict[str, Any] | None:
        """The result of a job that is done."""
        return json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else None

    def run(self, task_id: int | None = None) -> dict[str, Any]:
        """Run the job, or take the result that is there; a failure becomes a row that says so."""
        if (done := self.result()) is not None:
            return done
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            row = self._row() | self._measure(task_id)
        except Exception as error:  # noqa: BLE001 - any failure of any model costs its own job only
            if isinstance(error, LoggerRedirectError) and error.__cause__ is not None:
                error = error.__cause__
            log = self.file.with_suffix(".log")
            log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            words = str(error).strip().splitlines() or [self.model_config["class_path"]]
            return {**self.failed(f"{type(error).__name__}: {words[0]}"), "log": str(log)}
        write_whole(self.file, json.dumps(row, indent=1, default=str).encode())
        return row

    def failed(self, error: str) -> dict[str, Any]:
        """The row of a job that came to nothing."""
        return {**self._row(), "error": error}

    def _row(self) -> dict[str, Any]:
        kind = self.model_config["class_path"].rpartition(".")[2]
        return {
            "model": self.model_name,
            "category": self.category,
            "seed": self.seed,
            "key": self.key,
            "class": kind,
        }

    @hide_output
    def _measure(self, task_id: int | None) -> dict[str, Any]:
        seed_everything(self.seed, verbose=False)
        _reset_peak_memory()
        data: AnomalibDataModule | None = build_datamodule(self.data_config) if self.data_config else None
        model: AnomalibModule = get_model(dict(self.model_config))
        model.evaluator = model.visualizer = None
        if getattr(model, "class_name", "") is None and data is not None:
            # Folder has no category, and some zero-shot models would then prompt for nothing.
            model.class_name = data.category or data.name
        evaluator = CompareEvaluator(self.map_size, self.metrics)
        row: dict[str, Any] = {}
        with TemporaryDirectory() as folder:
            common = {"accelerator": "gpu" if self.accelerator == "cuda" else "cpu", "default_root_dir": folder}
            devices = 1 if task_id is None or self.accelerator == "cpu" else [task_id]
            engine = Engine(
                **common,
                devices=devices,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[evaluator],
            )
            start = now()
            if model.learning_type == LearningType.ONE_CLASS:
                engine.fit(model, datamodule=data)
            row["fit_seconds"] = now() - start
            start = now()
            if self.images:
                engine.predict(model, data_path=self.images, return_predictions=False)
            else:
                engine.test(model, datamodule=data, verbose=False)
                row |= evaluator.figures
            row["test_seconds"] = now() - start
        row |= {
            "images": len(evaluator.paths),
            "images_per_second": len(evaluator.paths) / max(evaluator.seconds, 1e-9),
            "peak_memory_mib": _peak_memory(self.accelerator),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "device": torch.cuda.get_device_name() if self.accelerator == "cuda" else platform.machine(),
            "versions": _versions(),
        }
        self._keep_examples(evaluator)
        return row

    def _keep_examples(self, evaluator: CompareEvaluator) -> None:
        order = sorted(range(len(evaluator.paths)), key=evaluator.paths.__getitem__)
        normal = [i for i in order if evaluator.labels[i] == 0][:2]
        others = [i for i in order if evaluator.labels[i] != 0]
        step = max(1, len(others) // (EXAMPLES - len(normal)))
        chosen = others[::step][: EXAMPLES - len(normal)] + normal
        arrays = self.file.with_suffix(".npz")
        partial = arrays.with_name(f".{arrays.stem}.{os.getpid()}.npz")
        np.savez_compressed(
            partial,
            paths=np.array([evaluator.paths[i] for i in chosen]),
            maps=np.stack([evaluator.maps[i] for i in chosen]),
            low=np.percentile(np.stack(evaluator.maps).astype(np.float32), 1),
            high=np.percentile(np.stack(evaluator.maps).astype(np.float32), 99.5),
        )
        partial.replace(arrays)
        scores = {"path": evaluator.paths, "label": evaluator.labels, "score": evaluator.scores}
        table = pd.DataFrame(scores).sort_values("path").to_csv(index=False)
        write_whole(self.file.with_suffix(".csv"), table.encode())

    @staticmethod
    def collect(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows as they are."""
        return results

    @staticmethod
    def save(results: list[dict[str, Any]]) -> None:
        """Nothing: every job has saved itself, and the pipeline writes the report."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that nobody ever sees half of it, whoever writes it at the same time."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _category(data: Mapping[str, Any] | None, images: str | None) -> str:
    if images or data is None:
        return Path(str(images)).name
    arguments = data.get("init_args", {})
    return str(arguments.get("category") or arguments.get("name") or data["class_path"].rpartition(".")[2])


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        logger.info("The peak of the process's memory cannot be reset here; it is that of all jobs so far.")


def _peak_memory(accelerator: str) -> float:
    """MiB of the device's memory, or of the process's."""
    if accelerator == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
