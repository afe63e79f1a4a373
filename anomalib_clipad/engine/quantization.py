"""Eight bits for the vision tower of an exported model, with ranges chosen by images; the rest stays in float32."""

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from anomalib.data import Batch

from anomalib_clipad.errors import InputError

if TYPE_CHECKING:
    from openvino import Model, Node

logger = logging.getLogger(__name__)

MOST_IMAGES = 300  # that ranges are chosen by, as nncf has it


class OneByOne:
    """The images of batches, so that the ranges do not depend on the batch size.

    Args:
        batches: A data loader, or whatever gives the same batches every time.

    Example:
        >>> from types import SimpleNamespace
        >>> batches = [SimpleNamespace(image=torch.rand(2, 3, 8, 8)), SimpleNamespace(image=torch.rand(1, 3, 8, 8))]
        >>> [image.shape[0] for image in OneByOne(batches)]
        [1, 1, 1]
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Every image, (1, 3, H, W)."""
        for batch in self.batches:
            yield from cast("torch.Tensor", batch.image).split(1)


def quantize_tower(
    model: "Model", projection: torch.Tensor, images: Iterable[torch.Tensor], most: int = MOST_IMAGES
) -> "Model":
    """Bring the vision tower of a graph to eight bits (INT8 by post-training quantisation).

    What lies beside the tower stays in float32: distances from references are small differences, of which eight bits
    leave nothing.

    Args:
        model: The graph, with one input.
        projection: (W, D) weight of the tower's last product.
        images: (1, 3, H, W) each, as the graph takes them.
        most: Most of them that are looked at.

    Returns:
        A new graph.

    Raises:
        InputError: If the graph has no such product.
    """
    # anomalib's own call does not say that this is a transformer, and what comes out then is noise.
    import nncf

    precise = nncf.IgnoredScope(
        names=_beside_the_tower(model, projection.detach().float().cpu().numpy()), validate=False
    )
    logger.info("Choosing the ranges of INT8 by images.")
    kind = nncf.ModelType.TRANSFORMER
    return nncf.quantize(model, nncf.Dataset(images), model_type=kind, subset_size=most, ignored_scope=precise)


def _beside_the_tower(model: "Model", projection: np.ndarray) -> list[str]:
    """Operations that no token goes through on its way to the joint embedding space."""
    inside: set[str] = set()
    waiting = [operation for operation in model.get_ordered_ops() if _multiplies_by(operation, projection)]
    while waiting:
        operation = waiting.pop()
        if operation.get_friendly_name() not in inside:
            inside.add(operation.get_friendly_name())
            waiting += [one.get_source_output().get_node() for one in operation.inputs()]
    if not inside:
        msg = "INT8_PTQ is not possible: the vision tower cannot be told from the rest of the graph; use INT8 or FP16."
        raise InputError(msg)
    names = (operation.get_friendly_name() for operation in model.get_ordered_ops())
    return [name for name in names if name not in inside]


def _multiplies_by(operation: "Node", weight: np.ndarray) -> bool:
    if operation.get_type_name() != "MatMul":
        return False
    given = [one.get_source_output().get_node() for one in operation.inputs()]
    constants = [one.data for one in given if one.get_type_name() == "Constant"]
    return any(np.array_equal(one, side) for one in constants for side in (weight, weight.T))
