"""Normal images: where they come from, references from some of them, thresholds from the scores of all."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, ImageItem
from anomalib.data.utils import read_image
from anomalib.data.utils.image import get_image_filename, get_image_filenames_from_dir
from torch.utils.data import Dataset
from tqdm import tqdm

from anomalib_clipad.components import Scores
from anomalib_clipad.components.conformal import check_rate
from anomalib_clipad.data.readable import ReadableDataset
from anomalib_clipad.engine.classes import ClassesMixin
from anomalib_clipad.engine.post_processing import ClipAdPostProcessor
from anomalib_clipad.engine.summaries import classes_of
from anomalib_clipad.engine.threshold_messages import warn_of_tested
from anomalib_clipad.errors import InputError, check_flag

logger = logging.getLogger(__name__)

BATCH = 8  # images scored at once
MOST_REFERENCES = 200  # images; the features of more take too much memory
SEED = "PL_GLOBAL_SEED"  # where Lightning's seed_everything leaves its seed, for other processes too


def lightning_seed() -> int:
    """The seed of Lightning's seed_everything; 0 where there is none, or what is no number.

    Example:
        >>> lightning_seed()
        0
    """
    return int(text) if (text := os.environ.get(SEED, "")).isdecimal() else 0


class NormalImages:
    """Normal images in the order of a seeded draw, the same in every process.

    Args:
        paths: Their files.
        transform: From an image of any size in [0, 1] to the network's input.

    Example:
        >>> images = NormalImages.of_folder(image_folder, lambda image: image)
        >>> len(images), sum(1 for _ in images)
        (2, 2)
    """

    def __init__(self, paths: Sequence[str], transform: Callable[[torch.Tensor], torch.Tensor]) -> None:
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(lightning_seed())).tolist()
        ordered = sorted(paths)
        self.paths = tuple(ordered[index] for index in order)
        self.transform = transform

    @classmethod
    def of_folder(cls, folder: str | Path, transform: Callable[[torch.Tensor], torch.Tensor]) -> "NormalImages":
        """All images of a folder and the folders in it.

        Raises:
            InputError: If there is no folder, or no image in it.
        """
        source = Path(folder).resolve()
        try:
            # Not get_image_filenames, which refuses every letter beyond ASCII.
            paths = [get_image_filename(source)] if source.is_file() else get_image_filenames_from_dir(source)
        except (OSError, ValueError) as error:
            what = "has no images" if source.is_dir() else "does not exist"
            msg = f"few_shot_source {folder} {what}; give a folder of normal images."
            raise InputError(msg) from error
        return cls([str(path) for path in paths], transform)

    @classmethod
    def of_training_split(
        cls, datamodule: AnomalibDataModule | None, transform: Callable[[torch.Tensor], torch.Tensor]
    ) -> "NormalImages":
        """All normal images of a data module's training split, as they are in their files."""
        samples = getattr(getattr(datamodule, "train_data", None), "samples", None)
        if samples is None:
            return cls([], transform)
        return cls([str(path) for path in samples[samples.label_index == 0].image_path], transform)

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """The images that can be read, (3, H, W) each; the others are named in the log."""
        return (image for _, image in self.named())

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Likewise, with their paths."""
        readable = ReadableDataset(_Files(self.paths))
        for index, path in enumerate(self.paths):
            item = readable[index]
            if item is not None:
                yield path, self.transform(cast("torch.Tensor", item.image))

    def some(self, paths: Sequence[str]) -> "NormalImages":
        """Some of them, in this order."""
        chosen = copy(self)
        chosen.paths = tuple(paths)
        return chosen


class _Files(Dataset):
    def __init__(self, paths: Sequence[str]) -> None:
        self.image_filenames = paths

    def __len__(self) -> int:
        return len(self.image_filenames)

    def __getitem__(self, index: int) -> ImageItem:
        path = self.image_filenames[index]
        return ImageItem(image=read_image(path, as_tensor=True), image_path=path)


class NormalImagesMixin(ClassesMixin):
    """References and thresholds from normal images; its user calls :meth:`adopt_normal` in its constructor."""

    k_shot: int
    few_shot_source: str | Path | None
    augment_references: bool

    def adopt_normal(
        self, k_shot: int, few_shot_source: str | Path | None, false_alarm_rate: float | None, augment_references: bool
    ) -> None:
        """Check the arguments, and take them over.

        Raises:
            InputError: If one is of another kind.
        """
        if type(k_shot) is not int or k_shot < 0:
            msg = f"k_shot must be a number of images, 0 or more, got {k_shot!r}."
            raise InputError(msg)
        if few_shot_source is not None and not (isinstance(few_shot_source, str | Path) and str(few_shot_source)):
            msg = f"few_shot_source must be the path of a folder of normal images, got {few_shot_source!r}."
            raise InputError(msg)
        check_flag("augment_references", augment_references)
        if false_alarm_rate is not None:
            check_rate(false_alarm_rate)
        self.k_shot, self.few_shot_source = k_shot, few_shot_source
        self.augment_references = augment_references
        if false_alarm_rate is not None and isinstance(self.post_processor, ClipAdPostProcessor):
            self.post_processor.false_alarm_rate = false_alarm_rate
        elif false_alarm_rate is not None:
            msg = "false_alarm_rate belongs to the default post-processor; leave post_processor at its default."
            raise InputError(msg)

    @property
    def learning_type(self) -> LearningType:
        """Few-shot with references, else zero-shot: in either case only thresholds are set from validation data."""
        return LearningType.FEW_SHOT if self._wants_references else LearningType.ZERO_SHOT

    @property
    def _wants_references(self) -> bool:
        return bool(self.k_shot or self.few_shot_source)

    @property
    def _more_follow(self) -> bool:
        """Whether validation images follow, which may set other thresholds."""
        return self._trainer is not None and bool(self.trainer.validating)

    def check_region(self, datasets: Iterable[Any]) -> None:
        """Refuse pictures that a region's mask does not fit; for the models to fill."""
        raise NotImplementedError

    def prepare_normal_images(self, datamodule: AnomalibDataModule | None) -> None:
        """Take references, and set thresholds from the scores of normal images, where this is asked for.

        Raises:
            InputError: If there are no images, or too few.
        """
        post_processor = self.post_processor if isinstance(self.post_processor, ClipAdPostProcessor) else None
        rate = post_processor.false_alarm_rate if post_processor is not None else None
        if self.restored:
            if self._wants_references and not self.model.references.fitted:
                msg = "The checkpoint holds no references; leave the checkpoint, or k_shot and few_shot_source, out."
                raise InputError(msg)
            return
        if not self._wants_references and rate is None:
            return
        references, others = self._sources(datamodule, rate)
        if not len(references) and not len(others):
            if self._wants_references and not self.model.references.fitted:
                msg = (
                    f"k_shot {self.k_shot} takes normal images of the data's training split, and there are none; give "
                    "a data module that has them, few_shot_source, or a checkpoint of such a run."
                )
                raise InputError(msg)
            return  # a run without a data module goes on with what an earlier one has set
        # Without a data module what a run with one has set stays, in any precision.
        before = self._normal_key[0] if self._normal_key else None
        precision = before if self._trainer is None or datamodule is None else self.trainer.precision
        key = (precision, self.model.class_names, self.k_shot, references.paths, others.paths)
        known = self._normal_key if datamodule is not None or self._normal_key is None else (*self._normal_key[:4], ())
        if key == known and self.model.references.fitted == self._wants_references:
            return  # without a data module what its images have set stays
        tested = getattr(datamodule, "test_data", None)
        if tested is not None:
            warn_of_tested((*references.paths, *others.paths), ReadableDataset(tested).image_paths())
        self._take(references, others, post_processor)
        self._normal_key = key

    def _sources(self, datamodule: AnomalibDataModule | None, rate: float | None) -> tuple[NormalImages, NormalImages]:
        """Where references come from, and images from elsewhere that are for the threshold only."""
        transform = getattr(self.pre_processor, "transform", None) or _as_it_is
        training = NormalImages.of_training_split(datamodule, transform)
        none = NormalImages([], transform)
        if not self.few_shot_source:
            return training, none
        if len(training):
            logger.info("References are taken from %s, not from the training split.", self.few_shot_source)
        references = NormalImages.of_folder(self.few_shot_source, transform)
        self.check_region([_Files(references.paths)])
        return references, none if rate is None else training

    def _take(self, references: NormalImages, others: NormalImages, post_processor: ClipAdPostProcessor | None) -> None:
        images, used = iter(references), 0
        scored: Iterable[Scores] = ()
        if self._wants_references:
            chosen = self._choose(images, len(references))
            used = len(chosen)
            with self._forward_context():
                scored = [self.model.set_references(self._batches(chosen), self.augment_references)]
        if post_processor is None:
            return
        if post_processor.false_alarm_rate is not None:
            scored = chain(scored, self._score(chain(images, others), len(references) - used + len(others)))
        evidence: list[tuple[torch.Tensor, torch.Tensor]] = []
        post_processor.set_from_normal(self.model, evidence_kept(scored, evidence), used, self._more_follow)
        if evidence:
            self.model.fit_defect_baseline(torch.cat([one for one, _ in evidence]))

    def _choose(self, images: Iterator[torch.Tensor], available: int) -> list[torch.Tensor]:
        """The references: ``k_shot`` of the images, or all of a folder."""
        wanted = self.k_shot or available
        source = self.few_shot_source or "the training split"
        if wanted > MOST_REFERENCES:
            msg = f"{wanted} references are more than the {MOST_REFERENCES} possible; set k_shot to take fewer."
            raise InputError(msg)
        if available < wanted:
            noun = "image" if available == 1 else "images"
            msg = f"k_shot is {self.k_shot}, but {source} has {available} normal {noun}; set k_shot accordingly."
            raise InputError(msg)
        chosen = list(islice(images, wanted))
        if not chosen or (self.k_shot and len(chosen) < wanted):
            msg = f"{len(chosen)} of the {wanted} references wanted from {source} can be read; replace the others."
            raise InputError(msg)
        return chosen

    def _score(self, images: Iterator[torch.Tensor], total: int) -> Iterator[Scores]:
        with self._bar("Scoring normal images", total) as bar:
            while batch := list(islice(images, BATCH)):
                with torch.no_grad(), self._forward_context():
                    yield self.model.scores(torch.stack(batch).to(self.device))
                bar.update(len(batch))

    def _batches(self, images: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The images in batches; they are taken off the list, since large ones are not to be kept to the end."""
        with self._bar("Encoding references", len(images)) as bar:
            while images:
                batch = torch.stack([images.pop(0) for _ in range(min(BATCH, len(images)))])
                yield batch.to(self.device)
                bar.update(len(batch))

    def _bar(self, words: str, total: int) -> tqdm:
        hidden = self._trainer is not None and self.trainer.progress_bar_callback is None
        return tqdm(total=total, desc=words, disable=hidden or not total)

    def _forward_context(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._trainer is None else self.trainer.precision_plugin.forward_context()


def evidence_kept(scored: Iterable[Scores], evidence: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[Scores]:
    """The scores, one batch at a time since maps are large; their words' evidence and classes are added to a list.

    Example:
        >>> found = []
        >>> len(list(evidence_kept([Scores(torch.zeros(1, 1, 1), torch.zeros(1), torch.zeros(1))], found))), found
        (1, [])
    """
    for scores in scored:
        if scores.defect_evidence is not None:
            known = scores.defect_evidence.flatten(1).isfinite().all(dim=1)
            evidence.append((scores.defect_evidence[known], classes_of(scores)[known]))
        yield scores


def _as_it_is(image: torch.Tensor) -> torch.Tensor:
    return image
