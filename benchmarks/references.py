"""What normal images give: metrics over their number, false-alarm rates against the promise, and masks of defects.

    python benchmarks/references.py                       # the demonstration's held-out textures
    python benchmarks/references.py FOLDER [FOLDER ...]   # and folders in MVTec's layout, of any image format

Every number of references is drawn five times, and means are printed. A folder without ``train/good`` has every second
image of ``test/good`` as a training image instead.
"""

import argparse
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from anomalib.data.utils import read_image, read_mask
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.nn import functional as F

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.components import Prediction, Scores
from anomalib_clipad.demo.datamodule import write_category
from anomalib_clipad.demo.textures import HELD_OUT
from anomalib_clipad.engine.post_processing import ClipAdPostProcessor

SEEDS = 5
SHOTS = (1, 2, 4, 8)
RATES = (0.05, 0.1, 0.2)
MASK_RATE = 0.1
MAP_SIZE = 128  # pixels a side in which maps and masks are compared


class Images(NamedTuple):
    """A category in memory, ready for the network."""

    train: torch.Tensor
    test: torch.Tensor
    labels: np.ndarray
    masks: np.ndarray | None


def load(root: Path, model: ClipAdSdp) -> Images:
    """Read a category."""
    transform = model.pre_processor.transform
    test = sorted(path for path in (root / "test").glob("*/*"))
    good = [path for path in test if path.parent.name == "good"]
    train = sorted((root / "train/good").glob("*"))
    if not train:
        train = good[::2]
        test = [path for path in test if path not in train]
    labels = np.array([path.parent.name != "good" for path in test])
    with_masks = (root / "ground_truth").is_dir()
    masks = np.stack([mask_of(path, root) for path in test]) if with_masks else None
    images = [torch.stack([transform(read_image(path, as_tensor=True)) for path in paths]) for paths in (train, test)]
    return Images(images[0], images[1], labels, masks)


def mask_of(path: Path, root: Path) -> np.ndarray:
    """The true mask of an image, empty for a good one."""
    found = sorted((root / "ground_truth" / path.parent.name).glob(f"{path.stem}*"))
    if not found:
        return np.zeros((MAP_SIZE, MAP_SIZE), dtype=bool)
    mask = torch.as_tensor(read_mask(found[0], as_tensor=True)).float()[None, None]
    return F.interpolate(mask, (MAP_SIZE, MAP_SIZE))[0, 0].bool().numpy()


@torch.inference_mode()
def score(model: ClipAdSdp, images: torch.Tensor) -> Scores:
    """Scores of all images, in batches of 16."""
    columns = zip(*(model.model.scores(batch) for batch in images.split(16)), strict=True)
    return Scores(*(None if column[0] is None else torch.cat(column) for column in columns))


def without(data: Images, index: int) -> Images:
    """The same without a test image, which would find itself among the references."""
    rest = np.arange(len(data.test)) != index
    masks = None if data.masks is None else data.masks[rest]
    return data._replace(test=data.test[torch.from_numpy(rest)], labels=data.labels[rest], masks=masks)


def metrics(model: ClipAdSdp, data: Images) -> list[float]:
    """Image AUROC, pixel AUROC and pixel AP, in per cent."""
    prediction = model.model.predictions(score(model, data.test))
    found = [roc_auc_score(data.labels, prediction.pred_score)]
    if data.masks is not None:
        maps = F.interpolate(prediction.anomaly_map[:, None], (MAP_SIZE, MAP_SIZE), mode="bilinear")[:, 0]
        flat = data.masks.ravel(), maps.numpy().ravel()
        found += [roc_auc_score(*flat), average_precision_score(*flat)]
    return [100 * float(value) for value in found]


def draws(count: int) -> Iterator[torch.Tensor]:
    """Orders of the training images, one a seed."""
    for seed in range(SEEDS):
        yield torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def mean(rows: list[list[float]]) -> str:
    """Means of columns, as a table has them."""
    return " / ".join(f"{value:.1f}" for value in np.mean(rows, axis=0))


def shots(model: ClipAdSdp, data: Images) -> list[str]:
    """A cell for every number of references, the last two with one defect among eight and with turned views."""
    model.model.set_classes(model.model.class_names)
    cells = [mean([metrics(model, data)])]
    for count in SHOTS:
        rows = []
        for order in draws(len(data.train)):
            model.model.set_references(data.train[order[:count]].split(8))
            rows.append(metrics(model, data))
        cells.append(mean(rows))
    for contaminated in (True, False):
        rows = []
        for order in draws(len(data.train)):
            chosen, tested = data.train[order[:8]].clone(), data
            if contaminated:
                index = int(np.flatnonzero(data.labels)[int(order[0]) % data.labels.sum()])
                chosen[0], tested = data.test[index], without(data, index)
            model.model.set_references(chosen.split(8), augment=not contaminated)
            rows.append(metrics(model, tested))
        cells.append(mean(rows))
    return cells


def normal_scores(model: ClipAdSdp, data: Images, order: torch.Tensor, references: int, others: bool) -> list[Scores]:
    """Make the first training images references, and score these and, where wanted, the others."""
    network = model.model
    network.set_classes(network.class_names)
    scored = [network.set_references(data.train[order[:references]].split(8))] if references else []
    return [*scored, score(model, data.train[order[references:]])] if others else scored


def calibrated(model: ClipAdSdp, scored: list[Scores], references: int, rate: float) -> ClipAdPostProcessor:
    """A post-processor with thresholds from these normal images."""
    post_processor = ClipAdPostProcessor(model.model.map_scale, false_alarm_rate=rate)
    post_processor.set_from_normal(model.model, scored, references)
    return post_processor


def false_alarms(model: ClipAdSdp, data: Images, references: int, others: bool) -> list[str]:
    """Realised against expected rates on the good test images: labels, then masks with any pixel."""
    realised: dict[float, list[list[float]]] = {rate: [] for rate in RATES}
    expected: dict[float, float] = {}
    for order in draws(len(data.train)):
        scored = normal_scores(model, data, order, references, others)
        prediction = model.model.predictions(score(model, data.test[~data.labels]))
        for rate in RATES:
            post_processor = calibrated(model, scored, references, rate)
            shown = post_processor(Prediction(*prediction))
            marked = shown.pred_mask.flatten(1).any(dim=1)
            realised[rate].append([100 * float(value.float().mean()) for value in (shown.pred_label, marked)])
            images = len(post_processor.good_scores)
            expected[rate] = 100 * max(1, int((images + 1) * rate + 1e-9)) / (images + 1)
    return [f"{expected[rate]:.0f}: {mean(rows)}" for rate, rows in realised.items()]


def marks(model: ClipAdSdp, data: Images, references: int, others: bool) -> list[str]:
    """Masks of anomalous images, by the threshold alone, and with what :class:`MapOffset` takes away, as it is done.

    Means of the overlap with the ground truth (intersection over union), the marked share of the image and the found
    share of the ground truth, in per cent.
    """
    truth = torch.from_numpy(data.masks[data.labels])
    rows: tuple[list[list[float]], ...] = ([], [])
    for order in draws(len(data.train)):
        scored = normal_scores(model, data, order, references, others)
        prediction = model.model.predictions(score(model, data.test[data.labels]))
        post_processor = calibrated(model, scored, references, MASK_RATE)
        as_it_is = post_processor(prediction).pred_mask
        post_processor.map_offset.take(torch.nan)
        for found, marked in zip(rows, (post_processor(prediction).pred_mask, as_it_is), strict=True):
            mask = F.interpolate(marked[:, None].float(), truth.shape[1:])[:, 0].bool()
            both, either = (mask & truth).sum(dim=(1, 2)), (mask | truth).sum(dim=(1, 2))
            shares = both / either, mask.float().mean(dim=(1, 2)), both / truth.sum(dim=(1, 2)).clamp(min=1)
            found.append([100 * float(share.mean()) for share in shares])
    return [mean(found) for found in rows]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--backbone", default="demo")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    model = ClipAdSdp("object", arguments.backbone, visualizer=False).eval()
    with tempfile.TemporaryDirectory() as root:
        for name in HELD_OUT:
            write_category(Path(root), name)
        places = [*(Path(root) / name for name in HELD_OUT), *arguments.folders]
        rates, masks = [], []
        print("Image AUROC / pixel AUROC / pixel AP in %, means over five draws\n")
        print("| data | 0 | " + " | ".join(map(str, SHOTS)) + " | 8, one a defect | 8, turned views |")
        print("|---" * (len(SHOTS) + 4) + "|")
        for place in places:
            data = load(place, model)
            model.model.set_classes([place.name])
            print(f"| {place.name} | " + " | ".join(shots(model, data)) + " |", flush=True)
            kinds = ((0, True), (4, True), (min(28, len(data.train)), False))
            rates += [(place.name, data, kind, false_alarms(model, data, *kind)) for kind in kinds]
            if data.masks is not None:
                masks += [(place.name, kind, marks(model, data, *kind)) for kind in kinds[:2]]
    print("\nFalse alarms in %, expected: realised labels / masks, on the good test images\n")
    print("| data | references, other normal images | " + " | ".join(f"rate {rate:.0%}" for rate in RATES) + " |")
    print("|---" * (len(RATES) + 2) + "|")
    for name, data, (count, others), cells in rates:
        rest = len(data.train) - count if others else 0
        print(f"| {name} ({(~data.labels).sum()} good) | {count}, {rest} | " + " | ".join(cells) + " |")
    print(f"\nMasks of anomalous images, rate {MASK_RATE:.0%}: overlap / marked / found share of the defect in %\n")
    print("| data | references | threshold alone | as they are |\n|---|---|---|---|")
    for name, (count, _), cells in masks:
        print(f"| {name} | {count} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
