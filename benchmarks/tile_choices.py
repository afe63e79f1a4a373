"""Why tiles and regions are as they are: the share of the tiles' map, and what takes the place of a region's outside.

    python benchmarks/tile_choices.py [FOLDER ...]

SDP on the demonstration backbone; folders in MVTec's layout, beside the demonstration's held-out textures.
"""

import argparse
import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from anomalib.data.utils import read_image
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.nn import functional as F

from anomalib_clipad.components import tiling
from anomalib_clipad.components.region import Region, RegionOfPictures
from anomalib_clipad.components.tiling import ViewScores
from anomalib_clipad.demo.datamodule import write_category
from anomalib_clipad.demo.textures import HELD_OUT
from anomalib_clipad.engine.pre_processing import clip_transform
from anomalib_clipad.sdp import ClipAdSdpModel

LONGER_SIDE = 256  # pixels at which maps and masks are compared
SHARES = (0.0, 0.4, 0.5, 0.6, 2 / 3, 0.75, 0.85, 1.0)
MOSAICS, ROWS, COLUMNS = 34, 4, 6
OF_EACH_KIND = 16  # pictures, where regions are compared
TENTH, HALF = (0.1, 0.1, 0.9, 0.9), (0.25, 0.0, 0.75, 1.0)


class Picture(NamedTuple):
    """A test picture in [0, 1], and its mask of ``LONGER_SIDE`` pixels."""

    pixels: torch.Tensor
    mask: np.ndarray


def pictures(root: Path, most: int | None = None) -> Iterator[Picture]:
    """Test pictures of a folder, at most so many of each kind."""
    for kind in sorted((root / "test").iterdir()):
        for path in islice(sorted(kind.iterdir()), most):
            pixels = read_image(path, as_tensor=True)
            size = [round(side * LONGER_SIDE / max(pixels.shape[-2:])) for side in pixels.shape[-2:]]
            mask = np.zeros(size, dtype=bool)
            if kind.name != "good":
                with Image.open(next((root / "ground_truth" / kind.name).glob(f"{path.stem}*"))) as file:
                    mask = np.asarray(file.convert("L").resize(size[::-1], Image.Resampling.NEAREST)) > 0
            yield Picture(pixels, mask)


class Seen(NamedTuple):
    """What was found in the whole of a picture and in its tiles."""

    whole: ViewScores
    tiles: ViewScores


class Tiled:
    """SDP with tiles of 96 pixels; the share of their map is chosen afterwards."""

    def __init__(self, name: str, image_size: tuple[int, int]) -> None:
        self.model = ClipAdSdpModel("demo", None, [name], image_size=image_size, tile_size=96).eval()
        self.transform = clip_transform(image_size, self.model.mean, self.model.std)

    def look(self, pixels: torch.Tensor) -> Seen:
        """Run the tower."""
        model, image = self.model, self.transform(pixels)[None]
        with torch.inference_mode():
            tiles = [model.compare(model.taps(views)) for views in model.tiling.tiles(image, 8)]
            return Seen(model.compare(model.taps(model.tiling.whole(image))), ViewScores.cat(tiles))

    def map(self, seen: Seen, share: float) -> torch.Tensor:
        """The map (1, H, W) with this share of the tiles'."""
        tiling.TILES_WEIGHT = share
        return self.model.tiling.join(*seen).text_map


def scaled(anomaly_map: torch.Tensor, size: tuple[int, ...]) -> np.ndarray:
    """A map (1, H, W) in the size of a mask."""
    return F.interpolate(anomaly_map[None], size, mode="bilinear", antialias=True)[0, 0].numpy()


def found_in_mosaics(root: Path, name: str) -> list[int]:
    """In how many mosaics of 24 parts the map's peak lies in the broken one, by share."""
    rng = np.random.default_rng(1)
    tiled = Tiled(name, (ROWS * 96, COLUMNS * 96))
    small = clip_transform((96, 96), (0.0,) * 3, (1.0,) * 3)
    good = [small(read_image(path, as_tensor=True)) for path in sorted(root.glob("t*/good/*"))]
    bad = [
        small(read_image(path, as_tensor=True)) for path in sorted(root.glob("test/*/*")) if "good" not in path.parts
    ]
    found = [0] * len(SHARES)
    for number in range(MOSAICS):
        parts = [good[index] for index in rng.integers(len(good), size=ROWS * COLUMNS)]
        place = int(rng.integers(len(parts)))
        parts[place] = bad[number % len(bad)]
        rows = [torch.cat(parts[start : start + COLUMNS], dim=2) for start in range(0, len(parts), COLUMNS)]
        seen = tiled.look(torch.cat(rows, dim=1))
        for column, share in enumerate(SHARES):
            y, x = divmod(int(tiled.map(seen, share).argmax()), COLUMNS * 96)
            found[column] += y // 96 * COLUMNS + x // 96 == place
    return found


def on_single_pictures(root: Path, name: str) -> tuple[list[float], list[float]]:
    """Pixel AP by share; image AUROC of the text score of whole pictures, of worst tiles, and of the mean of both."""
    tiled = Tiled(name, (192, 192))
    maps: list[list[np.ndarray]] = [[] for _ in SHARES]
    masks, texts = [], []
    for picture in pictures(root):
        seen = tiled.look(picture.pixels)
        masks.append(picture.mask)
        whole, worst = float(seen.whole.text_score), float(seen.tiles.text_score.max())
        texts.append((whole, worst, (whole + worst) / 2))
        for column, share in zip(maps, SHARES, strict=True):
            column.append(scaled(tiled.map(seen, share), picture.mask.shape).ravel())
    truth = np.concatenate([mask.ravel() for mask in masks])
    labels = [mask.any() for mask in masks]
    aps = [average_precision_score(truth, np.concatenate(column)) for column in maps]
    return aps, [roc_auc_score(labels, column) for column in zip(*texts, strict=True)]


def by_filling(root: Path, name: str, box: tuple[float, ...]) -> str:
    """Pixel AUROC / AP inside a region, by what its outside is made of before the model looks."""
    model = ClipAdSdpModel("demo", None, [name]).eval()
    region = RegionOfPictures(Region(box))
    region.lie_in(model.tiling, 8)
    transform = clip_transform(model.image_size, model.mean, model.std)
    inside = region.inside
    fillings: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
        lambda image: image,
        lambda image: torch.where(inside, image, image[..., inside].mean(dim=-1)[..., None, None]),
        region.fill,
        lambda image: torch.where(inside, image, 0.0),
    )
    maps: list[list[np.ndarray]] = [[] for _ in fillings]
    masks = []
    for picture in pictures(root, OF_EACH_KIND if name == "magnetic tile" else None):
        counts = Region(box).inside(picture.mask.shape)
        masks.append(picture.mask[counts])
        image = transform(picture.pixels)[None]
        for column, fill in zip(maps, fillings, strict=True):
            with torch.inference_mode():
                column.append(scaled(model(fill(image)).anomaly_map, picture.mask.shape)[counts])
    truth = np.concatenate(masks)
    values = [np.concatenate(column) for column in maps]
    return " | ".join(
        f"{100 * roc_auc_score(truth, v):.1f} / {100 * average_precision_score(truth, v):.1f}" for v in values
    )


def percent(values: list[float]) -> str:
    """Cells of a row."""
    return " | ".join(f"{100 * value:.1f}" for value in values)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    folders = parser.parse_args().folders
    logging.disable(logging.WARNING)
    head = " | ".join(f"{share:.3g}" for share in SHARES)
    line = "|---" * (1 + len(SHARES)) + "|"
    with TemporaryDirectory() as root:
        for name in HELD_OUT:
            write_category(Path(root), name)
        roots = {name: Path(root) / name for name in HELD_OUT}
        own = {folder.name.removesuffix("_toy").replace("_", " "): folder for folder in folders}
        print(f"Peak in the broken part, of {MOSAICS} mosaics\n\n| data | {head} |\n{line}")
        for name, folder in own.items():
            if (folder / "train").is_dir():
                print(f"| {name} | " + " | ".join(map(str, found_in_mosaics(folder, name))) + " |", flush=True)
        print("\nPixel AP; image AUROC of the text score of the whole, of the worst tile, and of their mean\n")
        print(f"| data | {head} | whole | worst | mean |\n{line}---|---|---|")
        for name, folder in (roots | own).items():
            aps, texts = on_single_pictures(folder, name)
            print(f"| {name} | {percent(aps)} | {percent(texts)} |", flush=True)
        for box in (TENTH, HALF):
            print(f"\nRegion {box}\n\n| data | map cut only | mean | nearest | CLIP's mean |\n|---|---|---|---|---|")
            for name, folder in own.items():
                print(f"| {name} | {by_filling(folder, name, box)} |", flush=True)


if __name__ == "__main__":
    main()
