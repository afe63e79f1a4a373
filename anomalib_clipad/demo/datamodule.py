"""DemoTextures: a small data set in MVTec's layout, rendered at its first use."""

import logging
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from anomalib.data import MVTecAD
from PIL import Image

from anomalib_clipad.demo.canvas import Style
from anomalib_clipad.demo.defects import DEFECTS, paint_defect
from anomalib_clipad.demo.textures import SURFACES, TRAINING, render
from anomalib_clipad.errors import InputError

logger = logging.getLogger(__name__)

SIZE = 256
# Colours of the photographs, which are grey.
NATURAL = {"grass": ((0.1, 0.16, 0.05), (0.6, 0.7, 0.35)), "gravel": ((0.2, 0.17, 0.14), (0.78, 0.74, 0.68))}
TRAIN_GOOD, TEST_GOOD, TEST_BROKEN = 12, 10, 3  # images of a category; of every kind of defect, the last


class DemoTextures(MVTecAD):
    """Rendered surfaces and photographed textures with painted defects, for demonstrations and tests.

    The first use writes the pictures, the same everywhere, into ``root``. The categories of ``HELD_OUT`` are what the
    demonstration backbone never saw, photographs of grass and gravel among them. It was trained on the others, which
    serve as auxiliary data.

    Args:
        root: Folder of the data set.
        category: One of ``anomalib_clipad.demo.textures.SURFACES``.
        **kwargs: As :class:`anomalib.data.MVTecAD` takes them.

    Raises:
        InputError: If there is no such category.

    Example:
        >>> data = DemoTextures(root="textures", category="linen", num_workers=0)
        >>> data.prepare_data()
        >>> data.setup()
        >>> len(data.train_data), len(data.test_data), data.test_data[0].image.shape
        (12, 34, torch.Size([3, 256, 256]))
    """

    def __init__(self, root: Path | str = "./datasets/DemoTextures", category: str = "linen", **kwargs: Any) -> None:  # noqa: ANN401 - MVTecAD's
        if not isinstance(root, str | Path):
            msg = f"root must be the path of a folder, got {root!r}."
            raise InputError(msg)
        if not isinstance(category, str) or category not in SURFACES:
            msg = f"category must be one of {', '.join(SURFACES)}, got {category!r}."
            raise InputError(msg)
        super().__init__(root, category, **kwargs)

    @property
    def auxiliary_categories(self) -> list[str]:
        """Categories that SDP+ may be trained on: none that is held out for testing."""
        return sorted(TRAINING)

    def prepare_data(self) -> None:
        """Write the category's pictures, if they are not there yet."""
        write_category(Path(self.root), self.category)


def write_category(root: Path, category: str) -> None:
    """Write one category atomically; other processes may write it at the same time.

    Args:
        root: Folder of the data set.
        category: One of ``SURFACES``.

    Example:
        >>> write_category(Path("textures"), "capsule")
        >>> len(list(Path("textures/capsule").rglob("*.png")))
        70
    """
    if (root / category).is_dir():
        return
    root.mkdir(parents=True, exist_ok=True)
    number = zlib.crc32(category.encode())
    style = Style.random(np.random.default_rng([number, 0]))
    if category in NATURAL:
        low, high = (np.array(colour) for colour in NATURAL[category])
        style = style._replace(low=low, high=high)
    with tempfile.TemporaryDirectory(dir=root, prefix=".") as partial:
        folder = Path(partial) / category
        for index in range(TRAIN_GOOD + TEST_GOOD):
            split = "train" if index < TRAIN_GOOD else "test"
            picture, _ = render(category, style, np.random.default_rng([number, 1, index]), SIZE)
            _write(folder / split / "good" / f"{index:03d}.png", picture)
        for kind_number, kind in enumerate(DEFECTS):
            for index in range(TEST_BROKEN):
                rng = np.random.default_rng([number, 2, kind_number, index])
                broken, mask = paint_defect(*render(category, style, rng, SIZE), kind, rng)
                name = kind.replace(" ", "_")
                _write(folder / "test" / name / f"{index:03d}.png", broken)
                _write(folder / "ground_truth" / name / f"{index:03d}_mask.png", mask)
        try:
            folder.rename(root / category)
        except OSError:  # another process was faster
            if not (root / category).is_dir():
                raise
    logger.info("Wrote the category %s to %s.", category, root)


def _write(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((255 * picture).astype(np.uint8)).save(path, compress_level=1)
