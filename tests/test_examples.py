"""The scripts in examples/, run as a reader would run them."""

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from .conftest import write_category

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, *arguments: object, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_comparing_in_python(small_clip: str, tmp_path: Path) -> None:
    assert len((EXAMPLES / "compare.py").read_text().splitlines()) < 40
    write_category(tmp_path / "widget")
    assert "report.md" in run("compare.py", tmp_path / "widget", "square", "--backbone", small_clip, cwd=tmp_path)
    report = (tmp_path / "results/compare_example/report.md").read_text()
    assert "Failed" not in report
    assert all(name in report for name in ("SDP dbscan", "SDP mean", "PatchCore"))


def test_prompt_cloud_is_drawn(small_clip: str, tmp_path: Path) -> None:
    run("prompt_cloud.py", "bottle", "--backbone", small_clip, "--output", "cloud.png", cwd=tmp_path)
    assert min(Image.open(tmp_path / "cloud.png").size) > 500
