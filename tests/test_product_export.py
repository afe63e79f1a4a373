"""Files of several products choose, score and threshold each image as the engine does."""

from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from PIL import Image

from anomalib_clipad import ClipAdSdp

from .conftest import folder as data
from .conftest import new_engine
from .test_products import BARE, FOLDERS, NAMES, mixed

__all__ = ["mixed"]  # a fixture
CLOSE = {"atol": 1e-4, "rtol": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [{}, {"k_shot": 3, "reference_layers": [2, 4], "image_size": (32, 56), "tile_size": 32}]
)
def test_files_choose_and_judge_as_the_engine(
    small_clip: str, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict
) -> None:
    """In a batch of both classes; anomalib's inferencers read the files."""
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    monkeypatch.chdir(tmp_path)
    model, engine = ClipAdSdp(NAMES, small_clip, **arguments, **BARE), new_engine(tmp_path)
    engine.validate(model, datamodule=data(mixed), verbose=False)
    paths = [
        mixed / f"test/{kind}/{part}/00{n}.png" for kind in ("good", "square") for part in FOLDERS for n in range(3)
    ]
    pixels = np.stack([np.asarray(Image.open(path), dtype=np.float32).transpose(2, 0, 1) / 255 for path in paths])
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(pixels))
    assert set(expected.explanation) == set(NAMES)
    session = onnxruntime.InferenceSession(model.to_onnx(tmp_path))
    names = [output.name for output in session.get_outputs()]
    assert names == ["pred_score", "pred_label", "anomaly_map", "pred_mask", "class_index"]
    score, label, anomaly_map, _, index = session.run(None, {session.get_inputs()[0].name: pixels})
    assert [NAMES[number] for number in index] == expected.explanation
    np.testing.assert_allclose(score, expected.pred_score, **CLOSE)
    np.testing.assert_allclose(anomaly_map, expected.anomaly_map, **CLOSE)
    assert (label == expected.pred_label.numpy()).all()
    alone = session.run(["pred_score", "class_index"], {session.get_inputs()[0].name: pixels[:1]})
    np.testing.assert_allclose(alone[0], score[:1], **CLOSE)

    by_torch = TorchInferencer(model.to_torch(tmp_path), device="cpu").predict(paths[0])
    assert by_torch.explanation == expected.explanation[:1]
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    by_openvino = OpenVINOInferencer(model.to_openvino(tmp_path), device="CPU", config=exact).predict(paths[0])
    for found in (by_torch, by_openvino):
        np.testing.assert_allclose(found.pred_score, expected.pred_score[:1], **CLOSE)
    if not arguments:
        file = model.to_openvino(tmp_path / "with class", class_output=True)
        found = openvino.Core().compile_model(file, "CPU", exact)(pixels)
        assert found["class_index"].tolist() == index.tolist()
