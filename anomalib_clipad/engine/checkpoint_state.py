"""What the state dict of a checkpoint holds, in this version and in earlier ones."""

from collections.abc import Mapping
from typing import Any

import torch

from anomalib_clipad.components import Float32Buffers, MapOffset, ReferenceBank, ReferenceFusion, ScoreFusion
from anomalib_clipad.components.map_offset import with_offsets
from anomalib_clipad.engine.checkpoint_parts import damaged
from anomalib_clipad.engine.class_limits import ClassLimits

EXTRA_STATE = "model._extra_state"  # torch's key of what the network keeps beside tensors
# Buffers that have moved since version 0.1.
MOVED = {"model.score_min": "model.fusion.score_min", "model.score_max": "model.fusion.score_max"}
# Values that each class has its own of; versions of one class have written them without the dimension of the classes.
FUSIONS: dict[str, type[Float32Buffers]] = {"fusion": ScoreFusion, "reference_fusion": ReferenceFusion}
OF_CLASSES = tuple(f"model.{name}.{value}" for name, fusion in FUSIONS.items() for value in fusion.growing)
CHOICE, LIMITS, OFFSET = "model.class_choice.vectors", "post_processor.of_class.", "post_processor.map_offset."
# Unknown until there are labelled validation data, and NaN until then.
MAY_BE_NAN = ("model.fusion.", "post_processor.")
# Of any number, and of values that earlier versions did not have.
SCORES_OF_NORMAL = ("post_processor.good_scores", "post_processor.normal")
LAYERS = "model.adapter."  # which a run has in its own precision
BANKS = ("model.references.", "model.tile_references.")
WORDS = tuple(f"model.defect_names.{name}" for name in ("directions", "baseline.mean"))
GROWING = (
    "model.text_features",
    *(bank + name for bank in BANKS for name in ReferenceBank.growing),
    *SCORES_OF_NORMAL,
    *WORDS,
    *OF_CLASSES,
    CHOICE,
    "post_processor.normal_class",
    *(LIMITS + name for name in ClassLimits.growing),
    *(OFFSET + name for name in MapOffset.growing),
)
SINCE_REFERENCES = (*BANKS, "model.reference_fusion.", *SCORES_OF_NORMAL, *WORDS, CHOICE, LIMITS, OFFSET)


def as_written_today(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict as this version writes it.

    Example:
        >>> as_written_today({"model.score_min": torch.zeros(2)})["model.fusion.score_min"].shape
        torch.Size([1, 2])
    """
    moved = {MOVED.get(key, key): value for key, value in state.items()}
    for key in OF_CLASSES:
        if isinstance(moved.get(key), torch.Tensor) and moved[key].ndim == 1:
            moved[key] = moved[key][None]
    with_offsets(moved, "post_processor.")
    for key, value in moved.items():
        if key.startswith(LAYERS) and isinstance(value, torch.Tensor) and value.is_floating_point():
            moved[key] = value.float()  # of a run whose precision was half
    return moved


def check_state(state: Mapping[str, Any], expected: Mapping[str, Any], fitted: bool) -> None:
    """Refuse a state dict that does not fit a model.

    Args:
        state: As :func:`as_written_today` gives it, with the model's extra state.
        expected: What the model writes.
        fitted: Whether it was written while layers were trained, of whatever classes.

    Raises:
        InputError: If a value is missing, unknown, of another shape or type, or not finite.

    Example:
        >>> check_state({EXTRA_STATE: {}, "model.text_features": torch.ones(0, 2, 4)}, {}, fitted=False)
        Traceback (most recent call last):
        ...
        anomalib_clipad.errors.InputError: The checkpoint is damaged: it has an unknown model.text_features; ...
    """
    problems = [f"lacks {key}" for key in expected if key not in state and not key.startswith(SINCE_REFERENCES)]
    for key, value in state.items():
        wanted = expected.get(key)
        if key == EXTRA_STATE:
            continue
        if not isinstance(value, torch.Tensor) or not isinstance(wanted, torch.Tensor):
            problems.append(f"has an unknown {key}" if wanted is None else f"has no tensor as {key}")
        elif value.shape != wanted.shape and not (key in GROWING and value.shape[1:] == wanted.shape[1:]):
            problems.append(f"has {key} of shape {tuple(value.shape)} instead of {tuple(wanted.shape)}")
        elif value.dtype != wanted.dtype:
            problems.append(f"has {key} of type {value.dtype} instead of {wanted.dtype}")
        elif not key.startswith(MAY_BE_NAN) and not value.isfinite().all():
            problems.append(f"has values in {key} that are not finite")
    extra = state[EXTRA_STATE]
    names = extra.get("class_names") if isinstance(extra, Mapping) else None
    vectors = state.get("model.text_features")
    if isinstance(vectors, torch.Tensor) and (not isinstance(names, list) or len(names) != len(vectors)):
        problems.append(f"has {len(vectors)} pairs of text vectors for the classes {names!r}")
    if not problems and not fitted:
        several = len(names or ())
        classes, none = {max(several, 1)}, {several} - {1} or {0}
        # Without labelled or normal images there are no thresholds.
        counts = dict.fromkeys(OF_CLASSES, classes) | {CHOICE: none, f"{LIMITS}values": none | {0}}
        counts |= {OFFSET + name: classes | {0} for name in MapOffset.growing}
        wrong = [key for key, fitting in counts.items() if key in state and len(state[key]) not in fitting]
        problems += [f"has {key} of {len(state[key])} classes instead of {several}" for key in wrong]
    words = extra.get("defects", []) if isinstance(extra, Mapping) else None
    if not problems and not _words_fit(words, *(len(state.get(key, ())) for key in WORDS), classes=len(names or ())):
        problems.append(f"has text vectors of other defects than {words!r}")
    if problems:
        raise damaged(problems[0])


def _words_fit(words: object, directions: int, baseline: int, *, classes: int) -> bool:
    """Whether words for defects, two or more of every class, and the lengths of what belongs to them agree."""
    if not isinstance(words, list) or len(words) not in (0, classes):
        return False
    if not all(isinstance(own, list) and len(own) > 1 and all(isinstance(word, str) for word in own) for own in words):
        return False
    return sum(map(len, words)) == directions and baseline in (0, directions)
