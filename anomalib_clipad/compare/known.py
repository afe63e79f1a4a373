"""What is known of single models and cannot be asked of their classes: data, keyed by the name of a class."""

from collections.abc import Callable, Mapping
from typing import Any

import open_clip
from anomalib.models.image.winclip import torch_model as winclip

from anomalib_clipad.components import pretrained

# Means over the data set in per cent, as their authors or anomalib's model READMEs give them.
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "MVTecAD": {
        "WinClip": {"pixel_F1Max": 31.7, "pixel_AUPRO": 64.6},
        "ClipAdSdp": {"pixel_F1Max": 35.9, "pixel_AUPRO": 75.3},
        "ClipAdSdpPlus": {"pixel_F1Max": 40.0, "pixel_AUPRO": 85.1},
        "AnomalyVFM": {
            "image_AUROC": 96.4,
            "image_F1Max": 95.0,
            "pixel_AUROC": 91.9,
            "pixel_F1Max": 49.2,
            "pixel_AUPRO": 87.1,
        },
        "Patchcore": {"image_AUROC": 98.0, "pixel_AUROC": 98.0},
    },
}

# anomalib's WinCLIP has its backbone in constants and takes no argument for it.
FIXED_CLIP: dict[str, tuple[str, str]] = {"WinClip": (winclip.BACKBONE, winclip.PRETRAINED)}
CLIP_SIZES = {"ViT-B-16-plus-240": "800 MB"}  # of downloads


def not_for_use(config: Mapping[str, Any]) -> str | None:
    """As :func:`anomalib_clipad.components.pretrained.not_for_use`, also for anomalib's models.

    Args:
        config: Of a model, with init_args.

    Example:
        >>> not_for_use({"class_path": "Patchcore", "init_args": {"pre_trained": False}})
        'random weights'
    """
    arguments = config.get("init_args") or {}
    return pretrained.not_for_use(arguments) or ("random weights" if arguments.get("pre_trained") is False else None)


def towers_are_sequence_first() -> bool:
    """Whether open_clip's towers still take (N, B, W), as anomalib's WinCLIP expects.

    Example:
        >>> isinstance(towers_are_sequence_first(), bool)
        True
    """
    return not hasattr(open_clip.transformer.Transformer(8, 1, 1), "batch_first")


# What must hold for a model, and what to say where it does not.
REQUIRED: dict[str, tuple[Callable[[], bool], str]] = {
    "WinClip": (
        towers_are_sequence_first,
        "WinCLIP's maps are constant with the installed open_clip, whose towers are batch-first; install "
        "'open_clip_torch>=2.23,<2.26.1' as anomalib asks, or leave WinClip out.",
    ),
}
