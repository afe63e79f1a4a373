"""Prompt ensembles: the sentences that describe a normal and an anomalous object.

CLIP-AD (arXiv 2311.00453), section 3.1 and appendix; the industrial set is the paper's, the medical set is ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from anomalib_clipad.components.weights import is_file
from anomalib_clipad.errors import InputError


@dataclass(frozen=True)
class PromptEnsemble:
    """State phrases and templates that together make the prompts of a class.

    Every phrase holds one ``{}`` for the class name, every template one ``{}`` for the phrase.

    Args:
        normal_states: Phrases for an object as it should be.
        anomalous_states: Phrases for an anomalous object.
        templates: Sentences around a phrase.

    Raises:
        InputError: If a list is empty, or an entry does not hold exactly one ``{}``.

    Example:
        >>> ensemble = PromptEnsemble(["flawless {}"], ["{} with a dent"], ["a photo of a {}.", "a dark {}."])
        >>> ensemble.prompts("can")
        (['a photo of a flawless can.', 'a dark flawless can.'], ['a photo of a can with a dent.', ...])
        >>> normal, anomalous = PromptEnsemble.from_config("industrial").prompts("bottle")
        >>> len(normal), len(anomalous)
        (198, 220)
    """

    normal_states: Sequence[str]
    anomalous_states: Sequence[str]
    templates: Sequence[str]

    def __post_init__(self) -> None:
        for key in (field.name for field in fields(self)):
            entries = getattr(self, key)
            if not isinstance(entries, list | tuple) or not entries:
                msg = f"prompts: {key} must be a list of at least one sentence, got {entries!r}."
                raise InputError(msg)
            for entry in entries:
                if not isinstance(entry, str) or entry.count("{}") != 1:
                    msg = f"prompts: every entry of {key} must hold exactly one {{}}, got {entry!r}."
                    raise InputError(msg)

    @classmethod
    def from_config(cls, config: "str | Path | Mapping[str, Any] | PromptEnsemble") -> "PromptEnsemble":
        """Make an ensemble from a name, a file or a mapping.

        Args:
            config: ``"industrial"`` (the paper's) or ``"medical"`` (ours, not the paper's), the path of a YAML file,
                a mapping with the keys ``normal_states``, ``anomalous_states`` and ``templates`` (keys left out are
                taken from the industrial set), or a ready ensemble.

        Raises:
            InputError: If the name or a key is unknown, or the file cannot be read.
        """
        if isinstance(config, PromptEnsemble):
            return config
        if isinstance(config, str | Path):
            if str(config) in ENSEMBLES:
                return ENSEMBLES[str(config)]
            config = _read_yaml(config)
        if not isinstance(config, Mapping):
            msg = f"prompts must be {_CHOICES}, got {config!r}."
            raise InputError(msg)
        industrial = asdict(ENSEMBLES["industrial"])
        if unknown := sorted(map(str, set(config) - set(industrial))):
            msg = f"prompts take the keys {', '.join(industrial)}, got {', '.join(unknown)}."
            raise InputError(msg)
        return cls(**{**industrial, **config})

    def prompts(self, class_name: str) -> tuple[list[str], list[str]]:
        """All prompts of a class: the normal ones and the anomalous ones, states in the outer loop.

        Args:
            class_name: What is in the image, such as ``bottle`` or ``metal nut``.

        Raises:
            InputError: If the class name is empty or not text.
        """
        if not isinstance(class_name, str) or not class_name.strip():
            found = "is empty" if isinstance(class_name, str) else f"must be text, got {class_name!r}"
            msg = f"class_name {found}; say what is in the images, for example 'metal nut', or leave it out."
            raise InputError(msg)
        return self._fill(self.normal_states, class_name), self._fill(self.anomalous_states, class_name)

    def _fill(self, states: Sequence[str], class_name: str) -> list[str]:
        phrases = [state.replace("{}", class_name) for state in states]
        return [template.replace("{}", phrase) for phrase in phrases for template in self.templates]


def _read_yaml(path: str | Path) -> Mapping[str, Any]:
    if not is_file(path):
        msg = f"prompts must be {_CHOICES}, got {str(path)!r}, which is neither a known name nor a file."
        raise InputError(msg)
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        # Not all are YAML's own: its tags for dates and numbers raise what Python's conversions raise.
        msg = f"prompts: {path} is not valid YAML ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})."
        raise InputError(msg) from error
    if not isinstance(config, Mapping):
        msg = f"prompts: {path} must hold a mapping with normal_states, anomalous_states and templates."
        raise InputError(msg)
    return config


# Order is part of the method: DBSCAN's result depends on it, and so do the parity numbers.
_INDUSTRIAL = PromptEnsemble(
    normal_states=(
        "flawless {}",
        "perfect {}",
        "unblemished {}",
        "{} without flaw",
        "{} without defect",
        "{} without damage",
        "{} without scratch",
        "{} without crack",
        "{} without contamination",
    ),
    anomalous_states=(
        "damaged {}",
        "imperfect {}",
        "blemished {}",
        "broken {}",
        "{} with flaw",
        "{} with defect",
        "{} with damage",
        "{} with scratch",
        "{} with crack",
        "{} with contamination",
    ),
    templates=(
        "a cropped photo of the {}.",
        "a cropped photo of a {}.",
        "a close-up photo of a {}.",
        "a close-up photo of the {}.",
        "a bright photo of a {}.",
        "a bright photo of the {}.",
        "a dark photo of the {}.",
        "a dark photo of a {}.",
        "a jpeg corrupted photo of a {}.",
        "a jpeg corrupted photo of the {}.",
        "a blurry photo of the {}.",
        "a blurry photo of a {}.",
        "a photo of the {}.",
        "a photo of a {}.",
        "a photo of a large {}.",
        "a photo of the small {}.",
        "a photo of the large {}.",
        "a photo of a small {}.",
        "a photo of the {} for visual inspection.",
        "a photo of a {} for visual inspection.",
        "a photo of the {} for anomaly detection.",
        "a photo of a {} for anomaly detection.",
    ),
)

# Ours: the paper uses medical prompts for its medical data sets, but not these.
_MEDICAL = PromptEnsemble(
    normal_states=("healthy {}", "normal {}", "{} without lesion", "{} without tumor", "{} without abnormality"),
    anomalous_states=("diseased {}", "abnormal {}", "{} with lesion", "{} with tumor", "{} with abnormality"),
    templates=(
        "a medical image of a {}.",
        "a medical image of the {}.",
        "a scan of a {}.",
        "a scan of the {}.",
        "a close-up medical image of a {}.",
        "a blurry medical image of a {}.",
        "a medical image of a {} for diagnosis.",
        "a photo of a {}.",
        "a photo of the {}.",
    ),
)

ENSEMBLES: dict[str, PromptEnsemble] = {"industrial": _INDUSTRIAL, "medical": _MEDICAL}
_CHOICES = f"one of {', '.join(ENSEMBLES)}, a mapping, or the path of a YAML file"
