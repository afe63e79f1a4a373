"""Two processes: the figures of one, and every picture once."""

import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from anomalib.engine import Engine

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.engine.table import NAME

from .conftest import ROOT, ROUNDING, folder, run_command
from .test_page import paths_of

SCRIPT = """
import sys
from pathlib import Path
from tests.test_distributed import score_category
if __name__ == "__main__":
    score_category(*map(Path, sys.argv[1:4]), devices=2, k_shot=int(sys.argv[4]))
"""


def score_category(small_clip: Path, category: Path, out: Path, devices: int, k_shot: int) -> None:
    """Test on 11 images, four at a time, then predict without a datamodule; save the figures of each process."""
    model = ClipAdSdp(backbone=str(small_clip), k_shot=k_shot, false_alarm_rate=0.3 if k_shot else None)
    engine = Engine(
        default_root_dir=out,
        logger=False,
        enable_progress_bar=False,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
    )
    figures = engine.test(model, datamodule=folder(category, eval_batch_size=4))[0]
    rank = engine.trainer.global_rank
    batches = engine.predict(model, data_path=category / "test/square")
    scores = {Path(batch.image_path[0]).name: batch.pred_score.item() for batch in batches}
    torch.save({"figures": figures, "scores": scores}, out / f"rank{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("k_shot", [0, 1])
def test_two_processes_give_the_figures_and_pictures_of_one(
    small_clip: str, category: Path, tmp_path: Path, k_shot: int
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    score_category(Path(small_clip), category, one, devices=1, k_shot=k_shot)
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    done = run_command(sys.executable, script, small_clip, category, two, k_shot, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = torch.load(one / "rank0.pt", weights_only=True)
    parts = [torch.load(two / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert len(expected["figures"]) == 9
    for part in parts:
        assert part["figures"] == pytest.approx(expected["figures"], abs=ROUNDING)
    assert sorted([*parts[0]["scores"], *parts[1]["scores"]]) == sorted(expected["scores"]), "each image once"
    assert parts[0]["scores"] | parts[1]["scores"] == pytest.approx(expected["scores"], abs=ROUNDING)
    assert pictures(two) == pictures(one)
    assert tables(two) == tables(one)
    assert sorted(len(paths) for paths in tables(one).values()) == [6, 11], "a table a run"
    assert pages(two) == pages(one)
    assert sorted(len(paths) for paths in pages(one).values()) == [6, 11]


def tables(root: Path) -> dict[str, list[str]]:
    """Images and their pictures in every table."""
    found = {str(path.relative_to(root)): pd.read_csv(path) for path in root.rglob(f"{NAME}*")}
    return {name: sorted(table.path + " " + table.picture) for name, table in found.items()}


def pages(root: Path) -> dict[str, list[str]]:
    """Images of every page, and of parts of one that were left."""
    return {str(path.relative_to(root)): paths_of(path) for path in root.rglob("*report.html*")}


def pictures(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.png"))
