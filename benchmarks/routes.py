"""Routes of SDP on the CPU: torch, torch.compile, ONNX Runtime and OpenVINO, measured in one run.

    python benchmarks/routes.py                  # ViT-B-16-plus-240 with random weights, some six minutes on two cores
    python benchmarks/routes.py --backbone ViT-B-32 --batch-sizes 1 --rounds 3
    python benchmarks/routes.py --eager          # torch only

On a CPU with AVX512 torch is measured with AVX2 kernels, too.

Every round runs each route and the plain tower (``encode_image``) once. Times are medians, ratios are medians of the
ratios within a round, because machines drift. Matrix rate: float32, 2048 x 2048 by 2048 x 2048, by torch. Differences
are those to torch eager in float32, a map's as a share of the range of all maps.
"""

import argparse
import copy
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from line import Line, machine
from operations import operations
from torch import nn
from torch.nn import functional as F

from anomalib_clipad.components import load_backbone
from anomalib_clipad.engine.export import OPSET
from anomalib_clipad.engine.quantization import quantize_tower
from anomalib_clipad.sdp import ClipAdSdpModel

EAGER_LIMIT = 1.08  # times encode_image
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
PRODUCT = 2048  # rows and columns of the matrices whose product tells the machine's rate
EAGER = "torch eager, float32"
IMAGES_FOR_INT8 = 8

Answer = tuple[torch.Tensor, torch.Tensor]
Route = Callable[[torch.Tensor], Answer]


class Measured(NamedTuple):
    """A route at a batch size.

    Attributes:
        route: Its name.
        batch: Images at once.
        seconds: An image.
        ratio: Times the plain tower.
        share: Of the machine's matrix rate.
        map_difference: Largest, as a share of the maps' range.
        score_difference: Largest.
    """

    route: str
    batch: int
    seconds: float
    ratio: float
    share: float
    map_difference: float = 0.0
    score_difference: float = 0.0

    def __str__(self) -> str:
        """The row of the table."""
        return (
            f"| {self.route} | {self.batch} | {1000 * self.seconds:.0f} ms | {self.ratio:.2f} | {self.share:.0%} "
            f"| {self.map_difference:.1g} | {self.score_difference:.1g} |"
        )


class MapAndScore(nn.Module):
    """SDP as it is exported here: images in, map and score out."""

    def __init__(self, model: ClipAdSdpModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> Answer:
        """Map and score."""
        prediction = self.model(images)
        return prediction.anomaly_map, prediction.pred_score


def say(what: str) -> None:
    """Tell how far it is."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def build(backbone: str) -> ClipAdSdpModel:
    """SDP with random weights, of which the text vectors are as near to each other as those of a class."""
    model = ClipAdSdpModel(clip=load_backbone(backbone, None).clip).eval()
    normal, change = torch.randn(2, model.visual.embed_dim).unbind()
    model.text_features = F.normalize(torch.stack([normal, normal + 0.3 * change]), dim=-1)[None]
    return model


def onnx_file(network: nn.Module, images: torch.Tensor, folder: Path) -> Path:
    """An ONNX file for any number of images, as the package exports it."""
    path, size = folder / "model.onnx", torch.export.Dim.DYNAMIC
    arguments = {"dynamo": True, "opset_version": OPSET, "verbose": False, "external_data": False}
    torch.onnx.export(network, (images,), path, dynamic_shapes={"images": {0: size}}, **arguments)
    return path


def onnxruntime_route(path: Path) -> Route:
    """By ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: tuple(map(torch.from_numpy, session.run(None, {name: images.numpy()})))


def openvino_route(model: object, precision: str) -> Route:
    """By OpenVINO."""
    import openvino

    config = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY", **config})
    return lambda images: tuple(torch.from_numpy(np.asarray(value)) for value in compiled(images.numpy()).values())


def fixed_openvino_route(model: Any, precision: str) -> Route:  # noqa: ANN401 - OpenVINO's, which may be missing
    """By OpenVINO, compiled for every batch size of its own."""
    compiled: dict[int, Route] = {}

    def run(images: torch.Tensor) -> Answer:
        if len(images) not in compiled:
            fixed = model.clone()
            fixed.reshape(list(images.shape))
            compiled[len(images)] = openvino_route(fixed, precision)
        return compiled[len(images)](images)

    return run


def routes(model: ClipAdSdpModel, only_eager: bool, folder: Path) -> Iterator[tuple[str, Route]]:
    """Every route that the installed packages allow, eager first."""
    network = MapAndScore(model)
    yield EAGER, network
    if only_eager:
        return
    half = MapAndScore(copy.deepcopy(model).to(torch.bfloat16))
    yield "torch eager, bfloat16", lambda images: half(images.bfloat16())
    yield "torch.compile, float32", torch.compile(MapAndScore(model), dynamic=False)
    missing = [name for name in ("onnxscript", "onnxruntime", "openvino", "nncf") if find_spec(name) is None]
    if missing:
        say(f"{' and '.join(missing)} not installed: routes left out")
    if "onnxscript" in missing:
        return
    say("exporting")
    path = onnx_file(network, torch.randn(2, 3, *model.image_size), folder)
    if "onnxruntime" not in missing:
        yield "ONNX Runtime, float32", onnxruntime_route(path)
    if "openvino" in missing:
        return
    import openvino

    graph = openvino.Core().read_model(path)
    yield "OpenVINO, float32", openvino_route(graph, "f32")
    yield "OpenVINO, bfloat16", openvino_route(graph, "bf16")
    if "nncf" not in missing:
        say("choosing the ranges of INT8")
        images = list(torch.randn(IMAGES_FOR_INT8, 3, *model.image_size).split(1))
        with redirect_stdout(sys.stderr):  # its progress, which is no part of the table
            quantised = quantize_tower(graph, model.visual.visual.proj, images, IMAGES_FOR_INT8)
        # OpenVINO 2026.4 refuses the quantised graph of a free batch size.
        yield "OpenVINO, INT8", fixed_openvino_route(quantised, "f32")


def matrix_rate() -> float:
    """Floating-point operations a second of a large product in float32, the best of five."""
    left, right = torch.randn(2, PRODUCT, PRODUCT).unbind()
    left @ right
    return 2 * PRODUCT**3 / min(seconds(lambda: left @ right) for _ in range(5))


def measure(
    backbone: str, batch_sizes: list[int], rounds: int, only_eager: bool = False, kernels: str = ""
) -> Iterator[Measured]:
    """Measure every route at every batch size."""
    torch.manual_seed(0)
    model = build(backbone)
    rate = matrix_rate()
    say(f"matrix rate {rate / 1e9:.0f} GFLOP/s")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        found = dict(routes(model, only_eager, Path(folder)))
        for batch in batch_sizes:
            images = torch.randn(batch, 3, *model.image_size)
            plain = "encode_image"
            calls: dict[str, Callable[[], object]] = {plain: lambda images=images: model.visual.visual(images)}
            calls |= {name: lambda route=route, images=images: route(images) for name, route in found.items()}
            work = operations(calls[EAGER])
            say(f"batch {batch}: {work / operations(calls[plain]):.3f} times the operations of encode_image")
            calls[plain]()
            answers = {name: [value.float() for value in route(images)] for name, route in found.items()}  # warms up
            times: dict[str, list[float]] = {name: [] for name in calls}
            for turn in range(most := max(3, 2 * rounds // (batch + 1))):
                for name, call in calls.items():
                    times[name].append(seconds(call))
                say(f"batch {batch}: round {turn + 1} of {most}")
            maps, scores = answers[EAGER]
            for name in found:
                ratio = statistics.median(a / b for a, b in zip(times[name], times[plain], strict=True))
                took = statistics.median(times[name])
                yield Measured(
                    name + kernels,
                    batch,
                    took / batch,
                    ratio,
                    work / took / rate,
                    float((answers[name][0] - maps).abs().max() / (maps.max() - maps.min())),
                    float((answers[name][1] - scores).abs().max()),
                )


def lines(backbone: str, batch_sizes: list[int], rounds: int = 11) -> Iterator[Line]:
    """The eager route's ratios and their limit, with all kernels of the CPU."""
    for one in measure(backbone, batch_sizes, rounds, only_eager=True):
        detail = f"batch {one.batch}: {1000 * one.seconds:.0f} ms an image, {one.share:.0%} of the matrix rate"
        yield Line(f"{one.route} / encode_image", detail, one.ratio, EAGER_LIMIT)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="ViT-B-16-plus-240")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=11, help="at batch 1; fewer at larger ones")
    parser.add_argument("--eager", action="store_true", help="leave the other routes out")
    parser.add_argument("--kernels", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if not arguments.kernels:
        print(f"{arguments.backbone}, random weights, {machine()}, load before {os.getloadavg()[0]:.1f}\n")
        print("| route | batch | an image | / encode_image | of the matrix rate | map differs | score differs |")
        print("|---" * 7 + "|")
    for one in measure(arguments.backbone, arguments.batch_sizes, arguments.rounds, arguments.eager, arguments.kernels):
        print(one, flush=True)
    if not arguments.kernels and torch.backends.cpu.get_cpu_capability() == "AVX512":
        say("the same with AVX2 kernels")
        command = [sys.executable, __file__, *sys.argv[1:], "--eager", "--kernels", ", AVX2 kernels"]
        subprocess.run(command, env={**os.environ, **AVX2}, check=True)


if __name__ == "__main__":
    main()
