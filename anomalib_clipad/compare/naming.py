"""How often a model's words for defects are right: what its jobs kept, put together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from anomalib_clipad.compare.job_files import Kept
from anomalib_clipad.components import NamingFigures
from anomalib_clipad.components.defect_words import NOT_CALLED, UNSPECIFIED
from anomalib_clipad.files import slug
from anomalib_clipad.pictures.text import printable

WORDS = "defects"  # of a job's row: the words it chose between
PREFIX = "naming_"  # of a job's figures in results.csv


@dataclass(frozen=True)
class Naming:
    """The words that a model gave to anomalous images whose folder is named by one of its words.

    Args:
        model: Its name.
        categories: Those in which it had these words.
        words: All that were to choose between.
        truth: The true word of each image.
        named: The word given, ``unspecified``, or that the image is not called anomalous.
        several: Whether the model had other words in other categories.

    Example:
        >>> naming = Naming("SDP", ("nut",), ("dent", "hole"), ("dent", "hole"), ("dent", "unspecified"))
        >>> naming.title, naming.figures.accuracy
        ('SDP', 0.5)
        >>> naming.confusion.loc["hole"].to_dict()
        {'dent': 0, 'hole': 0, 'unspecified': 1, 'not called anomalous': 0}
    """

    model: str
    categories: tuple[str, ...]
    words: tuple[str, ...]
    truth: tuple[str, ...]
    named: tuple[str, ...]
    several: bool = False

    @property
    def title(self) -> str:
        """The model, and the categories where its words are not the same in all."""
        return f"{self.model}, {', '.join(self.categories)}" if self.several else self.model

    @property
    def figures(self) -> NamingFigures:
        """Accuracy and macro F1, beside what guessing gives."""
        given = [None if word in (UNSPECIFIED, NOT_CALLED) else word for word in self.named]
        return NamingFigures.of(self.truth, given, self.words)

    @property
    def confusion(self) -> pd.DataFrame:
        """Numbers of images: a row a true word that occurs, a column a word, and two for images without one."""
        rows = [word for word in self.words if word in set(self.truth)]
        counts = pd.crosstab(pd.Series(self.truth, dtype=object), pd.Series(self.named, dtype=object))
        return counts.reindex(index=rows, columns=[*self.words, UNSPECIFIED, NOT_CALLED], fill_value=0)


def namings(rows: Sequence[Mapping[str, Any]], kept: Mapping[str, Kept]) -> list[Naming]:
    """What there is to say of words, model by model.

    Args:
        rows: A row a job; of several seeds of a model on a category, the first counts.
        kept: What the jobs kept.

    Returns:
        One for each model that had words, and for each list of words where categories have different ones; nothing
        where no anomalous image's folder is named by a word.

    Example:
        >>> namings([{"model": "SDP", "category": "nut", "key": "none"}], {})
        []
    """
    found: dict[tuple[str, tuple[str, ...]], dict[str, Kept]] = {}
    for row in rows:
        words, one = row.get(WORDS), kept.get(str(row["key"]))
        if isinstance(words, list) and one is not None:  # in a table, a row without words has NaN
            found.setdefault((str(row["model"]), tuple(words)), {}).setdefault(str(row["category"]), one)
    models = [model for model, _ in found]
    result = []
    for (model, words), jobs in found.items():
        known = [image for one in jobs.values() for image in one.images.values() if image.true_defect]
        truth = tuple(str(image.true_defect) for image in known)
        named = tuple(image.defect or NOT_CALLED for image in known)
        if known:
            result.append(Naming(model, tuple(jobs), words, truth, named, several=models.count(model) > 1))
    return result


def figures_of_job(words: Sequence[str], table: pd.DataFrame) -> dict[str, Any]:
    """What a job's row says of its words; nothing where it had none, or no folder is named by one.

    Args:
        words: All that were to choose between.
        table: With ``true_defect`` and ``defect`` of every image.

    Example:
        >>> table = pd.DataFrame({"true_defect": ["dent", None], "defect": ["dent", "hole"]})
        >>> figures_of_job(["dent", "hole"], table)["naming_accuracy"]
        1.0
    """
    known = table[table["true_defect"].notna()]
    if not len(words) or known.empty:
        return {}
    named = tuple(word if isinstance(word, str) else NOT_CALLED for word in known["defect"])
    naming = Naming("", (), tuple(words), tuple(known["true_defect"]), named)
    return {WORDS: list(words), **{f"{PREFIX}{key}": value for key, value in naming.figures._asdict().items()}}


def naming_table(found: Sequence[Naming]) -> pd.DataFrame:
    """A row a model: how many images there are, accuracy and macro F1 in per cent, and what guessing gives.

    Example:
        >>> naming_table([Naming("SDP", ("nut",), ("dent", "hole"), ("dent",), ("dent",))]).loc["SDP"].tolist()
        ['1', '100.0', '100.0', '50.0', '100.0']
    """
    rows = {}
    for one in found:
        images, *shares = one.figures
        rows[one.title] = [str(images), *(f"{100 * share:.1f}" for share in shares)]
    columns = ["images", "accuracy", "macro F1", "chance", "always the most frequent"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def naming_picture(naming: Naming) -> str:
    """Its picture's file, relative to the folder of the comparison.

    Example:
        >>> naming_picture(Naming("SDP", ("nut",), ("dent", "hole"), ("dent",), ("dent",)))
        'words/SDP.png'
    """
    return f"words/{slug(naming.title)}.png"


def naming_remarks(found: Sequence[Naming]) -> list[str]:
    """The same in sentences, for the screen and the page.

    Example:
        >>> naming_remarks([Naming("SDP", ("nut",), ("dent", "hole"), ("dent",), ("dent",))])
        ['Attribution, not diagnosis: SDP, 1 anomalous image named: accuracy 100.0 % (chance 50.0 %, ...']
    """
    return [printable(f"Attribution, not diagnosis: {one.title}, {one.figures}.") for one in found]
