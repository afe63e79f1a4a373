"""Taps of a frozen CLIP, computed once and read in every later epoch."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from torchvision.transforms.v2 import Transform
from torchvision.tv_tensors import Image, Mask

from anomalib_clipad.components.dual_path import DualPathFeatures
from anomalib_clipad.data.batch import ZeroShotBatch, ZeroShotItem
from anomalib_clipad.errors import InputError
from anomalib_clipad.files import remove_abandoned, replacing

if TYPE_CHECKING:
    from anomalib_clipad.data.auxiliary import AuxiliaryDataset

Entry = dict[str, torch.Tensor]
FORMAT = 2  # files of the first may be of pictures that were resized for another model
NAMES = {"mask", "label", *(f"{name}.0" for name in DualPathFeatures._fields)}


class CachedFeatures(Dataset):
    """A data set whose images are replaced by their taps, kept in memory or in a folder.

    Images that cannot be read are left out. In a folder, a file that is incomplete is computed again.

    Args:
        data: The data set.
        load: Gives the batches of some of its images, by their numbers.
        compute: Taps and resized masks of a batch.
        key: Names the CLIP and its input.
        folder: Where the taps are kept; ``None`` for memory.

    Raises:
        InputError: If the folder cannot be written to, or no image can be read.
    """

    def __init__(
        self,
        data: "AuxiliaryDataset",
        load: Callable[[Sequence[int]], Iterable[Any]],
        compute: Callable[[ZeroShotBatch], tuple[DualPathFeatures, torch.Tensor]],
        key: str,
        folder: Path | None,
    ) -> None:
        self.data, self.key, self.folder = data, key, folder
        self.entries: dict[int, Entry] = {}
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                remove_abandoned(folder, ".*.safetensors")
            missing = [index for index in range(len(data)) if not self._is_kept(index)]
            if missing:
                for index, entry in self._compute(load(missing), compute):
                    self._keep(index, entry)
        except (OSError, SafetensorError) as error:
            if folder is None:
                raise
            msg = (
                f"The features could not be kept in {folder} ({error}); make room there, or give cache_features "
                "another folder."
            )
            raise InputError(msg) from error
        unread = {index for index in missing if not self._is_kept(index)}
        self.indices = [index for index in range(len(data)) if index not in unread]
        if not self.indices:
            msg = "None of the images could be read; see the warnings above."
            raise InputError(msg)

    @staticmethod
    def _compute(
        batches: Iterable[ZeroShotBatch], compute: Callable[[ZeroShotBatch], tuple[DualPathFeatures, torch.Tensor]]
    ) -> Iterator[tuple[int, Entry]]:
        for batch in track(batches, description="Computing features"):
            features, masks = compute(batch)
            for row, (index, label) in enumerate(zip(*_numbered(batch), strict=True)):
                entry = {"mask": masks[row].to(torch.uint8), "label": label.int()}
                for name, taps in features._asdict().items():
                    entry |= {f"{name}.{tap}": tokens[row].clone() for tap, tokens in enumerate(taps)}
                yield int(index), entry

    def _keep(self, index: int, entry: Entry) -> None:
        if self.folder is None:
            self.entries[index] = entry
            return
        with replacing(self._file(self.folder, index)) as draft:
            save_file({name: tensor.contiguous() for name, tensor in entry.items()}, draft)

    def _is_kept(self, index: int) -> bool:
        if self.folder is None:
            return index in self.entries
        try:  # reads the header, which says how long the file must be
            with safe_open(self._file(self.folder, index), "pt") as file:
                return set(file.keys()) >= NAMES
        except (OSError, SafetensorError):
            return False

    def _file(self, folder: Path, index: int) -> Path:
        name = f"{FORMAT} {self.key} {self.data.identity(index)}"
        return folder / f"{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:32]}.safetensors"

    @property
    def augmentations(self) -> Transform | None:
        """Transform of the images, if they are to be read once more."""
        return self.data.augmentations

    @augmentations.setter
    def augmentations(self, transform: Transform | None) -> None:
        self.data.augmentations = transform

    def __len__(self) -> int:
        return len(self.indices)

    def path(self, position: int) -> str:
        """Path of an image."""
        return self.data.path(self.indices[position])

    def files(self, position: int) -> list[Path]:
        """Path of an image, and of its mask where there is one."""
        return self.data.files(self.indices[position])

    def __getitem__(self, position: int) -> ZeroShotItem:
        index = self.indices[position]
        entry = self.entries[index] if self.folder is None else load_file(self._file(self.folder, index))
        taps = len([name for name in entry if name.startswith("original")])
        return ZeroShotItem(
            image=Image(torch.zeros(3, 1, 1)),  # the taps take its place
            gt_mask=Mask(entry["mask"]),
            gt_label=entry["label"],
            image_path=self.data.path(index),
            class_index=self.data.rows[index][0],
            index=index,
            features=DualPathFeatures(
                *([entry[f"{name}.{tap}"] for tap in range(taps)] for name in DualPathFeatures._fields)
            ),
        )

    collate_fn = staticmethod(ZeroShotBatch.collate)


def _numbered(batch: ZeroShotBatch) -> tuple[torch.Tensor, torch.Tensor]:
    if batch.index is None or batch.gt_label is None:
        msg = "Features are cached of labelled images that know their number."
        raise TypeError(msg)
    return batch.index, batch.gt_label
