"""The scale that all models of a comparison are shown on: 0.5 is the threshold.

Jobs measure a model's own scores and maps, whose units differ. What is shown of them, in pictures, tables and on the
page, is brought to one scale here. It is not clamped, so the order of the scores stays. A model of several classes has
a scale for each, on which 0.5 is the class's own threshold.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from anomalib.post_processing import PostProcessor

from anomalib_clipad.engine.post_processing import ClipAdPostProcessor

Level = Literal["image", "pixel"]
MODEL, GOOD, ALL = "model", "good images", "all images"  # where a scale comes from
NOTHING = "nothing"  # where a model gives no values
LEAST = 1e-12  # that is divided by


@dataclass(frozen=True)
class Scale:
    """Brings values of one model to the common scale.

    Args:
        threshold: Value that is shown as 0.5.
        low: Lower end of the range. ``high - low`` is shown as 1, as anomalib's post-processor does it.
        high: Upper end.
        source: ``model``, if it is the model's own threshold; else ``good images`` or ``all images``, of whose values
            the largest is 0.5 and the lowest 0; ``nothing`` where there are none.
        soft: Flatten both ends, as our models do with maps whose threshold no image has set.
        largest_offset: Largest offset of normal images' maps, see :class:`anomalib_clipad.components.MapOffset`; None
            where maps are shown as they are.

    Example:
        >>> Scale(threshold=3.0, low=1.0, high=5.0, source=MODEL).shown([1.0, 3.0, 9.0]).tolist()
        [0.0, 0.5, 2.0]
        >>> Scale(threshold=0.0, low=-0.02, high=0.02, source=MODEL, soft=True).shown([0.02, 10.0]).round(3).tolist()
        [0.75, 0.999]
    """

    threshold: float
    low: float
    high: float
    source: str
    soft: bool = False
    largest_offset: float | None = None

    @property
    def known(self) -> bool:
        """Whether there is a threshold to judge by."""
        return self.source == MODEL

    def of_map(self, offset: float | None) -> "Scale":
        """The scale of one map, by its offset, if it has one."""
        if offset is None or self.largest_offset is None or not offset > self.largest_offset:
            return self
        above = offset - self.largest_offset
        return replace(self, threshold=self.threshold + above, low=self.low + above, high=self.high + above)

    def shown(self, values: Any) -> np.ndarray:  # noqa: ANN401 - whatever NumPy takes
        """Values on the common scale, in float64, in the order of those given."""
        away = np.asarray(values, dtype=np.float64) - self.threshold
        if self.high <= self.low:
            return 0.5 + np.sign(away) / 2
        away = away / (self.high - self.low)
        if self.soft:
            away = away / (1 + 2 * np.abs(away))
        return 0.5 + away


@dataclass(frozen=True)
class Scales:
    """The two scales of a job.

    Args:
        score: Of image scores.
        map: Of anomaly maps.
        of_class: The two of each class that occurs, where the model has several; those above are then of all images.

    Example:
        >>> nut = Scales(Scale(0.7, 0.0, 1.0, MODEL), Scale(2.0, 0.0, 4.0, GOOD))
        >>> both = Scales(nut.score, nut.map, {"nut": nut})
        >>> Scales.read(both.row()) == both, both.of("nut") == nut, nut.of(None) == nut
        (True, True, True)
    """

    score: Scale
    map: Scale
    of_class: Mapping[str, "Scales"] = field(default_factory=dict)

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> "Scales":
        """From a job's row."""
        of_class = {name: cls.read(own) for name, own in row.get("of_class", {}).items()}
        return cls(Scale(**row["score"]), Scale(**row["map"]), of_class)

    def of(self, class_name: str | None) -> "Scales":
        """The scales of an image of a class, which may not be known."""
        return self.of_class.get(class_name or "", self)

    def maps_of(self, class_names: Iterable[str | None], offsets: Iterable[float | None]) -> list[Scale]:
        """The scale of each image's map, from the images' classes and the maps' offsets."""
        return [self.of(name).map.of_map(offset) for name, offset in zip(class_names, offsets, strict=True)]

    def row(self) -> dict[str, Any]:
        """For a job's row."""
        return asdict(self)


def choose_scales(
    post_processor: object,
    scores: Sequence[float],
    map_limits: Sequence[tuple[float, float]],
    labels: Sequence[int | None],
    classes: Sequence[str | None] = (),
    class_names: Sequence[str] = (),
) -> Scales:
    """The scales of a model: by its own thresholds, else by good images, else by all.

    Args:
        post_processor: The model's; without thresholds, or not anomalib's, it tells nothing.
        scores: Image scores.
        map_limits: Lowest and largest value of each image's map.
        labels: 0 for a good image, None without labels.
        classes: Name of each image's class.
        class_names: All that the model chooses from; each has a scale of its own where there are several.

    Example:
        >>> scales = choose_scales(None, [1.0, 2.0, 9.0], [(0.0, 1.0)] * 3, [0, 0, 1])
        >>> scales.score.shown([1.0, 2.0]).tolist(), scales.score.source
        ([0.0, 0.5], 'good images')
    """
    limits = np.asarray(map_limits, dtype=np.float64).reshape(-1, 2)
    score, good = np.asarray(scores, dtype=np.float64), np.array([label == 0 for label in labels], dtype=bool)

    def of(rows: np.ndarray, number: int | None) -> Scales:
        values = limits[rows].T.flatten()
        of_score = _of_model(post_processor, "image", score[rows], number) or _of_images(score[rows], good[rows])
        if np.isnan(values).all():
            return Scales(of_score, Scale(0.0, 0.0, 0.0, NOTHING))
        of_map = _of_model(post_processor, "pixel", values, number) or _of_images(values, np.tile(good[rows], 2))
        return Scales(of_score, of_map)

    whole = of(np.full(len(score), fill_value=True), None)
    if len(class_names) < 2:
        return whole
    shown = np.array(classes, dtype=object)
    of_class = {name: of(shown == name, number) for number, name in enumerate(class_names) if name in classes}
    return Scales(whole.score, whole.map, of_class)


def _of_model(post_processor: object, level: Level, values: np.ndarray, number: int | None) -> Scale | None:
    """The scale of a post-processor that knows a threshold, its sensitivity included, for a class by its number."""
    if not isinstance(post_processor, PostProcessor) or not post_processor.enable_thresholding:
        return None
    stricter = 0.5 - float(getattr(post_processor, f"{level}_sensitivity"))  # how far the threshold is from 0.5
    limits = tuple(getattr(post_processor, f"{level}_{end}") for end in ("min", "max", "threshold"))
    if isinstance(post_processor, ClipAdPostProcessor) and number is not None:
        limits = post_processor.limits(level, torch.tensor([number]))
    low, high, threshold = map(float, limits)
    if math.isfinite(threshold):
        if not math.isfinite(high - low):  # not normalised
            reach = float(np.abs(_finite(values) - threshold).max(initial=0.0))
            low, high = threshold - reach, threshold + reach
        largest_offset = _largest_offset(post_processor, number) if level == "pixel" else None
        return Scale(threshold + stricter * (high - low), low, high, MODEL, largest_offset=largest_offset)
    if not isinstance(post_processor, ClipAdPostProcessor):
        return None
    if level == "image":
        return Scale(0.5 + stricter, 0.0, 1.0, MODEL)
    if post_processor.map_scale is None:
        return None
    centre, reach = post_processor.map_scale.centre, 1 / post_processor.map_scale.slope
    inverse = 2 * stricter / max(1 - abs(2 * stricter), LEAST)
    return Scale(centre + inverse * reach, centre - reach, centre + reach, MODEL, soft=True)


def _largest_offset(post_processor: PostProcessor, number: int | None) -> float | None:
    if not isinstance(post_processor, ClipAdPostProcessor):
        return None
    known = post_processor.map_offset.largest.tolist()
    own = known if number is None else known[number : number + 1]
    return own[0] if len(own) == 1 and math.isfinite(own[0]) else None  # images of all classes have none in common


def _of_images(values: np.ndarray, good: np.ndarray) -> Scale:
    """The largest value of good images becomes 0.5, the lowest 0; of all images where none is known to be good."""
    chosen, source = (values[good], GOOD) if good.any() else (values, ALL)
    low, high = _finite(chosen).min(initial=math.inf), _finite(chosen).max(initial=-math.inf)
    if low > high:  # no finite value
        low = high = 0.0
    return Scale(float(high), float(low), float(2 * high - low), source)


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]
