"""Small copies of images, made where these are read, so that who draws them does not read the files again."""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

GAP = 2.0  # times the size that is wanted, to which Pillow averages pixels before it resizes


class Preview(NamedTuple):
    """An image as it was read, reduced as far as nobody sees.

    Attributes:
        pixels: (h, w, 3) uint8.
        size: Width and height of the image itself.
        factor: By which it was reduced; a rest at its right and lower edge makes one pixel more.

    Example:
        >>> Preview.of(torch.rand(3, 4000, 3000), longest_side=500).pixels.shape
        (1000, 750, 3)
    """

    pixels: np.ndarray
    size: tuple[int, int]
    factor: int = 1

    @classmethod
    def of(cls, image: torch.Tensor, longest_side: int) -> "Preview":
        """Reduce an image by a whole number, to no less than twice the pictures that are drawn of it.

        Args:
            image: (3, H, W) in [0, 1], of the size that is stored; NaN becomes black.
            longest_side: Of the largest picture, in pixels.
        """
        height, width = image.shape[-2:]
        factor = max(1, int(max(height, width) / longest_side / GAP))
        small = image if factor == 1 else F.avg_pool2d(image[None], factor, ceil_mode=True)[0]
        return cls(np.ascontiguousarray(levels(small)), (width, height), factor)


def levels(image: torch.Tensor) -> np.ndarray:
    """An image (3, H, W) in [0, 1] as (H, W, 3) uint8; NaN becomes black.

    Example:
        >>> levels(torch.tensor([[[0.0, 1.0]]] * 3)).tolist()
        [[[0, 0, 0], [255, 255, 255]]]
    """
    shades = image.nan_to_num().clamp_(0, 1).mul_(255).round_().byte()  # in place: images may be large
    found: np.ndarray = shades.permute(1, 2, 0).numpy()
    return found
