"""The batch of this package: anomalib's, with the fields that a zero-shot model reads and writes."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from anomalib.data import ImageBatch, ImageItem, NumpyImageBatch, NumpyImageItem
from torch.utils.data import default_collate

from anomalib_clipad.components.dual_path import DualPathFeatures
from anomalib_clipad.data.preview import Preview


@dataclass
class ZeroShotItem(ImageItem):
    """One image of a :class:`ZeroShotBatch`; the fields are explained there.

    Example:
        >>> item = ZeroShotItem(image=torch.zeros(3, 8, 8), class_index=1, index=7)
        >>> item.class_index, item.index, item.features
        (1, 7, None)
    """

    class_index: int | torch.Tensor | None = None
    index: int | torch.Tensor | None = None
    features: DualPathFeatures | None = None
    text_score: torch.Tensor | None = None
    map_score: torch.Tensor | None = None
    map_offset: torch.Tensor | None = None
    raw_score: torch.Tensor | None = None
    raw_map: torch.Tensor | None = None
    p_value: torch.Tensor | None = None
    region: torch.Tensor | None = None
    defect_evidence: torch.Tensor | None = None
    defect_word: int | torch.Tensor | None = None
    defect_truth: int | torch.Tensor | None = None
    class_name: str | None = None
    picture: str | None = None
    preview: Preview | None = None

    @classmethod
    def of(cls, item: ImageItem) -> "ZeroShotItem":
        """The same item with our fields, which are empty."""
        return cls(**_shared(item))

    def to_numpy(self) -> NumpyImageItem:
        """The item as one of numpy arrays, which is anomalib's and has no place for our fields."""
        return ImageItem(**_shared(self)).to_numpy()


@dataclass
class ZeroShotBatch(ImageBatch):
    """anomalib's batch, with the fields that a zero-shot model reads and writes.

    Args:
        class_index: (B,) index of every image's class; the first class for all where there is none.
        index: (B,) number of every image in its data set.
        features: Taps that were computed before and take the place of the images, see :class:`DualPathFeatures`.
        text_score: (B,) score of the class token.
        map_score: (B,) score of the anomaly map.
        map_offset: (B,) mean of what the class token adds to the anomaly map, in its own units.
        raw_score: (B,) score before the post-processor clamps it, for the metrics.
        raw_map: (B, H, W) map before the post-processor clamps it, for the metrics.
        region: (B, H, W), true inside the region that is looked at; ``None`` where that is everything.
        p_value: (B,) share of normal images that score as high, where scores of normal images are known.
        defect_evidence: (B, V, N, words) from which a name is made when the region is known, see :class:`DefectNames`.
        defect_word: (B,) index into the network's vocabulary of the word given; -1 for ``unspecified``, -2 where the
            image is not called anomalous.
        defect_truth: (B,) likewise of the word that an anomalous image's folder is named by; -1 for any other image.
        class_name: Name of every image's class, as the model has taken it.
        picture: File of each image's picture, relative to the folder of the run.
        preview: Small copy of each image, where one was made for those who draw it, until it is drawn.
        own_maps: Map of each image in its own size, where these are asked for.
        own_masks: Mask of each image in its own size, likewise.

    Example:
        >>> batch = ZeroShotBatch(image=torch.zeros(2, 3, 8, 8), class_index=torch.tensor([0, 1]))
        >>> [int(item.class_index) for item in batch]
        [0, 1]
    """

    item_class: ClassVar[type[ZeroShotItem]] = ZeroShotItem

    class_index: torch.Tensor | None = None
    index: torch.Tensor | None = None
    features: DualPathFeatures | None = None
    text_score: torch.Tensor | None = None
    map_score: torch.Tensor | None = None
    map_offset: torch.Tensor | None = None
    raw_score: torch.Tensor | None = None
    raw_map: torch.Tensor | None = None
    p_value: torch.Tensor | None = None
    region: torch.Tensor | None = None
    defect_evidence: torch.Tensor | None = None
    defect_word: torch.Tensor | None = None
    defect_truth: torch.Tensor | None = None
    class_name: list[str] | None = None
    picture: list[str] | None = None
    preview: list[Preview | None] | None = None
    own_maps: list[torch.Tensor] | None = None
    own_masks: list[torch.Tensor | None] | None = None

    @classmethod
    def of(cls, batch: ImageBatch) -> "ZeroShotBatch":
        """The same batch with our fields; they are empty where it is one of anomalib's."""
        return batch if isinstance(batch, cls) else cls(**_shared(batch))

    @classmethod
    def of_one(cls, item: ImageItem) -> "ZeroShotBatch":
        """What anomalib's ``collate`` makes of one image, which it copies twice: a sixth of a large picture's time.

        Example:
            >>> item = ImageItem(image=torch.zeros(3, 8, 8), image_path="a.png", gt_label=torch.tensor(1))
            >>> batch = ZeroShotBatch.of_one(item)
            >>> batch.image.shape, batch.image_path, batch.gt_label
            (torch.Size([1, 3, 8, 8]), ['a.png'], tensor([True]))
        """
        return cls(**{name: _alone(value) for name, value in _shared(item).items() if value is not None})

    def pin_memory(self) -> "ZeroShotBatch":
        """The same batch, its pictures in memory that a GPU copies from by itself; torch's data loader asks for it."""
        if self.image is not None:
            self.image = self.image.pin_memory()
        if self.gt_mask is not None:
            self.gt_mask = self.gt_mask.pin_memory()
        return self

    @property
    def items(self) -> list[ZeroShotItem]:  # type: ignore[override]  # anomalib's list is invariant
        """The images one by one; anomalib's way would copy the whole batch first, and knows no taps."""
        own = {"anomaly_map": self.own_maps, "pred_mask": self.own_masks}  # in place of the batch's
        values = {field.name: own.get(field.name) or getattr(self, field.name) for field in fields(ZeroShotItem)}
        return [
            ZeroShotItem(**{name: _row(value, row) for name, value in values.items()}) for row in range(self.batch_size)
        ]

    def take_own_size(self, maps: list[torch.Tensor], masks: list[torch.Tensor | None]) -> None:
        """Have maps and masks in each image's own size, also as a batch where all images have one size.

        Example:
            >>> batch = ZeroShotBatch(image=torch.zeros(2, 3, 8, 8), anomaly_map=torch.zeros(2, 8, 8))
            >>> batch.take_own_size([torch.zeros(20, 30), torch.zeros(40, 10)], [None, None])
            >>> batch.anomaly_map is None, [tuple(item.anomaly_map.shape) for item in batch.items]
            (True, [(20, 30), (40, 10)])
        """
        alike = len({one.shape for one in maps}) == 1
        present = [one for one in masks if one is not None]
        self.anomaly_map = _stacked(maps) if alike else None
        self.pred_mask = _stacked(present) if alike and len(present) == len(maps) else None
        if not alike:
            self.own_maps, self.own_masks = maps, masks

    def to_numpy(self) -> NumpyImageBatch:
        """The batch as one of numpy arrays, which is anomalib's and has no place for our fields."""
        return ImageBatch(**_shared(self)).to_numpy()


def _shared(of: ImageItem | ImageBatch) -> dict[str, Any]:
    """What anomalib's own class has a field for."""
    return {field.name: getattr(of, field.name) for field in fields(ImageItem)}


def _alone(value: Any) -> Any:  # noqa: ANN401 - of the field's type
    return value[None] if isinstance(value, torch.Tensor) else default_collate([value])


def _stacked(values: list[torch.Tensor]) -> torch.Tensor:
    return values[0][None] if len(values) == 1 else torch.stack(values)  # large ones are not copied


def _row(value: torch.Tensor | list[Any] | DualPathFeatures | None, row: int) -> Any:  # noqa: ANN401 - of the field's type
    if isinstance(value, DualPathFeatures):
        return DualPathFeatures(*([tokens[row] for tokens in taps] for taps in value))
    return None if value is None else value[row]
