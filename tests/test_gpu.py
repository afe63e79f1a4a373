"""What a GPU computes, held against the CPU; test_device.py follows a batch over a GPU without one."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import open_clip
import pandas as pd
import pytest
import torch
from anomalib.data import PredictDataset
from torch.utils.data import DataLoader

from anomalib_clipad import ClipAdSdp, ClipAdSdpPlus
from anomalib_clipad.components import DualPathVisionTransformer
from anomalib_clipad.components.coreset import coreset
from anomalib_clipad.data import ReadableDataLoader
from anomalib_clipad.engine.table import NAME as TABLE
from anomalib_clipad.sdp import ClipAdSdpModel

from .conftest import Parity, auxiliary, build_model, fitted, folder, new_engine, state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
MODELS = ("ClipAdSdp", "ClipAdSdpPlus")
WAYS = [(0, {}), (2, {}), (2, {"image_size": (40, 56), "tile_size": 32}), (0, {"defects": ["scratch", "dent"]})]


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32; by torch's default a GPU has 10 bits of mantissa for them."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Let CUDA raise an error where the host waits for it."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def networks(
    name: str, small_clip: str, root: Path, references: int, arguments: dict[str, object]
) -> list[ClipAdSdpModel]:
    """The same network on the CPU and on the GPU."""
    model = build_model(name, small_clip, root, visualizer=False, **arguments)
    model.choose_class("widget")
    if references:
        model.model.set_references([torch.rand(references, 3, *model.model.image_size)])
    network = model.model.eval()
    return [network, deepcopy(network).cuda()]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("references", "arguments"), WAYS)
def test_maps_and_scores_are_those_of_the_cpu(
    small_clip: str, tmp_path: Path, name: str, references: int, arguments: dict[str, object]
) -> None:
    network, on_cuda = networks(name, small_clip, tmp_path, references, arguments)
    images, index = torch.rand(5, 3, *network.image_size), torch.zeros(5, dtype=torch.long)
    expected, ours = network.scores(images, index), on_cuda.scores(images.cuda(), index.cuda())
    for field in ("anomaly_map", "text_score", "map_score", "defect_evidence"):
        if (value := getattr(expected, field)) is not None:
            assert getattr(ours, field).is_cuda
            torch.testing.assert_close(getattr(ours, field).cpu(), value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("references", "arguments"), WAYS)
def test_the_host_does_not_wait_between_images_and_maps(
    small_clip: str, tmp_path: Path, name: str, references: int, arguments: dict[str, object], dtype: torch.dtype
) -> None:
    network = networks(name, small_clip, tmp_path, references, arguments)[1].to(dtype)
    images = torch.rand(3, 3, *network.image_size, device="cuda", dtype=dtype)
    index = torch.zeros(3, dtype=torch.long, device="cuda")
    expected = network(images, index)
    with no_waiting():
        ours = network(images, index)
    torch.testing.assert_close(ours.anomaly_map, expected.anomaly_map)


def test_features_are_those_of_the_release(parity: Parity, parity_clip: open_clip.CLIP) -> None:
    visual = deepcopy(parity_clip.visual).cuda()
    features = DualPathVisionTransformer(visual)(parity["input/image"].cuda())
    for tap, layer in enumerate(parity.meta["features_list"]):
        for path in ("surgery", "original"):
            ours = getattr(features, path)[tap].cpu()
            torch.testing.assert_close(ours, parity[f"features/{path}/{layer}"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("arguments", [{}, {"k_shot": 3, "false_alarm_rate": 0.2}])
def test_a_run_gives_the_figures_and_the_table_of_the_cpu(
    small_clip: str, parts: Path, tmp_path: Path, name: str, arguments: dict[str, object]
) -> None:
    figures, tables = [], []
    for accelerator in ("cpu", "gpu"):
        model = build_model(name, small_clip, tmp_path, visualizer=False, **arguments)
        engine = new_engine(tmp_path / accelerator, accelerator=accelerator)
        figures += engine.test(model, datamodule=folder(parts, eval_batch_size=4), verbose=False)
        (table,) = (tmp_path / accelerator).rglob(TABLE)
        tables.append(pd.read_csv(table))
    assert figures[1] == pytest.approx(figures[0], abs=1e-3)
    pd.testing.assert_frame_equal(tables[1], tables[0], atol=1e-3, rtol=0)


def test_training_learns_the_same_as_on_the_cpu(small_clip: str, auxiliary_root: Path, tmp_path: Path) -> None:
    expected = state(fitted(small_clip, auxiliary_root, tmp_path / "cpu")[0])
    torch.manual_seed(0)
    model, engine = (
        ClipAdSdpPlus(backbone=small_clip, lr=1e-2, visualizer=False),
        new_engine(tmp_path / "gpu", accelerator="gpu", max_epochs=2),
    )
    engine.fit(model, datamodule=auxiliary(auxiliary_root))
    assert engine.trainer.strategy.root_device.type == "cuda"
    for key, value in state(model).items():
        torch.testing.assert_close(value.cpu(), expected[key], atol=1e-3, rtol=0)


def test_pictures_reach_the_gpu_from_pinned_memory(image_folder: Path) -> None:
    data = PredictDataset(image_folder)
    (batch, _) = ReadableDataLoader(DataLoader(data, collate_fn=data.collate_fn), pin_memory=True)
    assert batch.image.is_pinned()


def test_bfloat16_is_near_float32(small_clip: str, image_folder: Path, tmp_path: Path) -> None:
    scores = []
    for precision in ("32-true", "bf16-true", "bf16-mixed", "16-mixed"):
        model = ClipAdSdp("cup", small_clip, visualizer=False)
        engine = new_engine(tmp_path / precision, accelerator="gpu", precision=precision)
        batches = engine.predict(model, data_path=image_folder)
        scores.append(torch.cat([batch.raw_score.cpu() for batch in batches]))
    torch.testing.assert_close(torch.stack(scores[1:]), scores[0].expand(3, -1), atol=0.02, rtol=0)


def test_a_coreset_is_the_same_each_time_and_leaves_generators_as_they_were() -> None:
    patches = torch.randn(60, 2, 8, generator=torch.Generator().manual_seed(0)).half().cuda()
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    chosen = [coreset(patches, torch.arange(60, device="cuda"), 20) for _ in range(2)]
    assert torch.equal(*chosen)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(torch.cuda.get_rng_state(), before[1])
