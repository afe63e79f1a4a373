"""A picture of every image that test and predict have scored."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePath
from typing import cast

import cv2
import numpy as np
import torch
from anomalib.post_processing import PostProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torchvision.transforms.v2 import Normalize

from anomalib_clipad.data.batch import ZeroShotBatch
from anomalib_clipad.data.preview import Preview, levels
from anomalib_clipad.data.verdict import Verdict, verdicts
from anomalib_clipad.engine.run_folder import IMAGES, images_of, run_folder, writing
from anomalib_clipad.engine.scored_batches import ScoredBatches, planes, side_by_side
from anomalib_clipad.engine.shown_map import map_on_the_scale
from anomalib_clipad.errors import InputError
from anomalib_clipad.files import write_atomically
from anomalib_clipad.pictures.image_file import preview_picture, read_picture, size_within, sized
from anomalib_clipad.pictures.inspection import inspection_picture
from anomalib_clipad.pictures.names import PictureNames

LONGEST_SIDE = 512


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
        post_processor = getattr(model, "post_processor", None)
        by_threshold = batch.pred_mask is not None and isinstance(post_processor, PostProcessor)
        threshold = 1 - cast("PostProcessor", post_processor).pixel_sensitivity if by_threshold else None
        said, count = list(verdicts(batch, model, number)), batch.batch_size
        names = [IMAGES / self._names(verdict.path) for verdict in said]
        maps = None if batch.anomaly_map is None else map_on_the_scale(batch, model)
        arrays = [planes(values, count) for values in (maps, batch.pred_mask, batch.gt_mask, batch.region)]
        draw = partial(self._draw, model, run_folder(trainer), threshold)
        files: Sequence[str | None] = batch.image_path or [None] * count
        previews = batch.preview or [None] * count
        side_by_side(draw, names, files, previews, list(cast("torch.Tensor", batch.image)), said, *arrays)
        batch.picture = list(map(str, names))

    def _draw(
        self,
        model: LightningModule,
        folder: Path,
        map_threshold: float | None,
        name: PurePath,
        file: str | None,
        preview: Preview | None,
        pixels: torch.Tensor,
        verdict: Verdict,
        anomaly_map: np.ndarray | None,
        pred_mask: np.ndarray | None,
        gt_mask: np.ndarray | None,
        region: np.ndarray | None,
    ) -> None:
        title = self._names.below(verdict.path)
        image = self._image(file, pixels, model) if preview is None else preview_picture(preview, self.longest_side)
        picture = inspection_picture(image, anomaly_map, verdict, title, pred_mask, gt_mask, map_threshold, region)
        path = folder / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # OpenCV encodes PNG in less than half of Pillow's time, and no larger.
            write_atomically(path, cv2.imencode(".png", np.asarray(picture)[..., ::-1])[1].tobytes())

    def _image(self, file: str | None, pixels: torch.Tensor, model: LightningModule) -> Image.Image:
        """The file as stored; where there is none any more, what the model was given."""
        if file:
            with suppress(OSError, SyntaxError, ValueError):
                return read_picture(Path(file), self.longest_side)
        pixels = pixels.detach().float().cpu()
        for step in getattr(getattr(getattr(model, "pre_processor", None), "transform", None), "transforms", []):
            if isinstance(step, Normalize):
                mean, std = (torch.tensor(values)[:, None, None] for values in (step.mean, step.std))
                pixels = pixels * std + mean
        image = Image.fromarray(levels(pixels))
        return sized(image, size_within(image.size, self.longest_side))
