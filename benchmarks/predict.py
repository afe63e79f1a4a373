"""Prediction in anomalib's engine, without and with the page and pictures, against reading the images alone.

    python benchmarks/predict.py                                # 2048 PNG files of 900 x 900 pixels, on a GPU
    python benchmarks/predict.py --device cpu --pictures 64     # on a CPU the model takes longer than reading
    python benchmarks/predict.py --device cpu --pictures 64 --batch-size 1 --workers 0     # as predict --data FOLDER

The weights are random, which changes no figure.
"""

import argparse
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from anomalib.data import PredictDataset
from anomalib.engine import Engine
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.data import ReadableDataLoader
from anomalib_clipad.engine.page import PageWriter
from anomalib_clipad.engine.visualizer import ClipAdVisualizer

DRAWN = 16  # further files are links to these; drawing takes a quarter of a second each


def write_pictures(folder: Path, count: int, side: int) -> None:
    """Pictures whose PNG files are as large as a camera's: smooth, with the noise of a sensor."""
    noise = np.random.default_rng(0)
    for number in range(count):
        file = folder / f"{number:04}.png"
        if number >= DRAWN:
            file.hardlink_to(folder / f"{number % DRAWN:04}.png")
            continue
        coarse = Image.fromarray(noise.integers(60, 190, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = smooth + noise.integers(-4, 5, smooth.shape, dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file)


def seconds(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Measure all four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="ViT-B-16-plus-240")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--pictures", type=int, default=2048)
    parser.add_argument("--side", type=int, default=900)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that read files")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    gpu = arguments.device == "cuda"
    precision = "bf16-true" if gpu else "32-true"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pictures"
        folder.mkdir()
        write_pictures(folder, arguments.pictures, arguments.side)
        data = PredictDataset(folder)
        loader = DataLoader(data, arguments.batch_size, num_workers=arguments.workers, collate_fn=data.collate_fn)
        model = ClipAdSdp("bottle", arguments.backbone, pretrained=None, visualizer=False, page=False)
        engine = Engine(
            accelerator="gpu" if gpu else "cpu",
            devices=1,
            precision=precision,
            logger=False,
            default_root_dir=name,
            enable_progress_bar=False,
        )

        def predict() -> None:
            engine.predict(model, dataloaders=loader, return_predictions=False)

        def read() -> None:
            for _ in ReadableDataLoader(loader):
                pass

        def predict_with_page() -> None:
            model.page = PageWriter()
            predict()

        def predict_with_pictures() -> None:
            model.visualizer = ClipAdVisualizer()
            predict_with_page()

        predict()  # the first run starts CUDA, and the files are in memory then
        calls = {"reading alone": read, "prediction": predict, "prediction with page": predict_with_page}
        calls["prediction with page and pictures"] = predict_with_pictures
        rates = {what: arguments.pictures / seconds(call) for what, call in calls.items()}
    device = torch.cuda.get_device_name() if gpu else "the CPU"
    print(
        f"{arguments.backbone} on {device}, {precision}, {arguments.pictures} PNG files of {arguments.side} x "
        f"{arguments.side}, {arguments.workers} processes that read, torch {torch.__version__}\n"
    )
    print("| | images/s | of reading alone |\n|---|---|---|")
    for what, rate in rates.items():
        print(f"| {what} | {rate:.1f} | {rate / rates['reading alone']:.0%} |")


if __name__ == "__main__":
    main()
