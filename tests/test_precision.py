"""Fewer bits than float32: maps stay, and what needs float32 keeps it."""

from pathlib import Path

import pytest
import torch

from anomalib_clipad import ClipAdSdp, ClipAdSdpPlus, InputError
from anomalib_clipad.components import DualPathVisionTransformer, attention
from anomalib_clipad.engine import precision as speeds

from .conftest import auxiliary, build_model, folder, make_clip, new_engine, weights, write_good

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


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_checkpoint_of_half_precision_is_read_in_any(
    small_clip: str, category: Path, tmp_path: Path, precision: str
) -> None:
    model = build_model("ClipAdSdpPlus", small_clip, tmp_path, visualizer=False)
    engine = new_engine(tmp_path, precision=precision)
    engine.test(model, datamodule=folder(category), verbose=False)
    path = weights(engine, "model.ckpt")
    expected = new_engine(tmp_path, precision=precision).predict(model, data_path=category / "test/good")
    other = ClipAdSdpPlus(backbone=small_clip, visualizer=False)
    found = new_engine(tmp_path, precision=precision).predict(other, data_path=category / "test/good", ckpt_path=path)
    for one, same in zip(found, expected, strict=True):
        torch.testing.assert_close(one.pred_score, same.pred_score, atol=1e-5, rtol=0)
    exact = new_engine(tmp_path).predict(
        ClipAdSdpPlus(backbone=small_clip, visualizer=False), data_path=category / "test/good", ckpt_path=path
    )
    for one, near in zip(exact, expected, strict=True):
        torch.testing.assert_close(one.pred_score, near.pred_score.float(), atol=0.05, rtol=0)
    assert ClipAdSdpPlus.load_from_checkpoint(path).trained


def test_training_in_bfloat16_is_resumed(small_clip: str, auxiliary_root: Path, tmp_path: Path) -> None:
    model, engine = (
        ClipAdSdpPlus(backbone=small_clip, visualizer=False),
        new_engine(tmp_path, max_epochs=1, precision="bf16-true"),
    )
    engine.fit(model, datamodule=auxiliary(auxiliary_root))
    again = ClipAdSdpPlus(backbone=small_clip, visualizer=False)
    longer = new_engine(tmp_path / "again", max_epochs=2, precision="bf16-true")
    longer.fit(again, datamodule=auxiliary(auxiliary_root), ckpt_path=weights(engine, "last.ckpt"))
    assert longer.trainer.current_epoch == 2


def test_training_in_float16_is_refused(small_clip: str, auxiliary_root: Path, tmp_path: Path) -> None:
    engine = new_engine(tmp_path, max_epochs=1, precision="16-true")
    with pytest.raises(InputError, match="16-true the layers of SDP\\+ become NaN; train with bf16-true"):
        engine.fit(ClipAdSdpPlus(backbone=small_clip, visualizer=False), datamodule=auxiliary(auxiliary_root))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("names", ["cup", ["cup", "nut"]], ids=str)
def test_references_and_their_choice_work_in_any_precision(
    small_clip: str, tmp_path: Path, precision: str, names: str | list[str]
) -> None:
    for number, name in enumerate(("cup", "nut")):
        write_good(tmp_path / "good" / name, 3, seed=number)
    arguments = {"few_shot_source": str(tmp_path / "good"), "max_references": 10, "visualizer": False}
    scores = [
        new_engine(tmp_path, precision=one).predict(
            ClipAdSdp(names, small_clip, **arguments), data_path=tmp_path / "good"
        )
        for one in ("32-true", precision)
    ]
    for exact, near in zip(*scores, strict=True):
        torch.testing.assert_close(near.pred_score.float(), exact.pred_score, atol=0.1, rtol=0)
    assert torch.get_default_dtype() == torch.float32
