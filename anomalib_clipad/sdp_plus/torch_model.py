"""SDP+ in plain PyTorch: SDP and one linear layer a tap, trained once on another data set.

CLIP-AD (arXiv 2311.00453), section 3.4.
"""

from collections.abc import Iterable
from itertools import chain, repeat
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from anomalib_clipad.components import DualPathFeatures
from anomalib_clipad.components.linear import linear
from anomalib_clipad.components.scores import LOGIT_SCALE, MapScale
from anomalib_clipad.components.surgery import margin
from anomalib_clipad.sdp.torch_model import ClipAdSdpModel
from anomalib_clipad.sdp_plus.loss import losses_of_taps


class ClipAdSdpPlusModel(ClipAdSdpModel):
    """SDP+: SDP's map and, added to it, maps of linear layers on the original path's patch tokens.

    Takes the arguments of :class:`anomalib_clipad.sdp.ClipAdSdpModel`. The layers, called adapter, start at random; see
    :mod:`anomalib_clipad.sdp_plus.adapter` for loading and saving them.

    Example:
        >>> import open_clip
        >>> vision = {"image_size": 32, "layers": 4, "width": 16, "head_width": 8, "patch_size": 8}
        >>> text = {"width": 8, "heads": 1, "layers": 1}
        >>> clip = open_clip.CLIP(embed_dim=12, vision_cfg=vision, text_cfg=text)
        >>> model = ClipAdSdpPlusModel(clip=clip, class_names=["bottle"], rvs="mean")
        >>> model(torch.rand(2, 3, 32, 32)).anomaly_map.shape
        torch.Size([2, 32, 32])
        >>> sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        816
    """

    needs_original = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - those of SDP
        super().__init__(*args, **kwargs)
        self.adapter = nn.ModuleList(nn.Linear(self.visual.width, self.visual.embed_dim) for _ in self.visual.layers)

    @property
    def map_scale(self) -> MapScale:
        """The layers add a probability a stage, balanced at one half; a certain one is worth four logits."""
        stages = len(self.visual.layers)
        return MapScale(centre=stages / 2, slope=8 / stages)

    @property
    def trained_layers(self) -> nn.ModuleList:
        """The adapter: what is trained, and kept in a checkpoint."""
        return self.adapter

    def map_before_smoothing(
        self, features: DualPathFeatures, text_features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """SDP's map plus the layers' anomalous probabilities, (B, H, W), and SDP's offset, (B,)."""
        total, offset = super().map_before_smoothing(features, text_features)
        logits = torch.cat(self.patch_logits(features.original, text_features), dim=1)  # (B, taps, rows, columns)
        return total + self._enlarge(logits).sigmoid().sum(dim=1), offset

    def loss(
        self,
        original: list[torch.Tensor],
        masks: torch.Tensor,
        class_index: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Focal and Dice loss, each summed over the taps; what is to be minimised is their sum.

        Args:
            original: Taps of the original path, (B, N + 1, W) each.
            masks: (B, H, W), 1 or True where anomalous.
            class_index: (B,) index into ``class_names``; the first class for all by default.
        """
        with torch.autocast(masks.device.type, enabled=False):
            probabilities = self.linear_probabilities(original, self.select_text_features(class_index))
            return losses_of_taps(probabilities, masks)

    def loss_of_pictures(
        self, images: torch.Tensor, masks: torch.Tensor, class_index: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Likewise of pictures, each of whose tiles is one more picture.

        Where pictures are cut, the tower runs again for the gradient, so that only the pixels of the views are kept.

        Args:
            images: (B, 3, H, W), as :meth:`forward` takes them.
            masks: See :meth:`loss`.
            class_index: See :meth:`loss`.
        """
        if not len(self.tiling):
            return self._loss_of_views(images, masks, class_index)
        planes, most = masks.as_subclass(torch.Tensor)[:, None].float(), self.tile_batch_size
        views = chain(self.tiling.whole(images).split(most), self.tiling.tiles(images, most))
        small = F.interpolate(planes, size=self.view_size, mode="nearest")
        parts = chain(small.split(most), self.tiling.tiles(planes, most))
        indices: Iterable[torch.Tensor | None] = repeat(None)
        if class_index is not None:
            of_tiles = class_index.repeat_interleave(len(self.tiling))
            indices = chain(class_index.split(most), of_tiles.split(most))
        losses = [
            len(view) * torch.stack(checkpoint(self._loss_of_views, view, part[:, 0], index, use_reentrant=False))
            for view, part, index in zip(views, parts, indices, strict=False)
        ]
        focal, dice = torch.stack(losses).sum(dim=0) / (len(images) * (1 + len(self.tiling)))
        return focal, dice

    def _loss_of_views(
        self, views: torch.Tensor, masks: torch.Tensor, class_index: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.loss(self.taps(views).original, masks, class_index)

    def linear_probabilities(self, original: list[torch.Tensor], text_features: torch.Tensor) -> list[torch.Tensor]:
        """What each layer thinks of every pixel.

        Args:
            original: Taps of the original path, (B, N + 1, W) each, class token first.
            text_features: (2, D) or (B, 2, D) unit vectors.

        Returns:
            One (B, 2, H, W) tensor a tap, normal and anomalous probability of each pixel, in float32.
        """
        maps = [self._enlarge(logits) for logits in self.patch_logits(original, text_features)]
        return [torch.cat([-logits, logits], dim=1).sigmoid() for logits in maps]

    def patch_logits(self, original: list[torch.Tensor], text_features: torch.Tensor) -> list[torch.Tensor]:
        """How anomalous each layer finds every patch: one (B, 1, rows, columns) tensor a tap.

        A softmax of two is a sigmoid of their difference: one map to enlarge instead of two, and see :func:`margin`.
        """
        text = LOGIT_SCALE * margin(text_features.float()).expand(original[0].shape[0], -1, -1)  # (B, 1, D)
        taps = []
        for layer, tokens in zip(cast("list[nn.Linear]", self.adapter), original, strict=True):
            patches = linear(tokens[:, 1:].float(), layer.weight.float(), layer.bias.float())  # (B, N, D)
            logits = F.normalize(patches, dim=-1) @ text.transpose(1, 2)  # (B, N, 1)
            taps.append(logits.transpose(1, 2).unflatten(2, self.grid))
        return taps

    def _enlarge(self, logits: torch.Tensor) -> torch.Tensor:
        # Corners are aligned here, unlike in SDP's map, as the authors have it.
        return F.interpolate(logits, size=self.view_size, mode="bilinear", align_corners=True)
