"""Exported files with more than anomalib's four outputs: what predict says of an image, they say too."""

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

from .conftest import folder, new_engine
from .test_export import FIELDS, OnceToOnnx, run_onnx, run_openvino


class Written(NamedTuple):
    """What predict says of some images, and files that are to say the same."""

    predicted: list[ImageBatch]
    onnx: Path
    openvino: Path


class Once(OnceToOnnx, ClipAdSdp):
    """Exports to ONNX once."""


@pytest.fixture(scope="module")
def written(small_clip: str, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    root = tmp_path_factory.mktemp("extra")
    model = Once("nut", small_clip, k_shot=3, false_alarm_rate=0.2, visualizer=False, extra_outputs=True)
    new_engine(root).validate(model, datamodule=folder(parts), verbose=False)
    predicted = new_engine(root).predict(model, datamodule=folder(parts))
    return Written(predicted, *(new_engine(root).export(model, kind, root) for kind in ("onnx", "openvino")))


def answers(written: Written, kind: str, batch: ImageBatch) -> dict[str, np.ndarray]:
    pixels = [np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255 for path in batch.image_path]
    run = {"onnx": run_onnx, "openvino": run_openvino}[kind]
    return run(getattr(written, kind), np.stack(pixels).transpose(0, 3, 1, 2))


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
def test_a_file_says_what_its_outputs_mean(written: Written) -> None:
    texts = onnxruntime.InferenceSession(written.onnx).get_modelmeta().custom_metadata_map
    info = openvino.Core().read_model(written.openvino)
    assert texts["normal_images"] == info.get_rt_info(["framework", "normal_images"]).astype(str) == "12"


@pytest.mark.slow
def test_anomalibs_inferencer_is_why_they_are_asked_for(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the inferencer keeps a cache
    with pytest.raises(TypeError, match="unexpected keyword argument 'p_value'"):
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
