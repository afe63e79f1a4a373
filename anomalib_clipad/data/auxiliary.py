"""Auxiliary data: the labelled images of other data sets that SDP+ is trained on once.

CLIP-AD (arXiv 2311.00453), section 4: train on the test split of VisA to test on MVTec-AD, and the reverse.
"""

import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import AnomalibDataModule, ImageBatch, ImageItem
from anomalib.data.datasets import AnomalibDataset
from anomalib.data.utils import LabelName
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms.v2 import Transform
from torchvision.tv_tensors import Mask

from anomalib_clipad.data.batch import ZeroShotBatch, ZeroShotItem
from anomalib_clipad.data.datamodules import build_datamodule, categories_on_disk, whole_test_split
from anomalib_clipad.data.feature_cache import CachedFeatures
from anomalib_clipad.data.readable import ReadableDataLoader
from anomalib_clipad.errors import InputError

logger = logging.getLogger(__name__)


class AuxiliaryDataset(Dataset):
    """Test images of several categories, each with its mask and the index of its category.

    Args:
        parts: One of anomalib's data sets a category.
        rows: (part, row) of every image.

    Example:
        >>> data = AuxiliaryDataModule(widgets, num_workers=0)
        >>> data.setup()
        >>> item = data.train_data[0]
        >>> item.image.shape, item.gt_mask.shape, item.class_index
        (torch.Size([3, 48, 48]), torch.Size([48, 48]), 0)
    """

    def __init__(self, parts: Sequence[AnomalibDataset], rows: Sequence[tuple[int, int]]) -> None:
        self.parts = list(parts)
        self.rows = list(rows)

    @property
    def augmentations(self) -> Transform | None:
        """Transform of images and masks, common to all parts."""
        return self.parts[0].augmentations

    @augmentations.setter
    def augmentations(self, transform: Transform | None) -> None:
        for part in self.parts:
            part.augmentations = transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> ZeroShotItem:
        part, row = self.rows[index]
        read = self.parts[part][row]
        if not isinstance(read, ImageItem) or read.image is None:
            msg = f"{type(self.parts[part]).__name__} has no images; SDP+ is trained on images alone."
            raise InputError(msg)
        item = ZeroShotItem.of(read)
        if item.gt_mask is None:  # a normal image of a data set without masks
            item.gt_mask = Mask(torch.zeros(read.image.shape[-2:], dtype=torch.uint8))
        item.class_index, item.index = part, index
        return item

    collate_fn = staticmethod(ZeroShotBatch.collate)

    def path(self, index: int) -> str:
        """Path of an image."""
        return str(self.files(index)[0])

    def files(self, index: int) -> list[Path]:
        """Path of an image, and of its mask where there is one."""
        part, row = self.rows[index]
        sample = self.parts[part].samples.iloc[row]
        return [Path(sample.image_path), *([Path(sample.mask_path)] if _has_mask(sample.mask_path) else [])]

    def identity(self, index: int) -> str:
        """A text that changes when an image, its mask or its label changes."""
        part, row = self.rows[index]
        label = int(self.parts[part].samples.iloc[row].label_index)
        states = [(path, path.stat()) for path in self.files(index)]
        return " ".join([str(label), *(f"{path.resolve()} {s.st_mtime_ns} {s.st_size}" for path, s in states)])


class AuxiliaryDataModule(AnomalibDataModule):
    """Other data sets, with their anomalies, for training SDP+.

    Takes the test images of anomalib data modules: the anomalous ones with masks and the normal ones. A part of them,
    held out by image within every category and label, is the validation data. The data set that the model is meant for
    has no place here.

    Args:
        datamodules: One or several of anomalib's data modules, or mappings of class_path and init_args.
        categories: Which categories of those data sets that have several; by default all that are on disk.
        train_batch_size: Images in a training batch, categories mixed.
        eval_batch_size: Images in a validation batch.
        num_workers: Processes that read images.
        val_split_ratio: Part of the images held out for validation.
        seed: Fixes the split and the order of the training images.
        cache_features: Compute CLIP's taps once: true keeps them in memory (about 6 MB an image with the default
            backbone), a path in a folder, where the next training finds them too.

    Raises:
        InputError: If an argument is invalid, there are no images to train on, or a category is not on disk.

    Example:
        >>> data = AuxiliaryDataModule(widgets, num_workers=0, val_split_ratio=0.3)
        >>> data.setup()
        >>> data.class_names, len(data.train_data), len(data.val_data)
        (['widget'], 7, 4)
    """

    # An AuxiliaryDataset or CachedFeatures; anomalib's class knows data sets of one category only.
    train_data: Any
    val_data: Any
    test_data: Any

    def __init__(
        self,
        datamodules: list[AnomalibDataModule] | AnomalibDataModule | list[dict[str, Any]],
        categories: list[str] | None = None,
        train_batch_size: int = 8,
        eval_batch_size: int = 8,
        num_workers: int = 8,
        val_split_ratio: float = 0.1,
        seed: int = 0,
        cache_features: bool | str | Path = False,
    ) -> None:
        whole = {"train_batch_size": (train_batch_size, 1), "eval_batch_size": (eval_batch_size, 1)}
        for name, (value, least) in {**whole, "num_workers": (num_workers, 0), "seed": (seed, 0)}.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                msg = f"{name} must be a whole number from {least}, got {value!r}."
                raise InputError(msg)
        if categories is not None and (
            not isinstance(categories, list | tuple) or not all(isinstance(name, str) for name in categories)
        ):
            msg = f"categories must be a list of names, got {categories!r}."
            raise InputError(msg)
        if not isinstance(cache_features, bool | str | Path) or cache_features == "":
            msg = f"cache_features must be true, false or the path of a folder, got {cache_features!r}."
            raise InputError(msg)
        super().__init__(train_batch_size, eval_batch_size, num_workers, seed=seed)
        sources = datamodules if isinstance(datamodules, list) else [datamodules]
        self.datamodules = [s if isinstance(s, AnomalibDataModule) else build_datamodule(s) for s in sources]
        if not self.datamodules:
            msg = "datamodules is empty; name at least one data set to train on."
            raise InputError(msg)
        if not isinstance(val_split_ratio, int | float) or not 0 < val_split_ratio < 1:
            msg = f"val_split_ratio must be a number between 0 and 1, got {val_split_ratio!r}."
            raise InputError(msg)
        self.val_split_ratio = val_split_ratio
        self.categories = categories
        self.cache_features = cache_features
        self.class_names: list[str] = []

    @property
    def name(self) -> str:  # type: ignore[override]  # anomalib's is not a property
        """Names of the data sets."""
        return "+".join(datamodule.name for datamodule in self.datamodules)

    def setup(self, stage: str | None = None) -> None:
        """Find the images and split them; a second call changes nothing."""
        if not hasattr(self, "train_data"):
            self._setup(stage)
        self._update_augmentations()

    def _setup(self, _stage: str | None = None) -> None:
        parts: list[AnomalibDataset] = []
        groups: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for name, datamodule in self._by_category():
            data = whole_test_split(datamodule)
            labels = data.samples.label_index.tolist()
            masked = [_has_mask(path) for path in data.samples.mask_path]
            kept = [
                row
                for row, label in enumerate(labels)
                if label == LabelName.NORMAL or (label == LabelName.ABNORMAL and masked[row])
            ]
            if left := sum(label != LabelName.NORMAL for label in labels) - sum(
                labels[r] != LabelName.NORMAL for r in kept
            ):
                logger.warning("%s: %d anomalous images without a mask are left out.", name, left)
            if not any(labels[row] == LabelName.ABNORMAL for row in kept):
                logger.warning("%s has no anomalous image with a mask; only its normal ones are trained on.", name)
            for row in kept:
                groups[len(parts), labels[row]].append((len(parts), row))
            parts.append(data)
            self.class_names.append(name)
        if not any(label == LabelName.ABNORMAL for _, label in groups):
            msg = f"None of {', '.join(self.class_names)} has an anomalous image with a mask to learn from."
            raise InputError(msg)
        train, held_out = _split(groups, self.val_split_ratio, self.seed)
        self.train_data = AuxiliaryDataset(parts, train)
        self.val_data = self.test_data = AuxiliaryDataset(parts, held_out)

    def _by_category(self) -> list[tuple[str, AnomalibDataModule]]:
        """Every category under its name, as a data module of its own."""
        found: list[tuple[str, AnomalibDataModule]] = []
        on_disk: set[str] = set()
        for datamodule in self.datamodules:
            if not datamodule.category:
                found.append((datamodule.name, datamodule))
                continue
            names = getattr(datamodule, "auxiliary_categories", None) or categories_on_disk(datamodule)
            on_disk.update(names)
            for name in names:
                if self.categories is None or name in self.categories:
                    one = copy.deepcopy(datamodule)
                    one.category = name
                    found.append((name, one))
        missing = sorted(set(self.categories or ()) - on_disk)
        if missing or not found:
            roots = ", ".join(str(getattr(datamodule, "root", datamodule.name)) for datamodule in self.datamodules)
            what = f"the categories {', '.join(missing)}" if missing else "any category"
            msg = f"There is no folder of {what} in {roots}; found {', '.join(sorted(on_disk)) or 'none'}."
            raise InputError(msg)
        return found

    def train_dataloader(self) -> DataLoader:
        """Shuffled anew each epoch, in an order of seed and epoch alone, so that training can be resumed."""
        trainer = self.trainer
        replicas, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        sampler: DistributedSampler = DistributedSampler(
            self.train_data, num_replicas=replicas, rank=rank, seed=self.seed or 0
        )
        if trainer:  # Lightning names the epoch to it too late where workers are to read
            sampler.set_epoch(cast("Any", trainer.fit_loop.epoch_progress.current).processed)
        return self._loader(self.train_data, self.train_batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        """The held-out part."""
        return self._loader(self._to_score(self.val_data), self.eval_batch_size)

    def test_dataloader(self) -> DataLoader:
        """The held-out part."""
        return self._loader(self._to_score(self.test_data), self.eval_batch_size)

    def _to_score(self, data: AuxiliaryDataset | CachedFeatures) -> AuxiliaryDataset | CachedFeatures:
        """Taps that are kept are those of the model in training; a run of any other wants the images."""
        other = self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING
        return data.data if isinstance(data, CachedFeatures) and other else data

    def _loader(
        self, data: AuxiliaryDataset | CachedFeatures, batch_size: int, sampler: Iterable[int] | None = None
    ) -> DataLoader:
        # Taps in memory need no reading, and every worker that starts afresh would get a copy of all of them.
        workers = 0 if isinstance(data, CachedFeatures) and data.folder is None else self.num_workers
        return DataLoader(data, batch_size=batch_size, sampler=sampler, num_workers=workers, collate_fn=data.collate_fn)

    def cache(self, compute: Callable[[ImageBatch], Any], key: str) -> None:
        """Replace the images by their taps, computed once.

        Args:
            compute: Taps of a batch, (original, surgery) lists, on the CPU.
            key: Names the CLIP and its input, so that a folder never serves another's taps.
        """
        if not self.cache_features:
            return
        folder = None if self.cache_features is True else Path(self.cache_features)
        for name in ("train_data", "val_data"):
            data = getattr(self, name)
            if isinstance(data, CachedFeatures):
                if data.key == key:
                    continue
                data = data.data  # what was kept is of another model

            def load(indices: Sequence[int], data: AuxiliaryDataset = data) -> ReadableDataLoader:
                return ReadableDataLoader(self._loader(data, self.eval_batch_size, sampler=indices))

            setattr(self, name, CachedFeatures(data, load, compute, key, folder))
        self.test_data = self.val_data


def _has_mask(path: object) -> bool:
    return isinstance(path, str | Path) and bool(str(path)) and Path(path).is_file()


def _split(
    groups: dict[tuple[int, int], list[tuple[int, int]]], ratio: float, seed: int | None
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Hold ``ratio`` of every group out; groups of one stay in training."""
    generator = torch.Generator().manual_seed(seed or 0)
    train: list[tuple[int, int]] = []
    held_out: list[tuple[int, int]] = []
    for _, rows in sorted(groups.items()):
        order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        count = min(max(1, round(ratio * len(order))), len(order) - 1)
        held_out += sorted(order[:count])
        train += sorted(order[count:])
    return train, held_out
