"""How often the words for defects are right, as metrics of anomalib's evaluator.

They read ``defect_word`` and ``defect_truth`` of a batch, over the anomalous images whose folder is named by one of the
words. A wrong word, ``unspecified`` and an image that is not called anomalous all count as wrong.
"""

from typing import Any

import torch
from anomalib.metrics import AnomalibMetric
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

NAMING_FIELDS = ("defect_word", "defect_truth")


class NamedDefects(Metric):
    """Share of right words.

    Words and true ones are indices. A negative word stands for none, which is wrong; an image whose truth is negative
    does not count.

    Example:
        >>> metric = NamedDefects()
        >>> metric.update(torch.tensor([0, 1, -1]), torch.tensor([0, -1, 1]))
        >>> metric.compute()
        tensor(0.5000)
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    words: list[torch.Tensor]
    truths: list[torch.Tensor]

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401 - torchmetrics'
        super().__init__(**kwargs)
        for name in ("words", "truths"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, words: torch.Tensor, truths: torch.Tensor) -> None:
        """Add a batch: (B,) each."""
        known = truths >= 0
        self.words.append(words[known])
        self.truths.append(truths[known])

    def compute(self) -> torch.Tensor:
        """In [0, 1]; NaN if no truth is known."""
        return (dim_zero_cat(self.words) == dim_zero_cat(self.truths)).float().mean()

    @property
    def defined(self) -> bool:
        """Whether any truth is known, over all processes."""
        return not bool(self.compute().isnan())


class NamedDefectsF1(NamedDefects):
    """Mean of the words' F1 scores, over the words that occur as truth.

    Example:
        >>> metric = NamedDefectsF1()
        >>> metric.update(torch.tensor([0, 1, -1]), torch.tensor([0, 0, 1]))
        >>> metric.compute()
        tensor(0.3333)
    """

    def compute(self) -> torch.Tensor:
        """In [0, 1]; NaN if no truth is known."""
        words, truths = dim_zero_cat(self.words), dim_zero_cat(self.truths)
        occurring = truths.unique()[:, None]
        given, true = words == occurring, truths == occurring  # (occurring words, n)
        return (2 * (given & true).sum(dim=1) / (given.sum(dim=1) + true.sum(dim=1))).mean()


class NamingAccuracy(AnomalibMetric, NamedDefects):  # type: ignore[misc]  # anomalib's way of mixing
    """:class:`NamedDefects` of batches.

    Example:
        >>> from types import SimpleNamespace
        >>> metric = NamingAccuracy()
        >>> metric.update(SimpleNamespace(defect_word=torch.tensor([0, 1, -1]), defect_truth=torch.tensor([0, 0, 1])))
        >>> metric.compute()
        tensor(0.3333)
    """

    default_fields = NAMING_FIELDS


class NamingF1Score(AnomalibMetric, NamedDefectsF1):  # type: ignore[misc]  # as above
    """:class:`NamedDefectsF1` of batches.

    Example:
        >>> NamingF1Score(prefix="image_").name
        'image_NamingF1Score'
    """

    default_fields = NAMING_FIELDS
