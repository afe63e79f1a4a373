"""In bfloat16, too, the scores of the validation pass serve the test pass, and no figure changes."""

from pathlib import Path

import pytest
import torch

from anomalib_clipad import ClipAdSdp

from .conftest import build_model, folder, new_engine, write_category

IMAGES = 8


@pytest.mark.parametrize("name", ["ClipAdSdp", "ClipAdSdpPlus"])
def test_scores_of_bfloat16_are_kept_as_they_are(
    name: str, small_clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = folder(write_category(tmp_path / "data", normal=3, broken=5), eval_batch_size=3)
    found: dict[bool, dict[str, torch.Tensor]] = {}
    figures = {}
    test_step = ClipAdSdp.test_step

    def step(self: ClipAdSdp, batch: object, *args: object) -> object:
        scored = test_step(self, batch, *args)
        for path, anomaly_map, score in zip(scored.image_path, scored.anomaly_map, scored.pred_score, strict=True):
            found[self.single_pass] |= {path: anomaly_map.clone(), f"score of {path}": score.clone()}
        return scored

    for single_pass in (True, False):
        found[single_pass] = {}
        model = build_model(name, small_clip, tmp_path, single_pass=single_pass, visualizer=False)
        monkeypatch.setattr(type(model), "test_step", step)
        engine = new_engine(tmp_path / str(single_pass), precision="bf16-true")
        figures[single_pass] = engine.test(model, datamodule=data, verbose=False)[0]
        assert model.model.visual.visual.proj.dtype == torch.bfloat16
        assert model.served == (IMAGES if single_pass else 0)
    assert figures[True] == figures[False]
    assert len(found[True]) == 2 * IMAGES
    assert all(torch.equal(value, found[False][key]) for key, value in found[True].items())
