"""What the engine side needs of a network."""

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

import torch

from anomalib_clipad.components import (
    ClassChoice,
    DefectName,
    DefectNames,
    DualPathFeatures,
    DualPathVisionTransformer,
    MapScale,
    Prediction,
    PromptEnsemble,
    ReferenceBank,
    ReferenceFusion,
    RegionOfPictures,
    ScoreFusion,
    Scores,
    TextEncoder,
)


class ZeroShotNetwork(Protocol):
    """A network that :class:`anomalib_clipad.engine.module.ZeroShotMixin` can run; it is an ``nn.Module`` too.

    Attributes:
        visual: Runs the CLIP's vision tower.
        text_encoder: Encodes prompts; absent in an exported model.
        prompts: The prompts of a class.
        text_features: (classes, 2, D) text vectors, normal and anomalous.
        class_names: The classes that these belong to.
        defect_names: Words for what is found, if any are asked for.
        class_choice: Chooses an image's class, where it is not given.
        fusion: One image score from two.
        reference_taps: At which taps images are compared with these.
        references: Patches of normal images, if there are any.
        tile_references: Likewise of their tiles, if pictures are cut into any.
        reference_fusion: One map and one score from two where there are references.
        map_scale: Where the map balances.
        image_size: Height and width of the input in pixels.
        tile_size: Height and width of the tiles that the input is cut into; ``None`` if it is not.
        tile_overlap: Share of a tile that the next one covers, too.
        region: What of the input is looked at.
        mean: Mean of the input's channels.
        std: Standard deviation of the input's channels.
    """

    visual: DualPathVisionTransformer
    text_encoder: TextEncoder | None
    prompts: PromptEnsemble
    text_features: torch.Tensor
    class_names: tuple[str, ...]
    defect_names: DefectNames
    class_choice: ClassChoice
    fusion: ScoreFusion
    reference_taps: list[int]
    references: ReferenceBank
    tile_references: ReferenceBank
    reference_fusion: ReferenceFusion
    image_size: tuple[int, int]
    tile_size: tuple[int, int] | None
    tile_overlap: float
    region: RegionOfPictures
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def set_image_size(self, image_size: tuple[int, int]) -> None:
        """Take images of another size from now on."""

    def keep_shape(self, height: int, width: int) -> tuple[int, int]:
        """The image size that keeps the shape of a picture."""

    @property
    def map_scale(self) -> MapScale:
        """Where the map balances."""

    @property
    def score_limits(self) -> tuple[float, float]:
        """Between what an image's score lies, as a rule."""

    def set_classes(self, class_names: Sequence[str], choose: bool = False, words: bool = True) -> None:
        """Encode the prompts of these classes and the words for defects, and prepare to choose each image's class."""

    def forget_classes(self) -> None:
        """Have no class."""

    def name_as_asked(self) -> None:
        """Encode the argument's words for defects where a state dict has brought others, or none."""

    def name_defects(
        self, evidence: torch.Tensor, weights: torch.Tensor, class_index: torch.Tensor | None = None
    ) -> list[DefectName]:
        """Name what is in regions of images."""

    def fit_defect_baseline(self, evidence: torch.Tensor, class_index: torch.Tensor | None = None) -> None:
        """Let the words' evidence on normal images be their zero."""

    def defect_probabilities(
        self, evidence: torch.Tensor, weights: torch.Tensor, class_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The same in numbers: (B, words)."""

    def set_references(self, images: Iterable[torch.Tensor], augment: bool = False) -> Scores:
        """Compare all further images with these, and score these, each compared with the others."""

    def set_references_of_classes(
        self, images: Sequence[Iterable[torch.Tensor]], augment: bool = False, few: Collection[int] = ()
    ) -> list[Scores]:
        """Likewise, class by class; those with too few of their own take all of them."""

    def classes_of(self, images: torch.Tensor) -> torch.Tensor:
        """The class that each image shows."""

    def scores(self, images: torch.Tensor, class_index: torch.Tensor | None = None) -> Scores:
        """Map and scores of images."""

    def scores_of(self, features: DualPathFeatures, class_index: torch.Tensor | None = None) -> Scores:
        """Map and scores of taps."""

    def fuse(
        self, text_score: torch.Tensor, map_score: torch.Tensor, class_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One score an image from two."""

    def fit_fusion(self, text_score: torch.Tensor, map_score: torch.Tensor, number: int | None = None) -> None:
        """Take the ranges of both scores from labelled validation images, of one class or of all."""

    def predictions(self, scores: Scores) -> Prediction:
        """The two scores of an image as one."""
