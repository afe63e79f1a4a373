"""Tiles of a large picture, and their maps as one again; beside them the whole picture at the size of a tile.

anomalib's ``Tiler`` has one stride and cuts at its multiples: where the last tile would leave the picture it pads it
with black, which a zero-shot model calls a defect. It weighs all pixels of a tile alike, so maps have steps where tiles
end.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple, cast

import torch
from torch.nn import functional as F

from anomalib_clipad.components.float32 import Float32Buffers
from anomalib_clipad.components.resizing import bicubic_matrix
from anomalib_clipad.components.smoothing import GaussianSmoothing, gaussian_matrix
from anomalib_clipad.errors import InputError

MOST_OVERLAP = 0.9
TILES_WEIGHT = 2 / 3  # of the tiles' map beside that of the whole picture, see benchmarks/tiles.md


class ViewScores(NamedTuple):
    """What the tower finds in views of its own size, or in whole pictures.

    Attributes:
        text_map: (B, h, w), from the comparison with the text vectors.
        text_score: (B,) in [0, 1], likewise.
        reference_map: (B, h, w), from the comparison with references, if there are any.
        defect_evidence: (B, N, words) of the patches, or (B, V, N, words) of those of V views, if there are words.
        class_index: (B,) index of the class that each was compared with, see :class:`Scores`.
        map_offset: (B,) of the map from the comparison with the text vectors, likewise.

    Example:
        >>> ViewScores(torch.zeros(2, 8, 8), torch.zeros(2)).reference_map is None
        True
    """

    text_map: torch.Tensor
    text_score: torch.Tensor
    reference_map: torch.Tensor | None = None
    defect_evidence: torch.Tensor | None = None
    class_index: torch.Tensor | None = None
    map_offset: torch.Tensor | None = None

    @classmethod
    def cat(cls, batches: Sequence["ViewScores"]) -> "ViewScores":
        """Several batches as one."""
        return cls(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*batches, strict=True)))  # type: ignore[arg-type]  # mypy loses the fields

    def rows(self) -> list["ViewScores"]:
        """The views one by one, each as a batch."""
        rows = range(len(self.text_score))
        return [ViewScores(*(None if part is None else part[row : row + 1] for part in self)) for row in rows]  # type: ignore[arg-type]  # likewise


def tile_positions(length: int, tile: int, overlap: float) -> list[int]:
    """Where tiles of a line begin: evenly spread, the first and the last flush with its ends.

    Args:
        length: Length of the line.
        tile: Length of a tile, at most that of the line.
        overlap: Share of a tile that the next one covers, too, at least.

    Example:
        >>> tile_positions(100, 40, 0.25)
        [0, 30, 60]
    """
    steps = math.ceil((length - tile) / max(1, math.floor(tile * (1 - overlap) + 1e-9)))
    return [round(step * (length - tile) / steps) for step in range(steps + 1)] if steps else [0]


class Tiling(Float32Buffers):
    """Cuts pictures of one size into tiles that overlap, and joins what was found in them and in the whole picture.

    Where tiles overlap, a value counts by how far it is from its tile's edge, so that the joined map has no seams. A
    picture of the size of a tile is not cut: it is its only view.

    Args:
        image_size: Height and width of the pictures.
        tile_size: Height and width of a tile.
        overlap: Share of a tile that the next one covers, too, at least, see :func:`check_tiles`.
        sigma: Standard deviation, in pixels, of the smoothing of maps.

    Raises:
        InputError: If a tile is larger than the pictures.

    Example:
        >>> tiling = Tiling((60, 100), (40, 40), sigma=1.0)
        >>> len(tiling), tiling.whole(torch.rand(2, 3, 60, 100)).shape
        (6, torch.Size([2, 3, 40, 40]))
        >>> [tiles.shape[0] for tiles in tiling.tiles(torch.rand(2, 3, 60, 100), batch_size=8)]
        [8, 4]
        >>> whole, tiles = (ViewScores(torch.ones(views, 40, 40), torch.rand(views)) for views in (2, 12))
        >>> tiling.join(whole, tiles).text_map.shape
        torch.Size([2, 60, 100])
    """

    small_rows: torch.Tensor
    small_columns: torch.Tensor
    join_rows: torch.Tensor
    join_columns: torch.Tensor

    def __init__(
        self, image_size: tuple[int, int], tile_size: tuple[int, int], overlap: float = 0.25, sigma: float = 0.0
    ) -> None:
        super().__init__()
        if any(tile > side for tile, side in zip(tile_size, image_size, strict=True)):
            msg = (
                f"tile_size {tile_size[0]} x {tile_size[1]} is larger than the picture, which is analysed at "
                f"{image_size[0]} x {image_size[1]} pixels; set image_size to more, or leave tile_size out."
            )
            raise InputError(msg)
        self.image_size, self.tile_size = image_size, tile_size
        self.smoothing = GaussianSmoothing(tile_size, sigma)  # of the whole picture, which is no larger than a tile
        lines = list(zip(image_size, tile_size, strict=True))
        self.positions = [tile_positions(*line, overlap) for line in lines]
        if len(self) == 0:
            return
        for name, line, positions in zip(("rows", "columns"), lines, self.positions, strict=True):
            self.register_buffer(f"small_{name}", bicubic_matrix(*line), persistent=False)  # (h, H) and (w, W)
            joining = _joining_matrix(*line, positions, sigma)  # (H, tiles * h) and (W, tiles * w)
            self.register_buffer(f"join_{name}", joining, persistent=False)

    def __len__(self) -> int:
        return 0 if self.tile_size == self.image_size else math.prod(map(len, self.positions))

    def whole(self, images: torch.Tensor) -> torch.Tensor:
        """The pictures at the size of a tile: (B, C, H, W) to (B, C, h, w)."""
        if len(self) == 0:
            return images
        with torch.autocast(images.device.type, enabled=False):
            return (self.small_rows @ images.float() @ self.small_columns.T).to(images.dtype)

    def tiles(self, images: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
        """Tiles of the pictures, all of a picture before those of the next, row by row.

        Args:
            images: (B, C, H, W).
            batch_size: Most tiles in a batch, which bounds the memory; an exported model takes all at once.

        Yields:
            (b, C, h, w).
        """
        if len(self) == 0:
            return
        height, width = self.tile_size
        if torch.compiler.is_compiling():
            rows, columns = (
                torch.tensor(starts, device=images.device)[:, None] + torch.arange(side, device=images.device)
                for starts, side in zip(self.positions, self.tile_size, strict=True)
            )
            cut = images[:, :, rows][..., columns]  # (B, C, tiles, h, tiles, w)
            yield cut.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
            return
        corners = list(product(range(len(images)), *self.positions))
        for start in range(0, len(corners), batch_size):
            yield torch.stack(
                [images[i, :, y : y + height, x : x + width] for i, y, x in corners[start : start + batch_size]]
            )

    def join(self, whole: ViewScores, tiles: ViewScores | None, counting: torch.Tensor | None = None) -> ViewScores:
        """What was found in both, for the pictures as they are.

        A map is the weighted mean of the tiles' and of the whole picture's, smoothed; the tiles' counts twice. The text
        score is the mean of the whole picture's and of its worst tile's.

        Args:
            whole: Of B pictures.
            tiles: Of their B * T tiles, in the order of :meth:`tiles`; ``None`` where pictures are not cut.
            counting: (T,), true for the tiles whose text score counts; all by default.
        """
        text_score, evidence, offset = whole.text_score, whole.defect_evidence, whole.map_offset
        if evidence is not None:
            evidence = evidence[:, None]  # (B, 1, N, words)
        if tiles is not None:
            scores = tiles.text_score.unflatten(0, (-1, len(self)))
            worst = (scores if counting is None else torch.where(counting, scores, 0.0)).amax(dim=1)
            text_score = (text_score + worst) / 2
            if offset is not None and tiles.map_offset is not None:
                offset = torch.lerp(offset, tiles.map_offset.unflatten(0, (-1, len(self))).mean(dim=1), TILES_WEIGHT)
            if evidence is not None and tiles.defect_evidence is not None:
                evidence = torch.cat([evidence, tiles.defect_evidence.unflatten(0, (-1, len(self)))], dim=1)
        text_map = cast("torch.Tensor", self._join_maps(whole.text_map, tiles.text_map if tiles else None))
        reference_map = self._join_maps(whole.reference_map, tiles.reference_map if tiles else None)
        return ViewScores(text_map, text_score, reference_map, evidence, whole.class_index, offset)

    def patch_means(self, maps: torch.Tensor, grid: tuple[int, int], batch_size: int) -> torch.Tensor:
        """Means of maps of pictures over the patches of the whole picture, and then of its tiles.

        Args:
            maps: (B, H, W).
            grid: Rows and columns of patches of a tile.
            batch_size: Most tiles at once.

        Returns:
            (B, 1 + tiles, N).
        """
        whole = F.adaptive_avg_pool2d(maps[:, None], grid).flatten(2)
        if len(self) == 0:
            return whole
        tiles = [F.adaptive_avg_pool2d(part, grid).flatten(2) for part in self.tiles(maps[:, None], batch_size)]
        return torch.cat([whole, torch.cat(tiles)[:, 0].unflatten(0, (-1, len(self)))], dim=1)

    def _join_maps(self, whole: torch.Tensor | None, tiles: torch.Tensor | None) -> torch.Tensor | None:
        if whole is None:
            return None
        smooth = self.smoothing(whole)
        if tiles is None:
            return smooth
        enlarged = F.interpolate(smooth[:, None], size=self.image_size, mode="bilinear", align_corners=False)[:, 0]
        return torch.lerp(enlarged, self.join_tiles(tiles), TILES_WEIGHT)

    def join_tiles(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps of tiles, in the order of :meth:`tiles`, as smoothed maps of pictures: (B * T, h, w) to (B, H, W)."""
        rows, columns = map(len, self.positions)
        maps = maps.unflatten(0, (-1, rows, columns)).transpose(2, 3)  # (B, rows, h, columns, w)
        return self.join_rows @ maps.flatten(3, 4).flatten(1, 2) @ self.join_columns.T

    def places(self, grid: tuple[int, int]) -> torch.Tensor:
        """Where the patches of a picture's tiles are: (T * N, 2), rows and columns counted in patches."""
        places = []
        for starts, tile, patches in zip(self.positions, self.tile_size, grid, strict=True):
            places.append(torch.tensor(starts)[:, None] * patches / tile + torch.arange(patches))  # (tiles, patches)
        rows, columns = (places[0][:, None, :, None], places[1][None, :, None, :])
        return torch.stack(torch.broadcast_tensors(rows, columns), dim=-1).reshape(-1, 2)


def check_tiles(image_size: object, tile_size: object, overlap: float, batch_size: int) -> None:
    """Refuse arguments that do not belong together, or are out of range.

    Raises:
        InputError: If they are.

    Example:
        >>> check_tiles((960, 1440), 240, 0.25, 8)
    """
    if isinstance(overlap, bool) or not isinstance(overlap, int | float) or not 0 <= overlap <= MOST_OVERLAP:
        msg = f"tile_overlap must be a share of a tile, 0 to {MOST_OVERLAP}, got {overlap!r}."
        raise InputError(msg)
    if type(batch_size) is not int or batch_size < 1:
        msg = f"tile_batch_size must be a number of tiles, 1 or more, got {batch_size!r}."
        raise InputError(msg)
    sides = tile_size if isinstance(tile_size, tuple | list) and len(tile_size) == 2 else (tile_size,)
    if tile_size is not None and not all(type(side) is int and side > 0 for side in sides):
        msg = f"tile_size must be one or two positive numbers of pixels, got {tile_size!r}."
        raise InputError(msg)
    if tile_size is not None and isinstance(image_size, str):
        msg = (
            f"image_size {image_size} has about the pixels of one tile; with tile_size give the height and width that "
            "the pictures are analysed at."
        )
        raise InputError(msg)


def _joining_matrix(length: int, tile: int, positions: Sequence[int], sigma: float) -> torch.Tensor:
    """(length, tiles * tile), by which lines of tiles become one line, smoothed; every row sums to 1."""
    inside = torch.arange(tile)
    weights = torch.minimum(inside + 1, tile - inside).double()  # distance from the tile's edge
    matrix = torch.zeros(length, len(positions), tile, dtype=torch.float64)
    for number, start in enumerate(positions):
        matrix[start + inside, number, inside] = weights
    matrix = matrix.flatten(1)
    return (gaussian_matrix(length, sigma) @ (matrix / matrix.sum(dim=1, keepdim=True))).float()
