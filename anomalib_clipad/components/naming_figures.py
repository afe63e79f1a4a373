"""How often the words for defects are right, beside what guessing gives."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from anomalib_clipad.errors import InputError


class NamingFigures(NamedTuple):
    """Figures over anomalous images whose defect is known.

    Attributes:
        images: How many.
        accuracy: Share of right words; an image without a word counts as wrong.
        macro_f1: Mean of the words' F1 scores, over the words that occur as truth.
        chance: What drawing one of the words gives as accuracy.
        most_frequent: What always saying the most frequent defect gives as accuracy.

    Example:
        >>> print(NamingFigures.of(["dent", "dent", "hole"], ["dent", None, "hole"], words=["dent", "hole", "stain"]))
        3 anomalous images named: accuracy 66.7 % (chance 33.3 %, most frequent 66.7 %), macro F1 83.3 %
    """

    images: int
    accuracy: float
    macro_f1: float
    chance: float
    most_frequent: float

    @classmethod
    def of(cls, truth: Sequence[str], named: Sequence[str | None], words: Sequence[str]) -> "NamingFigures":
        """Compare words with the truth.

        Args:
            truth: Of each anomalous image.
            named: The word given to it, ``None`` for none.
            words: All that were to choose between.

        Raises:
            InputError: If there is no image.
        """
        from sklearn.metrics import accuracy_score, f1_score  # here: a second to import, for the end of a run

        if not truth:
            msg = "There is no anomalous image whose defect is known; give some."
            raise InputError(msg)
        counts, given = Counter(truth), [word or "" for word in named]
        return cls(
            len(truth),
            float(accuracy_score(truth, given)),
            float(f1_score(truth, given, labels=sorted(counts), average="macro", zero_division=0)),
            1 / len(words),
            max(counts.values()) / len(truth),
        )

    def __str__(self) -> str:
        right, chance, frequent = (f"{100 * share:.1f} %" for share in (self.accuracy, self.chance, self.most_frequent))
        images = f"{self.images} anomalous image{'' if self.images == 1 else 's'}"
        return (
            f"{images} named: accuracy {right} (chance {chance}, most frequent {frequent}), "
            f"macro F1 {100 * self.macro_f1:.1f} %"
        )
