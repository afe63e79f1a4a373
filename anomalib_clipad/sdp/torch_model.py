"""SDP in plain PyTorch: a class name and an image in, an anomaly map and a score out.

CLIP-AD (arXiv 2311.00453), section 3. Nothing is trained.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import open_clip
import torch
from torch import nn
from torch.nn import functional as F

from anomalib_clipad.components import (
    Backbone,
    ClassTextFeatures,
    DualPathFeatures,
    DualPathVisionTransformer,
    GaussianSmoothing,
    PromptEnsemble,
    ReferenceBank,
    ReferenceFusion,
    TextEncoder,
    feature_surgery,
    keep_shape,
    load_backbone,
)
from anomalib_clipad.components.image_size import parse_image_size
from anomalib_clipad.components.reference import MOST_PATCHES
from anomalib_clipad.components.representative_vector import rvs_options
from anomalib_clipad.components.scores import LOGIT_SCALE, MapScale, Prediction, ScoreFusion, Scores, text_score
from anomalib_clipad.components.text_encoder import Tokenizer
from anomalib_clipad.errors import InputError

PAPER_SIGMA, PAPER_SIZE = 8.0, 240  # the smoothing belongs to this input size


class ClipAdSdpModel(ClassTextFeatures):
    """SDP: staged dual path, feature surgery and text vectors chosen by RVS.

    Args:
        backbone: See :func:`anomalib_clipad.components.load_backbone`.
        pretrained: Likewise.
        class_names: Classes to score against, in the order of ``class_index``; more with :meth:`set_classes`.
        layers: Blocks to tap; the ends of the four stages by default.
        rvs: How the text vectors are chosen: a method's name, or a mapping of ``method`` and its options.
        prompts: Prompt ensemble, see :meth:`anomalib_clipad.components.PromptEnsemble.from_config`.
        image_size: Side, or height and width, of the input in pixels; the tower's own by default. ``auto:2.5`` keeps
            the shape of pictures that are 2.5 times as wide as high, see :meth:`keep_shape`.
        sigma: Standard deviation of the map's smoothing in pixels; by default 8 at 240 x 240 pixels, and in proportion
            to the square root of the area.
        max_references: Most patches of references a tap, see :class:`anomalib_clipad.components.ReferenceBank`.
        clip: A ready open_clip model to use instead of loading one. Its vision tower is frozen and set to eval mode in
            place: give a copy of a CLIP that is still being trained.
        tokenizer: Tokenizer of ``clip``; open_clip's standard one by default.

    Raises:
        InputError: If an argument cannot be used.

    Example:
        >>> import open_clip
        >>> vision = {"image_size": 32, "layers": 4, "width": 16, "head_width": 8, "patch_size": 8}
        >>> text = {"width": 8, "heads": 1, "layers": 1}
        >>> clip = open_clip.CLIP(embed_dim=12, vision_cfg=vision, text_cfg=text)
        >>> model = ClipAdSdpModel(clip=clip, class_names=["bottle", "metal nut"], rvs="mean")
        >>> batch = model(torch.rand(3, 3, 32, 32), class_index=torch.tensor([0, 1, 1]))
        >>> batch.anomaly_map.shape, batch.pred_score.shape
        (torch.Size([3, 32, 32]), torch.Size([3]))
    """

    needs_original = False  # whether the map needs the original path's taps

    def __init__(
        self,
        backbone: str = "ViT-B-16-plus-240",
        pretrained: str | None = "laion400m_e31",
        class_names: Sequence[str] = (),
        layers: list[int] | None = None,
        rvs: str | Mapping[str, str | float] = "dbscan",
        prompts: str | Mapping[str, Sequence[str]] | PromptEnsemble = "industrial",
        image_size: int | tuple[int, int] | str | None = None,
        sigma: float | None = None,
        max_references: int = MOST_PATCHES,
        clip: nn.Module | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        options, ensemble = rvs_options(rvs), PromptEnsemble.from_config(prompts)
        if clip is None:
            loaded = load_backbone(backbone, pretrained)
        else:
            loaded = Backbone(clip.eval(), tokenizer or open_clip.get_tokenizer("ViT-B-32"))
        visual = DualPathVisionTransformer(cast("nn.Module", loaded.clip.visual), layers)
        super().__init__(TextEncoder(loaded.clip, loaded.tokenizer), visual.embed_dim, ensemble, options)
        self.mean, self.std = loaded.mean, loaded.std
        self.visual = visual.eval().requires_grad_(requires_grad=False)
        self.fusion = ScoreFusion(self.map_scale)
        self.reference_fusion = ReferenceFusion()
        self._sigma, self._max_references = sigma, max_references
        self.set_image_size(parse_image_size(image_size, self.visual.image_size, self.visual.patch_size))
        if class_names:
            self.set_classes(class_names)

    @property
    def map_scale(self) -> MapScale:
        """Twice a map value over the stages is a mean margin of cosines, a logit at CLIP's temperature."""
        return MapScale(centre=0.0, slope=LOGIT_SCALE * 2 / len(self.visual.layers))

    def set_image_size(self, image_size: tuple[int, int]) -> None:
        """Take images of another size from now on; forgets what was measured on images of the present one.

        Args:
            image_size: Height and width in pixels, multiples of the patch size.

        Raises:
            InputError: If it is none.
        """
        self.grid = self.visual.grid(image_size)
        self.image_size = image_size
        self.sigma = PAPER_SIGMA * math.sqrt(math.prod(image_size)) / PAPER_SIZE if self._sigma is None else self._sigma
        bank = ReferenceBank(len(self.visual.layers), self.visual.width, self.grid, self._max_references)
        device = self.text_features.device
        self.smoothing, self.references = GaussianSmoothing(image_size, self.sigma).to(device), bank.to(device)
        self.forget_images()

    def keep_shape(self, height: int, width: int) -> tuple[int, int]:
        """The image size that keeps the shape of a picture, see :func:`anomalib_clipad.components.keep_shape`."""
        return keep_shape(height, width, self.visual.image_size, self.visual.patch_size)

    def forget_images(self) -> None:
        """Have no score ranges and no references."""
        self.fusion.reset()
        self.references.reset()
        self.reference_fusion.reset()

    @torch.no_grad()
    def set_references(self, images: Iterable[torch.Tensor], augment: bool = False) -> Scores:
        """Compare all further images with these normal ones, too.

        Args:
            images: Batches (b, 3, H, W) of normal images of the first class, as :meth:`forward` takes them.
            augment: Whether the images are taken flipped and turned as well: eight ways, four if they are not square.

        Returns:
            What each of the k images scores when it is compared with the others, see
            :meth:`anomalib_clipad.components.ReferenceBank.fit`.

        Raises:
            InputError: If no class is set, or an image is of another size, or not finite.
        """
        text_features = self.select_text_features()
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        tokens: list[list[list[torch.Tensor]]] = []  # of every view of an image, then of every tap and batch
        for batch in images:
            views = list(_views(batch)) if augment else [batch]
            features = [self.taps(view) for view in views]
            tokens.append([one.original for one in features])
            with torch.autocast(text_features.device.type, enabled=False):
                found.append(self._text_scores(features[0], text_features))
        if not found:
            msg = "There is no image to take as a reference; give at least one batch."
            raise InputError(msg)
        text_maps, text_scores = (torch.cat(parts) for parts in zip(*found, strict=True))
        original = [
            torch.cat([torch.cat([batch[view][tap] for batch in tokens]) for view in range(len(tokens[0]))])
            for tap in range(len(self.visual.layers))
        ]
        with torch.autocast(text_features.device.type, enabled=False):
            maps = self._enlarge_smoothly(self.references.fit(original, len(text_maps)))
            self.reference_fusion.fit(text_maps, maps, text_scores)
            return self._with_references(text_maps, maps, text_scores)

    def train(self, mode: bool = True) -> "ClipAdSdpModel":
        """Set the training mode; CLIP is frozen and stays in eval mode."""
        super().train(mode)
        self.visual.eval()
        return self

    def forward(self, images: torch.Tensor, class_index: torch.Tensor | None = None) -> Prediction:
        """Score images.

        Args:
            images: (B, 3, H, W) of the model's image size, normalised as CLIP expects. An image that is not finite
                scores NaN; the others are not touched.
            class_index: (B,) index into ``class_names``; the first class for all by default.

        Returns:
            The map, its two scores, and both as one, see :class:`anomalib_clipad.components.ScoreFusion`, or with
            references :class:`anomalib_clipad.components.ReferenceFusion`.

        Raises:
            InputError: If no class is set, or the images or the index are of another shape or type.
        """
        return self.predictions(self.scores(images, class_index))

    def predictions(self, scores: Scores) -> Prediction:
        """The two scores of an image as one."""
        fused = self.fuse(scores.text_score, scores.map_score)
        return Prediction(fused, scores.anomaly_map, scores.text_score, scores.map_score)

    def fuse(self, text_score: torch.Tensor, map_score: torch.Tensor) -> torch.Tensor:
        """One score an image from two, (B,) each."""
        if self.references.fitted:
            return self.reference_fusion.fuse_scores(text_score, map_score)
        return self.fusion(text_score, map_score)

    def fit_fusion(self, text_score: torch.Tensor, map_score: torch.Tensor) -> None:
        """Take the ranges of both scores from labelled validation images; with references they are not needed."""
        if not self.references.fitted:
            self.fusion.fit(text_score, map_score)

    @property
    def score_limits(self) -> tuple[float, float]:
        """Between what an image's score lies, as a rule: with references it counts units above a normal image."""
        return (0.0, math.inf) if self.references.fitted else (0.0, 1.0)

    def scores(self, images: torch.Tensor, class_index: torch.Tensor | None = None) -> Scores:
        """The map and the two scores of images, see :meth:`forward`."""
        if not self.references.fitted or self.needs_original:
            return self.scores_of(self.taps(images, self.needs_original), class_index)
        # One tap of the original path after the other: all of them at once would be the peak of the memory.
        surgery, distances = [], []
        self._check_size(images)
        with torch.no_grad():
            for tap, (tokens, original) in enumerate(self.visual.walk(images)):
                surgery.append(tokens)
                distances.append(self.references.distance(tap, original))
        return self.scores_of(DualPathFeatures([], surgery), class_index, torch.stack(distances).mean(dim=0))

    def taps(self, images: torch.Tensor, with_original: bool = True) -> DualPathFeatures:
        """The features of images of the model's size, without gradients."""
        self._check_size(images)
        with torch.no_grad():
            return self.visual(images, with_original=with_original)

    def _check_size(self, images: torch.Tensor) -> None:
        if images.shape[-2:] != self.image_size:
            msg = f"The model takes images of {self.image_size} pixels, got {tuple(images.shape[-2:])}; resize them."
            raise InputError(msg)

    def scores_of(
        self,
        features: DualPathFeatures,
        class_index: torch.Tensor | None = None,
        distances: torch.Tensor | None = None,
    ) -> Scores:
        """The map and the two scores of taps computed before; in float32, whatever the tower's precision.

        Args:
            features: Taps of both paths; of the surgery path alone where nothing else is needed.
            class_index: See :meth:`forward`.
            distances: (B, N) from the references, where they were measured before.
        """
        text_features = self.select_text_features(class_index)
        if class_index is not None and len(class_index) != len(features.surgery[-1]):
            msg = (
                f"class_index must name a class for each of {len(features.surgery[-1])} images, got {len(class_index)}."
            )
            raise InputError(msg)
        with torch.autocast(text_features.device.type, enabled=False):
            text_map, text = self._text_scores(features, text_features)
            if not self.references.fitted:
                return Scores(text_map, text, text_map.amax(dim=(-2, -1)))
            distances = self.references(features.original) if distances is None else distances
            return self._with_references(text_map, self._enlarge_smoothly(distances), text)

    def _text_scores(
        self, features: DualPathFeatures, text_features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map (B, H, W) and score (B,) of the comparison with the text vectors."""
        text_map = self.smoothing(self.map_before_smoothing(features, text_features))
        return text_map, text_score(features.surgery[-1], text_features)

    def _with_references(self, text_map: torch.Tensor, reference_map: torch.Tensor, text: torch.Tensor) -> Scores:
        anomaly_map = self.reference_fusion.fuse_maps(text_map, reference_map)
        return Scores(anomaly_map, text, self.reference_fusion.map_score(anomaly_map))

    def map_before_smoothing(self, features: DualPathFeatures, text_features: torch.Tensor) -> torch.Tensor:
        """The map of a batch before smoothing, (B, H, W)."""
        return self.similarity_map(features.surgery, text_features)

    def similarity_map(self, surgery: list[torch.Tensor], text_features: torch.Tensor) -> torch.Tensor:
        """Anomalous score of the patches after surgery, resized bilinearly: (B, H, W)."""
        return self._enlarge_patches(feature_surgery(surgery, text_features)[:, 1:, 1])

    def _enlarge_patches(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, N) to (B, H, W), bilinearly."""
        patches = patches.reshape(-1, 1, *self.grid)
        return F.interpolate(patches, size=self.image_size, mode="bilinear", align_corners=False)[:, 0]

    def _enlarge_smoothly(self, patches: torch.Tensor) -> torch.Tensor:
        return self.smoothing(self._enlarge_patches(patches))


def _views(images: torch.Tensor) -> Iterator[torch.Tensor]:
    """Images as they are, then flipped and turned."""
    square = images.shape[-2] == images.shape[-1]
    for quarters in range(4) if square else (0, 2):
        turned = images.rot90(quarters, (-2, -1))
        yield turned
        yield turned.flip(-1)
