"""What a user is to know of the scores and thresholds of a run."""

import logging
import math
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import torch
from anomalib.data import Batch

from anomalib_clipad.components.conformal import ConformalThreshold
from anomalib_clipad.engine.metrics import AUROC, IMAGE_FIELDS

logger = logging.getLogger(__name__)

FEW = 5  # images that may well be anomalous all of them
ADVICE = "check class_name and prompts, or give normal images by few_shot_source or k_shot"
LOWEST_AUROC = 0.6  # of validation images, below which the scores are of no use


def announce(threshold: ConformalThreshold, rate: float | None, references: int, of: str = "") -> None:
    """Say what false-alarm rate to expect, and which one could not be had.

    Args:
        threshold: Of the image score.
        rate: What was asked for.
        references: How many of the threshold's images are references.
        of: Which class it is of, where there are several.

    Example:
        >>> announce(ConformalThreshold(value=0.7, images=19, rank=19), rate=0.05, references=4)
    """
    count = threshold.images
    which = f"{count} normal image{'s' if count > 1 else ''}{of and f' of {of}'}"
    if references == count:
        which += " (all of them references)" if count > 1 else " (the reference)"
    elif references:
        which += f" ({references} of them references)"
    worth = f"{threshold.expected_rate:.1%} expected, at most {threshold.upper_rate:.1%} with 95 % confidence"
    if rate is not None and threshold.expected_rate > rate + 1e-9:
        words = "A false-alarm rate of %s needs %d normal images. The largest score of %s is the threshold: %s."
        logger.warning(words, f"{rate:.1%}", math.ceil(1 / rate - 1e-9) - 1, which, worth)
    else:
        logger.info("Thresholds are set from %s. False-alarm rate: %s.", which, worth)


def warn_of_one_label(labels: list[torch.Tensor]) -> None:
    """Say so where every image of a run is anomalous; with a few images that may be true.

    Args:
        labels: (B,) of every batch.

    Example:
        >>> warn_of_one_label([torch.tensor([True, False])])
    """
    count = sum(map(len, labels))
    if count >= FEW and all(bool(batch.all()) for batch in labels):
        logger.warning("All %d images are called anomalous; if they are not, %s.", count, ADVICE)


def warn_of_no_numbers(paths: Sequence[str] | None, known: torch.Tensor) -> None:
    """Name the validation images that no threshold can be made from.

    Args:
        paths: Of the images.
        known: (B,) whether their scores are numbers.

    Example:
        >>> warn_of_no_numbers(["a.png"], torch.tensor([True]))
    """
    for path, is_known in zip(paths or ["A validation image"] * len(known), known.tolist(), strict=True):
        if not is_known:
            logger.warning("%s has a score that is not a number, so the thresholds are made without it.", path)


def warn_of_tested(normal: Sequence[str], tested: Sequence[str]) -> None:
    """Say where normal images are test images, too: a reference finds itself there.

    Args:
        normal: Paths of references, and of normal images that set thresholds.
        tested: Paths of the test images.

    Example:
        >>> warn_of_tested(["good/1.png"], ["test/1.png"])
    """
    known = {os.path.realpath(path) for path in tested} if normal else set()
    if shared := sum(os.path.realpath(path) in known for path in normal):
        logger.warning(
            "%d of the %d normal images are test images, too, so the figures of a test are too good; give others, by "
            "normal_dir or few_shot_source.",
            shared,
            len(normal),
        )


def warn_of_degenerate(scores: torch.Tensor, labels: torch.Tensor, threshold: float, of: str = "") -> None:
    """Say where labelled images show that the scores or the threshold are of no use.

    Args:
        scores: (N,) image scores.
        labels: (N,) 1 where anomalous.
        threshold: Threshold of the scores.
        of: Which class they are of, where there are several.

    Example:
        >>> warn_of_degenerate(torch.tensor([0.1, 0.9]), torch.tensor([0, 1]), threshold=0.5)
    """
    if not labels.any() or labels.all():
        return
    metric = AUROC(fields=IMAGE_FIELDS)
    metric.update(cast("Batch", SimpleNamespace(raw_score=scores, gt_label=labels)))
    auroc = float(metric.compute())
    if auroc < LOWEST_AUROC:
        words = "The scores hardly tell anomalous validation images%s from normal ones (AUROC %.2f); %s."
        logger.warning(words, of and f" of {of}", auroc, ADVICE)
    elif (scores > threshold).all() or (scores <= threshold).all():
        found = "anomalous" if (scores > threshold).all() else "normal"
        words = "At the threshold of the best F1 all validation images%s are %s; %s."
        logger.warning(words, of and f" of {of}", found, ADVICE)
