"""Files of several products choose, score and threshold each image as the engine does."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from PIL import Image

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.components import DefectName

from .conftest import folder as data
from .conftest import new_engine
from .test_export import FLOAT32, run_example, run_onnx, run_openvino
from .test_products import BARE, FOLDERS, NAMES, mixed

__all__ = ["mixed"]  # a fixture
WORDS = {"plate": ["dent", "hole"], "tile": ["crack", "stain", "chip"]}
CLOSE = {"atol": 1e-4, "rtol": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {
            "k_shot": 3,
            "reference_layers": [2, 4],
            "defects": WORDS,
            "extra_outputs": True,
            "image_size": (32, 56),
            "tile_size": 32,
        },
    ],
)
def test_files_choose_and_judge_as_the_engine(
    small_clip: str, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict
) -> None:
    """In a batch of both classes, p-values and words of each class, too; anomalib's inferencers read the files."""
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
    outputs = ["pred_score", "pred_label", "anomaly_map", "pred_mask", "class_index"]
    if arguments:
        file = model.to_onnx(tmp_path)
        found = run_onnx(file, pixels)
        assert list(found) == [*outputs, "p_value", "defect_probabilities"]
        judged_as_predict(file, paths, found, new_engine(tmp_path / "again").predict(model, data_path=mixed / "test"))
        alone = run_onnx(file, pixels[:1])
        np.testing.assert_allclose(alone["pred_score"], found["pred_score"][:1], **CLOSE)
        files = [found, run_openvino(file, pixels)]  # the same file, since anomalib's inferencer takes four outputs
    else:
        files = [run_openvino(model.to_openvino(tmp_path / "with class", class_output=True), pixels)]
        by_openvino = OpenVINOInferencer(model.to_openvino(tmp_path), device="CPU", config=FLOAT32).predict(paths[0])
        np.testing.assert_allclose(by_openvino.pred_score, expected.pred_score[:1], **CLOSE)
    for found in files:
        assert [NAMES[int(number)] for number in found["class_index"].ravel()] == expected.explanation
        np.testing.assert_allclose(found["pred_score"].ravel(), expected.pred_score, **CLOSE)
        np.testing.assert_allclose(found["anomaly_map"].squeeze(), expected.anomaly_map.squeeze(), **CLOSE)
        assert (found["pred_label"].ravel() == expected.pred_label.numpy()).all()
    by_torch = TorchInferencer(model.to_torch(tmp_path), device="cpu").predict(paths[0])
    assert by_torch.explanation == expected.explanation[:1]
    np.testing.assert_allclose(by_torch.pred_score, expected.pred_score[:1], **CLOSE)


def judged_as_predict(file: Path, paths: list[Path], found: dict[str, np.ndarray], batches: list[ImageBatch]) -> None:
    """A file's p-values and words are those of predict, and the example prints those of the image's class."""
    facts = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    facts = {key: json.loads(text) for key, text in facts.items()}
    assert facts["normal_images"] == [3, 3]
    assert facts["class_names"] == NAMES
    columns = list(zip(facts["defects"], facts["class_of_defect"], strict=True))
    assert columns == [(word, number) for number, name in enumerate(NAMES) for word in WORDS[name]]
    predicted = {path: (batch, row) for batch in batches for row, path in enumerate(batch.image_path)}
    anomalous = []
    for path, p_value, shares in zip(paths, found["p_value"], found["defect_probabilities"], strict=True):
        batch, row = predicted[str(path)]
        assert p_value == pytest.approx(float(batch.p_value[row]), abs=1e-6)
        own = NAMES.index(batch.class_name[row])
        found = {word: share for (word, number), share in zip(columns, shares.tolist(), strict=True) if number == own}
        assert sum(found.values()) == pytest.approx(1, abs=1e-4)
        if batch.pred_label[row]:
            ranked = dict(sorted(found.items(), key=lambda pair: -pair[1]))
            assert batch.explanation[row] == DefectName(ranked).explanation
            anomalous.append((path, batch.class_name[row], found))
    assert {name for _, name, _ in anomalous} == set(NAMES)
    printed = run_example(file, *(path for path, *_ in anomalous), cwd=file.parent).stdout.splitlines()
    for line, (_, name, found) in zip(printed, anomalous, strict=True):
        assert line.endswith(f", {', '.join(f'{word} {share:.2f}' for word, share in found.items())}, of class {name}")
