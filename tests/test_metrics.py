"""The figures that test prints: scikit-learn's, whatever the batch size."""

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from scipy.integrate import trapezoid
from scipy.ndimage import label
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomalib_clipad.engine.metrics import paper_evaluator

IMAGES, SIDE = 40, 16


@pytest.fixture(scope="module")
def data() -> dict[str, torch.Tensor]:
    """Scores in and out of [0, 1], so that some batches would be squashed and some not."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(IMAGES) % 2
    masks = torch.zeros(IMAGES, SIDE, SIDE, dtype=torch.bool)
    for i in range(1, IMAGES, 2):
        masks[i, i % 9 : i % 9 + 4, 3:7] = True
        masks[i, 12:14, i % 7 : i % 7 + 6] = True
    maps = 0.02 * torch.randn(IMAGES, SIDE, SIDE, generator=generator) + 0.02 * masks
    scores = torch.rand(IMAGES, generator=generator) + 0.3 * labels
    scores[8:12] -= 1.5
    return {"gt_label": labels, "gt_mask": masks, "raw_map": maps, "raw_score": scores}


def run(data: dict[str, torch.Tensor], batch_size: int) -> dict[str, float]:
    evaluator: Evaluator = paper_evaluator()
    for rows in torch.arange(IMAGES).split(batch_size):
        batch = ImageBatch(
            image=torch.zeros(len(rows), 3, SIDE, SIDE),
            gt_label=data["gt_label"][rows],
            gt_mask=data["gt_mask"][rows] if "gt_mask" in data else None,
            pred_label=data["raw_score"][rows] > 0.6,
            pred_mask=data["raw_map"][rows] > 0.03,
        )
        batch.raw_score, batch.raw_map = data["raw_score"][rows], data["raw_map"][rows]
        for metric in evaluator.test_metrics:
            metric.update(batch)
    return {metric.name: metric.compute() for metric in evaluator.test_metrics}


def best_f1(labels: np.ndarray, scores: np.ndarray) -> float:
    precision, recall, _ = precision_recall_curve(labels, scores)
    return float((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max())


def aupro(masks: np.ndarray, maps: np.ndarray, limit: float = 0.3) -> float:
    """Threshold by threshold, region by region."""
    regions = [
        (image, marked == number)
        for image, (marked, count) in enumerate(label(mask, structure=np.ones((3, 3))) for mask in masks)
        for number in range(1, count + 1)
    ]
    points = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        above = maps >= threshold
        overlap = np.mean([above[image][region].mean() for image, region in regions])
        points.append((above[~masks].mean(), overlap))
    rate, overlap = np.array(points).T
    inside = rate <= limit
    rate = np.append(rate[inside], limit)
    overlap = np.append(overlap[inside], np.interp(limit, *np.array(points).T))
    return float(trapezoid(overlap, rate) / limit)


@pytest.fixture(scope="module")
def reference_aupro(data: dict[str, torch.Tensor]) -> float:
    return aupro(data["gt_mask"].numpy(), data["raw_map"].numpy())


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_figures_equal_scikit_learns_at_any_batch_size(
    data: dict[str, torch.Tensor], reference_aupro: float, batch_size: int
) -> None:
    figures = run(data, batch_size)
    for level, truth, scores in (("image", "gt_label", "raw_score"), ("pixel", "gt_mask", "raw_map")):
        labels, values = data[truth].flatten().numpy(), data[scores].flatten().numpy()
        assert figures[f"{level}_AUROC"] == pytest.approx(roc_auc_score(labels, values), abs=1e-6)
        assert figures[f"{level}_AP"] == pytest.approx(average_precision_score(labels, values), abs=1e-6)
        assert figures[f"{level}_F1Max"] == pytest.approx(best_f1(labels, values), abs=1e-6)
    assert figures["pixel_AUPRO"] == pytest.approx(reference_aupro, abs=1e-5)


def test_all_seven_and_the_thresholded_f1_are_there(data: dict[str, torch.Tensor]) -> None:
    kinds = {f"{level}_{kind}" for level in ("image", "pixel") for kind in ("AUROC", "F1Max", "AP", "F1Score")}
    naming = {"image_NamingAccuracy", "image_NamingF1Score"}
    assert set(run(data, 8)) == kinds | {"pixel_AUPRO"} | naming


def test_without_masks_pixel_metrics_are_left_out(data: dict[str, torch.Tensor]) -> None:
    figures = run({key: value for key, value in data.items() if key != "gt_mask"}, 8)
    missing = {name for name, value in figures.items() if value is None}
    assert missing == {name for name in figures if name.startswith(("pixel", "image_Naming"))}
