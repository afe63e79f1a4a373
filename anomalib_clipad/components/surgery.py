"""Feature surgery: what is left of a patch's score when the part shared by both classes is taken away.

CLIP-AD (arXiv 2311.00453), section 3.3, in closed form.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from anomalib_clipad.errors import InputError


class SurgeryScores(NamedTuple):
    """What is left of tokens' scores, and how much of it all patches of an image have in common.

    Attributes:
        anomalous: (B, N + 1) in float32, class token first: score of the anomalous class. The normal one's is its
            negative.
        offset: (B,) mean over the patches of what the class token adds to their scores, see :func:`surgery_scores`.

    Example:
        >>> SurgeryScores(torch.zeros(2, 5), torch.zeros(2)).anomalous.shape
        torch.Size([2, 5])
    """

    anomalous: torch.Tensor
    offset: torch.Tensor


def feature_surgery(surgery_features: list[torch.Tensor], text_features: torch.Tensor) -> torch.Tensor:
    r"""Score every token against the normal and the anomalous text vector, fused over the stages.

    For each stage with unit-normalised tokens :math:`f`, cosines :math:`c_k = f \cdot t_k` and class-token weights
    :math:`w_k = p_k / \mathrm{mean}(p)`, :math:`p = \mathrm{softmax}(c_0, c_1)`, the feature shared by both classes
    is :math:`\mathrm{mean}_k(w_k f t_k)`. Taking it away leaves

    .. math:: \mathrm{score}_k = w_k c_k - \tfrac12 (w_0 c_0 + w_1 c_1)

    so the (B, 2, N, D) tensor of the long form is never built. Stages are summed.

    Args:
        surgery_features: One (B, N + 1, D) tensor a stage, class token first; any length.
        text_features: Unit vectors, normal then anomalous: (2, D) for all images, or (B, 2, D), one pair an image.

    Returns:
        (B, N + 1, 2) in float32, class token first; the anomalous score is the last channel, the normal one its
        negative. Each stage adds at most 1 in size.

    Raises:
        InputError: If the tensors are of other shapes or types.

    Example:
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator ...>
        >>> text = F.normalize(torch.randn(2, 8), dim=-1)
        >>> scores = feature_surgery([torch.randn(3, 17, 8)] * 4, text)
        >>> scores.shape, torch.allclose(scores[..., 0], -scores[..., 1])
        (torch.Size([3, 17, 2]), True)
    """
    anomalous = surgery_scores(surgery_features, text_features).anomalous[..., None]
    return torch.cat([-anomalous, anomalous], dim=-1)


def surgery_scores(surgery_features: list[torch.Tensor], text_features: torch.Tensor) -> SurgeryScores:
    r"""The anomalous scores of :func:`feature_surgery`, and what the class tokens add to those of all patches.

    For the anomalous class the score is :math:`f \cdot (p_1 t_1 - p_0 t_0)`: the two text vectors, which are nearly
    equal, are subtracted before the product, so that what runs this in fewer bits loses little. It is
    :math:`\tfrac12 f \cdot (t_1 - t_0) + (p_1 - \tfrac12) f \cdot (t_0 + t_1)`. The second part depends on the class
    token, and is nearly the same for all patches: its mean over them is the offset.

    Args:
        surgery_features: See :func:`feature_surgery`.
        text_features: Likewise.

    Raises:
        InputError: If the tensors are of other shapes or types.

    Example:
        >>> text = F.normalize(torch.randn(2, 8), dim=-1)
        >>> surgery_scores([torch.randn(3, 17, 8)] * 4, text).offset.shape
        torch.Size([3])
    """
    taps = list(surgery_features) if isinstance(surgery_features, list | tuple) else []
    if not taps or not all(_is_floating(tap, 3) and tap.shape == taps[0].shape for tap in taps):
        found = [tuple(tap.shape) if isinstance(tap, torch.Tensor) else type(tap).__name__ for tap in taps]
        msg = f"surgery_features must be a list of equal floating-point tensors (B, N + 1, D), got {found}."
        raise InputError(msg)
    check_text_features(text_features, taps[0].shape[0], taps[0].shape[2])
    normal, anomalous = text_features.float().unbind(dim=-2)  # (D,) or (B, D) each
    class_tokens = F.normalize(torch.stack([tokens[:, 0] for tokens in taps]).float(), dim=-1)  # (stages, B, D)
    # Of all stages at once: on a GPU a small batch waits for the launches. A softmax of two is a sigmoid.
    p = (class_tokens * (anomalous - normal)).sum(dim=-1, keepdim=True).sigmoid()
    directions = (p * anomalous - (1 - p) * normal)[..., None]  # (stages, B, D, 1)
    scores, means = [], []
    for tokens, direction in zip(taps, directions, strict=True):
        unit = F.normalize(tokens.float(), dim=-1)
        scores.append(unit @ direction)
        means.append(unit[:, 1:].mean(dim=1))
    shared = (torch.stack(means) * (normal + anomalous)).sum(dim=-1, keepdim=True)  # (stages, B, 1)
    offset = ((p - 0.5) * shared).sum(dim=0)
    return SurgeryScores(torch.stack(scores).sum(dim=0)[..., 0], offset[:, 0])


def check_text_features(text_features: torch.Tensor, images: int, width: int) -> None:
    """Check that text vectors are one pair for all images, or one pair an image.

    Raises:
        InputError: If they are not (2, D) or (B, 2, D) floating-point numbers.

    Example:
        >>> check_text_features(torch.eye(2), images=5, width=2)
    """
    if not isinstance(text_features, torch.Tensor) or not (
        (_is_floating(text_features, 2) and text_features.shape == (2, width))
        or (_is_floating(text_features, 3) and text_features.shape == (images, 2, width))
    ):
        found = tuple(text_features.shape) if isinstance(text_features, torch.Tensor) else type(text_features).__name__
        msg = f"text_features must be floating-point (2, {width}) or ({images}, 2, {width}), got {found}."
        raise InputError(msg)


def _is_floating(value: object, rank: int) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim == rank


def margin(text_features: torch.Tensor) -> torch.Tensor:
    """What separates anomalous from normal: (..., 2, D) to (..., 1, D), not of unit length.

    A product with it is the difference of two cosines, without the digits lost by subtracting them afterwards.

    Example:
        >>> margin(torch.tensor([[0.6, 0.8], [0.8, 0.6]]))
        tensor([[ 0.2000, -0.2000]])
    """
    return text_features[..., 1:, :] - text_features[..., :1, :]
