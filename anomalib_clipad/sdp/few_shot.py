"""A few normal images that a network compares all further ones with, too."""

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch.nn import functional as F

from anomalib_clipad.components import (
    ClassTextFeatures,
    DualPathFeatures,
    ReferenceBank,
    ReferenceFusion,
    ScoreFusion,
    Scores,
    Tiling,
)
from anomalib_clipad.components.reference import ReferenceTokens, turns
from anomalib_clipad.components.tiling import ViewScores
from anomalib_clipad.errors import InputError


class FewShotNetwork(ClassTextFeatures):
    """A network that takes references; the subclass compares views with them."""

    tiling: Tiling
    tile_batch_size: int
    image_size: tuple[int, int]
    view_size: tuple[int, int]
    grid: tuple[int, int]
    references: ReferenceBank
    tile_references: ReferenceBank
    fusion: ScoreFusion
    reference_fusion: ReferenceFusion

    @staticmethod
    def check_size(images: torch.Tensor, size: tuple[int, int]) -> None:
        """Refuse images of another size."""
        if images.shape[-2:] != size:
            msg = f"The model takes images of {size} pixels, got {tuple(images.shape[-2:])}; resize them."
            raise InputError(msg)

    def taps(self, views: torch.Tensor) -> DualPathFeatures:
        """The features of views; for the subclass to fill."""
        raise NotImplementedError

    def compare(self, features: DualPathFeatures) -> ViewScores:
        """Compare taps with the text vectors; for the subclass to fill."""
        raise NotImplementedError

    def enlarge_patches(self, patches: torch.Tensor) -> torch.Tensor:
        """(b, N) to (b, h, w), bilinearly."""
        patches = patches.reshape(-1, 1, *self.grid)
        return F.interpolate(patches, size=self.view_size, mode="bilinear", align_corners=False)[:, 0]

    def joined_scores(self, joined: ViewScores) -> Scores:
        """One map and two scores; for the subclass to fill."""
        raise NotImplementedError

    def fuse(
        self, text_score: torch.Tensor, map_score: torch.Tensor, class_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One score an image from two, (B,) each; ``class_index`` is the images', the first class by default."""
        if self.references.fitted:
            return self.reference_fusion.fuse_scores(text_score, map_score, class_index)
        return self.fusion(text_score, map_score, class_index)

    def fit_fusion(self, text_score: torch.Tensor, map_score: torch.Tensor, number: int | None = None) -> None:
        """Take the ranges of both scores from labelled validation images; with references they are not needed.

        Args:
            text_score: (N,), of the images.
            map_score: (N,), likewise.
            number: Index of their class; the ranges become every class's by default.
        """
        if not self.references.fitted:
            self.fusion.fit(text_score, map_score, number)

    @property
    def score_limits(self) -> tuple[float, float]:
        """Between what an image's score lies, as a rule: with references it counts units above a normal image."""
        return (0.0, math.inf) if self.references.fitted else (0.0, 1.0)

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
        whole, tiles = _Gathered(), _Gathered()
        for batch in images:
            self.check_size(batch, self.image_size)
            for turn, turned in enumerate(turns(batch) if augment else [batch]):
                self._gather([self.tiling.whole(turned)], turn, whole)
                self._gather(self.tiling.tiles(turned, self.tile_batch_size), turn, tiles)
        if not whole.seen:
            msg = "There is no image to take as a reference; give at least one batch."
            raise InputError(msg)
        with torch.autocast(self.text_features.device.type, enabled=False):
            count = sum(len(seen.text_score) for seen in whole.seen)
            seen = self._fit(self.references, whole, count)
            places = self.tiling.places(self.grid)
            joined = self.tiling.join(
                seen, self._fit(self.tile_references, tiles, count, places) if tiles.seen else None
            )
            self.reference_fusion.fit(joined.text_map, cast("torch.Tensor", joined.reference_map), joined.text_score)
            if joined.defect_evidence is not None:
                self.defect_names.baseline.fit(joined.defect_evidence)
            return self.joined_scores(joined)

    def _gather(self, views: Iterable[torch.Tensor], turn: int, gathered: "_Gathered") -> None:
        for view in views:
            features = self.taps(view)
            gathered.tokens.add(turn, features.original)
            if turn == 0:
                gathered.seen.append(self.compare(features))

    def _fit(
        self, bank: ReferenceBank, gathered: "_Gathered", images: int, places: torch.Tensor | None = None
    ) -> ViewScores:
        distances = bank.fit(gathered.tokens.taps(), images, places)
        return ViewScores.cat(gathered.seen)._replace(reference_map=self.enlarge_patches(distances))


class _Gathered:
    """What the tower finds in the views of normal images, and the tokens of these and of the turned ones."""

    def __init__(self) -> None:
        self.seen: list[ViewScores] = []
        self.tokens = ReferenceTokens()
