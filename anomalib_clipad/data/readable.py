"""Images as cameras, phones and broken transfers leave them: what can be read is read, the rest is named and skipped.

anomalib reads every image as 8-bit RGB, which saturates 16-bit images, and one truncated file ends a whole run.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from anomalib.data import Batch, DatasetItem, ImageBatch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset
from torchvision.tv_tensors import Image as ImageTensor

from anomalib_clipad.data.batch import ZeroShotBatch

logger = logging.getLogger(__name__)

UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)  # Pillow raises SyntaxError for some broken PNGs
SIXTEEN_BIT = {"I;16", "I;16L", "I;16B", "I;16N", "I"}
EXIF_FORMATS = {"JPEG", "MPO", "TIFF"}
EXIF_ORIENTATION = 0x0112


class ReadableDataLoader(DataLoader):
    """A data loader that skips what cannot be read, with a warning that names the file.

    16-bit images are brought to [0, 1] whole instead of saturated. Images stored rotated are judged as stored, so that
    heatmap and picture agree, and named.

    Args:
        dataloader: A loader over one of anomalib's datasets, which is left as it is.
        each_once: Whether several processes share the items without repeating some to get equal numbers, which
            Lightning does outside prediction and which would count some images twice.

    Example:
        >>> from anomalib.data import PredictDataset
        >>> _ = (image_folder / "broken.png").write_bytes(b"not an image")
        >>> dataset = PredictDataset(image_folder)
        >>> loader = ReadableDataLoader(DataLoader(dataset, collate_fn=dataset.collate_fn))
        >>> len(loader), len(list(loader))
        (3, 2)
    """

    def __init__(self, dataloader: DataLoader, each_once: bool = False) -> None:
        super().__init__(
            _ReadableDataset(dataloader.dataset),
            batch_sampler=_unrepeated(dataloader.batch_sampler) if each_once else dataloader.batch_sampler,
            num_workers=dataloader.num_workers,
            collate_fn=_SkippingCollate(dataloader.collate_fn),
            pin_memory=dataloader.pin_memory,
            timeout=dataloader.timeout,
            worker_init_fn=dataloader.worker_init_fn,
            multiprocessing_context=dataloader.multiprocessing_context,
            generator=dataloader.generator,
            prefetch_factor=dataloader.prefetch_factor,
            persistent_workers=dataloader.persistent_workers,
        )
        # A loader with a batch sampler has none of its own; anomalib's timer reports it.
        self.__dict__["batch_size"] = dataloader.batch_size

    @staticmethod
    def can_wrap(dataloader: object) -> bool:
        """Whether the loader asks a data set for items by number, so that one item can be skipped."""
        return (
            isinstance(dataloader, DataLoader)
            and dataloader.batch_sampler is not None
            and not isinstance(dataloader.dataset, IterableDataset)
        )

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the readable images."""
        return (batch for batch in super().__iter__() if batch is not None)


def _unrepeated(batches: BatchSampler) -> BatchSampler:
    padded = getattr(batches, "sampler", None)
    if type(padded) is not DistributedSampler:
        return batches
    sampler = UnrepeatedDistributedSampler(padded.dataset, padded.num_replicas, padded.rank, shuffle=False)
    return BatchSampler(sampler, batches.batch_size, drop_last=False)


class _ReadableDataset(Dataset):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["dataset"], name)

    def __getitem__(self, index: int) -> DatasetItem | None:
        try:
            item = self.dataset[index]
            path = getattr(item, "image_path", None)
            return _mend(item, Path(path), self.dataset) if path else item
        except UNREADABLE as error:
            logger.warning("Skipped %s, which cannot be read (%s); replace the file.", self._path(index), error)
            return None

    def _path(self, index: int) -> str:
        if hasattr(self.dataset, "image_filenames"):
            return str(self.dataset.image_filenames[index])
        if hasattr(self.dataset, "samples"):
            return f"{self.dataset.samples.iloc[index].image_path} or its mask"
        return f"image {index}"


class _SkippingCollate:
    def __init__(self, collate: object) -> None:
        self.collate = collate

    def __call__(self, items: list[DatasetItem | None]) -> Batch | None:
        readable = [item for item in items if item is not None]
        batch = self.collate(readable) if readable else None
        # The fields that a zero-shot model fills; the evaluator reads them off the loader's batch.
        return ZeroShotBatch.of(batch) if isinstance(batch, ImageBatch) else batch


def _mend(item: DatasetItem, path: Path, dataset: Dataset) -> DatasetItem:
    with Image.open(path) as image:  # only the header is read
        if image.format in EXIF_FORMATS and image.getexif().get(EXIF_ORIENTATION, 1) != 1:
            logger.warning("%s is stored rotated and judged as stored; save it upright if that is not meant.", path)
        if image.mode in SIXTEEN_BIT:
            grey = torch.from_numpy(np.asarray(image).astype(np.float32)) / np.iinfo(np.uint16).max
            transform = getattr(dataset, "augmentations", None) or getattr(dataset, "transform", None)
            pixels = ImageTensor(grey.clamp(0, 1).expand(3, -1, -1))
            item.image = transform(pixels) if transform else pixels
    return item
