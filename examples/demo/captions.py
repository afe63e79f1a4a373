"""What is said of the pictures that the demonstration backbone is trained on."""

import numpy as np

from anomalib_clipad.components import PromptEnsemble
from anomalib_clipad.demo.defects import DEFECTS

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
    "stain": ["{} with stain", "stained {}", "{} with a stain"],
    "hole": ["{} with hole", "perforated {}", "{} with a hole"],
    "contamination": ["{} with contamination", "contaminated {}", "dirty {}"],
    "dent": ["{} with dent", "dented {}", "{} with a dent"],
    "misprint": ["{} with misprint", "misprinted {}", "{} with a misprint"],
    "missing part": ["{} with missing part", "incomplete {}", "{} with a missing part"],
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


class Captions:
    """Makes captions.

    Args:
        rng: Decides which.
        surfaces: Names of all surfaces.
    """

    def __init__(self, rng: np.random.Generator, surfaces: list[str]) -> None:
        self.rng, self.surfaces = rng, surfaces

    def own_name(self, surface: str) -> str:
        """The surface's name, or another word for it."""
        return str(self.rng.choice([surface, *SYNONYMS.get(surface, [])]))

    def name(self, surface: str) -> tuple[str, bool]:
        """A name for a surface, and whether it says anything of it.

        Some names are general, and some are no words. So the text tower learns to read the state whatever the object's
        name is, known or not.
        """
        if self.rng.random() < 0.65:
            return self.own_name(surface), True
        return self.no_name(), False

    def no_name(self) -> str:
        """A general name, or one that is no word."""
        if self.rng.random() < 0.4:
            return str(self.rng.choice(ANYTHING))
        syllables = ["".join(self.rng.choice(list(part)) for part in ("bdfgklmnprstvz", "aeiou", "lmnrst"))]
        syllables += ["".join(self.rng.choice(list(part)) for part in ("bdfgklmnprstvz", "aeiou"))]
        return str(self.rng.choice(["", "", " "])).join(syllables[: self.rng.integers(1, 3)])

    def any_name(self) -> str:
        """The name of some surface, or none."""
        return self.name(str(self.rng.choice(self.surfaces)))[0]

    def caption(self, name: str, kind: int) -> str:
        """A caption of a flawless (kind -1) or broken surface."""
        if kind < 0:
            states = [f"{{}} without {word}" for word in DEFECTS] if self.rng.random() < 0.25 else NORMAL
        else:
            states = OF_KIND[list(DEFECTS)[kind]] if self.rng.random() < 0.5 else ANOMALOUS
        return self.sentence(str(self.rng.choice(states)).format(name))

    def with_and_without(self, name: str) -> tuple[list[str], list[str]]:
        """Every kind of defect, as the model asks for it: without it, and with it."""
        return tuple([self.sentence(f"{name} {how} {kind}") for kind in DEFECTS] for how in ("without", "with"))

    def sentence(self, phrase: str) -> str:
        """A phrase in one of the prompts' templates, or bare."""
        return str(self.rng.choice(PROMPTS.templates)).format(phrase) if self.rng.random() < 0.9 else phrase
