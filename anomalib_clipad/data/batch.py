"""The batch of this package: anomalib's, with the fields that a zero-shot model reads and writes."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from anomalib.data import ImageBatch, ImageItem, NumpyImageBatch, NumpyImageItem

from anomalib_clipad.components.dual_path import DualPathFeatures


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
    raw_score: torch.Tensor | None = None
    raw_map: torch.Tensor | None = None
    p_value: torch.Tensor | None = None
    region: torch.Tensor | None = None
    defect_evidence: torch.Tensor | None = None
    picture: str | None = None

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
        class_index: (B,) index of every image's category; the first category for all where there is none.
        index: (B,) number of every image in its data set.
        features: Taps that were computed before and take the place of the images, see :class:`DualPathFeatures`.
        text_score: (B,) score of the class token.
        map_score: (B,) score of the anomaly map.
        raw_score: (B,) score before the post-processor clamps it, for the metrics.
        raw_map: (B, H, W) map before the post-processor clamps it, for the metrics.
        region: (B, H, W), true inside the region that is looked at; ``None`` where that is everything.
        p_value: (B,) share of normal images that score as high, where scores of normal images are known.
        defect_evidence: (B, V, N, words) from which a name is made when the region is known, see :class:`DefectNames`.
        picture: File of each image's picture, relative to the folder of the run.

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
    raw_score: torch.Tensor | None = None
    raw_map: torch.Tensor | None = None
    p_value: torch.Tensor | None = None
    region: torch.Tensor | None = None
    defect_evidence: torch.Tensor | None = None
    picture: list[str] | None = None

    @classmethod
    def of(cls, batch: ImageBatch) -> "ZeroShotBatch":
        """The same batch with our fields; they are empty where it is one of anomalib's."""
        return batch if isinstance(batch, cls) else cls(**_shared(batch))

    @property
    def items(self) -> list[ZeroShotItem]:  # type: ignore[override]  # anomalib's list is invariant
        """The images one by one; anomalib's way would copy the whole batch first, and knows no taps."""
        names = [field.name for field in fields(self)]
        return [
            ZeroShotItem(**{name: _row(getattr(self, name), row) for name in names}) for row in range(self.batch_size)
        ]

    def to_numpy(self) -> NumpyImageBatch:
        """The batch as one of numpy arrays, which is anomalib's and has no place for our fields."""
        return ImageBatch(**_shared(self)).to_numpy()


def _shared(of: ImageItem | ImageBatch) -> dict[str, Any]:
    """What anomalib's own class has a field for."""
    return {field.name: getattr(of, field.name) for field in fields(ImageItem)}


def _row(value: torch.Tensor | list[str] | DualPathFeatures | None, row: int) -> Any:  # noqa: ANN401 - of the field's type
    if isinstance(value, DualPathFeatures):
        return DualPathFeatures(*([tokens[row] for tokens in taps] for taps in value))
    return None if value is None else value[row]
