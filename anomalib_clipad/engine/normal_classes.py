"""Normal images of several classes: which class each is of, references and thresholds of each."""

import logging
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import torch

from anomalib_clipad.components import Scores
from anomalib_clipad.engine.normal_images import BATCH, MOST_REFERENCES, NormalImages, NormalImagesMixin, evidence_kept
from anomalib_clipad.engine.post_processing import ClipAdPostProcessor
from anomalib_clipad.engine.products import Products
from anomalib_clipad.errors import InputError

logger = logging.getLogger(__name__)


class NormalClassesMixin(NormalImagesMixin):
    """References and thresholds of each of several classes; one class is :class:`NormalImagesMixin`'s.

    An image of ``few_shot_source`` is of the class that its folder is named by, or that the mapping says. One of the
    training split is of the class that the mapping says, or that the network chooses.
    """

    def _take(self, references: NormalImages, others: NormalImages, post_processor: ClipAdPostProcessor | None) -> None:
        names = self.model.class_names
        if len(names) < 2:
            super()._take(references, others, post_processor)
            return
        number_of = self._numbers(references, by_folder=bool(self.few_shot_source))
        of_classes = [[path for path in references.paths if number_of.get(path) == n] for n in range(len(names))]
        streams = [references.some(paths).named() for paths in of_classes]
        wanted = [min(len(paths), self.k_shot or len(paths)) if self._wants_references else 0 for paths in of_classes]
        of_references = self._references(streams, wanted) if self._wants_references else []
        if post_processor is None:
            return
        used, scored = sum(len(scores.text_score) for scores in of_references), iter(of_references)
        if post_processor.false_alarm_rate is not None:
            number_of |= self._numbers(others, by_folder=False)
            total = len(references) - sum(wanted) + len(others)
            scored = chain(scored, self._score_named(chain(*streams, others.named()), total, number_of))
        evidence: list[tuple[torch.Tensor, torch.Tensor]] = []
        post_processor.set_from_normal(self.model, evidence_kept(scored, evidence), used, self._more_follow)
        if evidence:
            self.model.fit_defect_baseline(*(torch.cat(values) for values in zip(*evidence, strict=True)))

    def _numbers(self, images: NormalImages, by_folder: bool) -> dict[str, int]:
        """The class of each image, by its path."""
        names, products = self.model.class_names, self.products
        found = {path: products.name_of(path) for path in images.paths}
        if by_folder:
            named = Products({name: name for name in names})
            source = Path(str(self.few_shot_source))
            found = {path: named.name_of(_below(source, Path(path))) or name for path, name in found.items()}
            if left_out := [path for path, name in found.items() if name is None]:
                msg = (
                    f"few_shot_source has {left_out[0]} in no folder of a class; put the images of each class into a "
                    f"folder of its name: {', '.join(names)}."
                )
                raise InputError(msg)
        elif products.folders is None:
            return self._chosen_numbers(images)
        else:
            products.check(images.paths, names)
        return {path: names.index(str(name)) for path, name in found.items()}

    def _chosen_numbers(self, images: NormalImages) -> dict[str, int]:
        """The class that the network chooses for each image, or for as many as are wanted."""
        post_processor, names = self.post_processor, self.model.class_names
        all_of_them = isinstance(post_processor, ClipAdPostProcessor) and post_processor.false_alarm_rate is not None
        numbers: dict[str, int] = {}
        named = images.named()
        with self._bar("Choosing classes of normal images", len(images)) as bar:
            while batch := list(islice(named, BATCH)):
                paths, pixels = zip(*batch, strict=True)
                with torch.no_grad(), self._forward_context():
                    chosen = self.model.classes_of(torch.stack(pixels).to(self.device)).tolist()
                numbers |= dict(zip(paths, chosen, strict=True))
                bar.update(len(batch))
                counts = [list(numbers.values()).count(number) for number in range(len(names))]
                if not all_of_them and min(counts) >= self.k_shot:
                    break
        return numbers

    def _references(self, streams: Sequence[Iterator[tuple[str, torch.Tensor]]], most: Sequence[int]) -> list[Scores]:
        """Take so many images off each class's stream as references."""
        names = self.model.class_names
        if (total := sum(most)) > MOST_REFERENCES:
            msg = f"{total} references are more than the {MOST_REFERENCES} possible; set k_shot to take fewer."
            raise InputError(msg)
        images = [[image for _, image in islice(own, count)] for own, count in zip(streams, most, strict=True)]
        wanted = self.k_shot or 1
        few = [number for number, own in enumerate(images) if len(own) < wanted]
        if len(few) == len(names):
            msg = f"No class has the {wanted} normal images that are wanted as references; give more, or set k_shot."
            raise InputError(msg)
        for number in few:
            logger.warning(
                "%r has %d of the %d normal images that are wanted as references; it is compared with all classes'.",
                names[number],
                len(images[number]),
                wanted,
            )
        with self._forward_context():
            batches = [self._batches(own) for own in images]
            return self.model.set_references_of_classes(batches, self.augment_references, few)

    def _score_named(
        self, named: Iterator[tuple[str, torch.Tensor]], total: int, number_of: dict[str, int]
    ) -> Iterator[Scores]:
        """Scores of images of known classes."""
        with self._bar("Scoring normal images", total) as bar:
            while batch := list(islice(named, BATCH)):
                paths, pixels = zip(*batch, strict=True)
                numbers = torch.tensor([number_of[path] for path in paths], device=self.device)
                with torch.no_grad(), self._forward_context():
                    yield self.model.scores(torch.stack(pixels).to(self.device), numbers)
                bar.update(len(batch))


def _below(folder: Path, path: Path) -> str:
    """The part of a path below a folder that may have been given as a relative one, or through a link."""
    roots = [root for root in (folder.absolute(), folder.resolve()) if path.is_relative_to(root)]
    return str(path.relative_to(roots[0]) if roots else path)
