"""Judge pictures as they arrive in a folder, or come from a camera, with an exported model.

python examples/line.py results/weights/onnx/model.onnx incoming/ [--results line.csv] [--threshold 0.5]
python examples/line.py results/weights/openvino/model.xml --camera 0

numpy, Pillow, and onnxruntime or openvino are enough (for a camera OpenCV, too). Ctrl-C or SIGTERM ends it.
"""

import argparse
import csv
import signal
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import numpy as np
from PIL import Image

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
POLL = 0.1  # seconds between two looks at the folder; a picture that changed in between is still being written
PATIENCE = 2.0  # seconds without a change after which a picture that cannot be judged is skipped
Model = Callable[[np.ndarray], float]  # from pixels (1, 3, H, W) in [0, 1] to a score
signals: list[int] = []
skipped: list[str] = []


def stop(number: int, _frame: object) -> None:
    """Take note of a signal; a second one ends the program at once."""
    signals.append(number)
    signal.signal(number, signal.SIG_DFL)


def load(path: Path) -> Model:
    """The model of a file, whose ending says by what it is run."""
    if path.suffix == ".xml":
        import openvino

        # Left alone, OpenVINO rounds to bfloat16 on a CPU that has it.
        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda pixels: compiled(pixels)["pred_score"].item()
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return lambda pixels: session.run(["pred_score"], {session.get_inputs()[0].name: pixels})[0].item()


def read(path: str) -> np.ndarray:
    """Pixels of a picture, scaled as in the engine."""
    with Image.open(path) as image:
        # Pillow would cut 16 bits off at 255. Older versions open a PNG of 16 bits in the mode of 32.
        if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):
            return np.asarray(image, dtype=np.float32)[None, None].repeat(3, axis=1) / 65535
        if image.mode in ("I", "F"):
            msg = "it has more than 16 bits"
            raise ValueError(msg)
        return np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1)[None] / 255


def judge(model: Model, name: str, pixels: np.ndarray) -> float:
    """Score of a picture; one of a single colour is named, because its score says nothing."""
    score = model(pixels)
    first = pixels[..., :1, :1]
    if (pixels[..., 0, :] == first[..., 0]).all() and (pixels == first).all():  # the first row tells nearly always
        print(f"{name} has one colour all over; look at the camera and the light.", file=sys.stderr)
    return score


def changes(folder: Path) -> dict[str, tuple[int, int]]:
    """Time of change and size of every picture, in the order of arrival."""
    found = {}
    for path in folder.iterdir():
        if path.suffix.lower() in ENDINGS:
            with suppress(FileNotFoundError):  # moved away meanwhile
                found[str(path)] = (path.stat().st_mtime_ns, path.stat().st_size)
    return dict(sorted(found.items(), key=lambda item: (item[1][0], item[0])))


def of_folder(model: Model, folder: Path, new_only: bool, once: bool) -> Iterator[tuple[str, float, float]]:
    """Path, score and seconds of every picture, once it is whole. Written anew under its name, it is a new one."""
    done = changes(folder) if new_only else {}
    since: dict[tuple[str, tuple[int, int]], float] = {}
    while not signals:
        now, present = time.monotonic(), changes(folder)
        done = {path: change for path, change in done.items() if path in present}
        since = {item: since.get(item, now) for item in present.items() if done.get(item[0]) != item[1]}
        for (path, change), first in since.items():
            if first == now or signals:
                continue
            start = time.perf_counter()
            try:
                score = judge(model, path, read(path))
            except Exception as error:  # noqa: BLE001 - Pillow raises almost anything for a damaged picture
                if now - first >= PATIENCE:
                    done[path] = change
                    skipped.append(path)
                    print(f"Skipped {path}, which cannot be judged: {error}", file=sys.stderr)
                continue
            done[path] = change
            yield path, score, time.perf_counter() - start
        if once and not since:
            return
        time.sleep(POLL)


def of_camera(model: Model, source: str) -> Iterator[tuple[str, float, float]]:
    """Name, score and seconds of every picture that a camera gives."""
    import cv2

    camera, number = cv2.VideoCapture(int(source) if source.isdigit() else source), 0
    while not signals:
        whole, picture = camera.read()
        if not whole:
            msg = f"camera {source} gives no picture"
            raise OSError(msg)
        start, number = time.perf_counter(), number + 1
        name = f"camera {source}, picture {number}"
        score = judge(model, name, picture[None, ..., ::-1].transpose(0, 3, 1, 2).astype(np.float32) / 255)
        yield name, score, time.perf_counter() - start


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", type=Path, help="exported model: .onnx for ONNX Runtime, .xml for OpenVINO")
parser.add_argument("folder", type=Path, nargs="?", help="folder to watch, without the folders in it")
parser.add_argument("--camera", help="instead of a folder: number of a camera, or what else OpenCV opens")
parser.add_argument("--results", type=Path, default=Path("line.csv"), help="table; rows are appended")
parser.add_argument("--threshold", type=float, default=0.5, help="a score above it is anomalous")
parser.add_argument("--new-only", action="store_true", help="leave out the pictures that are there at the start")
parser.add_argument("--once", action="store_true", help="end when the folder has no other picture")
given = parser.parse_args()
if given.model.suffix not in (".onnx", ".xml") or not given.model.is_file():
    parser.error(f"{given.model} is not an exported model; give a model.onnx or a model.xml that exists.")
if given.camera is None and not (given.folder and given.folder.is_dir()):
    parser.error(f"{given.folder} is not a folder; give one that exists, or --camera 0.")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # a verdict is seen at once, in a pipe too
try:
    model = load(given.model)
except Exception as error:  # noqa: BLE001 - whatever a runtime raises for a damaged file, or a package that is missing
    sys.exit(f"{given.model} cannot be loaded: {error}")
judged = of_camera(model, given.camera) if given.camera else of_folder(model, given.folder, given.new_only, given.once)
counts, latencies, problem = Counter(), array("f"), None
try:
    with given.results.open("a", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.writer(file)
        if not file.tell():
            table.writerow(("time", "path", "score", "label", "latency_ms"))
        for path, score, seconds in judged:
            label = "normal" if score <= given.threshold else "anomalous"
            counts[label] += 1
            latencies.append(1000 * seconds)
            now = datetime.now().astimezone().isoformat(timespec="milliseconds")
            table.writerow((now, path, f"{score:.6f}", label, f"{latencies[-1]:.1f}"))
            file.flush()
            print(f"{label:9}  {score:.3f}  {latencies[-1]:6.1f} ms  {path}")
except (OSError, ImportError) as error:  # the folder is gone, the disk is full, no camera, no OpenCV
    problem = f"Stopped: {error}"
words = f"{len(latencies)} images, {counts['anomalous']} anomalous, {len(skipped)} skipped"
print(f"{words}, median latency {np.median(latencies) if latencies else 0:.1f} ms. Table: {given.results}")
sys.exit(problem)
