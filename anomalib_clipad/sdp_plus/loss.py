"""Training loss of SDP+: focal and Dice loss, summed over the taps (section 3.4 of CLIP-AD, arXiv 2311.00453)."""

from collections.abc import Sequence

import torch

from anomalib_clipad.errors import InputError

SMOOTHING = 1e-5
GAMMA = 2


def focal_loss(probabilities: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Focal loss of pixels, without class weights.

    The one-hot target is clamped to [1e-5, 1 - 1e-5] and 1e-5 is added to the probability of the true class, so that
    loss and gradient stay finite at probabilities of 0 and 1.

    Args:
        probabilities: (B, 2, H, W), normal and anomalous, in [0, 1].
        masks: (B, H, W), 1 or True where anomalous.

    Returns:
        Scalar, mean over all pixels.

    Raises:
        InputError: If the tensors are of other shapes or types.

    Example:
        >>> focal_loss(torch.full((1, 2, 4, 4), 0.5), torch.zeros(1, 4, 4)).round(decimals=4)
        tensor(0.1733)
    """
    _check("probabilities", probabilities, 4, masks)
    return _focal(probabilities, _one_hot(masks.to(probabilities.dtype)))


def dice_loss(anomalous: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Dice loss of the anomalous probability: one minus the mean of the images' overlaps.

    Args:
        anomalous: (B, H, W) in [0, 1].
        masks: (B, H, W), 1 or True where anomalous.

    Returns:
        Scalar in [0, 1).

    Raises:
        InputError: If the tensors are of other shapes or types.

    Example:
        >>> dice_loss(torch.ones(1, 4, 4), torch.ones(1, 4, 4))
        tensor(0.)
    """
    _check("anomalous", anomalous, 3, masks)
    anomalous, masks = anomalous.flatten(1), masks.flatten(1).to(anomalous.dtype)
    overlap = (2 * (anomalous * masks).sum(dim=1) + 1) / (anomalous.sum(dim=1) + masks.sum(dim=1) + 1)
    return 1 - overlap.mean()


def losses_of_taps(probabilities: Sequence[torch.Tensor], masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Focal and Dice loss, each summed over the taps, which share their targets.

    Args:
        probabilities: (B, 2, H, W) of every tap, see :func:`focal_loss`.
        masks: (B, H, W), 1 or True where anomalous.

    Returns:
        Two scalars.

    Raises:
        InputError: If the tensors are of other shapes or types.

    Example:
        >>> focal, dice = losses_of_taps([torch.full((1, 2, 4, 4), 0.5)], torch.zeros(1, 4, 4))
        >>> focal.round(decimals=4)
        tensor(0.1733)
    """
    for values in probabilities:
        _check("probabilities", values, 4, masks)
    masks = masks.as_subclass(torch.Tensor).to(probabilities[0].dtype)
    target = _one_hot(masks)
    focal = torch.stack([_focal(values, target) for values in probabilities]).sum()
    dice = torch.stack([dice_loss(values[:, 1], masks) for values in probabilities]).sum()
    return focal, dice


def _one_hot(masks: torch.Tensor) -> torch.Tensor:
    return torch.stack([1 - masks, masks], dim=1).clamp(SMOOTHING, 1 - SMOOTHING)


def _focal(probabilities: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    true = (target * probabilities).sum(dim=1) + SMOOTHING
    return -((1 - true) ** GAMMA * true.log()).mean()


def _check(name: str, values: torch.Tensor, rank: int, masks: torch.Tensor) -> None:
    """Values (B, 2, H, W) or (B, H, W) and masks (B, H, W) belong together."""
    tensors = isinstance(values, torch.Tensor) and isinstance(masks, torch.Tensor)
    if tensors and values.is_floating_point() and values.ndim == rank and masks.ndim == 3 and not masks.is_complex():
        b, *size = masks.shape
        if tuple(values.shape) == ((b, 2, *size) if rank == 4 else (b, *size)):
            return
    found = [tuple(v.shape) if isinstance(v, torch.Tensor) else type(v).__name__ for v in (values, masks)]
    shape = "(B, 2, H, W)" if rank == 4 else "(B, H, W)"
    msg = f"{name} must be floating-point {shape} and masks (B, H, W), got {found[0]} and {found[1]}."
    raise InputError(msg)
