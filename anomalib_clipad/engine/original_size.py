"""``output_size: original``: maps and masks of ``predict`` in each picture's own pixels."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from anomalib.models.components import AnomalibModule
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from PIL import Image

from anomalib_clipad.data.batch import ZeroShotBatch
from anomalib_clipad.engine.network import ZeroShotNetwork
from anomalib_clipad.engine.post_processing import ClipAdPostProcessor
from anomalib_clipad.engine.run_folder import HEATMAPS, MASKS, images_of, run_folder, writing
from anomalib_clipad.engine.scored_batches import ScoredBatches
from anomalib_clipad.errors import InputError
from anomalib_clipad.files import replacing
from anomalib_clipad.pictures.heatmap import heat_layer
from anomalib_clipad.pictures.names import PictureNames

if TYPE_CHECKING:
    _Module = AnomalibModule
else:
    _Module = object  # anomalib takes every direct subclass of its module for a model

logger = logging.getLogger(__name__)

ORIGINAL = "original"


class OriginalSizeMixin(_Module):
    """Takes the argument; its user calls :meth:`adopt_output_size` in its constructor."""

    original_maps: "OriginalMaps | None"  # None for maps of the model's size

    def adopt_output_size(self, output_size: str | None) -> None:
        """Check the argument, and take it over.

        Raises:
            InputError: If it is of another form, or the post-processor is one that sets no mask from a larger map.
        """
        if output_size not in (None, ORIGINAL):
            msg = f"output_size must be {ORIGINAL}, or be left out for maps of image_size, got {output_size!r}."
            raise InputError(msg)
        if output_size is not None and not isinstance(self.post_processor, ClipAdPostProcessor):
            msg = f"output_size {ORIGINAL} belongs to the default post-processor; leave post_processor at its default."
            raise InputError(msg)
        self.original_maps = None if output_size is None else OriginalMaps()

    def check_exportable(self) -> None:
        """Refuse to export what an exported file cannot do.

        Raises:
            InputError: If maps are asked for in the pictures' own size.
        """
        if self.original_maps is not None:
            msg = (
                f"An exported file gives maps of the model's image_size, so output_size {ORIGINAL} cannot go into it; "
                "leave it out, and enlarge the maps."
            )
            raise InputError(msg)


class OriginalMaps(ScoredBatches):
    """Enlarges the maps of ``predict`` to the size of each picture's file, and makes the masks from them.

    Each picture's heatmap goes to ``heatmaps/`` in the folder of the run, to be laid over the picture, and its mask to
    ``masks/``, one picture at a time. The batch's ``anomaly_map`` and ``pred_mask`` become the large ones, except on
    the command line, where nobody reads them. In a batch of pictures of several sizes they are ``None``, and those of
    its ``items`` have each picture's size. Labels and scores stay as they are.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_clipad import ClipAdSdp
        >>> model = ClipAdSdp("nut", small_clip, output_size="original")  # which has OriginalMaps
        >>> engine = Engine(logger=False, enable_progress_bar=False)
        >>> engine.predict(model, data_path=image_folder)[0].anomaly_map.shape
        torch.Size([1, 40, 60])
    """

    def __init__(self) -> None:
        self._names = PictureNames([])

    def begin(self, trainer: Trainer, model: LightningModule) -> None:
        """Choose the names of the files."""
        del model
        self._names = PictureNames(list(images_of(trainer)))

    def on_scored(self, trainer: Trainer, model: LightningModule, batch: ZeroShotBatch, number: str) -> None:
        """Write the maps and masks of a batch of ``predict``, and leave them in it."""
        del number
        if not trainer.predicting:
            return
        if not batch.image_path:
            msg = f"output_size {ORIGINAL} looks at the pictures' files, and the data name none; leave it out."
            raise InputError(msg)
        on_command_line = any(isinstance(one, SaveConfigCallback) for one in cast("Any", trainer).callbacks)
        kept = []
        for path, (anomaly_map, mask) in zip(batch.image_path, _enlarged(batch, model), strict=True):
            self._write(run_folder(trainer), path, anomaly_map, mask)
            if not on_command_line:
                kept.append((anomaly_map, mask))
        if kept:
            batch.take_own_size(*map(list, zip(*kept, strict=True)))

    def _write(self, folder: Path, image: str, anomaly_map: torch.Tensor, mask: torch.Tensor | None) -> None:
        pictures = {HEATMAPS: heat_layer(anomaly_map.float().cpu().numpy())}
        if mask is not None:
            pictures[MASKS] = Image.fromarray(mask.cpu().numpy())
        for kind, picture in pictures.items():
            path = folder / kind / self._names(image)
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as draft:
                    picture.save(draft, compress_level=1)


def _enlarged(batch: ZeroShotBatch, model: LightningModule) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Map and mask of each picture, one at a time."""
    network, post_processor = cast("ZeroShotNetwork", model.model), cast("ClipAdPostProcessor", model.post_processor)
    for row, (path, small) in enumerate(
        zip(cast("list[str]", batch.image_path), cast("torch.Tensor", batch.anomaly_map), strict=True)
    ):
        try:
            with Image.open(path) as picture:  # only the header is read
                size = picture.size[::-1]
        except (OSError, SyntaxError, ValueError) as error:
            logger.warning("The size of %s cannot be read any more, so its map stays as it is (%s).", path, error)
            size = cast("tuple[int, int]", tuple(small.shape))
        large = network.region.enlarge(small[None], size)
        own = (None if values is None else values[row : row + 1] for values in (batch.map_offset, batch.class_index))
        mask = post_processor.pixel_mask(large, *own)
        region = network.region.given
        if mask is not None and region is not None:
            mask &= torch.from_numpy(region.inside(size)).to(mask.device)
        yield large[0], None if mask is None else mask[0]
