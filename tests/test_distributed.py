"""Two processes: the figures and the training of one, and every picture once."""

import logging
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from anomalib_clipad import ClipAdSdp, ClipAdSdpPlus
from anomalib_clipad.engine.table import NAME

from .conftest import ROOT, ROUNDING, auxiliary, folder, new_engine, run_command, state
from .test_page import paths_of
from .test_products import mixed

__all__ = ["mixed"]  # a fixture

pytestmark = pytest.mark.slow
ARGUMENTS: dict[str, dict] = {
    "plain": {},
    "reference": {"k_shot": 1, "false_alarm_rate": 0.3},
    "tiles": {"image_size": (48, 64), "tile_size": 32, "tile_batch_size": 3, "region": [0.0, 0.0, 0.8, 1.0]},
}
# Of pictures that take turns, so that the first process sees no tile and the second one no plate.
PRODUCTS = {"*/b/*[02468].png": "plate", "*/b/*[13579].png": "tile", "n": "nut"}
SCRIPT = """
import sys
from pathlib import Path
from tests.test_distributed import run_everything
if __name__ == "__main__":
    run_everything(*map(Path, sys.argv[1:]), devices=2)
"""


def run_everything(
    small_clip: Path, category: Path, mixed: Path, auxiliary_root: Path, out: Path, devices: int
) -> None:
    """Train, test and predict with all ``ARGUMENTS`` and with several products, in folders below ``out``."""
    # First, while the second process is not there yet: anomalib's engine fails where two make a folder at once.
    learn(small_clip, auxiliary_root, out / "train", devices)
    for name, arguments in ARGUMENTS.items():
        score_category(small_clip, category, out / name, devices, arguments)
    score_products(small_clip, mixed, out / "products", devices)


def score_category(small_clip: Path, category: Path, out: Path, devices: int, arguments: dict) -> None:
    """Test on 11 images, four at a time, then predict without a datamodule; save the figures of each process."""
    out.mkdir(parents=True, exist_ok=True)
    model = ClipAdSdp(backbone=str(small_clip), **arguments)
    engine = new_engine(out, devices=devices, strategy="ddp" if devices > 1 else "auto")
    figures = engine.test(model, datamodule=folder(category, eval_batch_size=4))[0]
    rank = engine.trainer.global_rank
    batches = engine.predict(model, data_path=category / "test/square")
    scores = {Path(batch.image_path[0]).name: batch.pred_score.item() for batch in batches}
    torch.save({"figures": figures, "scores": scores}, out / f"rank{rank}.pt")


def score_products(small_clip: Path, mixed: Path, out: Path, devices: int) -> None:
    """Test on 32 images of three classes, one at a time, with words that their folders are named by; then predict."""
    out.mkdir(parents=True, exist_ok=True)
    model = ClipAdSdp(PRODUCTS, str(small_clip), defects=["b", "n"], visualizer=False)
    engine = new_engine(out, devices=devices, strategy="ddp" if devices > 1 else "auto")
    data = folder(mixed, eval_batch_size=1)
    lines: list[str] = []
    logger, handler = logging.getLogger("anomalib_clipad.engine.defect_naming"), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    figures = engine.test(model, datamodule=data)[0]
    logger.removeHandler(handler)
    said = {
        batch.image_path[0]: (*batch.class_name, float(batch.pred_score), bool(batch.pred_label), *batch.explanation)
        for batch in engine.predict(model, dataloaders=data.test_dataloader())
    }
    limits = model.post_processor.of_class.values
    torch.save(
        {"figures": figures, "said": said, "limits": limits, "lines": lines},
        out / f"rank{engine.trainer.global_rank}.pt",
    )


def learn(small_clip: Path, root: Path, out: Path, devices: int) -> None:
    """Train for two epochs on batches of four; the first process saves the losses and the layers."""
    torch.manual_seed(0)
    model = ClipAdSdpPlus(backbone=str(small_clip), lr=1e-2, visualizer=False)
    strategy = "ddp" if devices > 1 else "auto"
    engine = new_engine(out, max_epochs=2, devices=devices, strategy=strategy, num_sanity_val_steps=0)
    engine.fit(model, datamodule=auxiliary(root, train_batch_size=4 // devices))
    if engine.trainer.is_global_zero:
        losses = {k: v.clone() for k, v in engine.trainer.callback_metrics.items() if k.startswith("train")}
        torch.save({"losses": losses, "adapter": state(model)}, out / "result.pt")


@pytest.fixture(scope="module")
def runs(
    small_clip: str, category: Path, mixed: Path, auxiliary_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """What one process wrote, and what two did, which are started once for all."""
    root = tmp_path_factory.mktemp("distributed")
    one, two, script = root / "one", root / "two", root / "two.py"
    run_everything(Path(small_clip), category, mixed, auxiliary_root, one, devices=1)
    script.write_text(SCRIPT)
    done = run_command(sys.executable, script, small_clip, category, mixed, auxiliary_root, two, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return one, two


@pytest.mark.parametrize("name", ARGUMENTS)
def test_two_processes_give_the_figures_and_pictures_of_one(runs: tuple[Path, Path], name: str) -> None:
    one, two = (run / name for run in runs)
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


def test_two_processes_set_the_thresholds_of_each_class_as_one_does(runs: tuple[Path, Path]) -> None:
    """To the last digit, though one process sees no image of a class; and the words for defects are as often right."""
    expected = torch.load(runs[0] / "products/rank0.pt", weights_only=True)
    parts = [torch.load(runs[1] / f"products/rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [{name for name, *_ in part["said"].values()} for part in parts] == [{"plate", "nut"}, {"tile", "nut"}]
    for part in parts:
        assert torch.equal(part["limits"], expected["limits"])
        assert part["figures"] == expected["figures"]
    assert parts[0]["said"] | parts[1]["said"] == expected["said"]
    assert len(expected["limits"].unique(dim=0)) == 3
    assert len(expected["lines"]) == 1
    assert [part["lines"] for part in parts] == [expected["lines"], []]
    naming = [expected["figures"][f"image_{kind}"] for kind in ("NamingAccuracy", "NamingF1Score")]
    assert all(0 < figure < 1 for figure in naming), naming


def tables(root: Path) -> dict[str, list[str]]:
    """Images and their pictures in every table."""
    found = {str(path.relative_to(root)): pd.read_csv(path) for path in root.rglob(f"{NAME}*")}
    return {name: sorted(table.path + " " + table.picture) for name, table in found.items()}


def pages(root: Path) -> dict[str, list[str]]:
    """Images of every page, and of parts of one that were left."""
    return {str(path.relative_to(root)): paths_of(path) for path in root.rglob("*report.html*")}


def pictures(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.png"))


def test_two_processes_learn_what_one_does(runs: tuple[Path, Path]) -> None:
    one, two = (torch.load(out / "train/result.pt", weights_only=True) for out in runs)
    for key, value in one["losses"].items():
        if key.endswith("epoch"):
            torch.testing.assert_close(two["losses"][key], value, atol=1e-5, rtol=1e-5, msg=key)
    for key, value in one["adapter"].items():
        torch.testing.assert_close(two["adapter"][key], value, atol=1e-5, rtol=0, msg=key)


def test_latest_is_the_folder_that_two_processes_have_trained_in(runs: tuple[Path, Path]) -> None:
    for run in runs:
        folder = run / "train/results/ClipAdSdpPlus/gear+plate"
        assert sorted(path.name for path in folder.iterdir()) == ["latest", "v0"]
        assert sorted(path.name for path in (folder / "latest/weights/lightning").iterdir()) == [
            "last.ckpt",
            "model.ckpt",
        ]
