"""Pixels of more than 8 bits, which anomalib saturates, brought to [0, 1]."""

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
DEEP = (*SIXTEEN_BIT, "I", "F")  # Pillow's modes of one channel with more than 8 bits: unsigned, int32, float32

MOST_OF_FRACTIONS = 2.0  # of images whose white is 1; one of 8 bits with nothing brighter is black
BITS = 258  # TIFF's tag for the bits of a pixel


def scale_to_unit(pixels: np.ndarray, sixteen_bit: bool = False) -> np.ndarray:
    """Bring the pixels of an image of one channel to [0, 1].

    The file does not say where white is. It is taken to be at the end of the smallest usual range that holds the
    brightest pixel: 1 for fractions, 255 for 8 bits, 65535 for 16 bits, then 2^17 - 1, 2^18 - 1 and so on. So a dark
    image of more bits than it uses appears brighter than it was; save images with the bits that they have. Fractions
    may exceed 1, as sharpening and resizing make them, if they stay below 2. Pixels below 0 become 0. NaN stays, and
    the model names the image.

    Args:
        pixels: (H, W) numbers of any type.
        sixteen_bit: Whether the file is known to have 16 bits, so that white is at 65535.

    Returns:
        (H, W) float32 in [0, 1].

    Example:
        >>> scale_to_unit(np.array([[0, 51, 255]], dtype=np.int32)).tolist()
        [[0.0, 0.20000000298023224, 1.0]]
        >>> scale_to_unit(np.array([[-0.5, 0.25, 1.0]], dtype=np.float32)).tolist()
        [[0.0, 0.25, 1.0]]
    """
    finite = pixels[np.isfinite(pixels)]
    brightest = float(finite.max()) if finite.size else 0.0
    fractions = np.issubdtype(pixels.dtype, np.floating) and brightest < MOST_OF_FRACTIONS
    white = 1.0 if fractions else 255.0
    if sixteen_bit or (brightest > white and not fractions):
        white = 65535.0 if sixteen_bit or brightest <= 65535 else 2.0 ** np.ceil(np.log2(brightest + 1)) - 1
    return np.clip(pixels.astype(np.float64) / white, 0, 1).astype(np.float32)


def deep_pixels(image: Image.Image) -> np.ndarray:
    """Pixels of an image of one channel with more than 8 bits, see :func:`scale_to_unit`.

    Args:
        image: Of one of the modes ``DEEP``, as it was opened.

    Returns:
        (H, W) float32 in [0, 1].

    Example:
        >>> deep_pixels(Image.fromarray(np.full((1, 2), 65535, dtype=np.uint16))).tolist()
        [[1.0, 1.0]]
    """
    pixels = np.asarray(image)
    if isinstance(image, TiffImageFile) and image.tag_v2.get(BITS) == (12,):
        return np.clip(pixels / np.float32(4095), 0, 1)
    # A PNG has at most 16 bits, whichever mode Pillow opens it in; of a PGM Pillow makes 16, whatever it has.
    sixteen_bit = image.mode in SIXTEEN_BIT or (image.mode == "I" and image.format in ("PNG", "PPM"))
    return scale_to_unit(pixels, sixteen_bit)
