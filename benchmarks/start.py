"""Time and memory until a model is ready: its vision weights read, its text vectors at hand.

    python benchmarks/start.py     # on Linux

Random weights of the default backbone are written to a temporary folder and read by new processes, whose imports are
not counted. The table goes to standard output.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import open_clip
import torch
from line import HEADER, Line, machine
from safetensors.torch import save_file

BACKBONE = "ViT-B-16-plus-240"
ROUNDS = 9
LIMITS = {"time": 1.2, "memory": 1.1}

READ = {
    ".safetensors": """
with safe_open(path, framework="pt") as file:
    kept = {key: file.get_tensor(key).clone() for key in file.keys() if key.startswith("visual.")}
""",
    ".pt": """
state = torch.load(path, mmap=True, weights_only=True)
kept = {key: value.clone() for key, value in state.items() if key.startswith("visual.")}
""",
}
START = """
model = ClipAdSdpModel(pretrained=path, class_names=["bottle"])
"""
PROGRAM = """
import json, os, pathlib, re, sys, time
import torch
from safetensors import safe_open
from anomalib_clipad.sdp import ClipAdSdpModel
import sklearn.cluster  # anomalib has imported it by then
path = sys.argv[1]
# Not getrusage, whose peak begins with that of the process that started this one.
peak = lambda: int(re.search("VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024
with open(path, "rb") as file:
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from disk, not from memory
before, start = peak(), time.perf_counter()
{body}
print(json.dumps([time.perf_counter() - start, peak() - before]))
"""


def measure(body: str, path: Path, cache: Path, rounds: int = ROUNDS) -> tuple[float, float]:
    """Median seconds and MiB of a piece of the program in new processes."""
    environment = {**os.environ, "ANOMALIB_CLIPAD_CACHE": str(cache)}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(body=body), str(path)]
    runs = [
        json.loads(subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout)
        for _ in range(rounds)
    ]
    seconds, mebibytes = zip(*runs, strict=True)
    return statistics.median(seconds), statistics.median(mebibytes)


def lines(rounds: int = ROUNDS) -> Iterator[Line]:
    """Write the weights, and measure."""
    torch.manual_seed(0)
    state = open_clip.create_model(BACKBONE, pretrained=None).state_dict()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("weights.safetensors", "weights.pt"):
            path, cache = Path(folder) / name, Path(folder) / f"cache of {name}"
            save = save_file if path.suffix == ".safetensors" else torch.save
            save({key: value.contiguous() for key, value in state.items()}, path)
            os.sync()  # else the page cache keeps it
            size = path.stat().st_size / 2**20
            first, _ = measure(START, path, cache, rounds=1)
            runs = [
                (measure(READ[path.suffix], path, cache, 1)[0], *measure(START, path, cache, 1)) for _ in range(rounds)
            ]  # in turn, because a disk is as fast as others let it be
            read, second, memory = (statistics.median(column) for column in zip(*runs, strict=True))
            ratio = statistics.median(start / read for read, start, _ in runs)
            detail = f"{name}: {second:.2f} s (the first {first:.2f} s), {read:.2f} s"
            yield Line("second start / vision weights read", detail, ratio, LIMITS["time"])
            yield Line("memory of a start / file", f"{name}, {size:.0f} MiB", memory / size, LIMITS["memory"])


def main() -> None:
    """Print the table."""
    print(f"{machine()}; the weights are read from disk\n\n{HEADER}")
    for line in lines():
        print(line, flush=True)


if __name__ == "__main__":
    main()
