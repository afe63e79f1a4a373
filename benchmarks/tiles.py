"""Tiles and shapes: time and memory as ratios measured in one run, and what they find.

    python benchmarks/tiles.py                              # ViT-B-16-plus-240, random weights, 20 minutes on two cores
    python benchmarks/tiles.py --find FOLDER [FOLDER ...]   # SDP, demonstration backbone, folders in MVTec's layout
    python benchmarks/tiles.py --references 8               # memory while so many references are taken, likewise

Time: a picture of T tiles against T untiled images in batches of the same size; pairs of calls alternate, and the
median of their ratios is printed. Memory: what one forward adds, at its peak, to a fresh process, for a picture of
4000 x 4000 pixels and for a batch of untiled images. To the latter the maps are added that only a large picture has:
the map of every tile, and four of the size of the picture.
"""

import argparse
import logging
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from anomalib.data.utils import read_image
from lightning.pytorch import Trainer
from line import HEADER, Line, machine
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.nn import functional as F

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.data.batch import ZeroShotBatch
from anomalib_clipad.engine.original_size import OriginalMaps
from anomalib_clipad.engine.pre_processing import clip_transform
from anomalib_clipad.sdp import ClipAdSdpModel

BATCH = 8
TIMED, LARGE = (6, 8), 4000  # tiles in rows and columns; pixels a side
MOST_TIME, MOST_MEMORY = 1.05, 1.3
LONGER_SIDE = 256  # pixels at which maps and masks are compared
MEBIBYTE = 2**20


def build(
    backbone: str, image_size: tuple[int, int] | None = None, tile_size: tuple[int, int] | None = None
) -> ClipAdSdpModel:
    """SDP with a random text vector, which changes neither time nor memory."""
    model = ClipAdSdpModel(backbone, None, image_size=image_size, tile_size=tile_size, tile_batch_size=BATCH).eval()
    model.text_features = F.normalize(torch.randn(1, 2, model.visual.embed_dim), dim=-1)
    return model


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_line(backbone: str, pairs: int) -> Line:
    """Median of time of T tiles over T untiled images."""
    plain = build(backbone)
    tile = plain.image_size
    size = tuple(round(side * (1 + 0.75 * (count - 1))) for side, count in zip(tile, TIMED, strict=True))
    tiled = build(backbone, size, tile)
    count = len(tiled.tiling)
    picture, images = torch.randn(1, 3, *size), torch.randn(count, 3, *tile)
    with torch.inference_mode():

        def untiled() -> None:
            for batch in images.split(BATCH):
                plain(batch)

        tiled(picture), untiled()
        ratio = statistics.median(seconds(lambda: tiled(picture)) / seconds(untiled) for _ in range(pairs))
    detail = f"{count} tiles in {size[0]} x {size[1]}, batches of {BATCH}"
    return Line("tiles / as many untiled images", detail, ratio, MOST_TIME)


def status(key: str) -> float:
    """MiB of this process by the kernel's count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def added_memory(backbone: str, large: bool) -> tuple[float, float]:
    """MiB that one forward adds at its peak, and MiB of the maps that a large picture has."""
    logging.disable(logging.WARNING)
    model, maps = build(backbone), 0.0
    if large:
        tile = model.image_size
        model = build(backbone, (LARGE, LARGE), tile)
        maps = 4 * (len(model.tiling) * tile[0] * tile[1] + 4 * LARGE**2) / MEBIBYTE
    images = torch.randn(1 if large else BATCH, 3, *model.image_size)
    with torch.inference_mode():
        model.visual(torch.randn(1, 3, *model.view_size))
        Path("/proc/self/clear_refs").write_text("5")  # counts the peak anew
        before = status("VmRSS")
        model(images)
    return status("VmHWM") - before, maps


def memory_line(backbone: str) -> Line:
    """Peak of a large picture over that of untiled images and its maps."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back at once, so the peak is the code's own
    peaks = []
    for large in (False, True):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks.append(pool.apply(added_memory, (backbone, large)))
    (plain, _), (tiled, maps) = peaks
    ratio = tiled / (plain + maps)
    detail = f"{LARGE} x {LARGE}, batch {BATCH}: {tiled:.0f} / ({plain:.0f} + {maps:.0f}) MiB"
    return Line("memory of tiles / untiled images and maps", detail, ratio, MOST_MEMORY)


def lines(backbone: str, pairs: int = 3) -> Iterator[Line]:
    """Time and memory."""
    yield time_line(backbone, pairs)
    yield memory_line(backbone)
    yield written_line()


def written_memory(large: int) -> float:
    """MiB that writing heatmap and mask of a picture in its own size adds at its peak."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        Image.new("L", (large, large)).save(path)
        model = ClipAdSdp("part", "demo", None, output_size="original")
        maps = torch.rand(1, *model.model.image_size)
        batch = ZeroShotBatch(image=torch.zeros(1, 3, *maps.shape[1:]), image_path=[str(path)], anomaly_map=maps)
        trainer = Trainer(default_root_dir=folder, logger=False, accelerator="cpu")
        trainer.predicting = True
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        OriginalMaps().on_predict_batch_end(trainer, model, batch, None, 0)
        added = status("VmHWM") - before
        if len(list(Path(folder).rglob("picture*.png"))) != 3:
            msg = "There are not a heatmap and a mask beside the picture."
            raise RuntimeError(msg)
    return added


def written_line() -> Line:
    """Peak of writing a large picture's heatmap and mask over the bytes of its map in float32."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(written_memory, (LARGE,))
    detail = f"{LARGE} x {LARGE}: {peak:.0f} MiB"
    return Line(
        "memory of writing heatmap and mask / the map in float32", detail, peak / (4 * LARGE**2 / MEBIBYTE), 5.5
    )


def references_memory(count: int, side: int) -> float:
    """MiB that taking references adds at its peak; 100 patches are kept, since the choice of more takes long."""
    logging.disable(logging.WARNING)
    model = ClipAdSdpModel("demo", None, ["part"], image_size=side, tile_size=96, max_references=100).eval()
    pictures = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    model.set_references([pictures])
    return status("VmHWM") - before


def references_line(count: int, side: int = 2000) -> Line:
    """Peak of taking references over their patches in half precision."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(references_memory, (count, side))
    bank = ClipAdSdpModel("demo", None, image_size=side, tile_size=96)
    patches = count * len(bank.tiling) * bank.grid[0] * bank.grid[1] * bank.visual.width * 2 / MEBIBYTE
    detail = f"{count} of {side} x {side}, {len(bank.tiling)} tiles each: {peak:.0f} / {patches:.0f} MiB"
    return Line("memory of taking references / their patches", detail, peak / patches)


def find(root: Path, name: str, **arguments: object) -> str:
    """Image AUROC, pixel AUROC and pixel AP of a folder, in per cent."""
    model = ClipAdSdpModel("demo", None, [name], **arguments).eval()
    transform = clip_transform(model.image_size, model.mean, model.std)
    labels, scores, maps, masks = [], [], [], []
    for path in sorted((root / "test").glob("*/*")):
        kind = path.parent.name
        image = read_image(path, as_tensor=True)
        with torch.inference_mode():
            prediction = model(transform(image)[None])
        labels.append(kind != "good")
        scores.append(float(prediction.pred_score))
        scale = LONGER_SIDE / max(image.shape[-2:])
        size = [round(side * scale) for side in image.shape[-2:]]
        maps.append(F.interpolate(prediction.anomaly_map[None], size, mode="bilinear", antialias=True).numpy().ravel())
        mask = np.zeros(size)
        if labels[-1]:
            with Image.open(next((root / "ground_truth" / kind).glob(f"{path.stem}*"))) as picture:
                mask = np.asarray(picture.convert("L").resize(size[::-1], Image.Resampling.NEAREST))
        masks.append(mask.ravel() > 0)
    pixels = np.concatenate(masks), np.concatenate(maps)
    found = roc_auc_score(labels, scores), roc_auc_score(*pixels), average_precision_score(*pixels)
    return " / ".join(f"{100 * value:.1f}" for value in found)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="ViT-B-16-plus-240")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--find", type=Path, nargs="*", default=[])
    parser.add_argument("--references", type=int)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.references:
        print(f"demonstration backbone, {machine()}\n\n{HEADER}\n{references_line(arguments.references)}")
        return
    if not arguments.find:
        print(f"{arguments.backbone}, {machine()}\n\n{HEADER}")
        for line in lines(arguments.backbone, arguments.pairs):
            print(line, flush=True)
        return
    print("| data, height x width | square | auto | tiles of 96 in twice that |\n|---|---|---|---|")
    for root in arguments.find:
        with Image.open(sorted((root / "test").glob("*/*"))[0]) as first:
            width, height = first.size
        auto = ClipAdSdpModel("demo", None).keep_shape(height, width)
        double = tuple(2 * side for side in auto)
        name = root.name.removesuffix("_toy").replace("_", " ")
        sizes = ({}, {"image_size": auto}, {"image_size": double, "tile_size": 96})
        cells = [find(root, name, **size) for size in sizes]
        print(f"| `{root.name}`, {height} x {width} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
