"""One defect among 24 parts in one large picture: SDP on the whole picture against SDP with tiles.

python examples/mosaic.py [--data FOLDER] [--references 2] [--output results/mosaic]

FOLDER has MVTec's layout; by default it is a rendered texture. Every mosaic is saved with both heatmaps beside it, and
it is counted how often the peak of the map lies in the part that has the defect.
"""

import argparse
import logging
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_dtype, to_image

from anomalib_clipad.demo.datamodule import write_category
from anomalib_clipad.engine.post_processing import ClipAdPostProcessor
from anomalib_clipad.engine.pre_processing import clip_transform
from anomalib_clipad.pictures.heatmap import legend, outline, overlay
from anomalib_clipad.sdp import ClipAdSdpModel

ROWS, COLUMNS = 4, 6
CELL = 240  # pixels of a part's longer side in the pictures that are saved

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, help="folder with test/good and test/DEFECT")
parser.add_argument("--name", help="what the parts are; the folder's name by default")
parser.add_argument("--backbone", default="demo")
parser.add_argument("--mosaics", type=int, default=6)
parser.add_argument("--references", type=int, default=0, help="flawless mosaics to compare with")
parser.add_argument("--output", type=Path, default=Path("results/mosaic"))
arguments = parser.parse_args()


def mosaic(good: list[Path], rng: np.random.Generator, broken: Path | None = None) -> tuple[Image.Image, int]:
    """A picture of 24 parts in random order, and which of them is broken."""
    paths = [good[number] for number in rng.integers(len(good), size=ROWS * COLUMNS)]
    place = int(rng.integers(len(paths)))
    if broken is not None:
        paths[place] = broken
    with Image.open(paths[0]) as first:
        width, height = (round(side * CELL / max(first.size)) for side in first.size)
    picture = Image.new("RGB", (width * COLUMNS, height * ROWS))
    for number, path in enumerate(paths):
        with Image.open(path) as part:
            corner = (number % COLUMNS * width, number // COLUMNS * height)
            picture.paste(part.convert("RGB").resize((width, height), Image.Resampling.BICUBIC), corner)
    return picture, place


class Detector:
    """SDP with or without tiles, and thresholds from flawless mosaics where there are any."""

    def __init__(
        self,
        flawless: list[Image.Image],
        image_size: tuple[int, int] | None = None,
        tile_size: tuple[int, int] | None = None,
    ) -> None:
        names = [arguments.name or folder.name]
        self.network = ClipAdSdpModel(arguments.backbone, class_names=names, image_size=image_size, tile_size=tile_size)
        self.post_processor = ClipAdPostProcessor(self.network.map_scale)
        if flawless:
            scores = self.network.set_references(map(self.prepared, flawless))
            self.post_processor.set_from_normal(self.network, [scores], references=len(flawless))

    def prepared(self, picture: Image.Image) -> torch.Tensor:
        """The network's input."""
        pixels = to_dtype(to_image(picture), torch.float32, scale=True)
        return clip_transform(self.network.image_size, self.network.mean, self.network.std)(pixels)[None]

    def __call__(self, picture: Image.Image) -> tuple[int, np.ndarray]:
        """The part where the map peaks, and the map, 0.5 at the threshold."""
        with torch.inference_mode():
            prediction = self.network(self.prepared(picture))
            shown = self.post_processor(prediction).anomaly_map[0].numpy()
        row, column = divmod(int(prediction.anomaly_map[0].argmax()), shown.shape[1])
        return row * ROWS // shown.shape[0] * COLUMNS + column * COLUMNS // shown.shape[1], shown


logging.disable(logging.WARNING)
with tempfile.TemporaryDirectory() as root:
    folder = arguments.data
    if folder is None:
        write_category(Path(root), "tread plate")
        folder = Path(root) / "tread plate"
    good = sorted(folder.glob("t*/good/*"))
    bad = sorted(path for path in folder.glob("test/*/*") if path.parent.name != "good")
    if not good or not bad:
        parser.error(f"{folder} needs pictures in test/good and in another folder of test.")
    rng = np.random.default_rng(0)
    samples = [mosaic(good, rng, bad[number * len(bad) // arguments.mosaics]) for number in range(arguments.mosaics)]
    flawless = [mosaic(good, rng)[0] for _ in range(arguments.references)]

default = Detector(flawless)
tile = default.network.image_size
width, height = (round(side * tile[0] / CELL) for side in samples[0][0].size)  # a part has the size of a tile
detectors = {"default": default, "tiles": Detector(flawless, (height, width), tile)}
found = dict.fromkeys(detectors, 0)
arguments.output.mkdir(parents=True, exist_ok=True)
for number, (picture, place) in enumerate(samples):
    broken = np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) == place
    panels = [outline(picture, broken)]
    for kind, detector in detectors.items():
        peak, anomaly_map = detector(picture)
        found[kind] += peak == place
        panels.append(overlay(picture, anomaly_map))
    small = picture.width // 2, picture.height // 2
    sheet = Image.new("RGB", (len(panels) * (small[0] + 8), small[1] + 38), "white")
    for column, panel in enumerate(panels):
        sheet.paste(panel.resize(small), (column * (small[0] + 8), 0))
    sheet.paste(legend(), (small[0] + 8, small[1] + 4))
    sheet.save(arguments.output / f"{number}.png")
for kind, count in found.items():
    print(f"{kind}: the peak lies in the broken part in {count} of {len(samples)} mosaics")
print(
    f"See {arguments.output}: the broken part outlined, the default, tiles of {tile[0]} in {height} x {width} pixels."
)
