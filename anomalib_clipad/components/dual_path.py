"""The staged dual path: CLIP's own image path and, beside it, the surgery path.

CLIP-AD (arXiv 2311.00453), section 3.2. Which original stream a tap sees follows the authors' release.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import nn

from anomalib_clipad.components.attention import attend
from anomalib_clipad.components.linear import linear
from anomalib_clipad.components.resizing import resample_positions
from anomalib_clipad.errors import InputError

STAGES = 4
MOST_PATCHES = 16384  # 2048 x 2048 pixels in patches of 16; more would take all memory


class DualPathFeatures(NamedTuple):
    """Taps of both paths, one tensor a tap, class token first, before unit normalisation.

    Attributes:
        original: (B, N + 1, W) each, tokens of CLIP's own residual stream.
        surgery: (B, N + 1, D) each, tokens of the surgery path in the joint embedding space; the class token is
            the original path's.

    Example:
        >>> DualPathFeatures(original=[torch.rand(1, 5, 8)], surgery=[torch.rand(1, 5, 6)]).surgery[0].shape
        torch.Size([1, 5, 6])
    """

    original: list[torch.Tensor]
    surgery: list[torch.Tensor]


def check_images(images: object, wanted: str, channels: int = 3) -> None:
    """Refuse what is no batch of images.

    Args:
        images: What was given.
        wanted: What is said to be wanted.
        channels: How many there are to be.

    Raises:
        InputError: If it is not a floating-point tensor (B, channels, H, W).

    Example:
        >>> check_images(torch.rand(1, 3, 40, 50), "Images must be a tensor")
    """
    if not isinstance(images, torch.Tensor):
        found = f"a {type(images).__name__}"
    elif images.ndim != 4 or images.shape[1] != channels:
        found = f"shape {tuple(images.shape)}"
    elif not images.is_floating_point():
        found = f"{images.dtype}"
    else:
        return
    msg = f"{wanted}, got {found}; convert them."
    raise InputError(msg)


class DualPathVisionTransformer(nn.Module):
    """Runs an open_clip vision tower along two paths at once, without changing the tower.

    The blocks are cut into four equal stages. Beside CLIP's path, every block adds a value-to-value attention of the
    original path's tokens to the surgery path, which has no feed-forward and starts again at each stage
    (section 3.2 of the paper).

    Args:
        visual: open_clip's ``VisionTransformer`` with a class token (``clip.visual``), 4, 8, 12, 24, ... blocks.
        layers: Blocks to tap, counted from 1, ascending. Defaults to the four stage ends: 3, 6, 9, 12 of 12 blocks.

    Raises:
        InputError: If the tower is of another kind, its blocks cannot be cut into four stages, or a tap is not a block.

    Example:
        >>> import open_clip, torch
        >>> vision = {"image_size": 32, "layers": 4, "width": 16, "head_width": 8, "patch_size": 8}
        >>> text = {"width": 8, "heads": 1, "layers": 1}
        >>> clip = open_clip.CLIP(embed_dim=12, vision_cfg=vision, text_cfg=text).eval()
        >>> features = DualPathVisionTransformer(clip.visual)(torch.rand(2, 3, 32, 32))
        >>> len(features.surgery), features.surgery[0].shape, features.original[0].shape
        (4, torch.Size([2, 17, 12]), torch.Size([2, 17, 16]))
    """

    def __init__(self, visual: VisionTransformer, layers: Sequence[int] | None = None) -> None:
        super().__init__()
        _check_tower(visual)
        self.visual = visual
        self.depth = len(visual.transformer.resblocks)
        self.stage_length = self.depth // STAGES
        self.layers = _check_layers(layers, self.depth)

    @property
    def width(self) -> int:
        """Width W of the original stream."""
        return self.visual.conv1.out_channels

    @property
    def embed_dim(self) -> int:
        """Width D of the joint embedding space."""
        return self.visual.proj.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Native input size (height, width) of the tower, in pixels."""
        return tuple(self.visual.image_size)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        return tuple(self.visual.conv1.kernel_size)

    def grid(self, image_size: tuple[int, int], name: str = "image_size") -> tuple[int, int]:
        """Number of patches (rows, columns) of an image of ``image_size`` (height, width) pixels; ``name`` names it.

        Raises:
            InputError: If a side is not a multiple of the patch size, or there are more than 16384 patches.
        """
        patch = self.patch_size
        sides = isinstance(image_size, tuple | list) and len(image_size) == 2
        if not sides or not all(isinstance(side, int) and side > 0 for side in image_size):
            msg = f"{name} must be a height and a width, whole numbers of pixels above 0, got {image_size!r}."
            raise InputError(msg)
        if any(side % step for side, step in zip(image_size, patch, strict=True)):
            msg = (
                f"{name} must be a multiple of the tower's patch size {patch[0]} x {patch[1]}, "
                f"got {image_size[0]} x {image_size[1]}; resize the images, or choose another {name}."
            )
            raise InputError(msg)
        rows, columns = image_size[0] // patch[0], image_size[1] // patch[1]
        if rows * columns > MOST_PATCHES:
            msg = (
                f"{name} {image_size[0]} x {image_size[1]} makes {rows * columns} patches of {patch[0]} x "
                f"{patch[1]} pixels, and at most {MOST_PATCHES} are possible; choose a smaller {name}."
            )
            raise InputError(msg)
        return rows, columns

    def forward(self, images: torch.Tensor, with_original: bool = True) -> DualPathFeatures:
        """Compute the taps of both paths.

        Args:
            images: (B, 3, H, W), normalised as CLIP expects; H and W multiples of the patch size. Position embeddings
                are interpolated when the size is not the native one.
            with_original: Whether the original stream's taps are wanted. SDP does without them, which spares the last
                block's work on everything but the class token.

        Returns:
            One tensor a tap and path; ``original`` is empty without ``with_original``.

        Raises:
            InputError: If the images are not a floating-point tensor of this shape.
        """
        taps = DualPathFeatures([], [])
        for surgery, original in self.walk(images, with_original):
            taps.surgery.append(surgery)
            if with_original:
                taps.original.append(original)
        return taps

    def walk(self, images: torch.Tensor, with_original: bool = True) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Compute the taps one by one, for a user who needs no more than one at a time; see :meth:`forward`.

        Yields:
            Tokens of the surgery path, (B, N + 1, D), and of the original one, (B, N + 1, W) or, at the last block
            without ``with_original``, its class token alone.
        """
        channels = self.visual.conv1.in_channels
        wanted = f"images must be a floating-point tensor (B, {channels}, H, W), normalised as CLIP expects"
        check_images(images, wanted, channels)
        visual, last = self.visual, self.layers[-1]

        def tap(surgery: torch.Tensor, original: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            tokens = torch.cat([original[:, :1], surgery[:, 1:]], dim=1)
            return visual.ln_post(tokens) @ visual.proj, original

        h = self._embed(images)  # (B, N + 1, W)
        s = h.new_zeros(())  # every stage begins with a block of its own
        for index, block in enumerate(visual.transformer.resblocks, start=1):
            # SDP looks at nothing but the class token of the last block's own path.
            class_only = index == self.depth and not with_original
            attended, surgery = _dual_attention(block, block.ln_1(h), class_only)
            m = (h[:, :1] if class_only else h) + attended
            if index - 1 in self.layers:
                # The release reads a tap's original stream after the next block's attention was added to it.
                yield tap(s, m)
            if index > last:
                return
            s = surgery if (index - 1) % self.stage_length == 0 else s + surgery
            del attended, surgery  # whose memory the feed-forward can use
            h = m + block.ls_2(_feed_forward(block, block.ln_2(m)))
        yield tap(s, h)  # the tower's last block has no next one

    def _embed(self, images: torch.Tensor) -> torch.Tensor:
        visual = self.visual
        grid = self.grid((images.shape[-2], images.shape[-1]))
        x = visual.conv1(images.to(visual.conv1.weight.dtype)).flatten(2).transpose(1, 2)  # (B, N, W)
        class_token = visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([class_token, x], dim=1)
        positions = visual.positional_embedding[None]  # (1, N + 1, W)
        if grid != tuple(visual.grid_size):  # asked here, because timm resizes to the same size while exporting
            positions = resample_positions(positions, grid, tuple(visual.grid_size))
        return visual.ln_pre(x + positions.to(x.dtype))


def _dual_attention(
    block: ResidualAttentionBlock, n: torch.Tensor, class_only: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query-key and value-value attention of one block: (B, N + 1, W) each, the former (B, 1, W) if ``class_only``."""
    attention, width = block.attn, n.shape[-1]
    weight, bias, heads = attention.in_proj_weight, attention.in_proj_bias, attention.num_heads

    def out(tokens: torch.Tensor) -> torch.Tensor:
        return block.ls_1(linear(tokens.transpose(1, 2).flatten(2), attention.out_proj.weight, attention.out_proj.bias))

    if class_only:
        (v,) = _split(linear(n, weight[-width:], bias[-width:]), 1, heads)
        return out(_class_attention(attention, n, v)), out(attend(v, v, v))
    q, k, v = _split(linear(n, weight, bias), 3, heads)
    return out(attend(q, k, v)), out(attend(v, v, v))


def _class_attention(attention: nn.MultiheadAttention, n: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Query-key attention of the class token alone, (B, heads, 1, d), without the keys of all tokens.

    A token's key times the query is the token times the query that went through the keys' weight. The keys' bias adds
    the same to all logits, which the softmax takes away.
    """
    width, heads = n.shape[-1], attention.num_heads
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    (q,) = _split(linear(n[:, :1], weight[:width], bias[:width]), 1, heads)  # (B, heads, 1, d)
    keys = weight[width : 2 * width].unflatten(0, (heads, -1))  # (heads, d, W)
    through = (q * q.shape[-1] ** -0.5) @ keys  # (B, heads, 1, W)
    logits = through[:, :, 0] @ n.mT  # (B, heads, N + 1)
    return logits.softmax(dim=-1, dtype=torch.float32).to(v.dtype)[:, :, None] @ v


def _feed_forward(block: ResidualAttentionBlock, n: torch.Tensor) -> torch.Tensor:
    """``block.mlp``, its linear layers by :func:`linear`, and GELU in place."""
    for layer in block.mlp:
        if type(layer) is nn.Linear:
            n = linear(n, layer.weight, layer.bias)
        elif type(layer) is nn.GELU:
            # The largest tensor there is: a second one takes a CPU up to 7 % of the time. Gradients keep a copy.
            n = torch.ops.aten.gelu_(n, approximate=layer.approximate)
        else:
            n = layer(n)
    return n


def _split(tokens: torch.Tensor, parts: int, heads: int) -> torch.Tensor:
    """(B, L, parts * W) to (parts, B, heads, L, d)."""
    return tokens.reshape(*tokens.shape[:2], parts, heads, -1).permute(2, 0, 3, 1, 4)


def _check_tower(visual: VisionTransformer) -> None:
    name = type(visual).__name__
    wanted = "The dual path needs open_clip's VisionTransformer with a class token"
    if name != "VisionTransformer" or not hasattr(visual, "transformer") or not hasattr(visual, "class_embedding"):
        msg = f"{wanted}, got a {name}; choose a ViT backbone such as ViT-B-16-plus-240."
        raise InputError(msg)
    if getattr(visual, "attn_pool", None) is not None or getattr(visual, "pool_type", "tok") != "tok":
        msg = f"{wanted} as its image feature, got one that pools its tokens; choose a backbone without token pooling."
        raise InputError(msg)
    if getattr(visual, "global_average_pool", False) or getattr(visual, "input_patchnorm", False):
        msg = f"{wanted} and plain patches, got one with average pooling or patch normalisation."
        raise InputError(msg)
    blocks = visual.transformer.resblocks
    if not all(isinstance(block.attn, nn.MultiheadAttention) for block in blocks):
        msg = f"{wanted} and plain multi-head attention, got blocks with {type(blocks[0].attn).__module__}'s variant."
        raise InputError(msg)
    if not blocks or len(blocks) % STAGES:
        msg = f"The dual path cuts the tower into {STAGES} equal stages, which {len(blocks)} blocks do not allow."
        raise InputError(msg)


def _check_layers(layers: Sequence[int] | None, depth: int) -> list[int]:
    if layers is None:
        return [depth // STAGES * stage for stage in range(1, STAGES + 1)]
    taps = list(layers) if isinstance(layers, list | tuple) else []
    if not taps or not all(type(tap) is int and 1 <= tap <= depth for tap in taps) or taps != sorted(set(taps)):
        msg = f"layers must be ascending block numbers between 1 and {depth}, got {layers!r}."
        raise InputError(msg)
    return taps
