"""Thresholds of each of several classes, from its own images where they are enough, else from all of them together."""

import logging
from collections.abc import MutableMapping
from itertools import product
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from anomalib.data import Batch
from anomalib.data.utils import ValSplitMode
from anomalib.metrics import F1AdaptiveThreshold, MinMax
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Trainer
from torchmetrics.aggregation import CatMetric
from torchmetrics.utilities import dim_zero_cat

from anomalib_clipad.components.conformal import p_values
from anomalib_clipad.components.map_offset import with_offsets
from anomalib_clipad.data.batch import ZeroShotBatch
from anomalib_clipad.engine.class_limits import KEYS, LEVELS, ClassLimits
from anomalib_clipad.engine.host import datamodule_of
from anomalib_clipad.engine.network import ZeroShotNetwork
from anomalib_clipad.engine.summaries import classes_of
from anomalib_clipad.errors import InputError

if TYPE_CHECKING:
    _PostProcessor = PostProcessor
else:
    _PostProcessor = object  # the class that uses it is one

logger = logging.getLogger(__name__)

LEAST = 3  # normal images of a class that has thresholds of its own
TOO_FEW = "%r has %d normal image%s, and thresholds of its own take %d; it has those of all classes together."
Limits = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Pool(NamedTuple):
    """Images that thresholds are made from.

    Attributes:
        summary: (N, 5) of labelled validation images: text score, map score, largest and mean map value,
            and the map's offset.
        labels: (N,) 1 where anomalous.
        normal: (n, 6) of other normal images: likewise, and 1 for a reference.
        classes: (n + N,) index of their classes, the normal ones first; empty where there is one class.

    Example:
        >>> everything = Pool(torch.zeros(3, 5), torch.tensor([0, 1, 0]), torch.zeros(0, 6), torch.tensor([0, 0, 1]))
        >>> everything.of(0).labels, everything.of(1).labels
        (tensor([0, 1], dtype=torch.int32), tensor([0], dtype=torch.int32))
    """

    summary: torch.Tensor
    labels: torch.Tensor
    normal: torch.Tensor
    classes: torch.Tensor

    @property
    def of_normal(self) -> torch.Tensor | None:
        """(n,) classes of the other normal images; nothing where there is one class."""
        return self.classes[: len(self.normal)] if len(self.classes) else None

    @property
    def of_validated(self) -> torch.Tensor | None:
        """(N,) classes of the validation images, likewise."""
        return self.classes[len(self.normal) :] if len(self.classes) else None

    def of(self, number: int) -> "Pool":
        """The images of one class."""
        own = self.classes == number
        normal, validated = own[: len(self.normal)], own[len(self.normal) :]
        return Pool(self.summary[validated], self.labels[validated].int(), self.normal[normal], self.classes[own])


def may_use_validation(trainer: Trainer | None, normal: torch.Tensor) -> bool:
    """Whether validation images count as normal ones: not where they are the test images, and there are others.

    Args:
        trainer: The run's.
        normal: (n, ...) the others.

    Example:
        >>> may_use_validation(None, torch.zeros(2, 6))
        True
    """
    data = None if trainer is None else datamodule_of(trainer)
    return not len(normal) or data is None or data.val_split_mode != ValSplitMode.SAME_AS_TEST


def check_post_processor(post_processor: object) -> None:
    """Refuse, for several classes, a post-processor that has one threshold for all.

    Raises:
        InputError: If it is one.

    Example:
        >>> check_post_processor(False)  # no post-processor, no thresholds
    """
    if isinstance(post_processor, PostProcessor) and not isinstance(post_processor, ClassPoolsMixin):
        msg = "Thresholds of several classes belong to the default post-processor; leave post_processor at its default."
        raise InputError(msg)


class ClassPoolsMixin(_PostProcessor):
    """Thresholds class by class, for a post-processor that sets those of a pool with :meth:`set_from`."""

    good_scores: torch.Tensor
    of_class: ClassLimits
    false_alarm_rate: float | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the post-processor's
        super().__init__(*args, **kwargs)
        self.of_class = ClassLimits()
        self._classes, self._pixel_classes = CatMetric(), CatMetric()  # of all validation images; of those with masks

    def _load_from_state_dict(
        self,
        state_dict: MutableMapping[str, torch.Tensor],
        prefix: str,
        *args: Any,  # noqa: ANN401 - handed on to torch's method
        **kwargs: Any,  # noqa: ANN401 - handed on to torch's method
    ) -> None:
        with_offsets(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def set_from(
        self,
        network: ZeroShotNetwork,
        pool: Pool,
        trainer: Trainer | None,
        number: int | None = None,
        of: str | None = "",
    ) -> None:
        """Set ranges and thresholds from a pool; for the post-processor to fill.

        Args:
            network: What has scored the images.
            pool: The images.
            trainer: The run's, if they are validation images.
            number: Index of their class; all classes by default.
            of: Whose they are, for messages; None for no messages.
        """
        raise NotImplementedError

    def collect_classes(self, outputs: ZeroShotBatch) -> None:
        """Remember the classes of a validation batch's images."""
        self._classes.update(classes_of(outputs))
        if outputs.gt_mask is not None:
            self._pixel_classes.update(classes_of(outputs))

    def _pixels(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Map values inside the region, (images, n), their ground truth, and the images' classes, of all processes.

        Of the metric that has collected them: every image has as many pixels as any other, and torchmetrics joins what
        the processes have in one order. Nothing where there is no ground truth.
        """
        metric = self._pixel_threshold_metric
        if not self._pixel_classes.update_called:
            return None
        classes = self._pixel_classes.compute().reshape(-1)
        with metric.sync_context():
            maps, masks = (dim_zero_cat(values).reshape(len(classes), -1) for values in (metric.preds, metric.target))
        return maps, masks, classes

    def _metrics_of(self, number: int, pixels: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None) -> None:
        """Let threshold and range of the maps be those of a class, all of whose images this process knows."""
        fields = ("anomaly_map", "gt_mask")
        self._pixel_threshold_metric = F1AdaptiveThreshold(fields, strict=False, sync_on_compute=False)
        self._pixel_min_max_metric = MinMax(fields[:1], strict=False, sync_on_compute=False)
        if pixels is not None and (pixels[-1] == number).any():
            maps, masks, _ = (values[pixels[-1] == number] for values in pixels)
            batch = cast("Batch", SimpleNamespace(anomaly_map=maps, gt_mask=masks))
            self._pixel_threshold_metric.update(batch)
            self._pixel_min_max_metric.update(batch)

    def set_pools(
        self, network: ZeroShotNetwork, everything: Pool, trainer: Trainer | None, more_follow: bool = False
    ) -> None:
        """Set what all images have in common, and, where there are several classes, what each class has of its own.

        Args:
            network: What has scored the images.
            everything: The images.
            trainer: The run's, if they are validation images.
            more_follow: Whether validation images follow, so that a class may get enough, and nothing is said yet.
        """
        names, unknown = network.class_names, torch.full((6,), torch.nan)
        # What images of an earlier run have set is not to stay where these set nothing.
        self._take_values(unknown)
        self.good_scores = self.good_scores[:0]
        network.fusion.reset(max(1, len(names)))
        if len(names) < 2:
            self.set_from(network, everything, trainer, of=None if more_follow else "")
            return
        pools = [everything.of(number) for number in range(len(names))]
        usable = [self._usable(pool, trainer) for pool in pools]
        few = [number for number, count in enumerate(usable) if count < LEAST]
        pixels = self._pixels()
        self.set_from(network, everything, trainer, of="all classes together" if few and not more_follow else None)
        shared, shared_good = self._values(), self.good_scores
        self.of_class.take(shared, shared_good, len(names))
        both = self._pixel_threshold_metric, self._pixel_min_max_metric
        for number, name in enumerate(names):
            if number in few:
                if not more_follow:
                    logger.warning(TOO_FEW, name, usable[number], "" if usable[number] == 1 else "s", LEAST)
                continue
            self._take_values(unknown)
            self.good_scores = shared_good[:0]
            self._metrics_of(number, pixels)
            self.set_from(network, pools[number], trainer, number, of=None if more_follow else repr(name))
            self.of_class.take(self._values(), self.good_scores, len(names), number)
        self._pixel_threshold_metric, self._pixel_min_max_metric = both
        self._take_values(shared)
        self.good_scores = shared_good

    def _usable(self, pool: Pool, trainer: Trainer | None) -> int:
        """How many normal images of a class would set its thresholds."""
        validated = int((pool.labels == 0).sum())
        if self.false_alarm_rate is None and pool.labels.any():
            return validated
        return len(pool.normal) + (validated if may_use_validation(trainer, pool.normal) else 0)

    def _own(self) -> list[torch.Tensor]:
        """The scalars of one class, in the order of :class:`ClassLimits`."""
        names = (f"{level}_{key}" for level, key in product(LEVELS, KEYS))
        return [getattr(self, f"_{name}" if name.endswith("threshold") else name) for name in names]

    def _values(self) -> torch.Tensor:
        return torch.stack(self._own()).clone()

    def _take_values(self, values: torch.Tensor) -> None:
        for scalar, value in zip(self._own(), values, strict=True):
            scalar.copy_(value)

    def _set(self, level: str, threshold: float, reach: float) -> None:
        """Set a threshold, and the range in which scores are told apart: as far below it as above."""
        getattr(self, f"_{level}_threshold").fill_(threshold)
        getattr(self, f"{level}_min").fill_(threshold - reach)
        getattr(self, f"{level}_max").fill_(threshold + reach)

    def p_values(self, scores: torch.Tensor, class_index: torch.Tensor | None) -> torch.Tensor | None:
        """P-values of scores (B,), each among the normal images of its class; nothing where there are none."""
        if class_index is not None and self.of_class.known:
            return self.of_class.p_values(scores, class_index) if len(self.of_class.good_scores) else None
        return p_values(scores, self.good_scores) if len(self.good_scores) else None

    def limits(self, level: str, class_index: torch.Tensor | None = None, dims: int = 0) -> Limits:
        """Minimum, maximum and threshold, NaN where unknown.

        Args:
            level: ``image`` or ``pixel``.
            class_index: (B,) index of the images' classes.
            dims: 0 for scores, 2 for maps.

        Returns:
            Three scalars, or with several classes three tensors (B,) or (B, 1, 1).
        """
        if class_index is not None and self.of_class.known:
            return cast("Limits", self.of_class(level, class_index, dims))
        return getattr(self, f"{level}_min"), getattr(self, f"{level}_max"), getattr(self, f"{level}_threshold")
