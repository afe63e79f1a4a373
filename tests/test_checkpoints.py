"""Checkpoints of earlier versions, state dicts, and files that are damaged."""

import json
from pathlib import Path

import pytest

from anomalib_clipad import ClipAdSdp, ClipAdSdpPlus
from anomalib_clipad.data import DemoTextures

from .conftest import new_engine

DATA = Path(__file__).parent / "data/checkpoints"


@pytest.fixture(scope="module")
def linen(tmp_path_factory: pytest.TempPathFactory) -> DemoTextures:
    data = DemoTextures(tmp_path_factory.mktemp("textures"), "linen", num_workers=0)
    data.prepare_data()
    return data


@pytest.mark.parametrize(("name", "kind"), [("sdp", ClipAdSdp), ("sdp_plus", ClipAdSdpPlus)])
def test_a_checkpoint_of_version_0_1_gives_the_same_scores(
    name: str, kind: type[ClipAdSdp], linen: DemoTextures, tmp_path: Path
) -> None:
    """``expected.json`` was written by version 0.1 with the model that wrote the checkpoint."""
    model = kind(backbone="demo", visualizer=False)
    folder = Path(linen.root) / "linen/test/scratch"
    batches = new_engine(tmp_path).predict(model, data_path=folder, ckpt_path=DATA / f"{name}-0.1.0.ckpt")
    expected = json.loads((DATA / "expected.json").read_text())[name]["scores"]
    assert len(batches) == len(expected)
    for batch in batches:
        # Version 0.1 showed the fused score itself, without the threshold at 0.5.
        fused = model.model.fuse(batch.text_score, batch.map_score).clamp(0, 1)
        ours = [fused.item(), batch.anomaly_map.max().item()]
        score, largest, label, area = expected[Path(batch.image_path[0]).name]
        assert ours == pytest.approx([score, largest], abs=1e-4)
        assert batch.pred_label.item() is label
        assert batch.pred_mask.float().mean().item() == pytest.approx(area, abs=1e-3)
    assert model.model.class_names == ("linen",)
