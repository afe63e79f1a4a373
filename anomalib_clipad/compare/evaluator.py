"""How every model of the comparison is measured."""

import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from anomalib.data import ImageBatch
from anomalib.data.utils import read_mask
from anomalib.metrics import Evaluator
from lightning.pytorch import LightningModule, Trainer
from torch.nn import functional as F

from anomalib_clipad.compare.heat_layers import marked_regions
from anomalib_clipad.compare.map_stream import MapStream
from anomalib_clipad.compare.scale import Scale
from anomalib_clipad.components import Region
from anomalib_clipad.components.defect_words import UNSPECIFIED
from anomalib_clipad.data.inside import cut_ground_truth
from anomalib_clipad.data.picture_shape import check_pictures
from anomalib_clipad.engine.defect_naming import NOT_CALLED, UNKNOWN
from anomalib_clipad.engine.metrics import IMAGE_FIELDS, PIXEL_FIELDS, GroundTruthKinds, paper_metrics
from anomalib_clipad.engine.naming_metrics import NAMING_FIELDS
from anomalib_clipad.errors import InputError

# The paper's seven, and how they are called in tables and pictures.
METRICS = {metric.name: metric.name.replace("_", " ").replace("F1Max", "F1-max") for metric in paper_metrics()}


class CompareEvaluator(Evaluator):
    """The seven metrics on a model's own scores and on maps of one size, whatever the model's input size is.

    Goes to the trainer as a callback, before the model's own: so it sees scores that no post-processor has touched.
    Masks are read from their files, not from what the model's transform made of them. Maps and masks are kept in a
    temporary file.

    Args:
        map_size: Side of the maps and masks that are measured.
        metrics: Names of those to measure, all seven by default.
        folder: Where the temporary file is; by default where the system keeps them.
        region: What of the maps, masks and labels is measured; by default what the model looks at.

    Raises:
        InputError: If there is no metric of a name.

    Example:
        >>> [metric.name for metric in CompareEvaluator(map_size=256).test_metrics][:3]
        ['image_AUROC', 'image_F1Max', 'image_AP']
    """

    def __init__(
        self,
        map_size: int,
        metrics: Sequence[str] = tuple(METRICS),
        folder: Path | None = None,
        region: Region | None = None,
    ) -> None:
        if unknown := [name for name in metrics if name not in METRICS]:
            msg = f"metrics takes any of {', '.join(METRICS)}, got {', '.join(map(str, unknown))}."
            raise InputError(msg)
        # anomalib declares neither whether a metric was updated nor that it reads any batch with its fields.
        self.measured: list[Any] = [metric for metric in paper_metrics() if metric.name in metrics]
        super().__init__(test_metrics=self.measured)
        self.map_size = (map_size, map_size)
        self.given_region = region
        self.region = None if region is None else torch.from_numpy(region.inside(self.map_size))
        self.looked_at: np.ndarray | None = None  # (H, W), the region of the maps
        self.all_paths: list[str] = []
        self.mask_paths: dict[str, str] = {}
        self.paths: list[str] = []
        self.labels: list[int | None] = []
        self.scores: list[float] = []
        self.explanations: list[str | None] = []
        self.p_values: list[float | None] = []
        self.classes: list[str | None] = []
        self.class_names: tuple[str, ...] = ()  # what the model chooses them from
        self.defects: list[tuple[int, int]] = []  # word and true word of each image, as a batch of ours has them
        self.vocabulary: tuple[str, ...] = ()  # the words that these count
        self._unread: Any = None  # a batch that the model's own callbacks have yet to write into
        self.map_limits: list[tuple[float, float]] = []  # lowest and largest value of each map
        self.map_offsets: list[float | None] = []  # of each map of our models
        self.stream = MapStream(map_size, folder)
        self.figures: dict[str, float] = {}
        self.kinds = GroundTruthKinds()
        self.seconds = self.validation_seconds = 0.0
        self.validated = 0

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the masks' files up, which a batch loses when it begins with a normal image; refuse other shapes."""
        del pl_module
        samples = cast("Any", trainer).datamodule.test_data.samples  # which Lightning does not declare
        self.all_paths = [str(path) for path in samples.image_path]
        check_pictures(self.given_region, self.all_paths)
        if "mask_path" in samples:
            self.mask_paths = dict(zip(self.all_paths, map(str, samples.mask_path), strict=True))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the images up."""
        del pl_module
        loaders: Any = trainer.predict_dataloaders
        dataset = (loaders[0] if isinstance(loaders, list) else loaders).dataset
        self.all_paths = [str(path) for path in dataset.image_filenames]
        check_pictures(self.given_region, self.all_paths)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start the clock."""
        del trainer, pl_module, batch, batch_idx, dataloader_idx
        self._read_words()
        self._start = now()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop the clock, bring the maps to one size, and measure."""
        del trainer, pl_module, outputs, batch_idx, dataloader_idx
        self.seconds += now() - self._start
        paths = [str(path) for path in batch.image_path or []]
        scores, maps = _found(batch)
        _check_numbers(paths, scores, maps)
        no_maps = maps is None
        if maps is None:
            maps = torch.full((len(scores), *self.map_size), torch.nan)  # shown grey
        else:
            maps = F.interpolate(maps, self.map_size, mode="bilinear", align_corners=False)[:, 0]
        labels = None if batch.gt_label is None else torch.as_tensor(batch.gt_label).cpu()
        masks = None if batch.gt_mask is None else self._masks(paths, torch.as_tensor(batch.gt_mask).cpu())
        region = self._region(batch, maps)
        values = (scores, labels, None if no_maps else maps, masks, region)
        measured: Any = SimpleNamespace(**dict(zip((*IMAGE_FIELDS, *PIXEL_FIELDS, "region"), values, strict=True)))
        self.looked_at = None if region is None else region[0].numpy()
        cut_ground_truth(measured)
        labels, masks = measured.gt_label, measured.gt_mask
        self.kinds.update(measured)
        for metric in self.measured:
            metric.update(measured)
        self.paths += paths
        self.labels += [None] * len(maps) if labels is None else labels.int().tolist()
        self.scores += scores.tolist()
        offsets = getattr(batch, "map_offset", None)
        self.map_offsets += [None] * len(maps) if offsets is None else offsets.tolist()
        self._unread = batch
        least = maps if region is None else torch.where(region, maps, torch.inf)
        maps = maps if region is None else torch.where(region, maps, -torch.inf)
        self.map_limits += list(zip(least.amin(dim=(-2, -1)).tolist(), maps.amax(dim=(-2, -1)).tolist(), strict=True))
        self.stream.append(maps, masks)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the figures; the trainer could not log them, since they are no part of the model."""
        self.on_predict_epoch_end(trainer, pl_module)
        one_kind = self.kinds.of_one_kind()
        defined = [one for one in self.measured if one.update_called and one.fields[1] not in one_kind]
        self.figures = {metric.name: float(metric.compute()) for metric in defined}

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the words of the last batch."""
        del trainer
        self._read_words()
        network = getattr(pl_module, "model", None)
        self.vocabulary = getattr(getattr(network, "defect_names", None), "vocabulary", ())  # of our models alone
        self.class_names = getattr(network, "class_names", ())  # likewise

    on_predict_batch_start = on_validation_batch_start = on_test_batch_start
    on_predict_batch_end = on_test_batch_end  # without labels there is nothing to measure but time

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *outputs_and_batch: Any) -> None:  # noqa: ANN401 - an image batch, and what Lightning does not type
        """Stop the clock, in case the test pass takes the scores over."""
        del trainer, pl_module
        self.validation_seconds += now() - self._start
        self.validated += len(outputs_and_batch[1].image)

    def images_per_second(self, model: object) -> float:
        """Images that went through the model in a second; in validation, too, where its scores serve the test pass."""
        served = getattr(model, "served", 0)
        images, seconds = len(self.paths), self.seconds
        if served:
            images, seconds = images + self.validated - served, seconds + self.validation_seconds
        return images / max(seconds, 1e-9)

    @property
    def only_kind(self) -> dict[str, str]:
        """For a job's row, where all images are of one kind."""
        kinds = {label for label in self.labels if label is not None}
        return {"only": "anomalous" if kinds.pop() else "normal"} if len(kinds) == 1 else {}

    @property
    def skipped(self) -> list[str]:
        """Images that the model was not given, because they could not be read."""
        seen = set(self.paths)
        return sorted(path for path in self.all_paths if path not in seen)

    def table(self, map_scales: Sequence[Scale]) -> pd.DataFrame:
        """A row an image, in the order in which they came.

        Args:
            map_scales: Of the images' maps, whose thresholds mark regions.
        """
        return marked_regions(self.stream, map_scales).assign(
            path=self.paths,
            class_name=self.classes,
            label=self.labels,
            score=self.scores,
            explanation=self.explanations,
            p_value=self.p_values,
            defect=[_word(word, self.vocabulary) for word, _ in self.defects],
            true_defect=[self.vocabulary[truth] if truth >= 0 else None for _, truth in self.defects],
        )

    def _read_words(self) -> None:
        """Read what the model's own callbacks, which come after this one, have written into the last batch."""
        batch, self._unread = self._unread, None
        if batch is None:
            return
        unknown = [None] * batch.batch_size
        self.explanations += batch.explanation or unknown
        self.classes += getattr(batch, "class_name", None) or unknown
        p_value = getattr(batch, "p_value", None)
        self.p_values += unknown if p_value is None else p_value.tolist()
        nothing = torch.full((batch.batch_size,), UNKNOWN)
        word, truth = (getattr(batch, name, None) for name in NAMING_FIELDS)
        both = (nothing if word is None else word, nothing if truth is None else truth)
        self.defects += zip(*(values.tolist() for values in both), strict=True)

    def _region(self, batch: ImageBatch, maps: torch.Tensor) -> torch.Tensor | None:
        """The region of the maps, (B, H, W): that of the data, else that of the model, if it has any."""
        if self.region is not None:
            return self.region.expand(maps.shape)
        region = getattr(batch, "region", None)
        if region is None:
            return None
        sized = F.interpolate(region[:1, None].float().cpu(), self.map_size, mode="nearest-exact")
        return sized[0].bool().expand(maps.shape)

    def _masks(self, paths: Sequence[str], given: torch.Tensor) -> torch.Tensor:
        masks = []
        for image_path, mask in zip(paths, given, strict=True):
            path = self.mask_paths.get(image_path, "")
            # Normal images have no file, which anomalib writes in more than one way.
            whole = torch.as_tensor(read_mask(path, as_tensor=True)) if path and Path(path).is_file() else mask
            masks.append(F.interpolate(whole[None, None].float(), self.map_size, mode="nearest")[0, 0])
        return torch.stack(masks).bool()


def _word(index: int, vocabulary: Sequence[str]) -> str | None:
    """The word given to an image, or that there is none for it; nothing where the model names none."""
    if not vocabulary or index == NOT_CALLED:
        return None
    return UNSPECIFIED if index < 0 else vocabulary[index]


def _found(batch: ImageBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores, (B,), by default the largest of the map, and maps, (B, 1, H, W), which some models do not give."""
    if batch.anomaly_map is None and batch.pred_score is None:
        msg = "The model gives neither scores nor anomaly maps, so there is nothing to measure; leave it out."
        raise InputError(msg)
    maps = None if batch.anomaly_map is None else torch.as_tensor(batch.anomaly_map).detach().float().cpu()
    maps = None if maps is None else maps.reshape(len(maps), 1, *maps.shape[-2:])
    given: Any = batch.pred_score if maps is None or batch.pred_score is not None else maps.amax(dim=(-3, -2, -1))
    return torch.as_tensor(given).detach().float().cpu().reshape(-1), maps


def _check_numbers(paths: Sequence[str], scores: torch.Tensor, maps: torch.Tensor | None) -> None:
    """Refuse NaN: a metric sorts it somewhere, and its figure then means nothing."""
    not_numbers = scores.isnan() if maps is None else scores.isnan() | maps.isnan().flatten(1).any(dim=1)
    invalid = not_numbers.nonzero().flatten().tolist()
    if invalid:
        name = Path(paths[invalid[0]]).name if paths else "an image"
        msg = f"The model's score or map of {name} is not a number (NaN), so nothing can be measured."
        raise InputError(msg)


def now() -> float:
    """Seconds on the clock, once the GPU has done what it was asked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
