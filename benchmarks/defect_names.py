"""How often words for defects, and choices among products, are right on the demonstration's textures and backbone.

    python benchmarks/defect_names.py

The margin is looked at on surfaces that are for validation, and reported on those held out. An image without a word
counts as wrong, as does a wrong word.
"""

import logging
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from anomalib.data.utils import read_image, read_mask
from line import Line
from torch.nn import functional as F

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.components import DefectName, NamingFigures, region_weights
from anomalib_clipad.demo.datamodule import write_category
from anomalib_clipad.demo.defects import DEFECTS
from anomalib_clipad.demo.textures import HELD_OUT, VALIDATION

MOST_COST = 1.05  # times the time without words
MARGINS = (0.0, 0.05, 0.1, 0.2, 0.3)
Named = list[tuple[str, DefectName]]


@torch.inference_mode()
def name_all(model: ClipAdSdp, root: Path, references: int) -> dict[str, Named]:
    """Truth and name of every anomalous image, by region: as the model marks it, and as the truth does."""
    network, transform = model.model, model.pre_processor.transform
    network.set_classes([root.name])
    if references:
        good = sorted((root / "train/good").iterdir())[:references]
        network.set_references([torch.stack([transform(read_image(path, as_tensor=True)) for path in good])])
    found: dict[str, Named] = {"marked": [], "true": []}
    for folder in sorted((root / "test").iterdir()):
        if folder.name == "good":
            continue
        paths = sorted(folder.iterdir())
        scores = network.scores(torch.stack([transform(read_image(path, as_tensor=True)) for path in paths]))
        maps = network.map_scale.squash(scores.anomaly_map)
        true = torch.stack([mask_of(path, root, maps.shape[-2:]) for path in paths])
        # With references the map's scale is another, and only a run sets its threshold.
        marked = None if references else maps > 0.5
        for region, weights in (("marked", region_weights(maps, marked)), ("true", true.float())):
            names = network.name_defects(scores.defect_evidence, weights)
            found[region] += [(folder.name.replace("_", " "), name) for name in names]
    return found


def mask_of(path: Path, root: Path, size: tuple[int, int]) -> torch.Tensor:
    """The true mask of an image, at the size of its map."""
    mask = read_mask(root / "ground_truth" / path.parent.name / f"{path.stem}_mask.png", as_tensor=True)
    return F.interpolate(mask.float()[None, None], size, mode="area")[0, 0] > 0


def figures(found: Named, margin: float) -> NamingFigures:
    """Of names whose lead is at least ``margin``."""
    words = []
    for _, name in found:
        first, second = list(name.probabilities.values())[:2]
        words.append(next(iter(name.probabilities)) if first - second >= margin else None)
    return NamingFigures.of([truth for truth, _ in found], words, list(DEFECTS))


@torch.inference_mode()
def lines(backbone: str, rounds: int = 8) -> Iterator[Line]:
    """What words cost: processor time of two images with eight words and without, in turn."""
    plain, naming = (ClipAdSdp("object", backbone, None, defects=words) for words in (None, list(DEFECTS)))
    images = torch.randn(2, 3, *plain.model.image_size)
    times: list[list[float]] = []
    for model in (plain, naming):
        model.model.set_classes(["object"])
        model.model.scores(images)
    for _ in range(rounds):
        row = []
        for model in (naming, plain):
            start = time.process_time()
            model.model.scores(images)
            row.append(time.process_time() - start)
        times.append(row)
    with_words, without = (min(column) for column in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    yield Line(
        "SDP with words / without", f"{len(DEFECTS)} words: {with_words:.2f} s, {without:.2f} s", ratio, MOST_COST
    )


@torch.inference_mode()
def chosen(model: ClipAdSdp, roots: list[Path]) -> dict[str, list[str]]:
    """Which of the surfaces' names the model chooses for every test image, good and defective, by the true one."""
    network, transform = model.model, model.pre_processor.transform
    names = [root.name for root in roots]
    network.set_classes(names, choose=True)
    found = {}
    for root in roots:
        images = torch.stack([transform(read_image(path, as_tensor=True)) for path in sorted(root.glob("test/*/*"))])
        found[root.name] = [names[number] for number in network.classes_of(images).tolist()]
    return found


def main() -> None:
    """Print a table a set of surfaces, and one of choices among the surfaces held out."""
    logging.disable(logging.WARNING)
    model = ClipAdSdp("object", "demo", defects=list(DEFECTS), visualizer=False).eval()
    with tempfile.TemporaryDirectory() as root:
        for title, surfaces in (("Validation", VALIDATION), ("Held out", HELD_OUT)):
            print(f"\n{title}: {', '.join(surfaces)}. Accuracy in % / macro F1 in % / images with a word\n")
            print("| references, region | " + " | ".join(f"margin {margin}" for margin in MARGINS) + " |")
            print("|---" * (len(MARGINS) + 1) + "|")
            for name in surfaces:
                write_category(Path(root), name)
            for references in (0, 4):
                each = [name_all(model, Path(root) / name, references) for name in surfaces]
                for region in ("marked", "true"):
                    found = list(chain.from_iterable(part[region] for part in each))
                    cells = []
                    for margin in MARGINS:
                        result = figures(found, margin)
                        leads = (list(name.probabilities.values())[:2] for _, name in found)
                        given = sum(first - second >= margin for first, second in leads)
                        cells.append(f"{100 * result.accuracy:.0f} / {100 * result.macro_f1:.0f} / {given}")
                    print(f"| {references}, {region} ({result.images}) | " + " | ".join(cells) + " |", flush=True)
        found_names = chosen(model, [Path(root) / name for name in HELD_OUT])
    print(f"\nChoice among products; chance is {100 / len(HELD_OUT):.0f} %\n")
    print("| surface | images | right | chosen instead |\n|---|---|---|---|")
    for name, names in found_names.items():
        others = Counter(other for other in names if other != name).most_common()
        print(f"| {name} | {len(names)} | {names.count(name)} | {', '.join(f'{o} {n}' for o, n in others)} |")
    total, right = (sum(counts) for counts in zip(*((len(n), n.count(k)) for k, n in found_names.items()), strict=True))
    print(f"| all | {total} | {right} ({100 * right / total:.0f} %) | |")


if __name__ == "__main__":
    main()
