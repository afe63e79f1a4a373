"""From a picture of any size to the model's input, the same in the engine and in exported files."""

from collections.abc import Iterator
from copy import deepcopy
from typing import cast

import torch
from anomalib.data import Batch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import LightningModule, Trainer
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize, Transform

from anomalib_clipad.components.resizing import bicubic_matrix


def clip_transform(
    image_size: tuple[int, int], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Compose:
    """Plain bicubic resize of the whole image, so that masks line up, and CLIP's normalisation.

    Args:
        image_size: Height and width wanted.
        mean: Mean of the channels.
        std: Standard deviation of the channels.

    Example:
        >>> clip_transform((32, 48), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))(torch.rand(3, 50, 70)).shape
        torch.Size([3, 32, 48])
    """
    resize = Resize(image_size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return Compose([resize, Normalize(mean=mean, std=std)])


class ClipAdPreProcessor(PreProcessor):
    """anomalib's pre-processor, whose exported form resizes as the engine does, and which does not wait for a GPU.

    torchvision's normalisation copies mean and standard deviation to the images' device at every batch, and the host
    waits for such a copy. In the engine they are there from the second batch on.

    anomalib turns antialiasing off where a model is exported, and a large picture then comes out as another one. Two
    matrix products are the same resize in every format. ONNX knows antialiasing since opset 18 (``Resize`` with
    ``antialias=1``), and torch writes it, for sizes that are free too. ONNX Runtime then agrees with torch to 1e-6. But
    OpenVINO 2026.4 makes something else of the same file: random images in [0, 1] of 75 x 110 pixels differ by up to
    0.58 at 32 x 32. It has the operation, and converted from torch directly it agrees; anomalib converts from ONNX.

    Args:
        transform: Resize and normalisation, see :class:`anomalib.pre_processing.PreProcessor`.

    Example:
        >>> images, resize = torch.rand(1, 3, 50, 70), Resize((32, 32), InterpolationMode.BICUBIC, antialias=True)
        >>> torch.allclose(ClipAdPreProcessor(resize)(images), resize(images), atol=1e-5)
        True
    """

    def __init__(self, transform: Transform | None = None) -> None:
        super().__init__(transform)
        self._resident: dict[torch.device, tuple[Transform, Transform]] = {}

    def transform_on(self, device: torch.device) -> Transform | None:
        """The transform, with what its normalisation needs on a device."""
        if self.transform is None or device.type == "cpu":
            return self.transform
        of, resident = self._resident.get(device, (None, None))
        if of is not self.transform:
            resident = deepcopy(self.transform)
            for step in _steps(resident):
                if isinstance(step, Normalize):
                    step.mean, step.std = (torch.tensor(values, device=device) for values in (step.mean, step.std))
            self._resident[device] = self.transform, resident
        return resident

    def prepare(self, batch: Batch) -> None:
        """Prepare the images and masks of a batch in the engine."""
        if transform := self.transform_on(cast("torch.Tensor", batch.image).device):
            batch.image, batch.gt_mask = transform(batch.image, batch.gt_mask)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """See :meth:`prepare`."""
        del trainer, pl_module, batch_idx, dataloader_idx
        self.prepare(batch)

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start

    def take(self, transform: Transform) -> None:
        """Prepare images by another transform from now on."""
        PreProcessor.__init__(self, transform)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Prepare images outside the engine.

        Args:
            batch: (B, 3, height, width) in [0, 1], of any size.

        Returns:
            The model's input.
        """
        if self.transform is None:
            return batch
        for step in _steps(self.transform):
            batch = _resize(batch, *step.size) if _is_antialiased(step) else step(batch)
        return batch


def _steps(transform: Transform) -> Iterator[Transform]:
    """A transform's parts, of which a :class:`Compose` of others has several."""
    if isinstance(transform, Compose):
        for part in transform.transforms:
            yield from _steps(part)
    else:
        yield transform


def _is_antialiased(step: object) -> bool:
    if not isinstance(step, Resize) or step.interpolation != InterpolationMode.BICUBIC:
        return False
    return bool(step.antialias and step.max_size is None and len(step.size) == 2)


def _resize(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    rows = bicubic_matrix(images.shape[-2], height, images.device)
    columns = bicubic_matrix(images.shape[-1], width, images.device)
    # One pile of planes: OpenVINO and its quantiser take what directly follows a product for the product's bias.
    resized = rows @ images.float().flatten(0, 1) @ columns.T
    return resized.to(images.dtype).unflatten(0, images.shape[:2])
