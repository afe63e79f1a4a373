"""What a model of several classes gives outside of the engine, and in exported files."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from anomalib.data import InferenceBatch


class IndexedBatch(NamedTuple):
    """anomalib's four outputs, and the class that was chosen for each image, for files of ONNX and OpenVINO.

    Example:
        >>> IndexedBatch(torch.tensor([0.2]), None, torch.zeros(1, 2, 2), None, torch.tensor([1])).class_index
        tensor([1])
    """

    pred_score: torch.Tensor
    pred_label: torch.Tensor | None
    anomaly_map: torch.Tensor
    pred_mask: torch.Tensor | None
    class_index: torch.Tensor


class NamedBatch(NamedTuple):
    """Likewise with the classes' names, in the field that anomalib's ``TorchInferencer`` has for words.

    Example:
        >>> NamedBatch(torch.tensor([0.2]), None, torch.zeros(1, 2, 2), None, ["nut"]).explanation
        ['nut']
    """

    pred_score: torch.Tensor
    pred_label: torch.Tensor | None
    anomaly_map: torch.Tensor
    pred_mask: torch.Tensor | None
    explanation: list[str]


def with_class(
    processed: Any,  # noqa: ANN401 - anomalib's batch, or what the network gives where there is no post-processor
    class_index: torch.Tensor | None,
    class_names: Sequence[str],
    tells: str,
) -> InferenceBatch:
    """What is given of images whose class was chosen; what came in where it was not.

    Args:
        processed: Scores, labels, maps and masks.
        class_index: (B,) index of the images' classes, where they were chosen.
        class_names: What it counts.
        tells: ``index``, ``name`` or ``nothing``.

    Example:
        >>> with_class(InferenceBatch(torch.tensor([0.2])), torch.tensor([1]), ["cup", "nut"], "name").explanation
        ['nut']
    """
    if class_index is None or not isinstance(processed, InferenceBatch) or tells == "nothing":
        return processed
    if tells == "index":
        return cast("InferenceBatch", IndexedBatch(*processed, class_index))  # type: ignore[arg-type]  # not None here
    return cast("InferenceBatch", NamedBatch(*processed, [class_names[number] for number in class_index.tolist()]))  # type: ignore[arg-type]  # likewise
