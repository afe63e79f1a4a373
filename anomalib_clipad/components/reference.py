"""References: patches of a few normal images, and how far a patch is from the nearest of them.

The bank holds tokens of CLIP's own path, as in WinCLIP+ (arXiv 2303.14814), APRIL-GAN (arXiv 2305.17382) and PromptAD
(arXiv 2404.05231). :class:`anomalib_clipad.components.ReferenceFusion` joins its map with the text map.
"""

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from anomalib_clipad.components.coreset import coreset
from anomalib_clipad.components.float32 import Float32Buffers
from anomalib_clipad.components.linear import linear
from anomalib_clipad.components.neighbourhood import neighbourhood_means
from anomalib_clipad.errors import InputError

MOST_PATCHES = 10_000  # of a bank, a tap; 44 images at 240 pixels
NEAR = 2  # patches, in rows and columns, from which on a patch lies outside of another's 3 x 3 neighbourhood
CHUNK = 1024  # patches of a bank compared at once, which bounds the memory


class ReferenceBank(Float32Buffers):
    r"""Patches of normal images at every tap; measures how far other patches are from the nearest of them.

    The distance of a patch is :math:`\tfrac12 (1 - \max_b \cos(p, b))`, in [0, 1]: the mean over the taps, once between
    patches and once between the means of 3 x 3 patches, averaged.

    Patches are kept in half precision and compared in float32. So a bank from a checkpoint gives the same distances.
    Of several classes the patches lie one class after the other, and an image is compared with those of its class.

    Args:
        taps: Number of taps.
        width: Width W of the tokens.
        grid: Rows and columns of patches of an image.
        max_patches: Most patches a tap; of more, anomalib's coreset sampling keeps as many.

    Raises:
        InputError: If ``max_patches`` is not a whole number above 0.

    Example:
        >>> bank = ReferenceBank(taps=2, width=8, grid=(3, 4))
        >>> references = [torch.randn(5, 13, 8) for _ in range(2)]  # class token first
        >>> bank.fit(references).shape
        torch.Size([5, 12])
        >>> bank([tokens[:1] for tokens in references]).abs().max() < 1e-3
        tensor(True)
    """

    growing = ("patches", "means", "counts")
    added = True

    patches: torch.Tensor
    means: torch.Tensor
    counts: torch.Tensor
    bank: torch.Tensor

    def __init__(self, taps: int, width: int, grid: tuple[int, int], max_patches: int = MOST_PATCHES) -> None:
        super().__init__()
        if type(max_patches) is not int or max_patches < 1:
            msg = f"max_references must be a whole number of patches above 0, got {max_patches!r}."
            raise InputError(msg)
        self.grid = grid
        self.max_patches = max_patches
        empty = torch.empty(0, taps, width, dtype=torch.half)
        self.register_buffer("patches", empty)  # (M, taps, W)
        self.register_buffer("means", empty.clone())  # likewise; empty where the bank has all patches of its images
        self.register_buffer("counts", torch.empty(0, dtype=torch.long))  # (classes,) patches of each; empty with one
        self.register_buffer("bank", torch.empty(2, taps, 0, width), persistent=False)  # what is compared

    @property
    def fitted(self) -> bool:
        """Whether there are references."""
        return len(self.patches) > 0

    def reset(self) -> None:
        """Have no references."""
        self.patches, self.means, self.bank = self.patches[:0], self.means[:0], self.bank[:, :, :0]
        self.counts = self.counts[:0]

    def join(self, banks: Sequence["ReferenceBank"]) -> None:
        """Take over the patches of several classes, one bank of them each."""
        self.counts = torch.tensor([len(bank.patches) for bank in banks], device=self.counts.device)
        some_chosen = any(len(bank.means) for bank in banks)
        means = [bank.bank[1].transpose(0, 1).half() if some_chosen else bank.means for bank in banks]
        with torch.autocast(self.patches.device.type, enabled=False):  # which joins no tensors in half precision
            self.patches, self.means = torch.cat([bank.patches for bank in banks]), torch.cat(means)
            self._prepare()

    def half_patches(self, original: Sequence[torch.Tensor]) -> torch.Tensor:
        """What :meth:`fit_patches` takes of images: (B * N, taps, W) unit vectors in half precision.

        Args:
            original: One (B, N + 1, W) tensor a tap, tokens of CLIP's own path, class token first.

        Raises:
            InputError: If the tokens are of another shape, or not finite.
        """
        self._check(original)
        with torch.autocast(original[0].device.type, enabled=False):
            return torch.stack([_unit(tokens).half() for tokens in original], dim=2).flatten(0, 1)

    def fit(self, original: Sequence[torch.Tensor], images: int | None = None) -> torch.Tensor:
        """Take over the patches of whole normal images, see :meth:`fit_patches`.

        Args:
            original: One (turns * k, N + 1, W) tensor a tap, tokens of CLIP's own path, class token first: of k images
                as they are, then of the same k images turned or flipped.
            images: Number k of images; all are images of their own by default.

        Raises:
            InputError: If the tokens are of another shape, or not finite.
        """
        return self.fit_patches(self.half_patches(original), images or original[0].shape[0])

    @torch.no_grad()
    def fit_patches(
        self,
        patches: torch.Tensor,
        images: int,
        places: torch.Tensor | None = None,
        inside: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Take over the patches of normal images.

        At its peak the memory has, beside these, what is kept in half precision and twice in float32; before that,
        where there are too many, what :func:`coreset` needs.

        Args:
            patches: (turns * k * parts * N, taps, W) of :meth:`half_patches`: of the parts of k images as they are,
                then of the same k images turned or flipped.
            images: Number k of images.
            places: (parts * N, 2), rows and columns of the patches of an image's parts; by default it is one part.
            inside: (turns * k * parts, N), true for the patches to be compared with; all by default.

        Returns:
            (k * parts, N) distances of every image's patches from those of the other images. A single image has no
            others: each patch is compared with those outside of its own 3 x 3 neighbourhood.

        Raises:
            InputError: If a patch has nothing to be compared with.
        """
        count = self.grid[0] * self.grid[1]
        places = (_grid_places(self.grid) if places is None else places).to(patches.device)
        parts = len(places) // count
        number = self._choose(patches, inside)
        owner = number // len(places) % images
        place = places[number % len(places)]

        def comparable(part: int) -> torch.Tensor:
            if images > 1:
                return (owner != part // parts)[None]  # (1, M)
            ours = places.unflatten(0, (parts, count))[part]
            near = ((ours[:, None] - place).abs() < NEAR).all(dim=-1)  # (N, M)
            return ~near & (number < len(places))

        for part in range(images * parts):
            wanted = slice(None) if inside is None else inside[part].to(patches.device)
            if not comparable(part).any(dim=1).expand(count)[wanted].all():
                msg = (
                    "Patches of a reference have no others to be compared with, so what is usual there cannot be "
                    "measured; give a second normal image, a larger region or more max_references."
                )
                raise InputError(msg)
        self.counts, self.patches, self.means = self.counts[:0], patches, patches[:0]
        if len(number) < len(patches):  # neighbours of some that are kept are gone, so the means are kept, too
            self.patches, self.means = patches[number], self._means_of(patches, number)
        self._prepare()
        ours = patches[: images * len(places)].split(count)
        return torch.cat(
            [self._distance(self._compared(own), self.bank, comparable(part)) for part, own in enumerate(ours)]
        )

    def forward(self, original: Sequence[torch.Tensor], class_index: torch.Tensor | None = None) -> torch.Tensor:
        """Distances of the patches of images.

        Args:
            original: One (B, N + 1, W) tensor a tap, class token first.
            class_index: (B,) index of the images' classes, where the bank has several; the first one by default.

        Returns:
            (B, N) in [0, 1].

        Raises:
            InputError: If there are no references.
        """
        if not self.fitted:
            msg = "There are no references to compare with; call fit with tokens of normal images first."
            raise InputError(msg)
        distances = [self.distance(tap, tokens, class_index) for tap, tokens in enumerate(original)]
        return torch.stack(distances).mean(dim=0)

    def distance(self, tap: int, tokens: torch.Tensor, class_index: torch.Tensor | None = None) -> torch.Tensor:
        """Distances at one tap, counted from 0: (B, N + 1, W) to (B, N); in float32, also under autocast.

        Of several classes, an image is compared with the first one's patches where there is no ``class_index``.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            patches = _unit(tokens)
            kinds = torch.stack([patches, neighbourhood_means(patches, self.grid)])[:, None]
            bank = self.bank[:, tap : tap + 1]
            if not len(self.counts):
                return self._distance(kinds, bank)
            of_classes = bank.split(self._sizes, dim=2)
            if class_index is None:
                return self._distance(kinds, of_classes[0])
            if torch.compiler.is_compiling():  # an exported file compares with all classes, and takes its own
                of_all = torch.stack([self._distance(kinds, own) for own in of_classes])  # (classes, B, N)
                return of_all.gather(0, class_index[None, :, None].expand(1, *of_all.shape[1:]))[0]
            distances = patches.new_empty(patches.shape[:2])
            for number in class_index.unique().tolist():
                rows = class_index == number
                distances[rows] = self._distance(kinds[:, :, rows], of_classes[number])
            return distances

    @staticmethod
    def _distance(patches: torch.Tensor, bank: torch.Tensor, comparable: torch.Tensor | None = None) -> torch.Tensor:
        """(2, taps, B, N, W) against (2, taps, M, W): (B, N); ``comparable`` tells which pairs (N or 1, M) count."""
        total = torch.zeros((), device=bank.device)
        for kind, ours in zip(patches, bank, strict=True):
            for tokens, references in zip(kind, ours, strict=True):
                largest = tokens.new_full(tokens.shape[:-1], -1.0)
                for start in range(0, len(references), CHUNK):
                    cosines = linear(tokens, references[start : start + CHUNK])  # (B, N, CHUNK)
                    if comparable is not None:
                        cosines = cosines.masked_fill(~comparable[:, start : start + CHUNK], -1.0)
                    largest = torch.maximum(largest, cosines.amax(dim=-1))
                total = total + (1 - largest)
        return 0.5 * total / (bank.shape[0] * bank.shape[1])

    def _prepare(self) -> None:
        """Make what is compared from what is kept."""
        if len(self.means):
            kept = torch.stack([self.patches, self.means]).transpose(1, 2)
            self.bank = F.normalize(kept.float(), dim=-1).contiguous()
        else:
            self.bank = self._compared(self.patches).flatten(2, 3)
        self._sizes = self.counts.tolist()  # known while exporting, where values of tensors are not

    def _compared(self, patches: torch.Tensor) -> torch.Tensor:
        """What of whole images is compared: (b * N, taps, W) to patches and their means, (2, taps, b, N, W)."""
        taps, width = patches.shape[1:]
        units = F.normalize(patches.float(), dim=-1).transpose(0, 1)  # (taps, b * N, W)
        images = units.reshape(-1, self.grid[0] * self.grid[1], width)
        both = torch.stack([images, neighbourhood_means(images, self.grid)])
        return both.unflatten(1, (taps, -1))

    def _choose(self, patches: torch.Tensor, inside: torch.Tensor | None) -> torch.Tensor:
        """Numbers of the patches to keep: those inside, and of too many a coreset."""
        number = torch.arange(len(patches), device=patches.device)
        if inside is not None and not inside.all():
            number = inside.flatten().nonzero()[:, 0].to(number.device)
        return number if len(number) <= self.max_patches else coreset(patches, number, self.max_patches)

    def _means_of(self, patches: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """Means of 3 x 3 patches around some, (M, taps, W) in half precision."""
        count = self.grid[0] * self.grid[1]
        means = patches.new_empty(len(number), *patches.shape[1:])
        image = number // count
        for part in image.unique().tolist():
            whole = self._compared(patches[part * count : (part + 1) * count])[1, :, 0]  # (taps, N, W)
            means[image == part] = whole[:, number[image == part] % count].transpose(0, 1).half()
        return means

    def _check(self, original: Sequence[torch.Tensor]) -> None:
        taps, width = self.patches.shape[1:]
        tokens = 1 + self.grid[0] * self.grid[1]
        shapes = [tuple(tap.shape) if isinstance(tap, torch.Tensor) else type(tap).__name__ for tap in original]
        if len(shapes) != taps or len(set(shapes)) != 1 or shapes[0][1:] != (tokens, width) or not shapes[0][0]:
            msg = f"References need {taps} tensors of shape (k, {tokens}, {width}), one a tap, got {shapes}."
            raise InputError(msg)
        if not all(tap.isfinite().all() for tap in original):
            msg = "Some references are not finite; look at the pixel values of the images."
            raise InputError(msg)

    def _load_from_state_dict(
        self,
        state_dict: MutableMapping[str, torch.Tensor],
        prefix: str,
        *args: Any,  # noqa: ANN401 - handed on to torch's method
        **kwargs: Any,  # noqa: ANN401 - handed on to torch's method
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._prepare()


def _grid_places(grid: tuple[int, int]) -> torch.Tensor:
    """(N, 2), rows and columns of a grid's patches."""
    return torch.cartesian_prod(*(torch.arange(side) for side in grid)).float()


def _unit(tokens: torch.Tensor) -> torch.Tensor:
    """Patches of unit length, without the class token: (B, N + 1, W) to (B, N, W) in float32."""
    return F.normalize(tokens[:, 1:].float(), dim=-1)
