"""Taps of a frozen CLIP, computed once and read in every later epoch."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from torchvision.tv_tensors import Image, Mask

from anomalib_clipad.components.dual_path import DualPathFeatures
from anomalib_clipad.data.batch import ZeroShotBatch, ZeroShotItem

Entry = dict[str, torch.Tensor]


class CachedFeatures(Dataset):
    """A data set whose images are replaced by their taps, kept in memory or in a folder.

    Args:
        data: The data set; :class:`anomalib_clipad.data.AuxiliaryDataset`.
        loader: Goes through it in order.
        compute: Taps and resized masks of a batch.
        key: Names the CLIP and its input.
        folder: Where the taps are kept; ``None`` for memory.
    """

    def __init__(
        self,
        data: Any,  # noqa: ANN401 - imported by the module that defines it
        loader: DataLoader,
        compute: Callable[[ZeroShotBatch], tuple[DualPathFeatures, torch.Tensor]],
        key: str,
        folder: Path | None,
    ) -> None:
        self.data, self.key, self.folder = data, key, folder
        self.entries: dict[int, Entry] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        missing = [index for index in range(len(data)) if folder is None or not self._file(index).is_file()]
        if missing:
            for index, entry in self._compute(loader, compute):
                self._keep(index, entry)

    def _compute(self, loader: DataLoader, compute: Callable) -> Iterator[tuple[int, Entry]]:
        for batch in track(loader, description="Computing features"):
            features, masks = compute(batch)
            for row, index in enumerate(batch.index.tolist()):
                entry = {"mask": masks[row].to(torch.uint8)}
                for name, taps in features._asdict().items():
                    entry |= {f"{name}.{tap}": tokens[row].clone() for tap, tokens in enumerate(taps)}
                entry["label"] = batch.gt_label[row].int()
                yield index, entry

    def _keep(self, index: int, entry: Entry) -> None:
        if self.folder is None:
            self.entries[index] = entry
            return
        file = self._file(index)
        partial = file.with_suffix(f".{os.getpid()}")
        save_file({name: tensor.contiguous() for name, tensor in entry.items()}, partial)
        partial.replace(file)

    def _file(self, index: int) -> Path:
        path = Path(self.data.path(index))
        name = f"{self.key} {path.resolve()} {path.stat().st_mtime_ns}"
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> ZeroShotItem:
        entry = self.entries[index] if self.folder is None else load_file(self._file(index))
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
