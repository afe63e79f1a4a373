"""Speed and memory on the CPU, as ratios measured in one run.

    python benchmarks/cpu.py                  # ViT-B-16-plus-240 with random weights, some ten minutes on two cores
    python benchmarks/cpu.py --backbone ViT-B-32 --batch-sizes 1

Weights do not change the figures, so none are needed. Pairs of calls alternate, and the median of their ratios is
printed, because machines drift.
"""

import argparse
import copy
import logging
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from line import HEADER, Line, machine
from torch import nn
from torch.nn import functional as F

import anomalib_clipad
from anomalib_clipad.components import DualPathVisionTransformer, PromptEnsemble, TextEncoder, load_backbone
from anomalib_clipad.components.coreset import coreset
from anomalib_clipad.sdp import ClipAdSdpModel
from anomalib_clipad.sdp_plus import ClipAdSdpPlusModel

LIMITS = {
    "dual path / encode_image": 1.2,
    "SDP / encode_image": 1.2,
    "SDP+ / encode_image": 1.25,
    "SDP, 4 references / encode_image": 1.25,
    "SDP, 16 references / encode_image": 1.4,
    "encode_image, float32 / SDP, bfloat16": 1.85,
    "WinCLIP / SDP": 10.0,
    "77 tokens / cut": 6.0,
    "memory of SDP / encode_image": 1.3,
    "memory of SDP, 4 references / encode_image": 1.4,
    "memory of SDP, 16 references / encode_image": 1.4,
    "memory of SDP+ training / testing": 1.3,
    "memory of choosing references / their features": 4.0,
    "bank of 4 references": 7.0,
    "start of Python, added": 1.0,
}


REFERENCES = (4, 16)
CHOICE = 12_000, 10_000  # patches there are, and patches kept
FEATURES = 256  # of each; more are projected to about 300


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_ratio(first: Callable[[], object], second: Callable[[], object], pairs: int) -> tuple[float, float, float]:
    """Median seconds of both and median of first / second, the two in turn."""
    first(), second()
    times = [(seconds(first), seconds(second)) for _ in range(pairs)]
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    return a, b, statistics.median(x / y for x, y in times)


def peak_memory(backbone: str, batch_size: int, work: str) -> float:
    """MiB that one forward adds, at its peak, to a fresh process; weights are not counted."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back at once, so the peak is the code's own
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_work_memory, (backbone, batch_size, work))


def with_references(clip: nn.Module, images: int) -> ClipAdSdpModel:
    """SDP with random references; their values do not change the time."""
    model = ClipAdSdpModel(clip=clip)
    model.text_features = F.normalize(torch.randn(1, 2, model.visual.embed_dim), dim=-1)
    tokens = 1 + model.grid[0] * model.grid[1]
    model.references.fit([torch.randn(images, tokens, model.visual.width) for _ in model.visual.layers])
    return model


def _work_memory(backbone: str, batch_size: int, work: str) -> float:
    logging.disable(logging.WARNING)
    clip = load_backbone(backbone, None).clip
    side = clip.visual.image_size[0]
    sdp, plus = ClipAdSdpModel(clip=clip), ClipAdSdpPlusModel(clip=clip)
    for model in (sdp, plus):
        model.text_features = F.normalize(torch.randn(1, 2, model.visual.embed_dim), dim=-1)
    images = torch.randn(batch_size, 3, side, side)
    masks = (torch.rand(batch_size, side, side) > 0.9).float()

    def without_gradient(call: Callable[[torch.Tensor], object]) -> Callable[[torch.Tensor], object]:
        return torch.inference_mode()(call)

    calls = {
        **{f"SDP, {count} references": without_gradient(with_references(clip, count)) for count in REFERENCES},
        "encode_image": without_gradient(clip.encode_image),
        "SDP": without_gradient(sdp),
        "SDP+": without_gradient(plus),
        "SDP+ training": lambda images: sum(plus.loss(plus.visual(images).original, masks[: len(images)])).backward(),
    }
    for call in calls.values():
        call(images[:1])  # libraries set up their buffers at the first call
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    calls[work](images)
    return _status("VmHWM") - before


def _choice_memory(patches: int, kept: int) -> tuple[float, float]:
    """MiB that the choice of patches adds to a fresh process at its peak, and MiB of their features."""
    tokens = torch.randn(patches, 1, FEATURES).half()
    coreset(tokens[:20], torch.arange(20), 10)  # imports
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    coreset(tokens, torch.arange(patches), kept)
    return _status("VmHWM") - before, patches * FEATURES * 4 / 2**20


def _status(key: str) -> float:
    """MiB that Linux counts for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def line(name: str, detail: str, figure: float, at_most: bool = True, unit: str = "x") -> Line:
    """A line with its limit."""
    return Line(name, detail, figure, LIMITS[name], at_most, unit)


def startup(runs: int) -> float:
    """Milliseconds that the package's line in site-packages adds to a start of Python."""
    line = Path(anomalib_clipad.__file__).with_name("anomalib_clipad_autoload.pth").read_text().splitlines()[-1]
    times = []
    for _ in range(runs):
        finders = list(sys.meta_path)
        sys.meta_path[:] = [f for f in finders if getattr(f, "__name__", "") != "AnomalibClipadFinder"]
        times.append(seconds(lambda: exec(line)))  # noqa: S102 - as Python itself does with it
        sys.meta_path[:] = finders
    return 1000 * statistics.median(times)


def lines(backbone: str, batch_sizes: list[int], pairs: int = 7, with_winclip: bool = True) -> Iterator[Line]:
    """Measure everything."""
    clip, tokenizer, *_ = load_backbone(backbone, None)
    side = clip.visual.image_size[0]
    tower = DualPathVisionTransformer(clip.visual)
    model = ClipAdSdpModel(clip=clip)
    plus = ClipAdSdpPlusModel(clip=clip)
    model.text_features = plus.text_features = F.normalize(torch.randn(1, 2, tower.embed_dim), dim=-1)
    referenced = {f"SDP, {count} references": with_references(clip, count) for count in REFERENCES}
    half = copy.deepcopy(model).to(torch.bfloat16)  # its limit is for a CPU with AVX512-BF16

    with torch.inference_mode():
        for batch_size in batch_sizes:
            images = torch.randn(batch_size, 3, side, side)
            rounds = max(3, pairs * 4 // (batch_size + 3))

            def plain(images: torch.Tensor = images) -> torch.Tensor:
                return clip.encode_image(images)

            for name, ours in (("dual path", tower), ("SDP", model), ("SDP+", plus), *referenced.items()):
                own, base, ratio = median_ratio(lambda ours=ours, images=images: ours(images), plain, rounds)
                yield line(f"{name} / encode_image", f"batch {batch_size}: {own:.2f} s, {base:.2f} s", ratio)
            half_images = images.bfloat16()
            *_, gain = median_ratio(plain, partial(half.visual.visual, half_images), 2 * rounds)
            full, few, ratio = median_ratio(plain, partial(half, half_images), 2 * rounds)
            detail = f"batch {batch_size}: {full:.2f} s, {few:.2f} s; encode_image itself {gain:.2f} x"
            yield line("encode_image, float32 / SDP, bfloat16", detail, ratio, at_most=False)

        if with_winclip:
            from anomalib.models.image.winclip import torch_model

            with patch.object(torch_model, "PRETRAINED", None):
                winclip = torch_model.WinClipModel(class_name="bottle").eval()
            for batch_size in batch_sizes:
                images = torch.randn(batch_size, 3, 240, 240)
                winclip(images[:1])

                def ours(images: torch.Tensor = images) -> float:
                    # Several in a row: the first after WinCLIP pays for the memory that WinCLIP gave back.
                    return statistics.median(seconds(lambda: model(images)) for _ in range(5))

                rounds = max(1, 8 // batch_size)  # WinCLIP takes 4 s an image
                times = [(seconds(lambda images=images: winclip(images)), ours()) for _ in range(rounds)]
                other, own = (statistics.median(column) for column in zip(*times, strict=True))
                ratio = statistics.median(a / b for a, b in times)
                yield line("WinCLIP / SDP", f"batch {batch_size}: {other:.2f} s, {own:.2f} s", ratio, at_most=False)

        prompts = [p for state in PromptEnsemble.from_config("industrial").prompts("metal_nut") for p in state]
        tokens = tokenizer(prompts)
        whole = seconds(lambda: [clip.encode_text(chunk) for chunk in tokens.split(256)])
        encoder = TextEncoder(clip, tokenizer)
        cut = statistics.median(seconds(lambda: encoder.encode(prompts)) for _ in range(3))
        yield line(
            "77 tokens / cut",
            f"{len(prompts)} prompts of metal_nut: {whole:.1f} s, {cut:.1f} s",
            whole / cut,
            at_most=False,
        )

    for batch_size in batch_sizes:
        plain = peak_memory(backbone, batch_size, "encode_image")
        for work in ("SDP", *referenced):
            ours = peak_memory(backbone, batch_size, work)
            detail = f"batch {batch_size}: {ours:.0f} MiB, {plain:.0f} MiB"
            yield line(f"memory of {work} / encode_image", detail, ours / max(plain, 1.0))

    train, test = (peak_memory(backbone, 8, work) for work in ("SDP+ training", "SDP+"))
    yield line("memory of SDP+ training / testing", f"batch 8: {train:.0f} MiB, {test:.0f} MiB", train / test)

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak, features = pool.apply(_choice_memory, CHOICE)
    detail = f"{CHOICE[1]} of {CHOICE[0]} patches: {peak:.0f} MiB, {features:.0f} MiB"
    yield line("memory of choosing references / their features", detail, peak / features)

    bank = referenced["SDP, 4 references"].references.state_dict().values()
    size = sum(value.numel() * value.element_size() for value in bank) / 1e6
    yield line("bank of 4 references", "in a checkpoint", size, unit="MB")

    yield line("start of Python, added", "median of 101 runs of its line", startup(101), unit="ms")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="ViT-B-16-plus-240")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--skip-winclip", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    print(f"{arguments.backbone}, float32, {machine()}\n\n{HEADER}")
    for one in lines(arguments.backbone, arguments.batch_sizes, arguments.pairs, not arguments.skip_winclip):
        print(one, flush=True)


if __name__ == "__main__":
    main()
