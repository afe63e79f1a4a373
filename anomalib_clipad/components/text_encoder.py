"""Text vectors: prompts through CLIP's text tower, cut after their end token."""

import logging
from collections.abc import Callable

import torch
from open_clip import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer
from torch import nn
from torch.nn import functional as F

from anomalib_clipad.components.prompts import PromptEnsemble
from anomalib_clipad.components.representative_vector import check_rvs, select_representative_vector
from anomalib_clipad.components.text_cache import TextVectorCache
from anomalib_clipad.errors import InputError

logger = logging.getLogger(__name__)

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
        fill_text: Called before the tower is used, see :class:`anomalib_clipad.components.Backbone`.
        cache: Where :meth:`text_features` looks first.

    Raises:
        InputError: If an argument is of another kind.

    Example:
        >>> import open_clip
        >>> vision = {"image_size": 32, "layers": 4, "width": 16, "head_width": 8, "patch_size": 8}
        >>> text = {"width": 8, "heads": 1, "layers": 1}
        >>> clip = open_clip.CLIP(embed_dim=12, vision_cfg=vision, text_cfg=text).eval()
        >>> encoder = TextEncoder(clip, open_clip.get_tokenizer("ViT-B-32"))
        >>> encoder.encode(["a photo of a bottle.", "a bottle"]).shape
        torch.Size([2, 12])
    """

    def __init__(
        self,
        clip: CLIP | CustomTextCLIP,
        tokenizer: Tokenizer,
        batch_size: int = 256,
        fill_text: Callable[[], None] | None = None,
        cache: TextVectorCache | None = None,
    ) -> None:
        if not isinstance(clip, nn.Module) or not hasattr(clip, "encode_text") or not hasattr(clip, "logit_scale"):
            msg = f"clip must be a CLIP of open_clip with its text tower, got a {type(clip).__name__}."
            raise InputError(msg)
        if not callable(tokenizer):
            msg = f"tokenizer must be a function from sentences to tokens, got {tokenizer!r}."
            raise InputError(msg)
        if type(batch_size) is not int or batch_size < 1:
            msg = f"batch_size must be a whole number above 0, got {batch_size!r}."
            raise InputError(msg)
        self.clip: CLIP | CustomTextCLIP = clip
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.fill_text = fill_text
        self.cache = cache
        self._encoded: tuple[object, list[torch.Tensor]] = None, []  # the last class's prompts and their vectors

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> torch.Tensor:
        """Unit vectors of prompts: (P, D) in float32, in the order of ``prompts``.

        Raises:
            InputError: If there are no prompts, or the tokenizer or the weights do not serve them.
        """
        if self.fill_text is not None:
            self.fill_text()
        # Vectors are kept for all runs, so they are those of the weights' own precision.
        with torch.autocast(self.clip.logit_scale.device.type, enabled=False):
            return self._encode(prompts)

    def _encode(self, prompts: list[str]) -> torch.Tensor:
        tower = getattr(self.clip, "text", self.clip)
        can_be_cut = _can_be_cut(self.clip, tower)
        tokens = self._tokens(prompts, tower if can_be_cut else None)
        if not can_be_cut:
            chunks = tokens.split(self.batch_size)
            return _finite(torch.cat([F.normalize(self.clip.encode_text(chunk).float(), dim=-1) for chunk in chunks]))
        lengths = tokens.argmax(dim=1) + 1  # the end token is the largest
        vectors: torch.Tensor | None = None
        for length in lengths.unique().tolist():
            for rows in (lengths == length).nonzero()[:, 0].split(self.batch_size):
                encoded = F.normalize(_encode_cut(tower, tokens[rows, :length]).float(), dim=-1)
                if vectors is None:
                    vectors = encoded.new_empty(len(prompts), encoded.shape[1])
                vectors[rows] = encoded
        assert vectors is not None  # noqa: S101 - for the type checker: there is at least one prompt
        return _finite(vectors)

    def fits(self, prompt: str) -> bool:
        """Whether the tower reads a prompt to its end: the tokenizer cuts one that is too long without a word."""
        tokens = self.tokenizer([prompt, f"{prompt} {prompt}"])
        return not torch.equal(tokens[0], tokens[1])

    def _tokens(self, prompts: list[str], tower: CLIP | TextTransformer | None) -> torch.Tensor:
        listed = isinstance(prompts, list | tuple) and len(prompts) > 0
        if not listed or not all(isinstance(prompt, str) for prompt in prompts):
            msg = f"prompts must be a list of at least one sentence, got {prompts!r}."
            raise InputError(msg)
        tokens = self.tokenizer(prompts)
        if not isinstance(tokens, torch.Tensor) or tokens.ndim != 2 or len(tokens) != len(prompts):
            found = getattr(tokens, "shape", type(tokens).__name__)
            msg = f"The tokenizer must give one row of tokens a prompt, got {found}; use the CLIP's own."
            raise InputError(msg)
        if tower is not None:
            words, places = tower.token_embedding.num_embeddings, len(tower.positional_embedding)
            if tokens.is_floating_point() or not 0 <= tokens.min() <= tokens.max() < words or tokens.shape[1] > places:
                msg = (
                    f"The tokenizer does not belong to the CLIP, which knows {words} tokens and sentences of {places}; "
                    f"it gives {tokens.shape[1]} a sentence up to {tokens.max()}. Use the CLIP's own."
                )
                raise InputError(msg)
        return tokens.to(self.clip.logit_scale.device)

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

        Raises:
            InputError: If the class name is empty, or the method or an option is unknown.
        """
        if not isinstance(ensemble, PromptEnsemble):
            msg = f"ensemble must be a PromptEnsemble, got {ensemble!r}; make one with PromptEnsemble.from_config."
            raise InputError(msg)
        prompts = ensemble.prompts(class_name)
        source = {"prompts": prompts, "rvs": {"method": method, **check_rvs(method, **options)}}
        vectors = None if self.cache is None else self.cache.read(source)
        if vectors is None:
            clouds = self._clouds(class_name, prompts)
            vectors = torch.stack([select_representative_vector(cloud, method, **options) for cloud in clouds])
            if self.cache is not None:
                self.cache.write(source, vectors)
        return vectors.to(self.clip.logit_scale.device)

    def class_vector(self, class_name: str, ensemble: PromptEnsemble) -> torch.Tensor:
        """The vector of a class, normal or not: (D,), the mean of all its prompts' unit vectors, of unit length again.

        Args:
            class_name: What is in the images.
            ensemble: The prompts that describe it.

        Raises:
            InputError: If the class name is empty.
        """
        prompts = ensemble.prompts(class_name)
        source = {"prompts": prompts, "vector": "mean of all"}
        vector = None if self.cache is None else self.cache.read(source)
        if vector is None:
            vector = F.normalize(torch.cat(self._clouds(class_name, prompts)).mean(dim=0), dim=0)
            if self.cache is not None:
                self.cache.write(source, vector)
        return vector.to(self.clip.logit_scale.device)

    def _clouds(self, class_name: str, prompts: tuple[list[str], list[str]]) -> list[torch.Tensor]:
        """Unit vectors of the normal and of the anomalous prompts, encoded once where both vectors are asked for."""
        if self._encoded[0] != prompts:
            logger.info("Encoding %d prompts of %r.", sum(map(len, prompts)), class_name)
            self._encoded = prompts, [self.encode(sentences) for sentences in prompts]
            if cut := [sentence for sentences in prompts for sentence in sentences if not self.fits(sentence)]:
                logger.warning(
                    "%d prompts of %r are longer than the text tower reads, so their ends are lost: %r; give a shorter "
                    "class_name, or shorter prompts.",
                    len(cut),
                    class_name,
                    max(cut, key=len),
                )
        return self._encoded[1]


def _finite(vectors: torch.Tensor) -> torch.Tensor:
    if not vectors.isfinite().all():
        msg = "The text tower gives vectors that are not finite; its weights are damaged or do not fit its precision."
        raise InputError(msg)
    return vectors


def _can_be_cut(clip: CLIP | CustomTextCLIP, tower: CLIP | TextTransformer) -> bool:
    """Whether a prompt's vector is that of its end token in a causal tower of open_clip's own."""
    pool_type = getattr(tower, "pool_type", None) or getattr(clip, "text_pool_type", "argmax")
    return (
        hasattr(tower, "token_embedding")
        and getattr(tower, "attn_mask", None) is not None
        and getattr(tower, "cls_emb", None) is None
        and not getattr(tower, "use_pad_mask", False)
        and pool_type == "argmax"
    )


def _encode_cut(tower: CLIP | TextTransformer, tokens: torch.Tensor) -> torch.Tensor:
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
