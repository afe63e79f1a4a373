"""Images of any quality: what can be read is read, and an unreadable file is skipped with a warning that names it.

anomalib reads every image as 8-bit RGB. That saturates images of more bits, makes those of fractions black, and one
truncated file ends a whole run.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from anomalib.data import Batch, DatasetItem, ImageBatch, ImageItem
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset
from torchvision.tv_tensors import Image as ImageTensor

from anomalib_clipad.data.batch import ZeroShotBatch, ZeroShotItem
from anomalib_clipad.data.deep_pixels import DEEP, deep_pixels
from anomalib_clipad.data.preview import Preview
from anomalib_clipad.data.read_ahead import read_ahead
from anomalib_clipad.errors import InputError

logger = logging.getLogger(__name__)

EXIF_ORIENTATION = 0x0112
ROTATED = range(2, 9)  # 1 is upright; others are not defined
PNG_EXIF = (b"eXIf", b"Raw profile type exif")


class _Indexed(Protocol):
    """A data set that gives items by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...  # noqa: ANN401 - any of anomalib's items


class ReadableDataLoader(DataLoader):
    """A data loader that skips what cannot be read, with a warning that names the file.

    Images of more than 8 bits are brought to [0, 1], see :mod:`anomalib_clipad.data.deep_pixels`. Images stored rotated
    are scored as stored, so that heatmap and picture agree, and named. An error that no file causes is raised as it is.

    Args:
        dataloader: A loader over one of anomalib's datasets, which is left as it is.
        each_once: Whether several processes share the items without repeating some to get equal numbers, which
            Lightning does outside prediction and which would count some images twice.
        pin_memory: Whether batches are for a GPU, so that it copies them while the host goes on; also where the loader
            itself was not made so, as anomalib makes most.
        ahead: Whether pictures that take long to read may be read while others are scored, see
            :mod:`anomalib_clipad.data.read_ahead`, where neither other processes read nor a GPU scores.
        preview_side: Pixels of the longest side of pictures that are drawn of the images, see
            :class:`anomalib_clipad.data.preview.Preview`; 0 where none are.

    Example:
        >>> from anomalib.data import PredictDataset
        >>> _ = (image_folder / "broken.png").write_bytes(b"not an image")
        >>> dataset = PredictDataset(image_folder)
        >>> loader = ReadableDataLoader(DataLoader(dataset, collate_fn=dataset.collate_fn))
        >>> len(loader), len(list(loader))
        (3, 2)
    """

    def __init__(
        self,
        dataloader: DataLoader,
        each_once: bool = False,
        pin_memory: bool = False,
        ahead: bool = False,
        preview_side: int = 0,
    ) -> None:
        super().__init__(
            ReadableDataset(dataloader.dataset, preview_side),  # type: ignore[arg-type]  # can_wrap: it is asked by number
            batch_sampler=_unrepeated(dataloader.batch_sampler) if each_once else dataloader.batch_sampler,
            num_workers=dataloader.num_workers,
            collate_fn=_SkippingCollate(dataloader.collate_fn),
            pin_memory=pin_memory or dataloader.pin_memory,
            timeout=dataloader.timeout,
            worker_init_fn=dataloader.worker_init_fn,
            multiprocessing_context=dataloader.multiprocessing_context,
            generator=dataloader.generator,
            prefetch_factor=dataloader.prefetch_factor,
            persistent_workers=dataloader.persistent_workers,
        )
        # A loader with a batch sampler has none of its own; anomalib's timer reports it.
        self.__dict__["batch_size"] = dataloader.batch_size
        self.ahead = ahead and not self.num_workers and not self.pin_memory

    @staticmethod
    def can_wrap(dataloader: object) -> bool:
        """Whether the loader asks a data set for items by number, so that one item can be skipped."""
        return (
            isinstance(dataloader, DataLoader)
            and dataloader.batch_sampler is not None
            and not isinstance(dataloader.dataset, IterableDataset)
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch names a class of its own for it
        """The batches of the readable images."""
        batches: Iterator[Batch | None] = super().__iter__()
        return (batch for batch in (read_ahead(batches) if self.ahead else batches) if batch is not None)


def _unrepeated(batches: Iterable[list[int]] | None) -> Iterable[list[int]] | None:
    padded = getattr(batches, "sampler", None)
    if not isinstance(batches, BatchSampler) or type(padded) is not DistributedSampler:
        return batches
    images, processes = len(padded.dataset), padded.num_replicas  # type: ignore[arg-type]  # torch's sampler asks, too
    if images < processes:
        # A process without an image would leave the others waiting for its part of the metrics.
        msg = f"Every process needs an image, and there are {processes} processes for {images}; use fewer devices."
        raise InputError(msg)
    sampler = UnrepeatedDistributedSampler(padded.dataset, padded.num_replicas, padded.rank, shuffle=False)
    return BatchSampler(sampler, batches.batch_size, drop_last=False)


class ReadableDataset(Dataset):
    """A data set whose items are None where their files cannot be read, see :class:`ReadableDataLoader`.

    Args:
        dataset: One of anomalib's, or any that gives items by number and names its files.
        preview_side: See :class:`ReadableDataLoader`.

    Example:
        >>> from anomalib.data import PredictDataset
        >>> ReadableDataset(PredictDataset(image_folder))[0].image.shape
        torch.Size([3, 40, 60])
    """

    def __init__(self, dataset: _Indexed, preview_side: int = 0) -> None:
        self.dataset, self.preview_side = dataset, preview_side

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> object:
        # The first is not there yet where pickle makes a copy for a worker; the second would go round our own reading.
        if name in ("dataset", "__getitems__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: int) -> DatasetItem | None:
        try:
            item = self.dataset[index]
            path = getattr(item, "image_path", None)
            if not path or getattr(item, "features", None) is not None:  # taps that take the place of the image
                return item
            return _corrected(item, Path(path), self.dataset, self.preview_side)
        except Exception as error:
            # Pillow raises almost anything for a damaged file. If the files can be read, the fault is elsewhere.
            if not isinstance(error, OSError) and all(_can_be_read(path) for path in self._files(index)):
                raise
            reason = str(error).strip() or type(error).__name__
            logger.warning("Skipped %s, which cannot be read (%s); replace the file.", self._name(index), reason)
            return None

    def image_paths(self) -> list[str]:
        """Files of all images, in order, also of those that cannot be read; none where the data set does not say."""
        if hasattr(self.dataset, "samples"):  # at once, since a data set has many
            return [str(path) for path in self.dataset.samples.image_path]
        return [str(files[0]) for files in map(self._files, range(len(self))) if files]

    def _name(self, index: int) -> str:
        files = self._files(index)
        if not files:
            return f"image {index}"
        return f"{files[0]} or its mask" if hasattr(self.dataset, "samples") else str(files[0])

    def _files(self, index: int) -> list[Path]:
        """The image, and its mask where there is one."""
        if hasattr(self.dataset, "files"):
            return list(self.dataset.files(index))
        if hasattr(self.dataset, "image_filenames"):
            return [Path(self.dataset.image_filenames[index])]
        if hasattr(self.dataset, "samples"):
            row = self.dataset.samples.iloc[index]
            paths = (row.image_path, row.get("mask_path"))
            return [Path(path) for path in paths if isinstance(path, str | Path) and str(path)]
        return []


def _can_be_read(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.convert("RGB")
    except Exception:  # noqa: BLE001 - whatever a file's bytes make a decoder raise
        return False
    return True


class _SkippingCollate:
    def __init__(self, collate: Callable[[list[DatasetItem]], Batch]) -> None:
        self.collate = collate

    def __call__(self, items: list[DatasetItem | None]) -> Batch | None:
        readable = [item for item in items if item is not None]
        if not readable:
            return None
        previews = [_taken_preview(item) for item in readable]
        if len(readable) == 1 and isinstance(readable[0], ImageItem) and self.collate == ImageBatch.collate:
            batch: Batch = ZeroShotBatch.of_one(readable[0])
        else:
            batch = self.collate(readable)
        if not isinstance(batch, ImageBatch):
            return batch
        # The fields that a zero-shot model fills; the evaluator reads them off the loader's batch.
        ours = ZeroShotBatch.of(batch)
        ours.preview = previews if any(previews) else None
        return ours


def _corrected(item: DatasetItem, path: Path, dataset: _Indexed, preview_side: int) -> DatasetItem:
    transform = getattr(dataset, "augmentations", None) or getattr(dataset, "transform", None)
    with Image.open(path) as image:  # only the header is read
        # A JPEG is drawn sooner from its file, at a fraction of its size.
        previewed = preview_side and image.format != "JPEG" and transform is None
        shape = image.size[::-1]
        if is_rotated(image, path):
            # Pillow 13 turns a TIFF when it decodes it, and scrambles one of one channel without compression.
            how = "may be read wrongly" if image.format == "TIFF" else "scored as stored"
            logger.warning("%s is stored rotated and %s; save it upright if that is not meant.", path, how)
        if image.mode in DEEP:
            grey = torch.from_numpy(deep_pixels(image))
            pixels = ImageTensor(grey.expand(3, -1, -1))
            item.image = transform(pixels) if transform else pixels
    if isinstance(item.image, torch.Tensor) and is_blank(item.image):
        logger.warning("%s has one colour all over and shows no part; look at the camera and the light.", path)
    return _with_preview(item, shape, preview_side) if previewed else item


def _with_preview(item: DatasetItem, shape: tuple[int, ...], longest_side: int) -> DatasetItem:
    """An item with its preview, unless its data set has made an image of another size of the file."""
    if not isinstance(item, ImageItem) or item.image is None or item.image.shape[-2:] != shape:
        return item
    ours = ZeroShotItem.of(item)
    ours.preview = Preview.of(item.image, longest_side)
    return ours


def _taken_preview(item: DatasetItem) -> Preview | None:
    """An item's preview, which anomalib's collation knows nothing of."""
    if not isinstance(item, ZeroShotItem):
        return None
    preview, item.preview = item.preview, None
    return preview


def is_blank(pixels: torch.Tensor) -> bool:
    """Whether an image has one colour all over, as from a camera that is covered or not connected.

    Args:
        pixels: (C, H, W).

    Example:
        >>> is_blank(torch.zeros(3, 2, 2)), is_blank(torch.eye(2).expand(3, 2, 2))
        (True, False)
    """
    # Nearly every image shows it in its first row.
    return all(bool((part == pixels[..., :1, :1]).all()) for part in (pixels[..., :1, :], pixels))


def is_rotated(image: Image.Image, path: Path) -> bool:
    """Whether an image's EXIF says that it is to be shown in another orientation than it is stored in.

    Args:
        image: Opened; its pixels need not be read.
        path: Its file.

    Example:
        >>> with Image.open(image_folder / "a.png") as image:
        ...     is_rotated(image, image_folder / "a.png")
        False
    """
    if image.format == "PNG" and "exif" not in image.info:
        # EXIF may follow the pixels, and Pillow would decode them all to find it.
        content = path.read_bytes()
        if not any(mark in content for mark in PNG_EXIF):
            return False
    try:
        return image.getexif().get(EXIF_ORIENTATION) in ROTATED
    except Exception:  # noqa: BLE001 - broken EXIF says nothing about the pixels, which were read
        return False
