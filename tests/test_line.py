"""examples/line.py, run as on a production line: no picture is lost, judged twice, or judged before it is whole."""

import csv
import io
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import openvino
import pytest
from PIL import Image

from anomalib_clipad import ClipAdSdp

from .conftest import ROOT, new_engine, run_command, start_command

# As on a machine that has neither of them.
BLOCKED = "import sys; sys.modules.update(dict.fromkeys(['torch', 'torchvision', 'anomalib', 'anomalib_clipad']))"
SCRIPT = f"{BLOCKED}; import runpy; sys.argv[0] = 'line.py'; runpy.run_path({str(ROOT / 'examples/line.py')!r})"
COMMAND = (sys.executable, "-uc", SCRIPT)


@pytest.fixture(scope="module")
def model(small_clip: str) -> ClipAdSdp:
    return ClipAdSdp("widget", backbone=small_clip, visualizer=False)


@pytest.fixture(scope="module")
def exported(model: ClipAdSdp, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exported")
    files = {"onnx": new_engine(root).export(model, "onnx", root), "openvino": root / "model.xml"}
    openvino.save_model(openvino.convert_model(files["onnx"]), files["openvino"], compress_to_fp16=False)
    return files


def picture(seed: int, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 60, 3), dtype=np.uint8)
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 250) if mode == "I;16" else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.02)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def names(path: Path) -> list[str]:
    return [Path(row["path"]).name for row in rows(path)] if path.exists() else []


def engines_scores(model: ClipAdSdp, root: Path, folder: Path) -> dict[str, float]:
    batches = new_engine(root).predict(model, data_path=folder)
    return {Path(batch.image_path[0]).name: float(batch.pred_score[0]) for batch in batches}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "number"), [("onnx", signal.SIGINT), ("openvino", signal.SIGTERM)])
def test_every_picture_is_judged_once_when_it_is_whole(
    exported: dict[str, Path], model: ClipAdSdp, tmp_path: Path, kind: str, number: signal.Signals
) -> None:
    incoming, table = tmp_path / "incoming", tmp_path / "line.csv"
    incoming.mkdir()
    (incoming / "early.png").write_bytes(picture(0))
    with start_command(*COMMAND, exported[kind], incoming, cwd=tmp_path, ANOMALIB_CLIPAD_AUTOLOAD="0") as process:
        try:
            wait_for(lambda: names(table) == ["early.png"])
            content = picture(1)
            (incoming / "slow.png").write_bytes(content[:2000])
            (incoming / "broken.png").write_bytes(b"not an image")
            (incoming / "deep.png").write_bytes(picture(2, "I;16"))
            wait_for(lambda: names(table)[1:] == ["deep.png"])
            with (incoming / "slow.png").open("ab") as file:
                file.write(content[2000:])
            wait_for(lambda: names(table)[2:] == ["slow.png"])
            time.sleep(2.5)  # broken.png is given up
            (incoming / "early.png").write_bytes(picture(3))
            wait_for(lambda: len(names(table)) == 4)
            process.send_signal(number)
            printed, problems = process.communicate(timeout=20)
        except BaseException:
            process.kill()
            raise
    assert process.returncode == 0, problems
    assert names(table) == ["early.png", "deep.png", "slow.png", "early.png"]
    assert problems.count("Skipped") == 1
    assert f"Skipped {incoming / 'broken.png'}, which cannot be judged: " in problems
    assert "Traceback" not in problems
    judged = rows(table)
    expected = engines_scores(model, tmp_path, incoming)
    for row in judged[1:]:
        assert float(row["score"]) == pytest.approx(expected[Path(row["path"]).name], abs=1e-4)
        assert row["label"] == ("anomalous" if float(row["score"]) > 0.5 else "normal")
        assert f"{row['label']:9}  {float(row['score']):.3f}" in printed
        assert 0 < float(row["latency_ms"]) < 10_000
    assert judged[0]["score"] != judged[3]["score"], "a camera that writes to one name all the time"
    assert [row["time"] for row in judged] == sorted(row["time"] for row in judged)
    bad = sum(row["label"] == "anomalous" for row in judged)
    assert f"4 images, {bad} anomalous, 1 skipped, median latency " in printed.splitlines()[-1]
    assert printed.splitlines()[-1].endswith("Table: line.csv")


def run_line(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    return run_command(*COMMAND, *arguments, cwd=cwd, ANOMALIB_CLIPAD_AUTOLOAD="0")


@pytest.mark.slow
def test_pictures_that_are_there_are_judged_by_the_threshold_that_is_given(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    incoming = tmp_path / "incoming"
    incoming.mkdir()
    for seed in range(3):
        (incoming / f"{9 - seed}.png").write_bytes(picture(seed))
    outcomes = {}
    for threshold in ("0", "1"):
        arguments = (exported["onnx"], incoming, "--once", "--threshold", threshold)
        outcomes[threshold] = run_line(*arguments, cwd=tmp_path)
        assert outcomes[threshold].returncode == 0, outcomes[threshold].stderr
        assert "one colour" not in outcomes[threshold].stderr
    assert "3 images, 3 anomalous, 0 skipped" in outcomes["0"].stdout
    assert "3 images, 0 anomalous, 0 skipped" in outcomes["1"].stdout
    assert names(tmp_path / "line.csv") == ["9.png", "8.png", "7.png"] * 2, "by arrival; a second run adds its rows"


@pytest.mark.slow
def test_only_new_pictures_on_request(exported: dict[str, Path], tmp_path: Path) -> None:
    incoming, table = tmp_path / "incoming", tmp_path / "line.csv"
    incoming.mkdir()
    (incoming / "old.png").write_bytes(picture(0))
    arguments = (exported["onnx"], incoming, "--new-only")
    with start_command(*COMMAND, *arguments, cwd=tmp_path, ANOMALIB_CLIPAD_AUTOLOAD="0") as process:
        try:
            wait_for(table.exists)
            time.sleep(0.5)
            (incoming / "new.png").write_bytes(picture(1))
            wait_for(lambda: bool(names(table)))
            shutil.rmtree(incoming)  # a share that is gone
            printed, problems = process.communicate(timeout=20)
        except BaseException:
            process.kill()
            raise
    assert process.returncode == 1
    assert names(table) == ["new.png"]
    assert "1 images, " in printed.splitlines()[-1]
    assert problems.splitlines()[-1].startswith("Stopped: [Errno 2]")


@pytest.mark.slow
def test_a_cameras_pictures_are_judged(exported: dict[str, Path], model: ClipAdSdp, tmp_path: Path) -> None:
    film = cv2.VideoWriter(str(tmp_path / "film.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for shade in (40, 90, 200):
        film.write(np.full((48, 64, 3), (shade, 0, 255 - shade), dtype=np.uint8))
    film.release()
    done = run_line(exported["openvino"], "--camera", "film.avi", cwd=tmp_path)
    assert done.returncode == 1, "a camera that falls silent is no good end"
    assert done.stderr.splitlines()[-1] == "Stopped: camera film.avi gives no picture"
    judged = rows(tmp_path / "line.csv")
    assert [row["path"] for row in judged] == [f"camera film.avi, picture {number}" for number in (1, 2, 3)]
    stored = cv2.VideoCapture(str(tmp_path / "film.avi"))
    (tmp_path / "stills").mkdir()
    for number in range(3):
        cv2.imwrite(str(tmp_path / f"stills/{number}.png"), stored.read()[1])
    expected = engines_scores(model, tmp_path, tmp_path / "stills")
    assert [float(row["score"]) for row in judged] == pytest.approx([expected[f"{n}.png"] for n in range(3)], abs=1e-4)
    words = " has one colour all over"
    named = [line.split(words)[0] for line in done.stderr.splitlines() if words in line]
    assert named == [row["path"] for row in judged], "as of a camera that is covered"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("gone.onnx", "."),
            "error: gone.onnx is not an exported model; give a model.onnx or a model.xml that exists.",
        ),
        (("bad.onnx", "gone"), "error: gone is not a folder; give one that exists, or --camera 0."),
        (("bad.onnx", "."), "bad.onnx cannot be loaded: "),
        (("bad.xml", "."), "bad.xml cannot be loaded: "),
    ],
)
def test_what_is_missing_or_damaged_is_named(arguments: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    for name in ("bad.onnx", "bad.xml"):
        (tmp_path / name).write_text("no model")
    done = run_line(*arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "line.csv").exists()


@pytest.mark.slow
def test_a_table_that_cannot_be_written_ends_the_line_with_a_sentence(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    done = run_line(exported["onnx"], tmp_path, "--results", "gone/line.csv", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "Stopped: [Errno 2] No such file or directory: 'gone/line.csv'"
