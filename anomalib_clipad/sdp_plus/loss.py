"""Training loss of SDP+: focal and Dice loss, summed over the taps (section 3.4 of CLIP-AD, arXiv 2311.00453)."""

import torch

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

    Example:
        >>> focal_loss(torch.full((1, 2, 4, 4), 0.5), torch.zeros(1, 4, 4)).round(decimals=4)
        tensor(0.1733)
    """
    masks = masks.to(probabilities.dtype)
    target = torch.stack([1 - masks, masks], dim=1).clamp(SMOOTHING, 1 - SMOOTHING)
    true = (target * probabilities).sum(dim=1) + SMOOTHING
    return -((1 - true) ** GAMMA * true.log()).mean()


def dice_loss(anomalous: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Dice loss of the anomalous probability: one minus the mean of the images' overlaps.

    Args:
        anomalous: (B, H, W) in [0, 1].
        masks: (B, H, W), 1 or True where anomalous.

    Returns:
        Scalar in [0, 1).

    Example:
        >>> dice_loss(torch.ones(1, 4, 4), torch.ones(1, 4, 4))
        tensor(0.)
    """
    anomalous, masks = anomalous.flatten(1), masks.flatten(1).to(anomalous.dtype)
    overlap = (2 * (anomalous * masks).sum(dim=1) + 1) / (anomalous.sum(dim=1) + masks.sum(dim=1) + 1)
    return 1 - overlap.mean()
