"""The way of images through a GPU, walked without one: fake tensors have a device, and no values to wait for."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from anomalib.data import InferenceBatch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anomalib_clipad import ClipAdSdp, ClipAdSdpPlus
from anomalib_clipad.components import p_values

from .conftest import build_model

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="this torch was built without CUDA, which fake tensors need as well"
)
FakeTensorMode = torch._subclasses.FakeTensorMode


class Stay(TorchDispatchMode):
    """Nothing that is computed may be anywhere but on the GPU."""

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict[str, object] | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            assert not isinstance(tensor, torch.Tensor) or tensor.is_cuda, f"{func} leaves the GPU"
        return out


class Chain(nn.Module):
    """What follows the pre-processor: network, then normalisation and thresholds."""

    def __init__(self, model: ClipAdSdp) -> None:
        super().__init__()
        self.model, self.post_processor = model.model, model.post_processor

    def forward(self, images: torch.Tensor, classes: torch.Tensor) -> InferenceBatch:
        prediction = self.model(images, classes)
        if len(self.post_processor.good_scores):
            p_values(prediction.pred_score, self.post_processor.good_scores)
        return self.post_processor(prediction)


class Loss(nn.Module):
    """The loss of SDP+, without its gradient: fake tensors have no backward pass without a GPU."""

    def __init__(self, model: ClipAdSdpPlus) -> None:
        super().__init__()
        self.model = model.model

    def forward(self, images: torch.Tensor, classes: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        return sum(self.model.loss(self.model.visual(images).original, masks, classes))


def on_gpu(module: nn.Module, fake: FakeTensorMode) -> dict[str, torch.Tensor]:
    """Parameters and buffers as they would be after ``module.cuda()``."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {key: fake.from_tensor(value).cuda().detach().requires_grad_(value.requires_grad) for key, value in tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["ClipAdSdp", "ClipAdSdpPlus"])
@pytest.mark.parametrize(("references", "tiles"), [(0, {}), (2, {}), (2, {"image_size": (40, 56), "tile_size": 32})])
def test_images_become_maps_without_leaving_the_gpu_or_waiting_for_it(
    small_clip: str, tmp_path: Path, name: str, dtype: torch.dtype, references: int, tiles: dict[str, object]
) -> None:
    size = tiles.get("image_size", (32, 32))
    model = build_model(name, small_clip, tmp_path, visualizer=False, **tiles)
    model.choose_class("widget")
    if references:
        scores = model.model.set_references([torch.rand(references, 3, *size)])
        model.post_processor.set_from_normal(model.model, [scores], references)
    chain = Chain(model.eval()).to(dtype)
    with FakeTensorMode() as fake:
        state = on_gpu(chain, fake)
        images = torch.rand(3, 3, *size, device="cuda", dtype=dtype)
        classes = torch.zeros(3, device="cuda", dtype=torch.long)
        with Stay():
            out = functional_call(chain, state, (images, classes))
    assert [tuple(value.shape) for value in out] == [(3,), (3,), (3, *size), (3, *size)]


def test_the_training_loss_stays_on_the_gpu_too(small_clip: str, tmp_path: Path) -> None:
    model = build_model("ClipAdSdpPlus", small_clip, tmp_path)
    model.choose_class("widget")
    training_loss = Loss(model)
    with FakeTensorMode() as fake:
        state = on_gpu(training_loss, fake)
        images, masks = torch.rand(3, 3, 32, 32, device="cuda"), torch.ones(3, 32, 32, device="cuda", dtype=torch.bool)
        classes = torch.zeros(3, device="cuda", dtype=torch.long)
        with Stay():
            loss = functional_call(training_loss, state, (images, classes, masks))
    assert loss.requires_grad
    assert loss.shape == ()
