"""Pictures of a comparison without what is outside of the region, for models that know no region."""

from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.transforms.utils import extract_transforms_by_type
from torchvision.transforms.v2 import Compose, Resize, Transform
from torchvision.tv_tensors import Mask

from anomalib_clipad.components import Region
from anomalib_clipad.components.region import nearest_inside

SUBSETS = ("train", "val", "test")


class FillOutside(Transform):
    """Pixels outside become copies of the nearest one inside; masks stay.

    Args:
        region: What is looked at.

    Example:
        >>> FillOutside(Region([0.5, 0.0, 1.0, 1.0]))(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])).tolist()
        [[[3.0, 3.0, 3.0, 4.0]]]
    """

    def __init__(self, region: Region) -> None:
        super().__init__()
        self.region = region
        self._source: dict[tuple[int, int], torch.Tensor] = {}  # of the last size, since pictures mostly have one

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:  # noqa: ANN401 - torchvision's
        """Fill an image (..., H, W) of any size."""
        del params
        if isinstance(inpt, Mask):
            return inpt
        size = (inpt.shape[-2], inpt.shape[-1])
        if size not in self._source:
            self._source = {size: nearest_inside(self.region.inside(size))}
        return inpt.flatten(-2).index_select(-1, self._source[size]).unflatten(-1, size)


def fill_outside(data: AnomalibDataModule, fill: FillOutside, transform: Transform | None = None) -> None:
    """Have a data module fill its pictures before anything else is done with them.

    Args:
        data: It takes effect when it is set up next.
        fill: What fills them.
        transform: That of the model.
    """
    resized = bool(extract_transforms_by_type(transform, Resize))
    for subset in SUBSETS:
        name = f"{subset}_augmentations"
        own = getattr(data, name, None)
        # anomalib puts the model's own resize in the place of one that stands alone.
        setattr(data, name, fill if own is None or (resized and type(own) is Resize) else Compose([fill, own]))
