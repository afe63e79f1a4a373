"""SDP in plain PyTorch: a class name and an image in, an anomaly map and a score out.

CLIP-AD (arXiv 2311.00453), section 3. Nothing is trained.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import cast

import open_clip
import torch
from torch import nn

from anomalib_clipad.components import (
    Backbone,
    DualPathFeatures,
    DualPathVisionTransformer,
    OpenedBackbone,
    PromptEnsemble,
    ReferenceBank,
    ReferenceFusion,
    Region,
    RegionOfPictures,
    TextEncoder,
    Tiling,
    keep_shape,
    open_backbone,
)
from anomalib_clipad.components.defect_words import Defects
from anomalib_clipad.components.image_size import parse_image_size
from anomalib_clipad.components.reference import MOST_PATCHES
from anomalib_clipad.components.reference_tokens import reference_taps
from anomalib_clipad.components.region import Boxes
from anomalib_clipad.components.representative_vector import rvs_options
from anomalib_clipad.components.scores import LOGIT_SCALE, MapScale, Prediction, ScoreFusion, Scores, text_score
from anomalib_clipad.components.surgery import surgery_scores
from anomalib_clipad.components.text_encoder import Tokenizer
from anomalib_clipad.components.tiling import ViewScores, check_tiles
from anomalib_clipad.errors import InputError
from anomalib_clipad.sdp.few_shot import FewShotNetwork

PAPER_SIGMA, PAPER_SIZE = 8.0, 240  # the smoothing belongs to this input size


class ClipAdSdpModel(FewShotNetwork):
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
        sigma: Standard deviation of the map's smoothing in pixels; by default 8/240 of the root of the input's area.
        tile_size: Side, or height and width, of tiles that images are cut into, see :meth:`scores`; none by default.
        tile_overlap: Share of a tile that the next one covers, too, at least.
        tile_batch_size: Most tiles that go through the tower at once.
        region: What is looked at: path of a mask picture, whose white counts, or boxes [left, top, right, bottom] in
            fractions of width and height; everything by default. See :meth:`scores`.
        reference_layers: Some of ``layers``, at which images are compared with references; by default those that suit
            the weights, see :class:`anomalib_clipad.components.Backbone`, or else all.
        max_references: Most patches of references a tap, see :class:`anomalib_clipad.components.ReferenceBank`.
        defects: Words for what is found, see :class:`anomalib_clipad.components.DefectNames` and :meth:`name_defects`.
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
        >>> batch.pred_score.shape, model.enlarge(batch.anomaly_map[0], (480, 640)).shape
        (torch.Size([3]), torch.Size([480, 640]))
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
        tile_size: int | tuple[int, int] | None = None,
        tile_overlap: float = 0.25,
        tile_batch_size: int = 8,
        region: str | Path | Boxes | None = None,
        reference_layers: list[int] | None = None,
        max_references: int = MOST_PATCHES,
        defects: Defects = None,
        clip: nn.Module | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        options, ensemble = rvs_options(rvs), PromptEnsemble.from_config(prompts)
        if clip is None:
            opened = open_backbone(backbone, pretrained)
        else:
            ready = Backbone(clip.eval(), tokenizer or open_clip.get_tokenizer("ViT-B-32"))
            opened = OpenedBackbone(ready)
        loaded = opened.loaded
        visual = DualPathVisionTransformer(cast("nn.Module", loaded.clip.visual), layers)
        encoder = TextEncoder(loaded.clip, loaded.tokenizer, fill_text=opened.fill_text, cache=opened.cache)
        super().__init__(encoder, visual.embed_dim, ensemble, options, defects)
        self.mean, self.std = loaded.mean, loaded.std
        self.visual = visual.eval().requires_grad_(requires_grad=False)
        self.fusion = ScoreFusion(self.map_scale)
        self.reference_fusion = ReferenceFusion()
        self._sigma, self._max_references = sigma, max_references
        self.reference_taps = reference_taps(reference_layers, loaded.reference_layers, self.visual.layers)
        self.region = RegionOfPictures(None if region is None else Region(region))
        check_tiles(image_size, tile_size, tile_overlap, tile_batch_size)
        sizes = self.visual.image_size, self.visual.patch_size
        self.tile_size = None if tile_size is None else parse_image_size(tile_size, *sizes)
        self.tile_overlap, self.tile_batch_size = tile_overlap, tile_batch_size
        self.set_image_size(parse_image_size(image_size, *sizes))
        if class_names:
            self.set_classes(class_names)

    @property
    def map_scale(self) -> MapScale:
        """Twice a map value over the stages is a mean margin of cosines, a logit at CLIP's temperature."""
        return MapScale(centre=0.0, slope=LOGIT_SCALE * 2 / len(self.visual.layers))

    def set_image_size(self, image_size: tuple[int, int]) -> None:
        """Take images of another size from now on; forgets what was measured on images of the present one.

        Args:
            image_size: Height and width in pixels, multiples of the patch size where images are not cut into tiles.

        Raises:
            InputError: If it is none, or a region leaves nothing of such images.
        """
        view_size = self.tile_size or image_size
        self.grid = self.visual.grid(view_size, "tile_size" if self.tile_size else "image_size")
        self.image_size, self.view_size = image_size, view_size
        self.sigma = PAPER_SIGMA * math.sqrt(math.prod(view_size)) / PAPER_SIZE if self._sigma is None else self._sigma
        device = self.text_features.device
        self.tiling = Tiling(image_size, view_size, self.tile_overlap, self.sigma).to(device)
        self.region.lie_in(self.tiling, self.tile_batch_size)
        self.region.to(device)
        self.references, self.tile_references = (
            ReferenceBank(len(self.reference_taps), self.visual.width, self.grid, self._max_references).to(device)
            for _ in range(2)
        )
        self.forget_images()

    def keep_shape(self, height: int, width: int) -> tuple[int, int]:
        """The image size that keeps the shape of a picture, see :func:`anomalib_clipad.components.keep_shape`."""
        return keep_shape(height, width, self.visual.image_size, self.visual.patch_size)

    def enlarge(self, anomaly_map: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """A map in the pixels of its picture.

        Args:
            anomaly_map: (H, W), one of those of :meth:`forward`.
            size: Height and width of the picture.

        Returns:
            The map, enlarged bilinearly; nothing outside of a region blends in.
        """
        return self.region.enlarge(anomaly_map[None], size)[0]

    def forget_images(self) -> None:
        """Have no score ranges and no references."""
        super().forget_images()
        classes = max(1, len(self.class_names))
        self.fusion.reset(classes)
        self.references.reset()
        self.tile_references.reset()
        self.reference_fusion.reset(classes)

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
            class_index: (B,) index into ``class_names``; by default the first class for all, or what each shows where
                :meth:`set_classes` was told to choose.

        Returns:
            The map, its two scores, and both as one, see :class:`anomalib_clipad.components.ScoreFusion`, or with
            references :class:`anomalib_clipad.components.ReferenceFusion`. With a region, where it is; the map outside
            of it is its least value inside, which the post-processor shows as 0.

        Raises:
            InputError: If no class is set, or the images or the index are of another shape or type.
        """
        return self.predictions(self.scores(images, class_index))

    def predictions(self, scores: Scores) -> Prediction:
        """The two scores of an image as one."""
        anomaly_map, text_score, map_score, _, class_index, offset = scores
        fused = self.fuse(text_score, map_score, class_index)
        return Prediction(fused, anomaly_map, text_score, map_score, class_index, offset)

    def scores(self, images: torch.Tensor, class_index: torch.Tensor | None = None) -> Scores:
        """The map and the two scores of images, see :meth:`forward` and :meth:`Tiling.join`.

        With a region, they are those of images whose outside is made of the nearest pixels inside: the text score is
        that of such an image, and of the tiles of which half is inside, or the most where half of none is. The map's
        score is made of pixels inside.
        """
        self.check_size(images, self.image_size)
        images = self.region.fill(images)
        whole = self._look(self.tiling.whole(images), self.references, class_index)
        tiles = self._look_at_tiles(images, whole.class_index) if len(self.tiling) else None
        with torch.autocast(self.text_features.device.type, enabled=False):
            return self.joined_scores(self.tiling.join(whole, tiles, self.region.tiles))

    def _look_at_tiles(self, images: torch.Tensor, class_index: torch.Tensor | None) -> ViewScores:
        indices: Iterable[torch.Tensor | None] = repeat(None)
        if class_index is not None:
            of_tiles = class_index.repeat_interleave(len(self.tiling))
            # An exported model takes all tiles at once.
            indices = [of_tiles] if torch.compiler.is_compiling() else of_tiles.split(self.tile_batch_size)
        views = self.tiling.tiles(images, self.tile_batch_size)
        pairs = zip(views, indices, strict=False)
        return ViewScores.cat([self._look(view, self.tile_references, index) for view, index in pairs])

    def _look(self, views: torch.Tensor, bank: ReferenceBank, class_index: torch.Tensor | None) -> ViewScores:
        """Run the tower, and compare what it gives with text vectors and references."""
        # Where the class is to be chosen, it is known behind the last tap.
        if not bank.fitted or self.needs_original or (class_index is None and self.class_choice.ready):
            return self.compare(self.taps(views, self.needs_original or bank.fitted), class_index, bank)
        # One tap of the original path after the other: all of them at once would be the peak of the memory.
        surgery, distances = [], []
        with torch.no_grad():
            for tap, (tokens, original) in enumerate(self.visual.walk(views)):
                surgery.append(tokens)
                if tap in self.reference_taps:
                    distances.append(bank.distance(self.reference_taps.index(tap), original, class_index))
        seen = self.compare(DualPathFeatures([], surgery), class_index)
        return seen._replace(reference_map=self.enlarge_patches(torch.stack(distances).mean(dim=0)))

    def taps(self, views: torch.Tensor, with_original: bool = True) -> DualPathFeatures:
        """The features of whole images or tiles of the tower's input size, without gradients."""
        self.check_size(views, self.view_size)
        with torch.no_grad():
            return self.visual(views, with_original=with_original)

    def scores_of(self, features: DualPathFeatures, class_index: torch.Tensor | None = None) -> Scores:
        """The map and the two scores of taps computed before; in float32, whatever the tower's precision.

        Args:
            features: Taps of both paths, of images that were not cut into tiles, nor to a region.
            class_index: See :meth:`forward`.
        """
        with torch.autocast(self.text_features.device.type, enabled=False):
            return self.joined_scores(self.tiling.join(self.compare(features, class_index, self.references), None))

    def compare(
        self,
        features: DualPathFeatures,
        class_index: torch.Tensor | None = None,
        bank: ReferenceBank | None = None,
    ) -> ViewScores:
        """Compare taps with the text vectors, and with references where there is a bank of them."""
        surgery = features.surgery
        class_index = self.index_of(surgery, class_index)
        text_features = self.select_text_features(class_index)
        if class_index is not None and class_index.shape[0] != surgery[-1].shape[0]:
            msg = f"class_index must name a class for each of {len(surgery[-1])} images, got {len(class_index)}."
            raise InputError(msg)
        with torch.autocast(text_features.device.type, enabled=False):
            text_map, offset = self.map_before_smoothing(features, text_features)
            score, evidence = text_score(surgery[-1], text_features), self.defect_names.evidence(surgery)
            seen = ViewScores(text_map, score, None, evidence, class_index, offset)
            if bank is None or not bank.fitted:
                return seen
            return seen._replace(reference_map=self.enlarge_patches(bank(self.reference_tokens(features), class_index)))

    def map_before_smoothing(
        self, features: DualPathFeatures, text_features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Anomalous scores of the patches after surgery, resized bilinearly, (B, H, W), and their offset, (B,)."""
        anomalous, offset = surgery_scores(features.surgery, text_features)
        return self.enlarge_patches(anomalous[:, 1:]), offset
