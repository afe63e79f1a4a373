"""Words for defects, as a user gives them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from anomalib_clipad.components.prompts import PromptEnsemble
from anomalib_clipad.errors import InputError

Defects: TypeAlias = Sequence[str] | Mapping[str, Any] | str | bool | None

STATES = "states"  # the prompt ensemble's own words
GENERAL = ("flaw", "defect", "damage", "abnormality")  # of the ensembles: that something is wrong, but not what
LONGEST = 40  # characters of a word in a message
UNSPECIFIED = "unspecified"  # said where no word leads
NOT_CALLED = "not called anomalous"  # of an image that therefore gets no word


def words_by_class(defects: Defects, ensemble: PromptEnsemble) -> tuple[str, ...] | dict[str, tuple[str, ...]] | None:
    """What a user writes for words, checked.

    Args:
        defects: A list of at least two words or phrases; a mapping from class to list; ``states`` or true for the
            ensemble's own, which have a counterpart ("with scratch", "without scratch") and say what is wrong; ``None``
            or false for none.
        ensemble: Prompts of a class.

    Returns:
        The words of all classes, or of each; nothing for no words.

    Raises:
        InputError: If there are fewer than two words, one twice, or something else than words.

    Example:
        >>> industrial = PromptEnsemble.from_config("industrial")
        >>> words_by_class("states", industrial), words_by_class({"can": ["dent", "big  hole"]}, industrial)
        (('scratch', 'crack', 'contamination'), {'can': ('dent', 'big hole')})
    """
    if defects is None or defects is False:
        return None
    if isinstance(defects, Mapping):
        if not defects:
            msg = "defects is an empty mapping; give each class its words, or leave it out."
            raise InputError(msg)
        return {name: _words(own, ensemble, f"defects of {name!r}") for name, own in defects.items()}
    return _words(defects, ensemble, "defects")


def _words(defects: object, ensemble: PromptEnsemble, what: str) -> tuple[str, ...]:
    if defects is True or defects == STATES:
        words = _specific_states(ensemble)
        if len(words) < 2:
            found = f"only {words[0]!r}" if words else "none"
            msg = (
                f"{what}: two states such as '{{}} with scratch' need one such as '{{}} without scratch', got {found}."
            )
            raise InputError(msg)
        return words
    if not isinstance(defects, Sequence) or isinstance(defects, str):
        msg = f"{what} must be a list of words, such as [scratch, crack], or {STATES!r}, got {defects!r}."
        raise InputError(msg)
    for word in defects:
        if not isinstance(word, str) or not word.strip() or "{}" in word:
            msg = f"{what}: every word must be text without {{}}, got {word!r}."
            raise InputError(msg)
    words = tuple(" ".join(word.split()) for word in defects)
    if len(words) < 2:
        found = f"got {shortened(words[0])} alone" if words else "got none"
        msg = f"{what} needs at least two words to choose between, {found}; add others, or leave it out."
        raise InputError(msg)
    folded = [word.casefold() for word in words]
    if taken := next((word for word in (UNSPECIFIED, NOT_CALLED) if word in folded), None):
        msg = f"{what}: {taken!r} is what is said where no word is given; use another word."
        raise InputError(msg)
    if twice := next((word for word, key in zip(words, folded, strict=True) if folded.count(key) > 1), None):
        msg = f"{what} has {shortened(twice)} twice; name it once."
        raise InputError(msg)
    return words


def _specific_states(ensemble: PromptEnsemble) -> tuple[str, ...]:
    prefix = "{} with "
    words = [state.removeprefix(prefix) for state in ensemble.anomalous_states if state.startswith(prefix)]
    normal = set(ensemble.normal_states)
    return tuple(word for word in words if f"{{}} without {word}" in normal and word not in GENERAL)


def word_of_folder(path: str | Path, words: Sequence[str]) -> str | None:
    """The word that a picture's folder is named by, as MVTec-AD names folders: ``broken_large`` for "broken large".

    Args:
        path: Of the picture.
        words: To choose from; case does not matter.

    Example:
        >>> word_of_folder("bottle/test/broken_large/000.png", ["Broken large", "contamination"])
        'Broken large'
        >>> word_of_folder("bottle/test/good/000.png", ["Broken large", "contamination"]) is None
        True
    """
    name = _as_folder(Path(path).parent.name)
    return next((word for word in words if _as_folder(word) == name), None)


def _as_folder(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()


def shortened(word: str) -> str:
    """A word as messages show it.

    Example:
        >>> shortened("dent"), len(shortened("dent" * 100))
        ("'dent'", 45)
    """
    return repr(word if len(word) <= LONGEST else f"{word[:LONGEST]}...")
