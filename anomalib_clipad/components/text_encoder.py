"""Text vectors: prompts through CLIP's text tower, cut after their end token."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from anomalib_clipad.components.prompts import PromptEnsemble
from anomalib_clipad.components.representative_vector import select_representative_vector

Tokenizer = Callable[[list[str]], torch.Tensor]


class TextEncoder:
    """Encodes prompts with a CLIP's text tower.

    Not a module on purpose: text is encoded once, before the first image, so the text tower neither follows the
    vision tower to the GPU nor into checkpoints and exports.

    CLIP's text tower is causal, so nothing after the end token reaches the result: prompts are cut there, and prompts
    of equal length are encoded together.

    Args:
        clip: An open_clip model.
        tokenizer: The model's tokenizer, from ``open_clip.get_tokenizer``.
        batch_size: Most prompts encoded at once, which bounds the memory.

    Example:
        >>> import open_clip
        >>> vision = {"image_size": 32, "layers": 4, "width": 16, "head_width": 8, "patch_size": 8}
        >>> text = {"width": 8, "heads": 1, "layers": 1}
        >>> clip = open_clip.CLIP(embed_dim=12, vision_cfg=vision, text_cfg=text).eval()
        >>> encoder = TextEncoder(clip, open_clip.get_tokenizer("ViT-B-32"))
        >>> encoder.encode(["a photo of a bottle.", "a bottle"]).shape
        torch.Size([2, 12])
    """

    def __init__(self, clip: nn.Module, tokenizer: Tokenizer, batch_size: int = 256) -> None:
        self.clip = clip
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> torch.Tensor:
        """Unit vectors of prompts: (P, D) in float32, in the order of ``prompts``."""
        tokens = self.tokenizer(prompts).to(self.clip.logit_scale.device)
        tower = getattr(self.clip, "text", self.clip)
        if not _can_be_cut(self.clip, tower):
            chunks = tokens.split(self.batch_size)
            return torch.cat([F.normalize(self.clip.encode_text(chunk).float(), dim=-1) for chunk in chunks])
        lengths = tokens.argmax(dim=1) + 1  # the end token is the largest
        vectors: torch.Tensor | None = None
        for length in lengths.unique().tolist():
            for rows in (lengths == length).nonzero()[:, 0].split(self.batch_size):
                encoded = F.normalize(_encode_cut(tower, tokens[rows, :length]).float(), dim=-1)
                if vectors is None:
                    vectors = encoded.new_empty(len(prompts), encoded.shape[1])
                vectors[rows] = encoded
        return vectors

    def text_features(
        self,
        class_name: str,
        ensemble: PromptEnsemble,
        method: str = "dbscan",
        **options: float,
    ) -> torch.Tensor:
        """The two text vectors of a class: (2, D), normal then anomalous (section 3.1 of the paper).

        Args:
            class_name: What is in the images.
            ensemble: The prompts that describe it.
            method: How a vector is chosen for each cloud, see :func:`select_representative_vector`.
            **options: The method's options.
        """
        clouds = [self.encode(prompts) for prompts in ensemble.prompts(class_name)]
        return torch.stack([select_representative_vector(cloud, method, **options) for cloud in clouds])


def _can_be_cut(clip: nn.Module, tower: nn.Module) -> bool:
    """Whether a prompt's vector is that of its end token in a causal tower of open_clip's own."""
    pool_type = getattr(tower, "pool_type", None) or getattr(clip, "text_pool_type", "argmax")
    return (
        hasattr(tower, "token_embedding")
        and getattr(tower, "attn_mask", None) is not None
        and getattr(tower, "cls_emb", None) is None
        and not getattr(tower, "use_pad_mask", False)
        and pool_type == "argmax"
    )


def _encode_cut(tower: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Encode (P, n) tokens that all end with the end token, as ``encode_text`` does with the padding behind it."""
    length = tokens.shape[1]
    x = tower.token_embedding(tokens).to(tower.transformer.get_cast_dtype())
    x = x + tower.positional_embedding[:length].to(x.dtype)
    mask = tower.attn_mask[:length, :length]
    if hasattr(tower.transformer, "batch_first"):
        x = tower.transformer(x, attn_mask=mask)
    else:  # open_clip before 2.27 runs its towers sequence-first
        x = tower.transformer(x.transpose(0, 1), attn_mask=mask).transpose(0, 1)
    x = tower.ln_final(x)[:, -1]
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection
