"""Image files as pictures: with the brightness and the orientation that the model sees."""

from pathlib import Path

import numpy as np
from PIL import Image

from anomalib_clipad.data.deep_pixels import DEEP, deep_pixels
from anomalib_clipad.data.preview import GAP, Preview

SMALLEST = 320  # pixels of the longest side, to about which smaller pictures are enlarged


def read_picture(path: Path, longest_side: int, enlarge: bool = True) -> Image.Image:
    """An image file as the model sees it, of a size to look at.

    Args:
        path: Of any kind that can be read. Orientation in EXIF is ignored, and 16 bits are scaled, as for the model.
        longest_side: Larger images are made smaller.
        enlarge: Whether small ones are enlarged, by a whole number and without smoothing.

    Returns:
        A picture of mode ``RGB`` in the image's own shape.

    Raises:
        OSError, SyntaxError or ValueError: Pillow's, of a file that cannot be read.

    Example:
        >>> Image.new("RGBA", (1000, 10)).save("long.png")
        >>> read_picture(Path("long.png"), 640).size
        (640, 6)
    """
    with Image.open(path) as image:
        width, height = size_within(image.size, longest_side, enlarge)
        image.draft(None, (width, height))  # a JPEG is decoded at a fraction of its size
        if image.mode in DEEP:
            pixels = np.nan_to_num(deep_pixels(image))
            return sized(Image.fromarray((255 * pixels).round().astype(np.uint8)).convert("RGB"), (width, height))
        return sized(image.convert("RGB"), (width, height))


def preview_picture(preview: Preview, longest_side: int, enlarge: bool = True) -> Image.Image:
    """What :func:`read_picture` makes of a file, from its preview, made for pictures of this size or larger.

    Example:
        >>> import torch
        >>> preview_picture(Preview.of(torch.zeros(3, 10, 1000), 640), 640).size
        (640, 6)
    """
    image, size = Image.fromarray(preview.pixels), size_within(preview.size, longest_side, enlarge)
    if preview.factor == 1:
        return sized(image, size)
    width, height = (side / preview.factor for side in preview.size)
    return image.resize(size, Image.Resampling.BICUBIC, (0, 0, width, height), reducing_gap=GAP)


def size_within(size: tuple[int, int], longest_side: int, enlarge: bool = True) -> tuple[int, int]:
    """Width and height of a picture of an image.

    Args:
        size: The image's.
        longest_side: The picture's at most.
        enlarge: Whether the picture of a small image is larger than it.

    Example:
        >>> size_within((1270, 500), 640), size_within((32, 16), 640)
        ((640, 252), (320, 160))
    """
    longest = max(size)
    if longest <= longest_side and not enlarge:
        return size
    factor = longest_side / longest if longest > longest_side else max(1, round(SMALLEST / longest))
    if factor * longest > longest_side:
        factor = longest_side // longest or longest_side / longest
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def sized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture of another size; an enlarged one shows its pixels.

    Example:
        >>> sized(Image.new("RGB", (2, 2)), (8, 8)).size
        (8, 8)
    """
    if image.size == size:
        return image
    larger = size[0] >= image.width and size[1] >= image.height
    if larger:
        return image.resize(size, Image.Resampling.NEAREST)
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=GAP)
