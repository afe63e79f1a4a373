"""``anomalib compare`` as a user types it: its tables, its pictures, its screen, and its interruptions."""

import json
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from anomalib_clipad.compare.job_files import read_row

from .conftest import ANOMALIB, SMALL_CONFIG, make_clip, start_command
from .test_compare import PATCHCORE, SDP, WINCLIP, configuration, data_root, figures, maps_of
from .test_metrics import best_f1

__all__ = ["data_root"]  # a fixture
pytestmark = pytest.mark.slow

# WinCLIP's backbone cannot be chosen, so a small CLIP takes its name, in the cache as the real one would lie there.
SITE = """
import json, os, open_clip
open_clip.factory._MODEL_CONFIGS["ViT-B-16-plus-240"] = json.loads(os.environ["SMALL_CLIP"])
tag = {"url": "https://example.com/small.pt"}
open_clip.pretrained._PRETRAINED["ViT-B-16-plus-240"] = {"laion400m_e31": tag}
"""
CLIP_CONFIG = {**SMALL_CONFIG, "vision_cfg": {**SMALL_CONFIG["vision_cfg"], "image_size": 240, "patch_size": 16}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    (home / ".cache/clip").mkdir(parents=True)
    torch.save(make_clip(image_size=240, patch_size=16).state_dict(), home / ".cache/clip/small.pt")
    (home / "site").mkdir()
    (home / "site/sitecustomize.py").write_text(SITE)
    return home


def start(config: dict, where: Path, home: Path) -> subprocess.Popen:
    (where / "compare.yaml").write_text(yaml.safe_dump(config))
    environment = {"HOME": str(home), "PYTHONPATH": str(home / "site"), "SMALL_CLIP": json.dumps(CLIP_CONFIG)}
    return start_command(ANOMALIB, "compare", "--config", "compare.yaml", cwd=where, **environment)


@pytest.fixture(scope="module")
def compared(data_root: Path, home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where a comparison of three models and a broken one wrote, and what it showed."""
    where = tmp_path_factory.mktemp("run")
    broken = {"class_path": "ClipAdSdp", "name": "broken", "init_args": {"rvs": "median"}}
    process = start(configuration(data_root, [SDP, WINCLIP, PATCHCORE, broken]), where, home)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 1, stderr[-3000:]
    return where / "out", stdout + stderr


def test_figures_equal_scikit_learns_on_the_same_scores(compared: tuple[Path, str], data_root: Path) -> None:
    output, _ = compared
    table = pd.read_csv(output / "results.csv")
    table = table[table["error"].isna()]
    assert len(table) == 6
    for _, row in table.iterrows():
        scores = pd.read_csv(output / "jobs" / f"{row['key']}.csv")
        assert row["image_AUROC"] == pytest.approx(roc_auc_score(scores["label"], scores["score"]), abs=1e-6)
        assert row["image_AP"] == pytest.approx(average_precision_score(scores["label"], scores["score"]), abs=1e-6)
        assert row["image_F1Max"] == pytest.approx(best_f1(scores["label"], scores["score"]), abs=1e-6)
        # Only some maps are kept, so pixel figures are compared in test_compare.py.
        assert row["images"] == len(scores) == len(maps_of(data_root, row["category"]))


def test_means_are_means_over_categories(compared: tuple[Path, str]) -> None:
    output, _ = compared
    table = pd.read_csv(output / "results.csv")
    mean = 100 * table[table["model"] == "SDP"]["pixel_AP"].mean()
    line = next(line for line in (output / "report.md").read_text().splitlines() if line.startswith("| SDP |"))
    assert f"{mean:.1f}" in line
    assert line.rstrip(" |").endswith("2 of 2")


def test_a_failed_job_costs_only_itself_and_is_named(compared: tuple[Path, str]) -> None:
    output, shown = compared
    assert shown.count("failed broken on") == 2
    assert "got 'median'" in shown
    assert "**Failed**: broken on gear" in (output / "report.md").read_text()


def test_the_screen_shows_a_bar_and_not_every_step(compared: tuple[Path, str]) -> None:
    _, shown = compared
    assert "8/8" in shown
    assert re.search(r"SDP +[\d.]+ +[\d.]+ ", shown)
    assert "Running validation" not in shown.split("8 jobs", 1)[1]


def test_everything_is_in_one_folder(compared: tuple[Path, str]) -> None:
    output, _ = compared
    for name in ("results.csv", "results.json", "report.md"):
        assert (output / name).stat().st_size > 0
    for name in ("means", "per_category", "speed_accuracy", "examples/gear", "examples/plate"):
        assert min(Image.open(output / f"{name}.png").size) > 200
    row = json.loads((output / "results.json").read_text())[0]
    measured = {"fit_seconds", "test_seconds", "images_per_second", "peak_memory_mib", "parameters", "versions", "seed"}
    assert measured <= set(row)


def test_an_interrupted_run_goes_on_where_it_was(
    compared: tuple[Path, str], data_root: Path, home: Path, tmp_path: Path
) -> None:
    """By every signal once, at a random moment of a job; then by two runs at once in the same folder."""
    config, output = configuration(data_root, [SDP, WINCLIP, PATCHCORE]), tmp_path / "out"
    rng = random.Random(0)
    stamps: dict[Path, int] = {}
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = start(config, tmp_path, home)
        while len(list(output.glob("jobs/[!.]*.json"))) == len(stamps) and process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(number)
        process.communicate(timeout=600)
        # Lightning ends its own run with status 1 when it is interrupted.
        assert process.returncode in (-number, 128 + number, *([1] if number == signal.SIGINT else []))
        if number == signal.SIGKILL:
            drafts = f".{process.pid}."
        assert {path: stamp for path, stamp in written(output).items() if path in stamps} == stamps
        stamps = written(output)
    assert 3 <= len(stamps) < 6
    assert all(read_row(file) is not None for file in stamps)
    both = [start(config, tmp_path, home) for _ in range(2)]
    for process in both:
        _, stderr = process.communicate(timeout=600)
        assert process.returncode == 0, stderr[-3000:]
        assert "Traceback" not in stderr
    assert {path: stamp for path, stamp in written(output).items() if path in stamps} == stamps
    expected = figures(compared[0]).drop(index="broken", level="model")
    pd.testing.assert_frame_equal(figures(output), expected, atol=1e-6)
    assert not [path for path in output.rglob(".*") if drafts not in path.name], "only SIGKILL may leave a draft"


def written(output: Path) -> dict[Path, int]:
    """When each job's row was written."""
    return {path: path.stat().st_mtime_ns for path in output.glob("jobs/[!.]*.json")}
