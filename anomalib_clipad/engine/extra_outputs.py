"""What exported files give beside anomalib's four outputs, where a user asks for it.

anomalib's ``OpenVINOInferencer`` has a field for each of the four and refuses a file with any other, so files have no
more than these by default.
"""

import json
import logging
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from anomalib.data import InferenceBatch

from anomalib_clipad.components import Prediction, Scores, region_weights
from anomalib_clipad.components.defect_names import MARGIN
from anomalib_clipad.engine.export import WholeExportMixin
from anomalib_clipad.engine.network import ZeroShotNetwork
from anomalib_clipad.errors import check_flag

logger = logging.getLogger(__name__)


class Answer(NamedTuple):
    """What a model finds in a batch, at every stage.

    Attributes:
        scores: Of the network, before the two scores of an image are one.
        prediction: Of the network.
        shown: Behind the post-processor: anomalib's four.

    Example:
        >>> Answer._fields
        ('scores', 'prediction', 'shown')
    """

    scores: Scores
    prediction: Prediction
    shown: InferenceBatch


class ExtraOutput(NamedTuple):
    """One more output of exported files.

    Attributes:
        name: Of the output.
        values: Takes the model and what it has found in B images, and gives (B, ...); None where the model has none.
        metadata: Takes the model, and gives what a user of the file needs to read the output; JSON can hold it.

    Example:
        >>> ExtraOutput("p_value", lambda model, answer: None, lambda model: {}).name
        'p_value'
    """

    name: str
    values: Callable[[Any, Answer], torch.Tensor | None]
    metadata: Callable[[Any], Mapping[str, object]]


def _p_value(model: Any, answer: Answer) -> torch.Tensor | None:  # noqa: ANN401 - an anomalib module with our parts
    p_values = getattr(model.post_processor, "p_values", None)
    return None if p_values is None else p_values(answer.prediction.pred_score, answer.prediction.class_index)


def _defects(model: Any, answer: Answer) -> torch.Tensor | None:  # noqa: ANN401 - likewise
    evidence = answer.scores.defect_evidence
    if evidence is None:
        return None
    # What is shown is on the scale, as map_on_the_scale has it in the engine, where anything normalises it.
    maps = cast("torch.Tensor", answer.shown.anomaly_map)
    if not getattr(model.post_processor, "enable_normalization", False):
        maps = model.model.map_scale.squash(maps)
    mask = getattr(answer.shown, "pred_mask", None)
    weights = region_weights(maps, mask)
    inside = model.model.region.inside
    return model.model.defect_probabilities(
        evidence, weights if inside is None else weights * inside, answer.scores.class_index
    )


def _normal_images(model: Any) -> dict[str, object]:  # noqa: ANN401 - likewise
    of_class = model.post_processor.of_class
    return {"normal_images": of_class.normal_images if of_class.known else len(model.post_processor.good_scores)}


def _words(model: Any) -> dict[str, object]:  # noqa: ANN401 - likewise
    words = model.model.defect_names.words
    found = {"defects": [word for own in words for word in own], "margin": MARGIN}
    if len(words) > 1:
        found["class_of_defect"] = [number for number, own in enumerate(words) for _ in own]
    return found


OUTPUTS: tuple[ExtraOutput, ...] = (
    ExtraOutput("p_value", _p_value, _normal_images),
    ExtraOutput("defect_probabilities", _defects, _words),
)


class ExtraOutputsMixin(WholeExportMixin):
    """Gives more than four outputs while a file is traced; its user calls :meth:`adopt_extra_outputs`."""

    model: ZeroShotNetwork  # type: ignore[assignment]  # anomalib declares a module
    extra_outputs = False
    _traced = False  # whether a file is written at the moment

    def adopt_extra_outputs(self, extra_outputs: bool) -> None:
        """Take the argument.

        Raises:
            InputError: If it is neither true nor false.
        """
        check_flag("extra_outputs", extra_outputs)
        self.extra_outputs = extra_outputs

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Have :meth:`with_extra` give the extra outputs, if they are wanted."""
        self._traced = self.extra_outputs
        try:
            yield
        finally:
            self._traced = False

    def with_extra(self, told: InferenceBatch, answer: Answer) -> InferenceBatch:
        """An answer with the extra outputs, while a file is traced; else as it is."""
        if not self._traced:
            return told
        outputs = {**told._asdict(), **{one.name: one.values(self, answer) for one in OUTPUTS}}
        known = {name: value for name, value in outputs.items() if value is not None}
        return cast("InferenceBatch", namedtuple("InferenceBatch", known)(**known))

    def describe(self, file: Path) -> None:
        """Write into an ONNX file what its extra outputs mean, which OpenVINO takes over; say which there are."""
        if not self.extra_outputs:
            return
        import onnx

        graph = onnx.load(file, load_external_data=False)
        written = {output.name for output in graph.graph.output}
        found = [one for one in OUTPUTS if one.name in written]
        if not found:
            logger.warning("extra_outputs finds nothing to give: no scores of normal images, no words for defects.")
            return
        facts = {key: value for one in found for key, value in one.metadata(self).items()}
        if len(self.model.class_names) > 1:
            facts["class_names"] = list(self.model.class_names)
        texts = {key: json.dumps(value) for key, value in facts.items()}
        onnx.helper.set_model_props(graph, texts)
        onnx.save(graph, file)
        names = ", ".join(one.name for one in found)
        logger.info("Outputs beside anomalib's four: %s. anomalib's OpenVINOInferencer does not take them.", names)
