"""Pictures of surfaces, flawless and broken, and captions of them: what the demonstration backbone is trained on."""

import io
import multiprocessing
from typing import NamedTuple

import numpy as np
import open_clip
import torch
from camera import Camera
from captions import Captions
from namesakes import NAMESAKES, usual_colours
from PIL import Image
from rich.progress import track
from torch.nn import functional as F

from anomalib_clipad.demo.canvas import Canvas, Style
from anomalib_clipad.demo.defects import DEFECTS, paint_defect
from anomalib_clipad.demo.materials import MATERIALS
from anomalib_clipad.demo.textures import SURFACES, TRAINING, paint

SIZE, PATCHES, RENDERED = 96, 12, 144  # pictures are rendered larger and reduced, as real ones are
CONTRAST = (0.1, 0.6)  # of the surfaces, up to what photographs have
BACKGROUNDS = [name for name in TRAINING if name in MATERIALS]
# Shares of the pictures with clutter behind an object, with an uneven surface, and that were kept as JPEG.
CLUTTERED, MOTTLED, COMPRESSED = 0.3, 0.4, 0.3


class Pictures(NamedTuple):
    """A pool of rendered pictures, each flawless and with two defects, or flawless only.

    Attributes:
        images: (P, 3, 3, S, S) uint8, one flawless and two broken each; (P, 1, 3, S, S) of namesakes.
        masks: (P, 3, S, S) bool.
        kinds: (P, 3) index of the defect, -1 where there is none.
        names: Name of the surface of each.
    """

    images: torch.Tensor
    masks: torch.Tensor
    kinds: torch.Tensor
    names: list[str]


def _surface(name: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A flawless surface or namesake, on a desk with things on it now and then, and not quite even now and then."""
    style = Style.random(rng, CONTRAST)
    if name in NAMESAKES:
        style = usual_colours(name, style, rng)
    whole, inside = paint({**SURFACES, **NAMESAKES}[name], style, rng, RENDERED)
    if not inside.all() and rng.random() < CLUTTERED:
        behind, _ = paint(SURFACES[rng.choice(BACKGROUNDS)], Style.random(rng), rng, RENDERED)
        whole = np.where(inside[..., None], whole, behind)
    if rng.random() < MOTTLED:
        mottle = Canvas(RENDERED, style, rng).fractal(rng.uniform(4, 20)) - 0.5
        whole = np.clip(whole * (1 + rng.uniform(0, 0.7) * mottle[..., None]), 0, 1).astype(np.float32)
    return whole, inside


def _kept(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Reduced, and some as JPEG: (3, S, S) uint8."""
    small = Image.fromarray((255 * picture).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if rng.random() < COMPRESSED:
        file = io.BytesIO()
        small.save(file, "JPEG", quality=int(rng.integers(50, 95)))
        small = Image.open(file)
    return np.asarray(small).transpose(2, 0, 1)


def _picture(job: tuple[str, int]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    name, seed = job
    rng = np.random.default_rng(seed)
    whole, inside = _surface(name, rng)
    kinds = [-1] if name in NAMESAKES else [-1, *rng.choice(len(DEFECTS), 2, replace=False).tolist()]
    images, masks = [], []
    for kind in kinds:
        picture, mask = whole, np.zeros_like(inside)
        if kind >= 0:
            picture, mask = paint_defect(whole, inside, list(DEFECTS)[kind], rng)
        images.append(_kept(picture, rng))
        masks.append(np.asarray(Image.fromarray(mask).convert("L").resize((SIZE, SIZE), Image.Resampling.BOX)) > 63)
    return np.stack(images), np.stack(masks), kinds


def render_pool(names: list[str], count: int, seed: int) -> Pictures:
    """Render ``count`` pictures of the surfaces in turn; all of them namesakes, or none."""
    jobs = [(names[i % len(names)], seed + i) for i in range(count)]
    with multiprocessing.Pool() as pool:
        done = list(track(pool.imap(_picture, jobs, chunksize=16), f"Rendering {count} pictures", total=count))
    images, masks, kinds = (torch.from_numpy(np.stack([np.asarray(d[k]) for d in done])) for k in range(3))
    return Pictures(images, masks, kinds, [name for name, _ in jobs])


class Batch(NamedTuple):
    """Images, B with captions and then M namesakes, and texts.

    Attributes:
        images: (B + M, 3, S, S), normalised.
        covered: (B, N) in [0, 1], how much of a patch shows a defect.
        broken: (B,) in {0, 1}.
        kinds: (B,) index of the defect, -1 where there is none.
        surfaces: (B + M,) number of the surface.
        named: (B,) whether the captions name the surface.
        captions: (B, 2, L) tokens: a flawless and a broken caption of each image; both images of a picture share them.
        names: (surfaces, L) tokens: a caption of every surface, all flawless or all broken.
        defects: (kinds, 2, L) tokens: something without and with each defect.
    """

    images: torch.Tensor
    covered: torch.Tensor
    broken: torch.Tensor
    kinds: torch.Tensor
    surfaces: torch.Tensor
    named: torch.Tensor
    captions: torch.Tensor
    names: torch.Tensor
    defects: torch.Tensor


class Sampler:
    """Draws batches of pictures, each flawless and broken and photographed, and of namesakes."""

    def __init__(self, pool: Pictures, namesakes: Pictures, seed: int, context_length: int) -> None:
        self.pool, self.namesakes = pool, namesakes
        self.surfaces = list(dict.fromkeys([*pool.names, *namesakes.names]))
        self.rng = np.random.default_rng(seed)
        self.camera = Camera(torch.Generator().manual_seed(seed))
        self.captions = Captions(self.rng, self.surfaces)
        self.tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=context_length)

    def batch(self, pictures: int, namesakes: int) -> Batch:
        """``2 * pictures`` images: so many surfaces, flawless and broken; and so many namesakes."""
        rows = self.rng.choice(len(self.pool.names), pictures, replace=False)
        others = self.rng.choice(len(self.namesakes.names), namesakes, replace=False)
        which = np.stack([np.zeros(pictures, dtype=int), self.rng.integers(1, 3, pictures)], axis=1)
        images, masks, kinds = (values[rows[:, None], which].flatten(0, 1) for values in self.pool[:3])
        more_images, more_masks, _ = (values[others, 0] for values in self.namesakes[:3])
        images, masks = self.camera(
            torch.cat([images, more_images]).float() / 255, torch.cat([masks, more_masks]).float()
        )
        covered = F.avg_pool2d(masks[: len(kinds), None], SIZE // PATCHES).flatten(1)
        captions, named = [], []
        for row, kind in zip(rows, kinds[1::2].tolist(), strict=True):
            name, names_it = self.captions.name(self.pool.names[row])
            captions.append([self.captions.caption(name, -1), self.captions.caption(name, kind)])
            named.append(names_it)
        kind = int(self.rng.choice([-1, self.rng.integers(len(DEFECTS))]))  # no surface is told by its state
        names = [self.captions.caption(self.captions.own_name(surface), kind) for surface in self.surfaces]
        without, with_it = self.captions.with_and_without(self.captions.any_name())
        shown = [*np.repeat([self.pool.names[row] for row in rows], 2), *(self.namesakes.names[row] for row in others)]
        return Batch(
            normalised(images),
            covered,
            (kinds >= 0).float(),
            kinds,
            torch.tensor([self.surfaces.index(name) for name in shown]),
            torch.tensor(named).repeat_interleave(2),
            self._tokens(captions).repeat_interleave(2, dim=0),
            self.tokenizer(names),
            self._tokens(list(zip(without, with_it, strict=True))),
        )

    def _tokens(self, pairs: list[list[str]]) -> torch.Tensor:
        return torch.stack([self.tokenizer(list(pair)) for pair in pairs])


def normalised(images: torch.Tensor) -> torch.Tensor:
    """As CLIP takes them: (B, 3, S, S) from [0, 1]."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    return (images - mean) / std
