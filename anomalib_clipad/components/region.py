"""The region of pictures that is looked at: nothing outside of it has any influence."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeGuard, cast

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

from anomalib_clipad.components.tiling import Tiling
from anomalib_clipad.errors import InputError

Boxes = Sequence[Sequence[float]] | Sequence[float]
BOX = "[left, top, right, bottom]"
WHITE = 128  # of 255, from which on a pixel of a mask counts
TOLERANCE = 0.02  # by which the ratios of sides of mask and pictures may differ, in a natural logarithm


class Region:
    """A region of interest, as it is given: for pictures of any size.

    Args:
        region: Path of a mask picture, whose white counts, or boxes [left, top, right, bottom] in fractions of width
            and height; one box may stand alone.

    Raises:
        InputError: If there is no mask, or nothing in it, or a box is empty or leaves the picture.

    Example:
        >>> region = Region([[0.0, 0.5, 1.0, 1.0]])
        >>> region.inside((2, 3)).tolist()
        [[False, False, False], [True, True, True]]
    """

    def __init__(self, region: str | Path | Boxes) -> None:
        self.boxes: list[tuple[float, ...]] = []
        self.mask: np.ndarray | None = None
        if isinstance(region, str | Path):
            self.name = f"region {region}"
            self.mask = _read(region)
        else:
            self.name = "region"
            self.boxes = _boxes(region)

    @property
    def digest(self) -> str:
        """Another one for every other region."""
        mask = b"" if self.mask is None else repr(self.mask.shape).encode() + self.mask.tobytes()
        return hashlib.sha256(mask + repr(self.boxes).encode()).hexdigest()[:16]

    def inside(self, size: tuple[int, int]) -> np.ndarray:
        """The region in pictures of a size: a pixel is in it if its centre is.

        Args:
            size: Height and width.

        Returns:
            (H, W), true inside.

        Raises:
            InputError: If no pixel is.
        """
        if self.mask is not None:
            rows, columns = (
                ((np.arange(side) + 0.5) * own / side).astype(int)
                for side, own in zip(size, self.mask.shape, strict=True)
            )
            inside = self.mask[rows[:, None], columns]
        else:
            rows, columns = ((np.arange(side) + 0.5) / side for side in size)
            inside = np.zeros(size, dtype=bool)
            for left, top, right, bottom in self.boxes:
                inside |= ((top <= rows) & (rows < bottom))[:, None] & (left <= columns) & (columns < right)
        if not inside.any():
            msg = f"{self.name} leaves nothing of pictures of {size[0]} x {size[1]} pixels; make it larger."
            raise InputError(msg)
        return inside

    def check_shape(self, path: str, height: int, width: int) -> None:
        """Refuse a picture of another shape than the mask's; of the same shape it may be larger or smaller.

        Args:
            path: Its file.
            height: Its height in pixels.
            width: Its width in pixels.

        Raises:
            InputError: If its shape is another one; boxes fit pictures of any shape.
        """
        if self.mask is None:
            return
        rows, columns = self.mask.shape
        if abs(math.log(rows * width / (columns * height))) > TOLERANCE:
            msg = (
                f"{self.name} is a mask of {rows} x {columns} pixels, and {path} has {height} x {width}, which is "
                "another shape; keep pictures of each shape in a folder with a mask of their own, or give boxes "
                f"{BOX} in fractions."
            )
            raise InputError(msg)


class RegionOfPictures(nn.Module):
    """A region in pictures of one size, or no region, which changes nothing.

    It has none until :meth:`lie_in` is called.

    Pixels outside become copies of the nearest one inside, before the tower looks at the picture. So nothing outside
    can change what is found inside, and the region's border is no edge.

    Args:
        region: The region; ``None`` for none.

    Example:
        >>> region = RegionOfPictures(Region([0.5, 0.0, 1.0, 1.0]))
        >>> region.lie_in(Tiling((1, 4), (1, 4)), batch_size=1)
        >>> region.fill(torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])).tolist()
        [[[[3.0, 3.0, 3.0, 4.0]]]]
        >>> maps = torch.tensor([[[9.0, 8.0, 1.0, 2.0]]])
        >>> region.values(maps).tolist(), region.cut(maps).tolist()
        ([[1.0, 2.0]], [[[1.0, 1.0, 1.0, 2.0]]])
    """

    inside: torch.Tensor | None
    index: torch.Tensor
    source: torch.Tensor
    tiles: torch.Tensor | None

    def __init__(self, region: Region | None = None) -> None:
        super().__init__()
        self.given = region
        for name in ("inside", "index", "source", "tiles"):
            self.register_buffer(name, None, persistent=False)

    def lie_in(self, tiling: Tiling, batch_size: int) -> None:
        """Belong to pictures of one size from now on.

        Args:
            tiling: Of the pictures.
            batch_size: Most tiles at once.

        Raises:
            InputError: If nothing is left of the pictures.
        """
        if self.given is None:
            return
        inside = self.given.inside(tiling.image_size)
        self.inside = torch.from_numpy(inside)  # (H, W)
        # Of the pixels inside, and of the one that each pixel is a copy of; 32 bits, since pictures may be large.
        self.index = torch.from_numpy(inside.ravel().nonzero()[0]).int()
        self.source = nearest_inside(inside)
        if len(tiling):
            pixels = torch.from_numpy(inside)[None, None].float()
            shares = torch.cat([tile.mean(dim=(1, 2, 3)) for tile in tiling.tiles(pixels, batch_size)])
            self.tiles = shares >= shares.max().clamp(max=0.5)  # (tiles,), whose text score counts

    def fill(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures (B, C, H, W) whose outside is made of the nearest pixels inside."""
        if self.inside is None:
            return images
        return images.flatten(2).index_select(2, self.source).unflatten(2, images.shape[-2:])

    def values(self, maps: torch.Tensor) -> torch.Tensor:
        """The pixels of maps that are inside: (B, H, W) to (B, n)."""
        pixels = maps.flatten(1)
        return pixels if self.inside is None else pixels.index_select(1, self.index)

    def cut(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps (B, H, W) whose values outside are their least one inside: no maximum or minimum is outside."""
        if self.inside is None:
            return maps
        return torch.where(self.inside, maps, self.values(maps).amin(dim=1)[:, None, None])

    def enlarge(self, maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Maps of pictures of another size, bilinearly, without what is outside of the region.

        Args:
            maps: (B, H, W), with one value outside.
            size: Height and width wanted.

        Returns:
            (B, *size), with that value outside of the region in pictures of this size.
        """
        filled = self.fill(maps[:, None])
        large = F.interpolate(filled, size, mode="bilinear", align_corners=False)[:, 0]
        if self.given is None or self.inside is None or self.inside.all():
            return large
        outside = maps[:, ~self.inside][:, :1, None]
        return torch.where(torch.from_numpy(self.given.inside(size)).to(large.device), large, outside)

    def of(self, maps: torch.Tensor) -> torch.Tensor | None:
        """The region for each of a batch's maps (B, H, W), true inside; ``None`` where there is no region."""
        return None if self.inside is None else self.inside.expand(maps.shape)


def nearest_inside(inside: np.ndarray) -> torch.Tensor:
    """Of each pixel the nearest one inside.

    Args:
        inside: (H, W), true inside.

    Returns:
        (H * W,) numbers of pixels, row by row.

    Example:
        >>> nearest_inside(np.array([[False, False, True, True]])).tolist()
        [2, 2, 2, 3]
    """
    rows, columns = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
    return torch.from_numpy(rows * inside.shape[1] + columns).flatten().int()


def _read(path: str | Path) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            grey = picture.convert("L")
    except Exception as error:  # whatever a file's bytes make a decoder raise
        what = "cannot be read as a picture" if Path(path).is_file() else "does not exist"
        msg = f"region {path} {what}; give a mask picture, whose white counts, or boxes {BOX} in fractions."
        raise InputError(msg) from error
    mask = np.asarray(grey) >= WHITE
    if not mask.any():
        msg = f"region {path} leaves nothing of the pictures: no pixel of the mask is white; white is what counts."
        raise InputError(msg)
    return mask


def _boxes(region: object) -> list[tuple[float, ...]]:
    given = list(region) if _is_list(region) else [region]
    given = [given] if given and all(_is_number(side) for side in given) else given
    if not given:
        msg = f"region is an empty list, which leaves nothing of the pictures; give boxes {BOX}, or no region."
        raise InputError(msg)
    boxes: list[tuple[float, ...]] = []
    for box in given:
        if not _is_list(box) or len(box) != 4 or not all(_is_number(side) for side in box):
            msg = f"A box of region must be {BOX} in fractions of width and height, got {box!r}."
            raise InputError(msg)
        left, top, right, bottom = (float(side) for side in cast("Sequence[float]", box))
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            msg = (
                f"A box of region must be {BOX} in fractions from 0 to 1, left before right and top above bottom, got "
                f"{list(box)!r}."
            )
            raise InputError(msg)
        boxes.append((left, top, right, bottom))
    return boxes


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)  # configurations bring lists of their own
