"""A word for what was found: which of some defects a region resembles most. Attribution, not diagnosis.

Ours, not the paper's. It uses the prompts' templates and the surgery path's patches.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from anomalib_clipad.components.defect_baseline import DefectBaseline, region_means
from anomalib_clipad.components.defect_words import UNSPECIFIED, Defects, shortened, words_by_class
from anomalib_clipad.components.float32 import Float32Buffers
from anomalib_clipad.components.prompts import PromptEnsemble
from anomalib_clipad.components.scores import LOGIT_SCALE
from anomalib_clipad.components.surgery import margin
from anomalib_clipad.components.text_encoder import TextEncoder
from anomalib_clipad.errors import InputError

MARGIN = 0.05  # between the two largest probabilities; below, no word is given
SHOWN = 2  # words in an explanation
LARGEST_SHARE = 0.01  # of a map's pixels, which are the region where none is marked
LEAST_WEIGHT = 1e-6  # of a pixel of the region, whose map may be zero everywhere


class DefectName(NamedTuple):
    """How much a region resembles each defect.

    Attributes:
        probabilities: By word, largest first; they sum to 1, and are NaN where the image could not be scored.

    Example:
        >>> found = DefectName({"scratch": 0.62, "crack": 0.21, "dent": 0.17})
        >>> found.word, found.explanation
        ('scratch', 'scratch 0.62, crack 0.21')
        >>> DefectName({"scratch": 0.5, "crack": 0.5}).explanation
        'unspecified'
    """

    probabilities: dict[str, float]

    @property
    def word(self) -> str | None:
        """The likeliest, if it leads by the margin."""
        first, second = list(self.probabilities.values())[:2]
        return next(iter(self.probabilities)) if first - second >= MARGIN else None

    @property
    def explanation(self) -> str:
        """The two likeliest with their probabilities, or ``unspecified``."""
        if self.word is None:
            return UNSPECIFIED
        return ", ".join(f"{word} {share:.2f}" for word, share in list(self.probabilities.items())[:SHOWN])


class DefectNames(Float32Buffers):
    r"""Names defects: the words of each class, as directions in the joint embedding space.

    A word's direction is :math:`d_s = t_{\text{with}\,s} - t_{\text{without}\,s}`. Its two text vectors are the means
    of the templates filled with "CLASS with WORD" and "CLASS without WORD". With :math:`f_p` the mean over the taps of
    a patch's unit vectors and :math:`w_p` the patch's weight, a region has

    .. math:: m_s = \frac{\sum_p w_p\, f_p \cdot d_s}{\sum_p w_p}

    The probabilities are a softmax of :math:`100\, m_s`: differences of cosines at CLIP's own temperature, as for the
    text score. See :class:`DefectBaseline` for what normal images change.

    Args:
        embed_dim: Length D of the text vectors.
        defects: The words, see :func:`anomalib_clipad.components.defect_words.words_by_class`.
        ensemble: Prompts of a class.

    Raises:
        InputError: If the words cannot be used.

    Example:
        >>> names = DefectNames(12, "states", PromptEnsemble.from_config("industrial"))
        >>> names.wanted(["bottle", "nut"])
        (('scratch', 'crack', 'contamination'), ('scratch', 'crack', 'contamination'))
        >>> names.evidence([torch.rand(2, 17, 12)]) is None  # before words are encoded
        True
    """

    growing = ("directions",)
    added = True

    directions: torch.Tensor

    def __init__(self, embed_dim: int, defects: Defects, ensemble: PromptEnsemble) -> None:
        super().__init__()
        self.defects, self.ensemble = words_by_class(defects, ensemble), ensemble
        self.words: tuple[tuple[str, ...], ...] = ()  # of every class
        self.register_buffer("directions", torch.empty(0, embed_dim))  # (words, D), one class after the other
        self.baseline = DefectBaseline()

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words of all classes, each once."""
        return tuple(dict.fromkeys(word for own in self.words for word in own))

    def wanted(self, class_names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """The words of each class; nothing where no names are wanted.

        Raises:
            InputError: If a mapping has no words for a class.
        """
        if self.defects is None:
            return ()
        if isinstance(self.defects, tuple):
            return (self.defects,) * len(class_names)
        if lacking := [name for name in class_names if name not in self.defects]:
            msg = f"defects has words for {', '.join(self.defects)}, but none for {lacking[0]!r}; add it."
            raise InputError(msg)
        return tuple(self.defects[name] for name in class_names)

    def encode(self, class_names: Sequence[str], encoder: TextEncoder) -> None:
        """Take the directions of the words of these classes; forgets what was measured on normal images.

        Raises:
            InputError: If a mapping has no words for a class, or a word is too long for the text tower.
        """
        words = self.wanted(class_names)
        directions = [self.directions[:0]]
        for name, own in zip(class_names, words, strict=False):
            for word in own:
                pair = _pair(word, self.ensemble)
                longest = max((prompt for state in pair.prompts(name) for prompt in state), key=len)
                if not encoder.fits(longest):
                    msg = f"defects: {shortened(word)} makes sentences that the text tower would cut; use fewer words."
                    raise InputError(msg)
                directions.append(margin(encoder.text_features(name, pair, "mean")).to(self.directions))
        self.words, self.directions = words, torch.cat(directions)
        self.baseline.reset()

    def forget(self) -> None:
        """Have no words, as before the first class."""
        self.words, self.directions = (), self.directions[:0]
        self.baseline.reset()

    def evidence(self, surgery: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """How far every patch points into each word's direction.

        Args:
            surgery: Taps of the surgery path, (B, N + 1, D) each, class token first.

        Returns:
            (B, N, words) in float32, words of one class after those of the other; nothing where there are no words.
        """
        if not self.words:
            return None
        taps = [F.normalize(tokens[:, 1:].float(), dim=-1) @ self.directions.T for tokens in surgery]
        return torch.stack(taps).mean(dim=0)

    def forward(
        self, evidence: torch.Tensor, weights: torch.Tensor, class_index: torch.Tensor | None = None
    ) -> list[DefectName]:
        """Name what is in a region.

        Args:
            evidence: (B, V, N, words) of :meth:`evidence`, the whole picture's patches before those of its tiles.
            weights: (B, V, N), 0 or more, of the patches; 0 outside of the region.
            class_index: (B,) index into the classes; the first class for all by default.
        """
        rows = self.probabilities(evidence, weights, class_index).tolist()
        classes = [0] * len(rows) if class_index is None else class_index.tolist()
        names = []
        for row, number in zip(rows, classes, strict=True):
            pairs = zip(self.words[number], row[self._own(number)], strict=True)
            # A stable order, also of what is not a number.
            names.append(DefectName(dict(sorted(pairs, key=lambda pair: -pair[1]))))
        return names

    def probabilities(
        self, evidence: torch.Tensor, weights: torch.Tensor, class_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The same in numbers: (B, words), words of one class after those of the other; 0 for those of other classes.

        The arguments are those of :meth:`forward`.
        """
        means = region_means(evidence, weights)
        columns = []
        for number in range(len(self.words)):
            own = self._own(number)
            shares = (LOGIT_SCALE * self.baseline(means[:, own], own)).softmax(dim=1)
            if class_index is not None:
                shares = torch.where((class_index == number)[:, None], shares, 0.0)
            columns.append(shares if class_index is not None or number == 0 else torch.zeros_like(shares))
        return torch.cat(columns, dim=1)

    def _own(self, number: int) -> slice:
        """Where the words of a class are among those of all."""
        start = sum(map(len, self.words[:number]))
        return slice(start, start + len(self.words[number]))


def region_weights(anomaly_map: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The map within the marked region, or within its largest hundredth where nothing is marked; 0 elsewhere.

    Args:
        anomaly_map: (B, H, W), 0 or more.
        mask: (B, H, W), true where marked.

    Returns:
        (B, H, W).

    Example:
        >>> maps = torch.tensor([[[0.6, 0.2]], [[0.1, 0.4]]])
        >>> region_weights(maps, maps > 0.5).tolist() == [[[maps[0, 0, 0], 0]], [[0, maps[1, 0, 1]]]]
        True
    """
    values = anomaly_map.float()
    pixels = values.flatten(1)
    least = pixels.topk(max(1, round(LARGEST_SHARE * pixels.shape[1])), dim=1).values[:, -1, None, None]
    region = values >= least
    if mask is not None:
        marked = mask.bool()
        region = marked | (region & ~marked.flatten(1).any(dim=1)[:, None, None])
    return torch.where(region, values.clamp(min=LEAST_WEIGHT), 0.0)


def _pair(word: str, ensemble: PromptEnsemble) -> PromptEnsemble:
    return PromptEnsemble([f"{{}} without {word}"], [f"{{}} with {word}"], ensemble.templates)
