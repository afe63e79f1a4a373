"""Pictures of surfaces, flawless and broken, and captions of them: what the demonstration backbone is trained on."""

import multiprocessing
from typing import NamedTuple

import numpy as np
import open_clip
import torch
from PIL import Image
from rich.progress import track
from torch.nn import functional as F

from anomalib_clipad.components import PromptEnsemble
from anomalib_clipad.demo.canvas import Style
from anomalib_clipad.demo.defects import DEFECTS, paint_defect
from anomalib_clipad.demo.textures import render

SIZE, PATCHES, RENDERED = 96, 12, 144  # pictures are rendered larger and reduced, as real ones are
CONTRAST = (0.1, 0.6)  # of the surfaces, up to what photographs have

PROMPTS = PromptEnsemble.from_config("industrial")
NORMAL = [*PROMPTS.normal_states, "intact {}", "pristine {}", "undamaged {}", "clean {}", "good {}", "{} in order"]
ANOMALOUS = [
    *(state for state in PROMPTS.anomalous_states if state.split()[-1] not in ("scratch", "crack", "contamination")),
    "defective {}",
    "faulty {}",
    "{} with an anomaly",
    "spoiled {}",
]
OF_KIND = {
    "scratch": ["{} with scratch", "scratched {}", "{} with scratches"],
    "crack": ["{} with crack", "cracked {}", "{} with a crack"],
    "stain": ["{} with contamination", "stained {}", "{} with a stain"],
    "hole": ["{} with a hole", "perforated {}"],
    "contamination": ["{} with contamination", "contaminated {}", "dirty {}"],
    "dent": ["{} with a dent", "dented {}"],
    "misprint": ["{} with a misprint", "misprinted {}"],
    "missing part": ["{} with a missing part", "incomplete {}", "broken {}"],
}
SYNONYMS = {
    "wood": ["wooden board", "timber"],
    "fabric": ["cloth", "textile"],
    "metal": ["brushed metal", "steel"],
    "plastic": ["plastic surface"],
    "mesh": ["grid", "lattice"],
    "rubber": ["studded rubber", "rubber mat"],
    "glass": ["window pane"],
    "washer": ["ring"],
    "bolt": ["screw head", "hexagon nut"],
    "bottle cap": ["crown cork"],
}
ANYTHING = ["object", "surface", "texture", "part", "product", "material", "item", "thing"]


class Pictures(NamedTuple):
    """A pool of rendered pictures, each flawless and with two defects.

    Attributes:
        images: (P, 3, 3, S, S) uint8, one flawless and two broken each.
        masks: (P, 3, S, S) bool.
        kinds: (P, 3) index of the defect, -1 where there is none.
        names: Name of the surface of each.
    """

    images: torch.Tensor
    masks: torch.Tensor
    kinds: torch.Tensor
    names: list[str]


def _picture(job: tuple[str, int]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    name, seed = job
    rng = np.random.default_rng(seed)
    whole, inside = render(name, Style.random(rng, CONTRAST), rng, RENDERED)
    kinds = [-1, *rng.choice(len(DEFECTS), 2, replace=False).tolist()]
    images, masks = [], []
    for kind in kinds:
        picture, mask = whole, np.zeros_like(inside)
        if kind >= 0:
            picture, mask = paint_defect(whole, inside, list(DEFECTS)[kind], rng)
        small = Image.fromarray((255 * picture).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        images.append(np.asarray(small).transpose(2, 0, 1))
        masks.append(np.asarray(Image.fromarray(mask).convert("L").resize((SIZE, SIZE), Image.Resampling.BOX)) > 63)
    return np.stack(images), np.stack(masks), kinds


def render_pool(names: list[str], count: int, seed: int) -> Pictures:
    """Render ``count`` pictures of the surfaces in turn."""
    jobs = [(names[i % len(names)], seed + i) for i in range(count)]
    with multiprocessing.Pool() as pool:
        done = list(track(pool.imap(_picture, jobs, chunksize=16), f"Rendering {count} pictures", total=count))
    images, masks, kinds = (torch.from_numpy(np.stack([np.asarray(d[k]) for d in done])) for k in range(3))
    return Pictures(images, masks, kinds, [name for name, _ in jobs])


class Captions:
    """Makes captions; ``rng`` decides which."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def name(self, surface: str) -> tuple[str, bool]:
        """A name for a surface, and whether it says anything of it: some names are general, some are no words.

        So the text tower learns to read the state whatever the object's name is, known or not.
        """
        kind = self.rng.random()
        if kind < 0.5:
            return str(self.rng.choice([surface, *SYNONYMS.get(surface, [])])), True
        if kind < 0.65:
            return str(self.rng.choice(ANYTHING)), False
        syllables = ["".join(self.rng.choice(list(part)) for part in ("bdfgklmnprstvz", "aeiou", "lmnrst"))]
        syllables += ["".join(self.rng.choice(list(part)) for part in ("bdfgklmnprstvz", "aeiou"))]
        return str(self.rng.choice(["", "", " "])).join(syllables[: self.rng.integers(1, 3)]), False

    def caption(self, name: str, kind: int) -> str:
        """A caption of a flawless (kind -1) or broken surface."""
        states = NORMAL if kind < 0 else ANOMALOUS
        if kind >= 0 and self.rng.random() < 0.4:
            states = OF_KIND[list(DEFECTS)[kind]]
        template = str(self.rng.choice(PROMPTS.templates)) if self.rng.random() < 0.9 else "{}"
        return template.format(str(self.rng.choice(states)).format(name))


class Batch(NamedTuple):
    """Images with a flawless and a broken caption each.

    Attributes:
        images: (B, 3, S, S), normalised.
        patches: (B, N) in {0, 1}, whether a patch shows a defect.
        broken: (B,) in {0, 1}.
        texts: (2, B, L) tokens: flawless, broken.
        surfaces: (B,) number of the surface.
        named: (B,) whether the captions name the surface.
    """

    images: torch.Tensor
    patches: torch.Tensor
    broken: torch.Tensor
    texts: torch.Tensor
    surfaces: torch.Tensor
    named: torch.Tensor


class Sampler:
    """Draws batches of pictures, each flawless and broken, turned, mirrored and in other light."""

    def __init__(self, pool: Pictures, seed: int, device: torch.device, context_length: int) -> None:
        self.pool, self.device = pool, device
        self.rng = np.random.default_rng(seed)
        self.captions = Captions(self.rng)
        self.tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=context_length)
        self.mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
        self.std = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
        self.numbers = {name: number for number, name in enumerate(dict.fromkeys(pool.names))}

    def batch(self, pictures: int) -> Batch:
        """``2 * pictures`` images: so many surfaces, flawless and broken."""
        rows = self.rng.choice(len(self.pool.names), pictures, replace=False)
        images, masks, kinds, texts, named = [], [], [], ([], []), []
        for row in rows:
            turn, flip = int(self.rng.integers(4)), bool(self.rng.random() < 0.5)
            broken = int(self.rng.integers(1, 3))
            name, names_it = self.captions.name(self.pool.names[row])
            for which in (0, broken):
                image = self.pool.images[row, which].float() / 255
                mask = self.pool.masks[row, which]
                image, mask = (x.rot90(turn, (-2, -1)) for x in (image, mask))
                if flip:
                    image, mask = image.flip(-1), mask.flip(-1)
                image = self._in_other_light(image)
                images.append((image - self.mean) / self.std)
                masks.append(mask)
                kinds.append(int(self.pool.kinds[row, which]))
                named.append(names_it)
                texts[0].append(self.captions.caption(name, -1))
                texts[1].append(self.captions.caption(name, int(self.pool.kinds[row, broken])))
        covered = F.avg_pool2d(torch.stack(masks)[:, None].float(), SIZE // PATCHES)
        tokens = torch.stack([self.tokenizer(side) for side in texts])
        numbers = torch.tensor([self.numbers[self.pool.names[row]] for row in np.repeat(rows, 2)])
        batch = Batch(
            torch.stack(images),
            (covered.flatten(1) > 0.08).float(),
            torch.tensor([float(kind >= 0) for kind in kinds]),
            tokens,
            numbers,
            torch.tensor(named),
        )
        return Batch(*(part.to(self.device) for part in batch))

    def _in_other_light(self, image: torch.Tensor) -> torch.Tensor:
        """Another exposure and white balance, and sensor noise."""
        gain, lift = 1 + self.rng.normal(0, 0.15), self.rng.normal(0, 0.06) + self.rng.normal(0, 0.02, (3, 1, 1))
        noise = self.rng.uniform(0, 0.03) * self.rng.standard_normal(image.shape, dtype=np.float32)
        return torch.from_numpy(np.clip(image.numpy() * gain + lift + noise, 0, 1).astype(np.float32))
