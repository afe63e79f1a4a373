"""A few normal images that a network compares all further ones with, too."""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import cast

import torch
from torch.nn import functional as F

from anomalib_clipad.components import (
    ClassTextFeatures,
    DualPathFeatures,
    ReferenceBank,
    ReferenceFusion,
    RegionOfPictures,
    ScoreFusion,
    Scores,
    Tiling,
)
from anomalib_clipad.components.defect_names import DefectName
from anomalib_clipad.components.reference_tokens import ReferenceTokens, turns
from anomalib_clipad.components.tiling import ViewScores
from anomalib_clipad.errors import InputError


class FewShotNetwork(ClassTextFeatures):
    """A network that takes references; the subclass compares views with them."""

    tiling: Tiling
    tile_batch_size: int
    image_size: tuple[int, int]
    view_size: tuple[int, int]
    grid: tuple[int, int]
    reference_taps: list[int]
    references: ReferenceBank
    tile_references: ReferenceBank
    fusion: ScoreFusion
    reference_fusion: ReferenceFusion
    region: RegionOfPictures

    @staticmethod
    def check_size(images: torch.Tensor, size: tuple[int, int]) -> None:
        """Refuse images of another size."""
        if images.shape[-2:] != size:
            msg = f"The model takes images of {size} pixels, got {tuple(images.shape[-2:])}; resize them."
            raise InputError(msg)

    def taps(self, views: torch.Tensor) -> DualPathFeatures:
        """The features of views; for the subclass to fill."""
        raise NotImplementedError

    def compare(self, features: DualPathFeatures, class_index: torch.Tensor | None = None) -> ViewScores:
        """Compare taps with the text vectors; for the subclass to fill."""
        raise NotImplementedError

    def reference_tokens(self, features: DualPathFeatures) -> list[torch.Tensor]:
        """Tokens of CLIP's own path at the taps where images are compared with references."""
        return [features.original[tap] for tap in self.reference_taps]

    def enlarge_patches(self, patches: torch.Tensor) -> torch.Tensor:
        """(b, N) to (b, h, w), bilinearly."""
        patches = patches.reshape(-1, 1, *self.grid)
        return F.interpolate(patches, size=self.view_size, mode="bilinear", align_corners=False)[:, 0]

    def joined_scores(self, joined: ViewScores) -> Scores:
        """What was found in whole pictures and tiles, and joined, as one map and two scores."""
        text_map, text, reference_map, evidence, class_index, offset = joined
        if reference_map is None:
            map_score = self.region.values(text_map).amax(dim=1)
            return Scores(self.region.cut(text_map), text, map_score, evidence, class_index, offset)
        text_units, reference_units = self.reference_fusion.units(text_map, reference_map, class_index)
        map_score = self.reference_fusion.map_score(self.region.values(reference_units), math.prod(self.view_size))
        offset = None if offset is None else self.reference_fusion.offset_units(offset, class_index)
        return Scores(self.region.cut(text_units + reference_units), text, map_score, evidence, class_index, offset)

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

        With a region, what is outside of it counts for nothing, also where images are turned.

        Args:
            images: Batches (b, 3, H, W) of normal images of the first class, as :meth:`forward` takes them.
            augment: Whether the images are taken flipped and turned as well: eight ways, four if they are not square.

        Returns:
            What each of the k images scores when it is compared with the others, see
            :meth:`anomalib_clipad.components.ReferenceBank.fit`.

        Raises:
            InputError: If no class is set, or an image is of another size, or not finite.
        """
        gathered = self._gather(images, augment)
        if not gathered[0].seen:
            msg = "There is no image to take as a reference; give at least one batch."
            raise InputError(msg)
        joined = self._fit((self.references, self.tile_references), *gathered, augment)
        if joined.defect_evidence is not None:
            self.fit_defect_baseline(joined.defect_evidence)
        return self.joined_scores(joined)

    @torch.no_grad()
    def set_references_of_classes(
        self, images: Sequence[Iterable[torch.Tensor]], augment: bool = False, few: Collection[int] = ()
    ) -> list[Scores]:
        """Compare all further images with normal ones of their class, too.

        Args:
            images: Of each class, as :meth:`set_references` takes them.
            augment: See :meth:`set_references`.
            few: Classes that have too few of their own; images of these are compared with those of all classes.

        Returns:
            What the images of each class score, see :meth:`set_references`.

        Raises:
            InputError: If there is no image, or one is of another size, or not finite.
        """
        gathered = [self._gather(own, augment, number) for number, own in enumerate(images)]
        pairs = [(self._new_bank(), self._new_bank()) for _ in gathered]
        counts = [len(whole.seen) for whole, _ in gathered]
        scored = []
        for number, (banks, own) in enumerate(zip(pairs, gathered, strict=True)):
            if number in few:
                whole, tiles = (_Gathered.cat(parts) for parts in zip(*gathered, strict=True))
                first, count = sum(counts[:number]), counts[number]
                found = self._fit(banks, whole, tiles, augment, number).rows()[first : first + count]
            else:
                found = self._fit(banks, *own, augment, number).rows()
            if found:
                scored.append(self.joined_scores(ViewScores.cat(found)))
        self.references.join([bank for bank, _ in pairs])
        self.tile_references.join([bank for _, bank in pairs])
        return scored

    def classes_of(self, images: torch.Tensor) -> torch.Tensor:
        """(B,) index of the class that each image shows, see :class:`anomalib_clipad.components.ClassChoice`."""
        self.check_size(images, self.image_size)
        return cast("torch.Tensor", self.class_choice(self.taps(self.tiling.whole(self.region.fill(images))).surgery))

    def _new_bank(self) -> ReferenceBank:
        bank = self.references
        taps, width = bank.patches.shape[1:]
        return ReferenceBank(taps, width, bank.grid, bank.max_patches).to(bank.patches.device)

    def _gather(
        self, images: Iterable[torch.Tensor], augment: bool, number: int | None = None
    ) -> tuple["_Gathered", "_Gathered"]:
        """What the tower finds in whole images and in their tiles, all of one class."""
        whole, tiles = _Gathered(), _Gathered()
        for batch in images:
            self.check_size(batch, self.image_size)
            filled = self.region.fill(batch)
            for turn, turned in enumerate(turns(filled) if augment else [filled]):
                self._look_at([self.tiling.whole(turned)], turn, whole, number)
                self._look_at(self.tiling.tiles(turned, self.tile_batch_size), turn, tiles, number)
        return whole, tiles

    def name_defects(
        self, evidence: torch.Tensor, weights: torch.Tensor, class_index: torch.Tensor | None = None
    ) -> list[DefectName]:
        """Name what is in regions of images.

        Args:
            evidence: (B, V, N, words), ``defect_evidence`` of :meth:`scores`.
            weights: (B, H, W) of the pixels, see :func:`anomalib_clipad.components.region_weights`.
            class_index: See :meth:`forward`.
        """
        patches = self.tiling.patch_means(weights, self.grid, self.tile_batch_size)
        return cast("list[DefectName]", self.defect_names(evidence, patches, class_index))

    def defect_probabilities(
        self, evidence: torch.Tensor, weights: torch.Tensor, class_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The same in numbers, see :meth:`DefectNames.probabilities`."""
        patches = self.tiling.patch_means(weights, self.grid, self.tile_batch_size)
        return self.defect_names.probabilities(evidence, patches, class_index)

    def fit_defect_baseline(self, evidence: torch.Tensor, class_index: torch.Tensor | None = None) -> None:
        """Let the words' evidence on normal images, (k, V, N, words), be their zero; of several classes, each's own."""
        inside, names = self._patches_inside(), self.defect_names
        whole = None if inside is None else inside[0]
        if class_index is None:
            names.baseline.fit(evidence, whole)
        else:
            names.baseline.fit_classes(evidence, class_index, names.words, whole)

    def _patches_inside(self, augment: bool = False) -> torch.Tensor | None:
        """(turns, V, N), true for patches of the whole picture and its tiles that are inside the region in part."""
        if self.region.inside is None:
            return None
        pixels = self.region.inside[None, None].float()
        views = torch.cat([turned[:, 0] for turned in (turns(pixels) if augment else [pixels])])
        return self.tiling.patch_means(views, self.grid, self.tile_batch_size) > 0

    def _look_at(self, views: Iterable[torch.Tensor], turn: int, gathered: "_Gathered", number: int | None) -> None:
        for view in views:
            features = self.taps(view)
            gathered.tokens.add(turn, self.references.half_patches(self.reference_tokens(features)))
            if turn == 0:
                own = None if number is None else torch.full((len(view),), number, device=view.device)
                gathered.seen += self.compare(features, own).rows()

    def _fit(
        self,
        banks: tuple[ReferenceBank, ReferenceBank],
        whole: "_Gathered",
        tiles: "_Gathered",
        augment: bool,
        number: int | None = None,
    ) -> ViewScores:
        """Fill the banks of whole images and of tiles, and measure the units of a class, the first one by default."""
        with torch.autocast(self.text_features.device.type, enabled=False):
            count, parts = len(whole.seen), len(self.tiling)
            inside = self._patches_inside(augment)
            of_tiles = None
            if parts:
                of_tiles = self._fit_bank(banks[1], tiles, count, inside, self.tiling.places(self.grid))
            of_whole = self._fit_bank(banks[0], whole, count, inside)
            joined = ViewScores.cat(
                [
                    self.tiling.join(
                        self._found(whole, of_whole, slice(k, k + 1)),
                        None if of_tiles is None else self._found(tiles, of_tiles, slice(k * parts, (k + 1) * parts)),
                        self.region.tiles,
                    )
                    for k in range(count)  # one by one, since the maps of all tiles are large
                ]
            )
            text_map, reference_map = (
                self.region.values(maps) for maps in (joined.text_map, cast("torch.Tensor", joined.reference_map))
            )
            self.reference_fusion.fit(text_map, reference_map, joined.text_score, number or 0)
            return joined

    def _fit_bank(
        self,
        bank: ReferenceBank,
        gathered: "_Gathered",
        images: int,
        inside: torch.Tensor | None,
        places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(images * parts, N) distances of the images' patches from those of the others."""
        if inside is not None:
            parts = inside[:, :1] if places is None else inside[:, 1:]  # (turns, parts, N)
            inside = parts[:, None].expand(-1, images, -1, -1).flatten(0, 2)
        return bank.fit_patches(gathered.tokens.patches(), images, places, inside)

    def _found(self, gathered: "_Gathered", distances: torch.Tensor, views: slice) -> ViewScores:
        """What was found in some views, compared with references, too."""
        seen = ViewScores.cat(gathered.seen[views])
        return seen._replace(reference_map=self.enlarge_patches(distances[views]))


class _Gathered:
    """What the tower finds in the views of normal images, and the tokens of these and of the turned ones."""

    def __init__(self) -> None:
        self.seen: list[ViewScores] = []  # of a view each
        self.tokens = ReferenceTokens()

    @classmethod
    def cat(cls, parts: Sequence["_Gathered"]) -> "_Gathered":
        """Those of several classes together."""
        both = cls()
        for part in parts:
            both.seen += part.seen
            both.tokens.extend(part.tokens)
        return both
