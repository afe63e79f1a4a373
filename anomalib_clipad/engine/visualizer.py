"""A picture of every image that test and predict have scored."""

from contextlib import suppress
from pathlib import Path
from typing import cast

import numpy as np
import torch
from anomalib.post_processing import PostProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torchvision.transforms.v2 import Normalize

from anomalib_clipad.data.batch import ZeroShotBatch, ZeroShotItem
from anomalib_clipad.data.verdict import Verdict, verdicts
from anomalib_clipad.engine.post_processing import map_on_the_scale
from anomalib_clipad.engine.run_folder import IMAGES, images_of, run_folder, writing
from anomalib_clipad.engine.scored_batches import ScoredBatches
from anomalib_clipad.errors import InputError
from anomalib_clipad.files import replacing
from anomalib_clipad.pictures.image_file import read_picture, size_within, sized
from anomalib_clipad.pictures.inspection import inspection_picture
from anomalib_clipad.pictures.names import PictureNames

LONGEST_SIDE = 512
COMPRESSION = 1  # of a PNG; more takes three times as long for the same size


class ClipAdVisualizer(ScoredBatches, Visualizer):
    """Draws each image beside its heatmap and its ground truth, under its name, score and verdict.

    Colours are those of :mod:`anomalib_clipad.pictures.heatmap`, the same for the same value in every picture of every
    run. A picture goes to ``images/`` in the folder of its run, under the image's own path below the folder that all
    images of the run have in common; the batch keeps it as ``picture``, relative to the folder of the run.

    Args:
        longest_side: Pixels of the longest side of the image as it is drawn.

    Raises:
        InputError: If ``longest_side`` is not positive, or a picture cannot be written.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_clipad import ClipAdSdp
        >>> model = ClipAdSdp("nut", small_clip, visualizer=ClipAdVisualizer(longest_side=400))
        >>> engine = Engine(logger=False, accelerator="cpu", enable_progress_bar=False)
        >>> batches = engine.predict(model, data_path=image_folder)
        >>> [batch.picture for batch in batches]
        [['images/a.png'], ['images/b.png']]
    """

    def __init__(self, longest_side: int = LONGEST_SIDE) -> None:
        super().__init__()
        if longest_side < 1:
            msg = f"longest_side must be positive, got {longest_side}."
            raise InputError(msg)
        self.longest_side = longest_side
        self._names = PictureNames([])

    def begin(self, trainer: Trainer, model: LightningModule) -> None:
        """Choose the names of the pictures."""
        del model
        self._names = PictureNames(list(images_of(trainer)))

    def on_scored(self, trainer: Trainer, model: LightningModule, batch: ZeroShotBatch, number: str) -> None:
        """Draw the images of a batch."""
        folder, names = run_folder(trainer), []
        for verdict, item in zip(verdicts(batch, model, number), batch.items, strict=True):
            name = self._names(verdict.path)
            picture = self._draw(verdict, item, model)
            path = folder / IMAGES / name
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as draft:
                    picture.save(draft, compress_level=COMPRESSION)
            names.append(str(IMAGES / name))
        batch.picture = names

    def _draw(self, verdict: Verdict, item: ZeroShotItem, model: LightningModule) -> Image.Image:
        post_processor = getattr(model, "post_processor", None)
        by_threshold = item.pred_mask is not None and isinstance(post_processor, PostProcessor)
        return inspection_picture(
            self._image(item, model),
            None if item.anomaly_map is None else _plane(map_on_the_scale(item, model)),
            verdict,
            self._names.below(verdict.path),
            None if item.pred_mask is None else _plane(item.pred_mask).astype(bool),
            None if item.gt_mask is None else _plane(item.gt_mask).astype(bool),
            1 - cast("PostProcessor", post_processor).pixel_sensitivity if by_threshold else None,
            None if item.region is None else _plane(item.region),
        )

    def _image(self, item: ZeroShotItem, model: LightningModule) -> Image.Image:
        """The file as stored; where there is none any more, what the model was given."""
        if item.image_path:
            with suppress(OSError, SyntaxError, ValueError):
                return read_picture(Path(item.image_path), self.longest_side)
        pixels = cast("torch.Tensor", item.image).detach().float().cpu()
        for step in getattr(getattr(getattr(model, "pre_processor", None), "transform", None), "transforms", []):
            if isinstance(step, Normalize):
                mean, std = (torch.tensor(values)[:, None, None] for values in (step.mean, step.std))
                pixels = pixels * std + mean
        levels = (255 * pixels.nan_to_num().clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
        image = Image.fromarray(levels)
        return sized(image, size_within(image.size, self.longest_side))


def _plane(values: torch.Tensor) -> np.ndarray:
    """(H, W) of a map or mask, which some models give with a channel."""
    return values.detach().float().cpu().numpy().reshape(values.shape[-2:])
