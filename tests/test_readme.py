"""What the README shows works as it stands there."""

import re
from pathlib import Path

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.components import PromptEnsemble

from .conftest import ROOT, new_engine

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_prompts_file_is_taken(small_clip: str, image_folder: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "prompts.yaml").write_text(block)
    model = ClipAdSdp("metal hinge", backbone=small_clip, prompts=tmp_path / "prompts.yaml", visualizer=False)
    ensemble = model.model.prompts
    assert "{} with a missing screw" in ensemble.anomalous_states
    assert "{} with all screws" in ensemble.normal_states
    assert ensemble.templates == PromptEnsemble.from_config("industrial").templates
    scores = [float(batch.pred_score[0]) for batch in new_engine(tmp_path).predict(model, data_path=image_folder)]
    assert len(scores) == 2
    assert all(0 < score < 1 for score in scores)


def test_links_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ")).lower().replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("#")
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target
