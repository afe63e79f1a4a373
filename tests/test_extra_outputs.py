"""Exported files with more than anomalib's four outputs: what predict says of an image, they say too."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.deploy import OpenVINOInferencer
from PIL import Image

from anomalib_clipad import ClipAdSdp, InputError
from anomalib_clipad.components import DefectName, region_weights
from anomalib_clipad.components.defect_names import MARGIN

from .conftest import build_model, folder, new_engine
from .test_export import FIELDS, OnceToOnnx, run_example, run_onnx, run_openvino

WORDS = ["square", "big dent", "hole"]


class Written(NamedTuple):
    """What predict says of some images, and files that are to say the same."""

    model: ClipAdSdp
    predicted: list[ImageBatch]
    onnx: Path
    openvino: Path


@pytest.fixture(scope="module")
def written(small_clip: str, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    root = tmp_path_factory.mktemp("extra")
    arguments = {"k_shot": 3, "false_alarm_rate": 0.2, "defects": WORDS, "extra_outputs": True}
    # SDP+, whose layers have gradients: it is exported right after a run in inference mode.
    model = OnceToOnnx()(
        build_model("ClipAdSdpPlus", small_clip, root, class_name="nut", visualizer=False, **arguments)
    )
    new_engine(root).validate(model, datamodule=folder(parts), verbose=False)
    predicted = new_engine(root).predict(model, datamodule=folder(parts))
    return Written(
        model.eval(), predicted, *(new_engine(root).export(model, kind, root) for kind in ("onnx", "openvino"))
    )


def pixels_of(batch: ImageBatch) -> torch.Tensor:
    pixels = [np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255 for path in batch.image_path]
    return torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2))


def answers(written: Written, kind: str, batch: ImageBatch) -> dict[str, np.ndarray]:
    run = {"onnx": run_onnx, "openvino": run_openvino}[kind]
    return run(getattr(written, kind), pixels_of(batch).numpy())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_files_give_the_p_values_of_predict(written: Written, kind: str) -> None:
    seen = set()
    for batch in written.predicted:
        found = answers(written, kind, batch)
        np.testing.assert_allclose(found["p_value"], batch.p_value.numpy(), atol=1e-6, rtol=0)
        np.testing.assert_allclose(found["pred_score"], batch.pred_score.numpy(), atol=1e-4, rtol=0)
        seen |= set(found["p_value"].round(4).tolist())
    assert len(seen) > 3, "p-values of the smallest and of larger scores"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_files_give_the_words_of_predict(written: Written, kind: str) -> None:
    for batch in written.predicted:
        rows = answers(written, kind, batch)["defect_probabilities"]
        with written.model.tracing(), torch.no_grad():
            expected = written.model(pixels_of(batch)).defect_probabilities
        np.testing.assert_allclose(rows, expected.numpy(), atol=1e-4, rtol=0)
        for row, label, explanation in zip(rows.tolist(), batch.pred_label, batch.explanation, strict=True):
            pairs = sorted(zip(WORDS, row, strict=True), key=lambda pair: -pair[1])
            assert explanation == (DefectName(dict(pairs)).explanation if label else "")


def test_probabilities_are_exactly_those_of_the_names(small_clip: str) -> None:
    model = ClipAdSdp("nut", small_clip, defects=WORDS, extra_outputs=True).eval()
    images = torch.rand(3, 3, 40, 40)
    with model.tracing(), torch.no_grad():
        model(images)  # sets the class
        found = model(images)
        evidence = model.model.scores(model.pre_processor(images)).defect_evidence
        names = model.model.name_defects(evidence, region_weights(found.anomaly_map, found.pred_mask))
    for row, name in zip(found.defect_probabilities.tolist(), names, strict=True):
        assert dict(zip(WORDS, row, strict=True)) == pytest.approx(name.probabilities, abs=1e-6)


@pytest.mark.slow
def test_the_example_prints_them(written: Written, tmp_path: Path) -> None:
    batch = next(batch for batch in written.predicted if batch.pred_label.any())
    row = int(batch.pred_label.nonzero()[0])
    done = run_example(written.onnx, batch.image_path[row], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"p-value {float(batch.p_value[row]):.3f}, square 0." in done.stdout


@pytest.mark.slow
def test_a_file_says_what_its_outputs_mean(written: Written) -> None:
    texts = onnxruntime.InferenceSession(written.onnx).get_modelmeta().custom_metadata_map
    info = openvino.Core().read_model(written.openvino)
    for key, value in {"normal_images": 12, "defects": WORDS, "margin": MARGIN}.items():
        assert texts[key] == info.get_rt_info(["framework", key]).astype(str) == json.dumps(value)


@pytest.mark.slow
def test_anomalibs_inferencer_is_why_they_are_asked_for(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the inferencer keeps a cache
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        OpenVINOInferencer(written.openvino, "CPU").predict(np.zeros((48, 48, 3), dtype=np.float32))


def test_the_model_itself_keeps_to_anomalibs_four(small_clip: str) -> None:
    model = ClipAdSdp("nut", small_clip, extra_outputs=True).eval()
    images = torch.rand(2, 3, 40, 40)
    assert model(images)._fields == FIELDS
    with model.tracing():
        assert model(images)._fields == FIELDS, "without normal images there is no p-value"
        model.post_processor.good_scores = torch.tensor([0.1, 0.2, 0.9])
        assert model(images)._fields == (*FIELDS, "p_value")
    assert model(images)._fields == FIELDS


def test_the_argument_is_true_or_false(small_clip: str) -> None:
    with pytest.raises(InputError, match="extra_outputs must be true or false, got 'p_value'"):
        ClipAdSdp("nut", small_clip, extra_outputs="p_value")
