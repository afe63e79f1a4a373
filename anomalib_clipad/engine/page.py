"""A page to look through the images of a run, see :mod:`anomalib_clipad.page`."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer

from anomalib_clipad.components.pretrained import not_for_use
from anomalib_clipad.data.batch import ZeroShotBatch
from anomalib_clipad.data.preview import Preview
from anomalib_clipad.data.verdict import Verdict, verdicts
from anomalib_clipad.engine.post_processing import ClipAdPostProcessor
from anomalib_clipad.engine.run_folder import run_folder, skipped_images, writing
from anomalib_clipad.engine.scored_batches import Background, ScoredBatches, planes
from anomalib_clipad.engine.shown_map import map_on_the_scale
from anomalib_clipad.errors import InputError
from anomalib_clipad.page import (
    Finding,
    PageImage,
    original_for_browsers,
    with_folders,
    write_heat_layer,
    write_page,
    write_thumbnail,
)
from anomalib_clipad.page.page import NAME
from anomalib_clipad.page.thumbnails import LONGER_SIDE
from anomalib_clipad.pictures.heatmap import THRESHOLD

logger = logging.getLogger(__name__)

MOST_IMAGES = 20_000  # on a page; a browser grows slow above, and each has a picture of ten kilobytes and a heatmap


class PageWriter(ScoredBatches):
    """Writes ``report.html`` beside the table of predictions, with thumbnails and heatmaps of the images.

    The pictures of a batch are written while the next one is scored, the page at the end of the run, after Ctrl-C or an
    error with what there is. A run that is killed leaves the table and the pictures, but no page.

    Args:
        most_images: How many images of a run get onto the page; the table has all of them.

    Example:
        >>> PageWriter(most_images=500).most_images
        500
    """

    longest_side = LONGER_SIDE  # of its thumbnails

    def __init__(self, most_images: int = MOST_IMAGES) -> None:
        self.most_images = most_images
        self._images: list[PageImage] = []
        self._drawing: Background[PageImage] = Background()
        self._scored: list[str] = []  # also what is not on the page
        self._folder = Path()
        self._running = False

    def begin(self, trainer: Trainer, model: LightningModule) -> None:
        """Begin a page."""
        del model
        self._images, self._scored, self._running = [], [], True
        self._drawing = Background()
        self._folder = run_folder(trainer)

    def on_scored(self, trainer: Trainer, model: LightningModule, batch: ZeroShotBatch, number: str) -> None:
        """Draw the images of a batch."""
        room = self.most_images // trainer.world_size - len(self._scored)
        said = list(verdicts(batch, model, number))
        self._scored += [verdict.path for verdict in said]
        if room <= 0:
            return
        maps = None if batch.anomaly_map is None else map_on_the_scale(batch, model)
        columns = planes(maps, len(said)), planes(batch.region, len(said)), _scores(batch, model), _raw_scores(batch)
        drawn = partial(_drawn, _name(model), self._folder, bool(batch.image_path))
        previews = batch.preview or [None] * len(said)
        self._images += self._drawing.start(drawn, said[:room], *columns, previews)

    def end(self, trainer: Trainer, model: LightningModule) -> None:
        """Join what several processes have drawn, and write the page."""
        folder = self._folder
        self._images += self._drawing.wait()
        with writing(folder / NAME):
            if not trainer.is_global_zero:
                content = {"scored": self._scored, "images": [asdict(image) for image in self._images]}
                _part(folder, trainer.global_rank).write_text(json.dumps(content), encoding="utf-8")
        trainer.strategy.barrier("pages are written")
        if trainer.is_global_zero:
            with writing(folder / NAME):
                for rank in range(1, trainer.world_size):
                    self._join(_part(folder, rank))
                self._running = False
                try:
                    self._write(trainer, model)
                except KeyboardInterrupt:
                    self._running = True  # so that the page is written all the same
                    raise

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the page of what there is; the error itself is raised anyway."""
        with suppress(Exception):  # that of the run matters
            self._images += self._drawing.wait()
        if not self._running or not self._images or not trainer.is_global_zero:
            return
        why = "interrupted" if isinstance(exception, KeyboardInterrupt) else "ended by an error"
        try:
            # The others may be waiting for each other, and are not waited for.
            whose = f" by the first of {trainer.world_size} processes" if trainer.world_size > 1 else ""
            self._write(trainer, pl_module, [f"The run was {why}; the page has the images that were done{whose}."])
        except (OSError, InputError) as error:
            logger.warning("No page was written (%s).", error)
        self._running = False

    def _join(self, part: Path) -> None:
        content = json.loads(part.read_text(encoding="utf-8"))
        self._scored += content["scored"]
        for row in content["images"]:
            findings = {model: Finding(**finding) for model, finding in row.pop("findings").items()}
            self._images.append(PageImage(**row, findings=findings))
        part.unlink()

    def _write(self, trainer: Trainer, model: LightningModule, notes: Sequence[str] = ()) -> None:
        images = with_folders(self._images)
        classes = sorted({image.category for image in images})
        title = f"{_name(model)}: {', '.join(classes)}" if classes else _name(model)
        logged = trainer.callback_metrics if trainer.testing and not self._running else {}
        figures = {key: float(value) for key, value in logged.items() if value.numel() == 1}
        metrics = pd.DataFrame([{"model": _name(model), **figures}]) if figures else None
        post_processor = _post_processor(model)
        write_page(
            self._folder,
            title,
            images,
            notes=[*notes, *self._notes(trainer, model)],
            metrics=metrics,
            threshold=THRESHOLD if post_processor is None else 1 - post_processor.image_sensitivity,
        )

    def _notes(self, trainer: Trainer, model: LightningModule) -> Iterator[str]:
        """What a reader should know before believing the page."""
        if reason := not_for_use(model.hparams):
            yield f"{reason.capitalize()}: scores and heatmaps say nothing about real parts."
        if (scored := len(self._scored)) > len(self._images):
            yield f"The page has {len(self._images)} of the {scored} images; {NAME} would be slow with more."
        if not self._running and (skipped := skipped_images(trainer, self._scored)):
            yield f"Images that could not be read and are not on the page: {len(skipped)}; the run's log names them."


def _post_processor(model: LightningModule) -> PostProcessor | None:
    found = cast("Any", model).post_processor
    return found if isinstance(found, PostProcessor) else None


def _name(model: LightningModule) -> str:
    return type(model).__name__


def _part(folder: Path, rank: int) -> Path:
    return folder / f".{NAME}.{rank}"


def _scores(batch: ZeroShotBatch, model: LightningModule) -> list[float]:
    """Scores as they are shown, but also beyond the ends of the scale, where the post-processor clamps them."""
    shown = cast("torch.Tensor", batch.pred_score).detach().float().cpu().reshape(-1)
    post_processor = _post_processor(model)
    if post_processor is None or batch.raw_score is None:
        return shown.tolist()
    raw = batch.raw_score.detach().float().cpu().reshape(-1)
    limits = (post_processor.image_min, post_processor.image_max, post_processor.image_threshold)
    if isinstance(post_processor, ClipAdPostProcessor):
        limits = post_processor.limits("image", batch.class_index)
    low, high, threshold = (value.detach().float().cpu() for value in limits)
    beyond = torch.where(high > low, (raw - threshold) / (high - low) + THRESHOLD, shown)
    inside = (shown > 0) & (shown < 1) & post_processor.enable_normalization
    return torch.where(inside | ~beyond.isfinite(), shown, beyond).tolist()


def _raw_scores(batch: ZeroShotBatch) -> list[str]:
    if batch.raw_score is None:
        return [""] * batch.batch_size
    return [f"{score:.6g}" for score in batch.raw_score.detach().reshape(-1).tolist()]


def _drawn(
    model: str,
    folder: Path,
    has_file: bool,
    verdict: Verdict,
    anomaly_map: np.ndarray | None,
    region: np.ndarray | None,
    score: float,
    raw_score: str,
    preview: Preview | None,
) -> PageImage:
    path = Path(verdict.path)
    with writing(folder / NAME):
        heat = None if anomaly_map is None else write_heat_layer(anomaly_map, path, folder)
        thumbnail = write_thumbnail(path, folder, region, preview) if has_file else None
    return PageImage(
        path=verdict.path,
        category=verdict.class_name or "",
        truth=None if verdict.truth is None else int(verdict.truth),
        findings={model: Finding(score, raw_score, heat, verdict.p_value, verdict.explanation)},
        thumbnail=thumbnail,
        original=original_for_browsers(path, folder),
    )
