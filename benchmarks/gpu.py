"""Speed and memory on a GPU: images per second, ratios, the share of the device's matrix throughput.

    python benchmarks/gpu.py                                    # ViT-B-16-plus-240 with random weights
    python benchmarks/gpu.py --backbone ViT-L-14-336 --batch-sizes 1 32
    python benchmarks/gpu.py --device cpu --backbone FOLDER --batch-sizes 1 --seconds 0.1      # a trial run

Weights do not change the figures, so none are needed. Before anything is timed, CUDA is set to raise an error where
the host waits for the device: nothing between images in and maps out may. CUDA graphs (torch.compile with
``mode="reduce-overhead"``) are for the smallest batch, whose kernels take less time than their launches.
"""

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from operations import operations
from torch import nn
from torch.nn import functional as F

from anomalib_clipad.components import load_backbone
from anomalib_clipad.sdp import ClipAdSdpModel
from anomalib_clipad.sdp_plus import ClipAdSdpPlusModel

PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
GRAPHS = "CUDA graphs"
MODES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": lambda model: model,
    "compiled": partial(torch.compile, dynamic=False),
    GRAPHS: partial(torch.compile, dynamic=False, mode="reduce-overhead"),
}
MATRIX = {"cuda": 8192, "cpu": 1024}  # side of the product that stands for what a device can do

Forward = Callable[[torch.Tensor], object]


def wait(device: torch.device) -> None:
    """Let the device finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, budget: float) -> float:
    """Median seconds of a call, repeated for ``budget`` seconds and at least three times."""
    call(), call()  # warm-up: libraries choose their kernels, compilers compile
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget:
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_memory(call: Callable[[], object], device: torch.device) -> str:
    """MiB of a call at its peak, weights included; only CUDA counts them."""
    if device.type != "cuda":
        return "-"
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f}"


def throughput(device: torch.device, dtype: torch.dtype, budget: float) -> float:
    """Operations per second of one large matrix product, the device's own measure."""
    side = MATRIX[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, device, budget)


def build(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, nn.Module], int]:
    """What is compared, by name, and the side of its images."""
    clip = load_backbone(arguments.backbone, None).clip
    models = {"SDP": ClipAdSdpModel(clip=clip), "SDP+": ClipAdSdpPlusModel(clip=clip)}
    for model in models.values():
        model.text_features = F.normalize(torch.randn(1, 2, model.visual.embed_dim), dim=-1)
    towers: dict[str, nn.Module] = {"encode_image": clip.visual, **models}
    if not arguments.skip_winclip:
        from anomalib.models.image.winclip import torch_model

        with patch.object(torch_model, "PRETRAINED", None):
            towers["WinCLIP"] = torch_model.WinClipModel(class_name="bottle")
    return {name: tower.eval().to(device, dtype) for name, tower in towers.items()}, clip.visual.image_size[0]


def check_no_waiting(model: nn.Module, images: torch.Tensor) -> None:
    """Run SDP or SDP+ once with CUDA told to raise an error where the host waits for it."""
    model(images)
    if images.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(images)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
def measure(arguments: argparse.Namespace, device: torch.device, precision: str) -> None:
    """Print the rows of one precision."""
    dtype = PRECISIONS[precision]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    models, native = build(arguments, device, dtype)
    peak = throughput(device, dtype, arguments.seconds)
    flops = {}
    for name, model in models.items():
        side = 240 if name == "WinCLIP" else native
        flops[name] = operations(partial(model, torch.randn(1, 3, side, side, device=device, dtype=dtype)))
        if name.startswith("SDP"):
            check_no_waiting(model, torch.randn(2, 3, side, side, device=device, dtype=dtype))
    for mode in arguments.modes:
        for size in arguments.batch_sizes[:1] if mode == GRAPHS else arguments.batch_sizes:
            base: float | None = None
            for name, model in models.items():
                if name == "WinCLIP" and (mode != "eager" or size > arguments.winclip_batch):
                    continue
                side = 240 if name == "WinCLIP" else native
                images = torch.randn(size, 3, side, side, device=device, dtype=dtype)
                run: Forward = MODES[mode](model)
                try:
                    taken = seconds(lambda run=run, images=images: run(images), device, arguments.seconds)
                    memory = peak_memory(lambda run=run, images=images: run(images), device)
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    print(f"| {precision} | {mode} | {size} | {name} | {str(error).splitlines()[0][:80]} | | | |")
                    continue
                base = taken if name == "encode_image" else base
                ratio = f"{taken / base:.2f} x" if base else "-"
                share = flops[name] * size / taken / peak
                row = f"{size / taken:.1f} | {ratio} | {memory} | {share:.0%}"
                print(f"| {precision} | {mode} | {size} | {name} | {row} |", flush=True)


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="ViT-B-16-plus-240")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--precisions", choices=PRECISIONS, nargs="+", default=list(PRECISIONS))
    parser.add_argument("--modes", choices=MODES, nargs="+", default=list(MODES))
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each figure")
    parser.add_argument("--winclip-batch", type=int, default=32, help="largest batch for WinCLIP, whose memory grows")
    parser.add_argument("--skip-winclip", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    print(f"{arguments.backbone} on {name}, torch {torch.__version__}\n")
    print(
        "| precision | mode | batch | model | images/s | time / encode_image | peak MiB | of a matrix product's speed |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for precision in arguments.precisions:
        measure(arguments, device, precision)


if __name__ == "__main__":
    main()
