"""What is said of an image: one owner for tables, pictures and pages."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from anomalib.post_processing import PostProcessor

from anomalib_clipad.data.batch import ZeroShotBatch

VERDICTS = ("normal", "anomalous")


@dataclass(frozen=True)
class Verdict:
    """What is said of an image.

    Args:
        path: Its file, or a number where the data set does not say.
        class_name: What it shows.
        score: Its score; NaN where it could not be scored.
        threshold: What the score is compared with; a score above it is anomalous.
        label: Whether it is called anomalous.
        p_value: Share of normal images that score as high.
        truth: Whether it is anomalous.
        explanation: In words.

    Fields are None where they are not known.

    Example:
        >>> verdict = Verdict("nut.png", score=0.7, threshold=0.5, label=True, truth=False)
        >>> verdict.word, verdict.true_word, verdict.right, verdict.comparison
        ('anomalous', 'normal', False, 'score 0.700 > threshold 0.500')
    """

    path: str
    class_name: str | None = None
    score: float | None = None
    threshold: float | None = None
    label: bool | None = None
    p_value: float | None = None
    truth: bool | None = None
    explanation: str | None = None

    @property
    def word(self) -> str | None:
        """The label as a word."""
        return None if self.label is None else VERDICTS[self.label]

    @property
    def true_word(self) -> str | None:
        """The truth as a word."""
        return None if self.truth is None else VERDICTS[self.truth]

    @property
    def right(self) -> bool | None:
        """Whether label and truth agree."""
        return None if self.label is None or self.truth is None else self.label == self.truth

    @property
    def comparison(self) -> str | None:
        """Score and threshold in words, with as many digits as tell them apart."""
        if self.score is None:
            return None
        if math.isnan(self.score):
            return "score is not a number"
        if self.threshold is None:
            return f"score {self.score:.3f}"
        digits = telling_digits(self.score, self.threshold)
        sign = ">" if self.score > self.threshold else "≤"
        return f"score {self.score:.{digits}f} {sign} threshold {self.threshold:.{digits}f}"


def telling_digits(score: float, threshold: float) -> int:
    """Digits behind the point, at least three and at most six, that tell a score from the threshold.

    Example:
        >>> telling_digits(0.7, 0.5), telling_digits(0.50004, 0.5), telling_digits(0.5, 0.5)
        (3, 5, 3)
    """
    if score == threshold:
        return 3
    return next((digits for digits in (3, 4, 5) if f"{score:.{digits}f}" != f"{threshold:.{digits}f}"), 6)


def verdicts(batch: ZeroShotBatch, model: object, number: str = "0") -> Iterator[Verdict]:
    """What is said of the images of a batch.

    Args:
        batch: As the model has scored it.
        model: A model of anomalib. ``class_index`` counts the classes of its network, if that has any. The threshold is
            one minus its post-processor's ``image_sensitivity``, if scores are normalised.
        number: Of the batch, for images without a file.

    Yields:
        A verdict an image.

    Example:
        >>> import torch
        >>> batch = ZeroShotBatch(image=torch.zeros(1, 3, 8, 8), pred_score=torch.tensor([0.7]))
        >>> list(verdicts(batch, model=None))
        [Verdict(path='image 0-0', class_name=None, score=0.699..., threshold=None, label=None, p_value=None, ...)]
    """
    class_names = getattr(getattr(model, "model", None), "class_names", ())
    post_processor = getattr(model, "post_processor", None)
    threshold = None
    if isinstance(post_processor, PostProcessor) and post_processor.enable_normalization:
        threshold = 1 - post_processor.image_sensitivity
    count = batch.batch_size
    paths: Sequence[str | None] = batch.image_path or [None] * count
    explanations: Sequence[str | None] = batch.explanation or [None] * count
    columns = zip(
        *(_numbers(batch, name) for name in ("class_index", "pred_score", "pred_label", "p_value", "gt_label")),
        paths,
        explanations,
        strict=True,
    )
    for row, (class_index, score, label, p_value, truth, path, explanation) in enumerate(columns):
        yield Verdict(
            path=str(path) if path else f"image {number}-{row}",
            class_name=class_names[int(class_index or 0)] if class_names else None,
            score=score,
            threshold=threshold if label is not None else None,
            label=None if label is None else bool(label),
            p_value=p_value,
            truth=None if truth is None else bool(truth),
            explanation=explanation,
        )


def _numbers(batch: ZeroShotBatch, name: str) -> list[float] | list[None]:
    """A field as numbers, taken from the device at once."""
    values: torch.Tensor | None = getattr(batch, name)
    return [None] * batch.batch_size if values is None else values.detach().reshape(batch.batch_size).tolist()
