"""``anomalib compare``: any models of anomalib side by side, zero-shot ones included."""

import argparse
import inspect
import logging
from pathlib import Path
from typing import Any

import anomalib.models
import open_clip
import timm
import torch
import yaml
from anomalib.pipelines.components.base import Pipeline, Runner
from anomalib.utils.logging import redirect_logs
from huggingface_hub import try_to_load_from_cache
from open_clip.pretrained import get_pretrained_cfg
from rich.console import Console
from rich.table import Column, Table

from anomalib_clipad.compare.evaluator import METRICS
from anomalib_clipad.compare.generator import CompareJobGenerator
from anomalib_clipad.compare.job import CompareJob
from anomalib_clipad.compare.report import mean_table, write_report
from anomalib_clipad.compare.runners import ParallelCompareRunner, SerialCompareRunner
from anomalib_clipad.components.backbone import find_cached
from anomalib_clipad.errors import InputError

CLIP_SIZES = {"ViT-B-16-plus-240": "800 MB"}
WINCLIP_BACKBONE, WINCLIP_TAG = "ViT-B-16-plus-240", "laion400m_e31"


class Compare(Pipeline):
    """Compare models on the same images: metrics, speed, memory, heatmaps, in tables and pictures.

    Example:
        >>> [type(runner).__name__ for runner in Compare()._setup_runners({"accelerator": "cpu"})]
        ['SerialCompareRunner']
    """

    def _setup_runners(self, args: dict) -> list[Runner]:
        """One serial runner, or one process a GPU where there are several."""
        accelerator = args.get("accelerator", "cuda" if torch.cuda.is_available() else "cpu")
        if accelerator not in {"cpu", "cuda"}:
            msg = f"accelerator must be cpu or cuda, got {accelerator!r}."
            raise InputError(msg)
        generator = CompareJobGenerator(accelerator)
        if accelerator == "cuda" and torch.cuda.device_count() > 1:
            return [ParallelCompareRunner(generator, n_jobs=torch.cuda.device_count())]
        return [SerialCompareRunner(generator)]

    def run(self, args: argparse.Namespace | None = None) -> list[dict[str, Any]]:
        """Run what is missing and write the report.

        Args:
            args: With ``config``, the path of a YAML file.

        Returns:
            A row a job.

        Raises:
            InputError: If the configuration cannot be used.
        """
        config = self._get_args(args)
        if not isinstance(config, dict) or not isinstance(config.get("compare"), dict):
            msg = "The configuration needs a key compare with models and data; see configs/compare_folder.yaml."
            raise InputError(msg)
        runner = self._setup_runners(config)[0]
        settings = config["compare"]
        jobs = runner.generator(settings, None)
        for line in preflight(jobs):
            Console(stderr=True).print(line)
        output = jobs[0].output
        output.mkdir(parents=True, exist_ok=True)
        redirect_logs(str(output / "compare.log"))
        for handler in list(logging.root.handlers):  # which anomalib's command line writes to
            if not isinstance(handler, logging.FileHandler):
                logging.root.removeHandler(handler)
        rows = runner.run(settings)
        write_report(output, rows, title=yaml.safe_dump(settings, sort_keys=False))
        _show(rows)
        Console().print(f"Report: {output / 'report.md'}\nHeatmaps: {output / 'examples'}")
        return rows


def preflight(jobs: list[CompareJob]) -> list[str]:
    """What a user should know before hours go by.

    Returns:
        Sentences on what is done already and what will be downloaded.

    Raises:
        InputError: If data are missing, or the installed open_clip spoils WinCLIP.
    """
    waiting = [job for job in jobs if job.result() is None]
    lines = [f"{len(jobs)} jobs, {len(jobs) - len(waiting)} of them done."]
    missing = sorted({path for job in waiting for path in _missing_data(job)})
    if missing:
        msg = f"These data are missing: {', '.join(missing)}; put them there, or set root to where they are."
        raise InputError(msg)
    models = {job.model_config["class_path"].rpartition(".")[2]: job.model_config for job in waiting}
    if "WinClip" in models and not _runs_sequence_first():
        msg = (
            "WinCLIP's maps are constant with the installed open_clip, whose towers are batch-first; install "
            "'open_clip_torch>=2.23,<2.26.1' as anomalib asks, or leave WinClip out."
        )
        raise InputError(msg)
    weights = {
        (arguments.get("backbone", WINCLIP_BACKBONE), arguments.get("pretrained", WINCLIP_TAG))
        for name, config in models.items()
        if name in {"ClipAdSdp", "ClipAdSdpPlus", "WinClip"}
        for arguments in [config.get("init_args") or {}]
    }
    for backbone, tag in sorted(weights, key=str):
        known = tag and not Path(backbone).is_dir() and get_pretrained_cfg(backbone, tag)
        if known and find_cached(backbone, tag) is None:
            lines.append(
                f"The weights {tag} of {backbone} will be downloaded ({CLIP_SIZES.get(backbone, 'size unknown')})."
            )
    return lines + sorted({line for job in waiting if (line := _timm_download(job.model_config))})


def _timm_download(config: dict[str, Any]) -> str | None:
    """Says what a model with a backbone of timm's, as PatchCore has one, will fetch."""
    kind = getattr(anomalib.models, config["class_path"].rpartition(".")[2], None)
    defaults = {name: p.default for name, p in inspect.signature(kind).parameters.items()} if kind else {}
    arguments = {**defaults, **(config.get("init_args") or {})}
    backbone = arguments.get("backbone")
    if arguments.get("pre_trained") is not True or not isinstance(backbone, str) or not timm.is_model(backbone):
        return None
    name = (timm.get_pretrained_cfg(backbone) or timm.models.PretrainedCfg()).hf_hub_id
    files = ("model.safetensors", "pytorch_model.bin")
    if not name or any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
        return None
    with torch.device("meta"):
        size = sum(p.numel() for p in timm.create_model(backbone).parameters()) * 4 / 1e6
    return f"The weights of {backbone} for {kind.__name__} will be downloaded ({size:.0f} MB)."


def _show(rows: list[dict[str, Any]]) -> None:
    """The means on the screen, if anything was measured."""
    means = mean_table(rows)
    if means.empty:
        return
    names = Column("", min_width=min(24, max(len(str(name)) for name in means.index)))
    table = Table(names, *(METRICS[name] for name in means), title="Means over the categories, %", show_edge=False)
    for model, values in means.iterrows():
        table.add_row(str(model), *(f"{100 * value:.1f}" for value in values))
    Console().print(table)


def _missing_data(job: CompareJob) -> list[str]:
    if job.images and not Path(job.images).exists():
        return [str(job.images)]
    arguments = (job.data_config or {}).get("init_args", {})
    root = arguments.get("root")
    if not root:
        return []
    folder = Path(root) / str(arguments.get("category") or "")
    split = Path(root) / "visa_pytorch" / str(arguments.get("category") or "")
    return [] if folder.is_dir() or split.is_dir() else [str(folder)]


def _runs_sequence_first() -> bool:
    """Whether open_clip's towers still take (N, B, W), as anomalib's WinCLIP expects."""
    return not hasattr(open_clip.transformer.Transformer(8, 1, 1), "batch_first")
