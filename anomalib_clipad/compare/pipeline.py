"""``anomalib compare``: any models of anomalib side by side, zero-shot ones included."""

import argparse
import inspect
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Any

import anomalib.models
import pandas as pd
import timm
import torch
import yaml
from anomalib.pipelines.components.base import Pipeline, Runner
from huggingface_hub import try_to_load_from_cache
from open_clip.pretrained import get_pretrained_cfg
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from anomalib_clipad.compare.bars import Bars
from anomalib_clipad.compare.evaluator import METRICS
from anomalib_clipad.compare.generator import CompareJobGenerator
from anomalib_clipad.compare.job import CompareJob
from anomalib_clipad.compare.known import CLIP_SIZES, FIXED_CLIP, REQUIRED
from anomalib_clipad.compare.naming import naming_remarks, namings
from anomalib_clipad.compare.predictions import read_kept
from anomalib_clipad.compare.remarks import remarks
from anomalib_clipad.compare.report import write_report
from anomalib_clipad.compare.runners import ParallelCompareRunner, SerialCompareRunner
from anomalib_clipad.compare.screen import interruptible, logging_to, say
from anomalib_clipad.compare.settings import short_class
from anomalib_clipad.compare.shots import check_shots
from anomalib_clipad.compare.tables import mean_table, skipped_images
from anomalib_clipad.components.backbone import find_cached
from anomalib_clipad.engine.table import NAME
from anomalib_clipad.errors import InputError
from anomalib_clipad.page.page import NAME as PAGE


class Compare(Pipeline):
    """Compare models on the same images: metrics, speed, memory, heatmaps, in tables and pictures.

    Example:
        >>> [type(runner).__name__ for runner in Compare()._setup_runners({"accelerator": "cpu"})]
        ['SerialCompareRunner']
    """

    def _setup_runners(self, args: dict) -> list[Runner]:
        """One serial runner, or one process a GPU where there are several."""
        accelerator = _accelerator(args)
        generator = CompareJobGenerator(accelerator)
        if accelerator == "cuda" and torch.cuda.device_count() > 1:
            return [ParallelCompareRunner(generator, n_jobs=torch.cuda.device_count())]
        return [SerialCompareRunner(generator)]

    def run(self, args: argparse.Namespace | None = None) -> list[dict[str, Any]]:  # type: ignore[override]  # anomalib's returns nothing
        """Run what is missing and write the report.

        anomalib's pipelines return nothing; the rows are for callers in Python.

        Args:
            args: With ``config``, the path of a YAML file.

        Returns:
            A row a job.

        Raises:
            InputError: If the configuration cannot be used, or a job failed; the report is written all the same.
        """
        config = self._read(args)
        runner = self._setup_runners(config)[0]
        settings = config["compare"]
        jobs: Sequence[CompareJob] = CompareJobGenerator(_accelerator(config)).generate_jobs(settings)
        for line in preflight(jobs):
            say(line)
        output = jobs[0].output
        _make_folder(output)
        with interruptible():
            with logging_to(output / "compare.log"):
                rows = runner.run(settings)
            _show(rows)
            for line in (*remarks(rows), *naming_remarks(namings(rows, read_kept(output, rows)))):
                say(line)
            say("Drawing the report.")
            try:
                with Bars(1, "report") as bars:
                    write_report(output, rows, title=yaml.safe_dump(settings, sort_keys=False), tell=bars.tell)
            except OSError as error:
                msg = (
                    f"The report could not be written ({error}); what was measured is kept, so start again after that."
                )
                raise InputError(msg) from error
        places = {"Report": "report.md", "Page": PAGE, "Heatmaps": "examples", "Table": NAME}
        say("\n".join(f"{what}: {output / name}" for what, name in places.items()), stderr=False)
        for path, models in skipped_images(pd.DataFrame(rows)).items():
            say(f"Skipped, because it cannot be read: {path} ({', '.join(models)})")
        if failed := [row for row in rows if "error" in row]:
            names = "; ".join(f"{row['model']} on {row['category']}" for row in failed)
            others = " The others are in the report." if len(failed) < len(rows) else ""
            msg = f"{len(failed)} of {len(rows)} jobs failed: {names}.{others}"
            raise InputError(msg)
        return rows

    def _read(self, args: argparse.Namespace | None) -> dict[str, Any]:
        try:
            config: object = self._get_args(args)  # type: ignore[arg-type]  # jsonargparse's namespace is one of these
        except (OSError, UnicodeError, yaml.YAMLError) as error:
            msg = f"The configuration cannot be read ({' '.join(str(error).split())}); give a YAML file."
            raise InputError(msg) from error
        if not isinstance(config, dict) or not isinstance(config.get("compare"), dict):
            msg = "The configuration needs a key compare with models and data; see configs/compare_folder.yaml."
            raise InputError(msg)
        if unknown := sorted(str(key) for key in config if key not in {"accelerator", "compare"}):
            msg = f"The configuration takes the keys accelerator and compare, got {', '.join(unknown)}."
            raise InputError(msg)
        return config


def _accelerator(config: dict[str, Any]) -> str:
    accelerator = config.get("accelerator") or ("cuda" if torch.cuda.is_available() else "cpu")
    if accelerator not in ("cpu", "cuda"):
        msg = f"accelerator must be cpu or cuda, got {accelerator!r}."
        raise InputError(msg)
    return str(accelerator)


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"The folder {output} cannot be made ({error}); set output to one that can be written to."
        raise InputError(msg) from error


def preflight(jobs: Sequence[CompareJob]) -> list[str]:
    """What a user should know before hours go by.

    Returns:
        Sentences on what is done already and what will be downloaded.

    Raises:
        InputError: If data are missing or too few, or a model cannot work with the installed packages.
    """
    waiting = [job for job in jobs if job.result() is None]
    lines = [f"{len(jobs)} jobs, {len(jobs) - len(waiting)} of them done."]
    missing = sorted({path for job in waiting for path in _missing_data(job)})
    if missing:
        msg = f"These data are missing: {', '.join(missing)}; put them there, or set root to where they are."
        raise InputError(msg)
    most = {job.category: job for job in sorted(waiting, key=lambda job: job.shots or 0) if job.shots}
    for category, job in most.items():
        check_shots(job.shots or 0, job.data_config or {}, category)
    for name in sorted({short_class(job.model_config["class_path"]) for job in waiting} & set(REQUIRED)):
        holds, sentence = REQUIRED[name]
        if not holds():
            raise InputError(sentence)
    downloads = (said(job.model_config) for said in (_clip_download, _timm_download) for job in waiting)
    return lines + list(dict.fromkeys(line for line in downloads if line))


def _arguments(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a model's class, and what it will be built with."""
    name = short_class(config["class_path"])
    kind = getattr(anomalib.models, name, None)
    defaults = {key: one.default for key, one in inspect.signature(kind).parameters.items()} if kind else {}
    return name, {**defaults, **(config.get("init_args") or {})}


def _clip_download(config: dict[str, Any]) -> str | None:
    """Says what a model on a CLIP will fetch."""
    name, arguments = _arguments(config)
    backbone, tag = FIXED_CLIP.get(name) or (arguments.get("backbone"), arguments.get("pretrained"))
    if not isinstance(backbone, str) or not isinstance(tag, str) or Path(backbone).is_dir():
        return None
    if not get_pretrained_cfg(backbone, tag) or find_cached(backbone, tag) is not None:
        return None
    return f"The weights {tag} of {backbone} will be downloaded ({CLIP_SIZES.get(backbone, 'size unknown')})."


def _timm_download(config: dict[str, Any]) -> str | None:
    """Says what a model with a backbone of timm's, as PatchCore has one, will fetch."""
    kind, arguments = _arguments(config)
    backbone = arguments.get("backbone")
    if arguments.get("pre_trained") is not True or not isinstance(backbone, str) or not timm.is_model(backbone):
        return None
    name = (timm.get_pretrained_cfg(backbone) or timm.models.PretrainedCfg()).hf_hub_id
    files = ("model.safetensors", "pytorch_model.bin")
    if not name or any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
        return None
    with torch.device("meta"):
        size = sum(p.numel() for p in timm.create_model(backbone).parameters()) * 4 / 1e6
    return f"The weights of {backbone} for {kind} will be downloaded ({size:.0f} MB)."


def _show(rows: list[dict[str, Any]]) -> None:
    """The means on the screen, if anything was measured."""
    means = mean_table(rows)
    if means.empty:
        return
    names = Column("", min_width=min(24, max(len(str(name)) for name in means.index)))
    table = Table(
        names,
        *(METRICS[name].replace(" ", "\n") for name in means),
        title="Means over the categories, %",
        box=SIMPLE_HEAD,
        padding=0,
    )
    for model, values in means.iterrows():
        table.add_row(Text(str(model)), *(f"{100 * value:.1f}" for value in values))
    Console().print(table)


def _missing_data(job: CompareJob) -> list[str]:
    if job.images and not Path(job.images).exists():
        return [str(job.images)]
    arguments = (job.data_config or {}).get("init_args") or {}
    root = arguments.get("root")
    if not root or not isinstance(root, str | Path):
        return []
    category = str(arguments.get("category") or "")
    folder = Path(root, category)
    # VisA and Real-IAD have their categories in a folder of the root.
    inside = [Path(root, "visa_pytorch", category), *Path(root).glob(f"realiad_*/{escape(category)}")]
    return [] if any(one.is_dir() for one in (folder, *inside)) else [str(folder)]
