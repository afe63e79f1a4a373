"""What each part of SDP is worth on the demonstration backbone: RVS methods, single stages, and the original path.

    python examples/demo/ablation.py                # prints a table; the held-out categories of DemoTextures

Every row changes one thing of SDP. Figures are means over the categories.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anomalib.data.utils import read_image, read_mask
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import normalize, resize

from anomalib_clipad.demo.datamodule import write_category
from anomalib_clipad.demo.textures import HELD_OUT
from anomalib_clipad.sdp import ClipAdSdpModel

METHODS = ("dbscan", "mean", "pca", "kde", "mean_shift")


def images_of(model: ClipAdSdpModel, folder: Path) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Images as the model takes them, labels, and masks at its size."""
    paths = sorted((folder / "test").rglob("*.png"))
    images = torch.stack([read_image(path, as_tensor=True) for path in paths])
    images = resize(images, list(model.image_size), interpolation=InterpolationMode.BICUBIC, antialias=True)
    masks = torch.zeros(len(paths), *model.image_size)
    for number, path in enumerate(paths):
        if path.parent.name != "good":
            mask = read_mask(folder / "ground_truth" / path.parent.name / f"{path.stem}_mask.png", as_tensor=True)
            masks[number] = F.interpolate(mask[None, None].float(), model.image_size)[0, 0]
    labels = np.array([path.parent.name != "good" for path in paths])
    return normalize(images, list(model.mean), list(model.std)), labels, masks.numpy() > 0


def main() -> None:
    """Measure every variant on every category."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="demo")
    parser.add_argument("--root", type=Path, default=Path("datasets/DemoTextures"))
    parser.add_argument("--categories", nargs="+", default=list(HELD_OUT))
    arguments = parser.parse_args()
    model = ClipAdSdpModel(backbone=arguments.backbone)
    tower = model.visual.visual
    figures: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for category in arguments.categories:
        write_category(arguments.root, category)
        images, labels, masks = images_of(model, arguments.root / category)
        with torch.no_grad():
            features = model.visual(images)
            original = [tower.ln_post(tokens) @ tower.proj for tokens in features.original]
        for method in METHODS:
            model.rvs = {"method": method}
            model.set_classes([category])
            variants = {f"SDP, {method}": features}
            if method == "dbscan":
                stages = enumerate(features.surgery, start=1)
                variants |= {f"SDP, stage {n} alone": features._replace(surgery=[tokens]) for n, tokens in stages}
                variants["same surgery on the original path"] = features._replace(surgery=original)
            for name, taps in variants.items():
                scores = model.scores_of(taps)
                maps = scores.anomaly_map.numpy().ravel()
                image = roc_auc_score(labels, model.fusion.fit(scores.text_score, scores.map_score))
                pixel = (roc_auc_score(masks.ravel(), maps), average_precision_score(masks.ravel(), maps))
                figures[name].append((image, *pixel))
    table = pd.DataFrame({name: np.mean(rows, axis=0) for name, rows in figures.items()}).T
    print("| variant | image AUROC | pixel AUROC | pixel AP |\n|---|---|---|---|")
    for name, (image, *pixel) in table.iterrows():
        print(f"| {name} | {100 * image:.1f} | {100 * pixel[0]:.1f} | {100 * pixel[1]:.1f} |")


if __name__ == "__main__":
    main()
