"""The scripts in examples/ and benchmarks/, run as a reader would run them, but for the start of Python."""

import logging
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from .commands import kept_log_handlers
from .conftest import ROOT, write_category

pytestmark = pytest.mark.slow
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Run a script in ``tmp_path``, in this process, which spares its imports; what it printed."""

    def run_script(script: str, *arguments: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend((ROOT / script).parent)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)  # which some scripts change
        with kept_log_handlers():
            runpy.run_path(str(ROOT / script), run_name="__main__")
        return capsys.readouterr().out

    return run_script


def test_comparing_in_python(run: Callable[..., str], small_clip: str, tmp_path: Path) -> None:
    assert len((EXAMPLES / "compare.py").read_text().splitlines()) < 40
    write_category(tmp_path / "widget")
    assert "report.md" in run("examples/compare.py", tmp_path / "widget", "square", "--backbone", small_clip)
    report = (tmp_path / "results/compare_example/report.md").read_text()
    assert "Failed" not in report
    assert all(name in report for name in ("SDP dbscan", "SDP mean", "PatchCore"))


def test_prompt_cloud_is_drawn(run: Callable[..., str], small_clip: str, tmp_path: Path) -> None:
    run("examples/prompt_cloud.py", "bottle", "--backbone", small_clip, "--output", "cloud.png")
    assert min(Image.open(tmp_path / "cloud.png").size) > 500


def test_gpu_benchmark_measures_the_cpu_too(run: Callable[..., str], small_clip: str) -> None:
    options = "--device cpu --batch-sizes 1 3 --seconds 0.01 --precisions float32 bf16 --modes eager --skip-winclip"
    table = run("benchmarks/gpu.py", "--backbone", small_clip, *options.split())
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if " | eager | " in line
    ]
    wanted = [[p, n, m] for p in ("float32", "bf16") for n in ("1", "3") for m in ("encode_image", "SDP", "SDP+")]
    assert [[row[0], row[2], row[3]] for row in rows] == wanted
    assert all(float(row[4]) > 0 and float(row[5].removesuffix(" x")) > 0 for row in rows)


def test_prediction_benchmark_measures_the_cpu_too(run: Callable[..., str], small_clip: str) -> None:
    options = "--device cpu --pictures 70 --side 40 --batch-size 16 --workers 0"
    table = run("benchmarks/predict.py", "--backbone", small_clip, *options.split())
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[-4:]]
    assert [what for what, *_ in rows] == [
        "reading alone",
        "prediction",
        "prediction with page",
        "prediction with page and pictures",
    ]
    reading = float(rows[0][1])
    for _, rate, share in rows[1:]:
        assert 0 < float(rate) < reading
        assert abs(float(rate) / reading - float(share.removesuffix("%")) / 100) < 0.01


def test_mosaics_are_drawn_and_counted(run: Callable[..., str], tmp_path: Path) -> None:
    said = run("examples/mosaic.py", "--mosaics", 2, "--references", 1)
    assert "tiles: the peak lies in the broken part in 2 of 2 mosaics" in said
    sheets = sorted((tmp_path / "results/mosaic").glob("*.png"))
    assert [Image.open(sheet).size for sheet in sheets] == [(3 * 728, 518)] * 2
