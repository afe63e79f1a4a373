"""The pictures of a page: small copies of images, and heatmaps to lay over them."""

import hashlib
import logging
import os
from pathlib import Path

import numpy as np
from PIL import Image

from anomalib_clipad.data.deep_pixels import DEEP
from anomalib_clipad.data.preview import Preview
from anomalib_clipad.data.readable import is_rotated
from anomalib_clipad.files import relative_path, replacing
from anomalib_clipad.pictures.heatmap import dimmed, heat_layer
from anomalib_clipad.pictures.image_file import preview_picture, read_picture

logger = logging.getLogger(__name__)

LONGER_SIDE = 240  # pixels
QUALITY = 85
FOLDER = "report_files"
THUMBNAILS, HEAT = f"{FOLDER}/thumbnails", f"{FOLDER}/heat"
BROWSER_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")


def write_thumbnail(
    image: Path, folder: Path, region: np.ndarray | None = None, preview: Preview | None = None
) -> str | None:
    """Write a small copy of an image, in its own shape and as it is stored, unless there is one of it that is newer.

    Args:
        image: The image's file, of any of Pillow's formats; deep ones are scaled as the models see them.
        folder: Folder of the page.
        region: (H, W), true where the image was looked at; the rest is pale. None for everywhere.
        preview: Of the image, if there is one; else the file is read.

    Returns:
        Path of a JPEG relative to ``folder``, of at most 240 pixels on its longer side; None for an unreadable image.

    Raises:
        OSError: If it cannot be written.

    Example:
        >>> name = write_thumbnail(image_folder / "a.png", Path("page"))
        >>> Image.open(Path("page") / name).size
        (60, 40)
    """
    name = f"{THUMBNAILS}/{_digest(image)}.jpg"
    path = folder / name
    try:
        found = image.stat()
        of_region = "" if region is None else hashlib.sha256(region.tobytes()).hexdigest()
        state = f"{found.st_size} {found.st_mtime_ns} {of_region}"
        if path.exists() and path.stat().st_mtime > found.st_mtime and _state_of(path) in (None, state):
            return name
        small = (
            read_picture(image, LONGER_SIDE, enlarge=False)
            if preview is None
            else preview_picture(preview, LONGER_SIDE, enlarge=False)
        )
    except Exception as error:  # noqa: BLE001 - whatever a file's bytes make a decoder raise
        logger.warning("No thumbnail of %s, which cannot be read any more (%s).", image, error)
        return None
    if region is not None:
        small = dimmed(small, region)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        small.save(draft, quality=QUALITY, comment=state)
    return name


def _state_of(thumbnail: Path) -> str | None:
    """The image that a thumbnail was made of: another file of its name may be an older one."""
    try:
        with Image.open(thumbnail) as opened:
            comment = opened.info.get("comment")
            return comment.decode() if isinstance(comment, bytes) else None
    except (OSError, ValueError):
        return None


def write_heat_layer(anomaly_map: np.ndarray, image: Path, folder: Path) -> str:
    """Write the heatmap of an image, to be stretched over the image's thumbnail.

    Args:
        anomaly_map: (H, W) in [0, 1], 0.5 at the threshold.
        image: The image that it belongs to, after which the file is named.
        folder: Folder of the page.

    Returns:
        Path of a PNG relative to ``folder``, of the map's size, but at most 240 pixels on the longer side.

    Raises:
        OSError: If it cannot be written.

    Example:
        >>> name = write_heat_layer(np.zeros((480, 240)), image_folder / "a.png", Path("page"))
        >>> Image.open(Path("page") / name).size
        (120, 240)
    """
    values = Image.fromarray(np.asarray(anomaly_map, dtype=np.float32))
    values.thumbnail((LONGER_SIDE, LONGER_SIDE), Image.Resampling.BILINEAR)
    name = f"{HEAT}/{_digest(image)}.png"
    (folder / HEAT).mkdir(parents=True, exist_ok=True)
    with replacing(folder / name) as draft:
        heat_layer(np.asarray(values)).save(draft, compress_level=3)
    return name


def original_for_browsers(image: Path, folder: Path) -> str | None:
    """Path of an image from a page's folder, if browsers show its file as the models see it.

    They do not if it is of another format, deep, animated, or stored rotated, or on another drive than the page.

    Example:
        >>> original_for_browsers(image_folder / "a.png", image_folder), original_for_browsers(Path("x.png"), Path())
        ('a.png', None)
    """
    try:
        with Image.open(image) as opened:  # only the header is read
            usual = opened.format in BROWSER_FORMATS and opened.mode not in DEEP
            usual = usual and not getattr(opened, "is_animated", False)
            return relative_path(image, folder) if usual and not is_rotated(opened, image) else None
    except OSError:
        return None


def _digest(path: Path) -> str:
    # Images of one name in two folders have pictures of their own.
    return hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:20]
