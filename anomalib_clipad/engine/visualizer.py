"""A picture of every image that test and predict have scored."""

from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.post_processing import PostProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torchvision.transforms.v2 import Normalize

from anomalib_clipad.data.batch import ZeroShotBatch, ZeroShotItem
from anomalib_clipad.data.verdict import Verdict, verdicts
from anomalib_clipad.engine.post_processing import ClipAdPostProcessor
from anomalib_clipad.engine.run_folder import IMAGES, images_of, run_folder, writing
from anomalib_clipad.errors import InputError
from anomalib_clipad.files import replacing
from anomalib_clipad.pictures.image_file import read_picture, size_within, sized
from anomalib_clipad.pictures.inspection import inspection_picture
from anomalib_clipad.pictures.names import PictureNames

LONGEST_SIDE = 512
COMPRESSION = 1  # of a PNG; more takes three times as long for the same size


class ClipAdVisualizer(Visualizer):
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

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the names of the pictures."""
        del pl_module
        self._names = PictureNames(list(images_of(trainer)))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's
        batch: Any,  # noqa: ANN401 - Lightning's
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the images of a batch."""
        del batch, dataloader_idx
        folder, names = run_folder(trainer), []
        ours = ZeroShotBatch.of(cast("ImageBatch", outputs))
        model = cast("Any", pl_module)
        said = verdicts(
            ours, getattr(model.model, "class_names", ()), getattr(model, "post_processor", None), batch_idx
        )
        for verdict, item in zip(said, ours.items, strict=True):
            # Images without a file have the same numbers in every process.
            name = self._names(verdict.path if item.image_path else f"{verdict.path} of {trainer.global_rank}")
            picture = self._draw(verdict, item, pl_module)
            path = folder / IMAGES / name
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as draft:
                    picture.save(draft, compress_level=COMPRESSION)
            names.append(str(IMAGES / name))
        ours.picture = names

    on_predict_start, on_predict_batch_end = on_test_start, on_test_batch_end

    def _draw(self, verdict: Verdict, item: ZeroShotItem, model: LightningModule) -> Image.Image:
        post_processor = getattr(model, "post_processor", None)
        by_threshold = item.pred_mask is not None and isinstance(post_processor, PostProcessor)
        return inspection_picture(
            self._image(item, model),
            None if item.anomaly_map is None else _plane(map_on_the_scale(item.anomaly_map, model)),
            verdict,
            self._names.below(verdict.path),
            None if item.pred_mask is None else _plane(item.pred_mask).astype(bool),
            None if item.gt_mask is None else _plane(item.gt_mask).astype(bool),
            1 - cast("PostProcessor", post_processor).pixel_sensitivity if by_threshold else None,
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


def map_on_the_scale(anomaly_map: torch.Tensor, model: LightningModule) -> torch.Tensor:
    """A map in [0, 1], 0.5 at the threshold; by the model's own rule where no post-processor has brought it there.

    Args:
        anomaly_map: Of any shape, as the batch has it at the end of a step.
        model: The one that made it.

    Example:
        >>> from anomalib_clipad import ClipAdSdp
        >>> model = ClipAdSdp("nut", small_clip, post_processor=False)
        >>> map_on_the_scale(torch.zeros(1), model)
        tensor([0.5000])
    """
    post_processor = getattr(model, "post_processor", None)
    shown = isinstance(post_processor, PostProcessor) and post_processor.enable_normalization
    if shown and not isinstance(post_processor, ClipAdPostProcessor):
        shown = not cast("PostProcessor", post_processor).pixel_min.isnan()
    scale = getattr(model.model, "map_scale", None)
    return anomaly_map if shown or scale is None else scale.squash(anomaly_map)


def _plane(values: torch.Tensor) -> np.ndarray:
    """(H, W) of a map or mask, which some models give with a channel."""
    return values.detach().float().cpu().numpy().reshape(values.shape[-2:])
