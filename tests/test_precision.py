"""Fewer bits than float32: maps stay, and what needs float32 keeps it."""

from pathlib import Path

import pytest
import torch

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.components import DualPathVisionTransformer, attention
from anomalib_clipad.engine import precision as speeds

from .conftest import build_model, make_clip, new_engine

RAW = {"class_name": "widget", "post_processor": False, "visualizer": False}


def maps(model: ClipAdSdp, category: Path, root: Path, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw maps and image scores of all test images, as the engine computes them."""
    batches = new_engine(root, precision=precision).predict(model, data_path=category / "test")
    return torch.cat([batch.anomaly_map for batch in batches]), torch.cat([batch.pred_score for batch in batches])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed", "16-true"])
@pytest.mark.parametrize("name", ["ClipAdSdp", "ClipAdSdpPlus"])
def test_maps_agree_with_float32(small_clip: str, category: Path, tmp_path: Path, name: str, precision: str) -> None:
    expected, scores = maps(build_model(name, small_clip, tmp_path, **RAW), category, tmp_path, "32-true")
    ours, our_scores = maps(build_model(name, small_clip, tmp_path, **RAW), category, tmp_path, precision)
    assert not torch.equal(ours, expected), "the precision was not used"
    assert ours.dtype == our_scores.dtype == torch.float32
    extent = expected.max() - expected.min()
    assert (ours - expected).abs().max() < 2e-2 * extent
    assert (our_scores - scores).abs().max() < 2e-2


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("side", [32, 232])
def test_bfloat16_features_agree_with_float64(monkeypatch: pytest.MonkeyPatch, units: bool, side: int) -> None:
    """On CPUs with bfloat16 units and without, on few and on many patches."""
    monkeypatch.setattr(attention, "BFLOAT16_UNITS", units)
    tower = DualPathVisionTransformer(make_clip().visual)
    for parameter in tower.parameters():
        parameter.data = parameter.data.bfloat16().double()  # its own rounding is not what is tested
    images = torch.randn(2, 3, side, side).bfloat16()
    with torch.inference_mode():
        expected = tower.double()(images.double())
        ours = tower.bfloat16()(images)
    for a, b in zip([*ours.surgery, *ours.original], [*expected.surgery, *expected.original], strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).norm() < 1e-2 * b.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_surgery_and_softmax_stay_in_float32(dtype: torch.dtype) -> None:
    """Taps of few bits lose no more than their own rounding on the way to a map."""
    from anomalib_clipad.components import DualPathFeatures
    from anomalib_clipad.sdp import ClipAdSdpModel

    model = ClipAdSdpModel(clip=make_clip(), class_names=["widget"], rvs="mean", defects=["scratch", "dent"])
    taps = model.visual(torch.rand(3, 3, 32, 32))
    rounded = DualPathFeatures(*([tokens.to(dtype) for tokens in path] for path in taps))
    widened = DualPathFeatures(*([tokens.float() for tokens in path] for path in rounded))
    with torch.autocast("cpu", dtype=dtype):
        ours = model.scores_of(rounded)
    expected = model.scores_of(widened)
    for name in ("anomaly_map", "text_score", "map_score", "defect_evidence"):
        assert getattr(ours, name).dtype == torch.float32
        assert torch.equal(getattr(ours, name), getattr(expected, name))


@pytest.mark.parametrize(("times", "warned"), [(6.0, True), (0.5, False)])
def test_a_precision_that_is_slower_here_is_said_once(
    small_clip: str,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    times: float,
    warned: bool,
) -> None:
    seconds = {torch.bfloat16: times, torch.float32: 1.0}
    monkeypatch.setattr(speeds, "seconds_of", seconds.__getitem__)
    speeds._warn_once.cache_clear()
    model = ClipAdSdp("cup", small_clip, visualizer=False)
    model.table = model.page = None
    new_engine(tmp_path, precision="bf16-true").predict(model, data_path=image_folder)
    assert caplog.text.count("bf16-true is slower than float32 on this CPU") == int(warned)
    assert ("6.0 times as long" in caplog.text) == warned
    new_engine(tmp_path).predict(model, data_path=image_folder)
    assert caplog.text.count("slower than float32") == int(warned)
