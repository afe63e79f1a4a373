"""A row an image: what a run found, written as it comes."""

import csv
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from scipy import ndimage

from anomalib_clipad.data.batch import ZeroShotBatch
from anomalib_clipad.data.verdict import VERDICTS, Verdict, verdicts
from anomalib_clipad.engine.run_folder import HEATMAPS, IMAGES, MASKS, images_of, run_folder, skipped_images, writing
from anomalib_clipad.engine.scored_batches import ScoredBatches, planes
from anomalib_clipad.page.page import NAME as PAGE
from anomalib_clipad.page.thumbnails import FOLDER as PICTURES_OF_PAGE

logger = logging.getLogger(__name__)

NAME = "predictions.csv"
BOXES = tuple(f"box_{side}" for side in ("left", "top", "right", "bottom"))
COLUMNS = (
    *("path", "class", "score", "threshold", "label", "p_value", "true_label", "marked_area"),
    *(*BOXES, "picture", "explanation"),
)
PICTURES = (IMAGES, HEATMAPS, MASKS, PICTURES_OF_PAGE)  # folders beside a table
MOST_NAMED = 5  # skipped images in the closing line


class PredictionTable(ScoredBatches):
    """Writes ``predictions.csv`` into the folder of a run, and says at its end what was found.

    A row has the image's path and class, its score, the threshold that it is compared with, label, p-value where
    scores of normal images are known, true label where it is known, the marked share of the image, the bounding box of
    the largest marked region as fractions of width and height, the file of its picture relative to the table where the
    visualizer is ours, and the batch's explanation.
    Rows are written batch by batch, so a run that was interrupted, by any signal, leaves those of all images that it
    has scored.

    Example:
        >>> PredictionTable.path(Path("results"))
        PosixPath('results/predictions.csv')
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None
        self._folder = Path()
        self._paths: list[str] = []
        self._anomalous = 0

    @staticmethod
    def path(folder: Path, rank: int = 0) -> Path:
        """Where a process writes its rows."""
        return folder / (f"{NAME}.{rank}" if rank else NAME)

    def begin(self, trainer: Trainer, model: LightningModule) -> None:
        """Begin a table."""
        del model
        self._close()
        self._paths, self._anomalous = [], 0
        self._folder = run_folder(trainer)
        if trainer.is_global_zero:
            warn_of_pictures_of_runs(images_of(trainer))
        path = self.path(self._folder, trainer.global_rank)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", newline="", encoding="utf-8", errors="backslashreplace")
            csv.writer(self._file).writerow(COLUMNS)

    def on_scored(self, trainer: Trainer, model: LightningModule, batch: ZeroShotBatch, number: str) -> None:
        """Write the rows of a batch."""
        if self._file is None:
            return
        masks = planes(batch.pred_mask, batch.batch_size)
        pictures: Sequence[str | None] = batch.picture or [None] * batch.batch_size
        rows = [_row(*one) for one in zip(verdicts(batch, model, number), masks, pictures, strict=True)]
        with writing(self.path(self._folder, trainer.global_rank)):
            csv.DictWriter(self._file, COLUMNS).writerows(rows)
            self._file.flush()
        self._paths += [row["path"] for row in rows]
        self._anomalous += sum(row["label"] == VERDICTS[1] for row in rows)

    def end(self, trainer: Trainer, model: LightningModule) -> None:
        """Join the tables of several processes, and say what was found."""
        del model
        self._close()
        trainer.strategy.barrier("tables are written")
        if not trainer.is_global_zero:
            return
        with writing(self.path(self._folder)):
            for rank in range(1, trainer.world_size):
                self._join(self.path(self._folder), self.path(self._folder, rank))
        self._say(skipped_images(trainer, self._paths))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the rows that were written, and say so."""
        del pl_module, exception
        if self._file is not None:
            self._close()
            if trainer.is_global_zero:
                self._say([], " when the run ended")

    def _say(self, skipped: list[str], when: str = "") -> None:
        images = "1 image" if len(self._paths) == 1 else f"{len(self._paths)} images"
        words = f"{images}, {self._anomalous} of them anomalous{when}"
        if skipped:
            more = f" and {len(skipped) - MOST_NAMED} more" if len(skipped) > MOST_NAMED else ""
            words += f"; {len(skipped)} skipped: {', '.join(skipped[:MOST_NAMED])}{more}"
        folder = self._folder
        here = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
        there = [name for name in (NAME, IMAGES, HEATMAPS, MASKS, PAGE) if (folder / name).exists()]
        logger.info("%s. Results in %s: %s.", words, here, ", ".join(there))

    def _join(self, table: Path, part: Path) -> None:
        with part.open(newline="", encoding="utf-8") as other, table.open("a", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(other))
            csv.DictWriter(file, COLUMNS).writerows(rows)
        part.unlink()
        self._paths += [row["path"] for row in rows]
        self._anomalous += sum(row["label"] == VERDICTS[1] for row in rows)

    def _close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # of rows that could not be written before, which was said then
                self._file.close()
            self._file = None


def warn_of_pictures_of_runs(paths: Iterable[str]) -> None:
    """Say that images are pictures that earlier runs have drawn, where results lie within the folder of the images.

    Args:
        paths: Of the images of a run.

    Example:
        >>> warn_of_pictures_of_runs(["photos/a.png"])
    """
    folders = Counter(map(os.path.dirname, paths))
    drawn = [folder for folder in folders if any(_is_of_a_run(one) for one in (Path(folder), *Path(folder).parents))]
    if drawn:
        logger.warning(
            "%d of the %d images are pictures that an earlier run has drawn, as in %s; keep results elsewhere "
            "(default_root_dir), or give a folder of images alone.",
            sum(folders[folder] for folder in drawn),
            folders.total(),
            drawn[0],
        )


def _is_of_a_run(folder: Path) -> bool:
    if folder.name not in PICTURES:
        return False
    try:
        with (folder.parent / NAME).open(encoding="utf-8", errors="replace") as table:
            return set(table.readline().strip().split(",")) >= {"score", "threshold", "p_value"}
    except OSError:
        return False


def _row(verdict: Verdict, mask: np.ndarray | None, picture: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "path": verdict.path,
        "class": verdict.class_name,
        "score": _number(verdict.score),
        "threshold": verdict.threshold,
        "label": verdict.word,
        "p_value": _number(verdict.p_value),
        "true_label": verdict.true_word,
        "picture": picture,
        "explanation": verdict.explanation,
    }
    if mask is not None:
        mask = mask.astype(bool)
        row["marked_area"] = f"{mask.mean():.6f}"
        row |= {side: f"{value:.4f}" for side, value in zip(BOXES, largest_box(mask), strict=False)}
    return row


def largest_box(mask: np.ndarray) -> tuple[float, ...]:
    """Bounding box of the largest connected region of a mask.

    Args:
        mask: (H, W), true where marked; pixels that touch at a corner are connected.

    Returns:
        Left, top, right and bottom as fractions of width and height; nothing for an empty mask.

    Example:
        >>> mask = np.zeros((4, 10), dtype=bool)
        >>> mask[1:3, 2:7] = mask[0, 9] = True
        >>> largest_box(mask)
        (0.2, 0.25, 0.7, 0.75)
    """
    regions, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if not count:
        return ()
    largest = int(np.bincount(regions.ravel())[1:].argmax())
    rows, columns = ndimage.find_objects(regions)[largest]
    height, width = mask.shape
    return columns.start / width, rows.start / height, columns.stop / width, rows.stop / height


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.6g}"
