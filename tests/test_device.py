"""The way of images through a GPU, walked without one: fake tensors have a device, and no values to wait for."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anomalib.data import InferenceBatch, PredictDataset
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory
from torchvision.transforms.v2 import Normalize

from anomalib_clipad import ClipAdSdp, ClipAdSdpPlus
from anomalib_clipad.components import p_values
from anomalib_clipad.components.reference_fusion import ReferenceFusion
from anomalib_clipad.data.batch import ZeroShotBatch
from anomalib_clipad.engine.host import images_converted_on_the_gpu, readable_images

from .conftest import build_model, write_category

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="this torch was built without CUDA, which fake tensors need as well"
)
FakeTensorMode = torch._subclasses.FakeTensorMode


class NoFloat64(TorchDispatchMode):
    """Nothing on the GPU may be in float64, which those of Apple do not have."""

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict[str, object] | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.check(tensor, f"{func}")
        return out

    def check(self, tensor: torch.Tensor, by: str) -> None:
        assert not tensor.is_cuda or tensor.dtype != torch.float64, f"{by} gives float64"


class Stay(NoFloat64):
    """Nothing that is computed may be anywhere but on the GPU, either."""

    def check(self, tensor: torch.Tensor, by: str) -> None:
        super().check(tensor, by)
        assert tensor.is_cuda, f"{by} leaves the GPU"


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


@pytest.mark.parametrize("stage", ["train", "validation", "test", "predict"])
def test_pictures_are_prepared_without_a_copy_to_the_gpu(small_clip: str, tmp_path: Path, stage: str) -> None:
    pre_processor = build_model("ClipAdSdp", small_clip, tmp_path).pre_processor
    start = getattr(pre_processor, f"on_{stage}_batch_start")

    with FakeTensorMode():
        for number in range(2):
            # Not anomalib's batch, whose class of images cannot be of fake tensors.
            batch = SimpleNamespace(image=torch.rand(2, 3, 40, 50, device="cuda"), gt_mask=None)
            # With the first batch, mean and standard deviation are copied.
            with Stay() if number else nullcontext():
                start(None, None, batch, number)
    assert batch.image.shape == (2, 3, 32, 32)


def test_units_of_references_need_no_float64_on_the_gpu() -> None:
    with FakeTensorMode():
        fusion = ReferenceFusion()
        fusion.mean, fusion.std = (torch.ones(1, 3, device="cuda") for _ in range(2))
        with NoFloat64():
            fusion.fit(*(torch.rand(4, 64, device="cuda") for _ in range(2)), torch.rand(4, device="cuda"))
    assert fusion.mean.is_cuda
    assert fusion.std.dtype == torch.float32


def test_what_is_on_the_gpu_is_the_present_transform(small_clip: str, tmp_path: Path) -> None:
    pre_processor = build_model("ClipAdSdp", small_clip, tmp_path).pre_processor
    gpu = torch.device("meta")  # no GPU is needed to see which values are asked for
    first = pre_processor.transform_on(gpu)
    assert first is pre_processor.transform_on(gpu)
    pre_processor.take(Normalize(mean=(0.5, 0.5, 0.5), std=(0.1, 0.2, 0.3)))
    second = pre_processor.transform_on(gpu)
    assert second is not first
    assert second.mean.device == gpu
    assert isinstance(pre_processor.transform.mean, list)
    assert pre_processor.transform_on(torch.device("cpu")) is pre_processor.transform


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cpu", False)])
def test_pictures_for_a_gpu_are_pinned(tmp_path: Path, device: str, pinned: bool) -> None:
    data = PredictDataset(write_category(tmp_path / "widget") / "test" / "good")
    strategy = SimpleNamespace(root_device=torch.device(device), process_dataloader=lambda loader: loader)
    run = SimpleNamespace(fn=TrainerFn.PREDICTING)
    trainer = SimpleNamespace(strategy=strategy, state=run, callbacks=[])
    with readable_images(trainer):
        loader = strategy.process_dataloader(DataLoader(data, collate_fn=data.collate_fn))
    assert loader.pin_memory is pinned
    assert next(iter(loader)).image.ndim == 4


@pytest.mark.parametrize(
    ("device", "stage", "dtype"),
    [
        ("cuda", TrainerFn.PREDICTING, torch.float32),
        ("cuda", TrainerFn.FITTING, torch.bfloat16),
        ("cpu", TrainerFn.PREDICTING, torch.bfloat16),
    ],
)
def test_pictures_for_a_gpu_are_not_converted_by_the_host(device: str, stage: TrainerFn, dtype: torch.dtype) -> None:
    plugin = HalfPrecision("bf16-true")
    strategy, run = SimpleNamespace(root_device=torch.device(device)), SimpleNamespace(fn=stage)
    with images_converted_on_the_gpu(SimpleNamespace(strategy=strategy, precision_plugin=plugin, state=run)):
        assert plugin.convert_input(torch.ones(2)).dtype == dtype
    assert plugin.convert_input(torch.ones(2)).dtype == torch.bfloat16, "the user's plugin is left as it was"


@pytest.mark.parametrize("name", ["ClipAdSdp", "ClipAdSdpPlus"])
@pytest.mark.parametrize("tiles", [{}, {"image_size": (40, 56), "tile_size": 32, "region": [[0.1, 0.1, 0.8, 0.9]]}])
def test_a_network_of_fewer_bits_takes_pictures_in_float32(
    small_clip: str, tmp_path: Path, name: str, tiles: dict[str, object]
) -> None:
    model = build_model(name, small_clip, tmp_path, visualizer=False, **tiles)
    model.choose_class("widget")
    network = model.model.eval().to(torch.bfloat16)
    network.set_references([torch.rand(2, 3, *network.image_size)])
    images = torch.rand(3, 3, *network.image_size).to(torch.bfloat16)
    ours, expected = network(images.float()), network(images)
    assert torch.equal(ours.pred_score, expected.pred_score)
    assert torch.equal(ours.anomaly_map, expected.anomaly_map)


def test_a_batch_pins_its_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:  # in place of memory that only CUDA can give
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = ZeroShotBatch(image=torch.rand(2, 3, 8, 8), gt_mask=torch.ones(2, 8, 8), class_index=torch.arange(2))
    seen = pin_memory(batch)
    assert seen is batch
    assert [seen.image.data_ptr(), seen.gt_mask.data_ptr()] == [tensor.data_ptr() for tensor in pinned]
    assert pin_memory(ZeroShotBatch(image=torch.rand(2, 3, 8, 8))).gt_mask is None


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
