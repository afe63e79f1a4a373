"""Exported models: the same maps, scores and labels as in the engine."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from anomalib.deploy import CompressionType, OpenVINOInferencer, TorchInferencer
from PIL import Image

from anomalib_clipad import ClipAdSdp, InputError

from .conftest import ROOT, build_model, files, folder, new_engine, run_command

EXAMPLES = ROOT / "examples"
FIELDS = ("pred_score", "pred_label", "anomaly_map", "pred_mask")
# What OpenVINO calls exact: left alone, it rounds to bfloat16 on a CPU that has it.
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
MODELS = ("ClipAdSdp", "ClipAdSdpPlus")


class OnceToOnnx:
    """Has models export to ONNX once, which takes ten seconds; anomalib's export to OpenVINO begins with the same file.

    Models are left of their class, since one of the same name would be one more model to the command line.
    """

    def __init__(self, written: Path | None = None) -> None:
        self.written = written

    def __call__(self, model: ClipAdSdp) -> ClipAdSdp:
        export = model.to_onnx

        def to_onnx(export_root: Path, model_file_name: str = "model", input_size: object = None) -> Path:
            assert input_size is None, "other files than before"
            if self.written is None:
                self.written = export(export_root, model_file_name)
                return self.written
            return Path(shutil.copy(self.written, Path(export_root) / f"{model_file_name}.onnx"))

        model.to_onnx = to_onnx
        return model


class Exported(NamedTuple):
    """A model calibrated on labelled data, and its files."""

    model: ClipAdSdp
    checkpoint: Path
    torch: Path
    onnx: Path
    openvino: Path


@pytest.fixture(scope="module", params=MODELS)
def exported(
    request: pytest.FixtureRequest, small_clip: str, category: Path, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    root = tmp_path_factory.mktemp("export")
    engine = new_engine(root)
    model = build_model(request.param, small_clip, root, visualizer=False)
    engine.test(model, datamodule=folder(category))
    checkpoint = Path(engine.trainer.default_root_dir) / "weights/lightning/model.ckpt"
    once = OnceToOnnx()
    written = [
        new_engine(root).export(once(type(model)(backbone=small_clip)), kind, root / "files", ckpt_path=checkpoint)
        for kind in ("torch", "onnx", "openvino")
    ]
    return Exported(model.eval(), checkpoint, *written)


def eager(model: ClipAdSdp, images: torch.Tensor) -> dict[str, np.ndarray]:
    """As the engine does it, whose transform resizes with antialiasing."""
    with torch.no_grad():
        batch = model.post_processor(model.model(model.pre_processor.transform(images)))
    return {key: value.numpy() for key, value in batch._asdict().items()}


def run_onnx(path: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"input": images}), strict=True))


def run_openvino(path: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    compiled = openvino.Core().compile_model(path, "CPU", FLOAT32)
    return {output.any_name: value for output, value in compiled(images).items()}


def assert_same(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray], atol: float = 1e-4) -> None:
    assert set(ours) == set(FIELDS)
    for key in ("pred_score", "anomaly_map"):
        assert ours[key].dtype == np.float32
        np.testing.assert_allclose(ours[key], expected[key], atol=atol, rtol=0, err_msg=key)
    assert np.array_equal(ours["pred_label"], expected["pred_label"])
    # A pixel that lies on the threshold may fall on either side.
    assert (ours["pred_mask"] != expected["pred_mask"]).mean() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("size", [(32, 32), (75, 110)], ids=["native", "larger"])
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_files_give_the_eager_models_maps_and_scores(
    exported: Exported, kind: str, size: tuple[int, int], batch: int
) -> None:
    images = torch.rand(batch, 3, *size)
    run = {"onnx": run_onnx, "openvino": run_openvino}[kind]
    assert_same(run(getattr(exported, kind), images.numpy()), eager(exported.model, images))


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.float32).transpose(2, 0, 1)[None] / 255


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "openvino"])
def test_inferencers_give_the_engines_answers(
    exported: Exported, category: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)  # anomalib's inferencer keeps a cache where it is started
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    expected = new_engine(tmp_path).predict(exported.model, data_path=category / "test", ckpt_path=exported.checkpoint)
    inferencer = (
        TorchInferencer(exported.torch, device="cpu")
        if kind == "torch"
        else OpenVINOInferencer(exported.openvino, "CPU", FLOAT32)
    )
    labels = set()
    for batch in expected:
        with torch.no_grad():
            predicted = inferencer.predict(batch.image_path[0])
        ours = {key: np.asarray(getattr(predicted, key)) for key in FIELDS}
        assert_same(ours, {key: getattr(batch, key).numpy() for key in FIELDS})
        labels.add(bool(ours["pred_label"]))
    assert labels == {False, True}


@pytest.mark.slow
def test_a_large_picture_is_resized_as_in_the_engine(exported: Exported, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (700, 900, 3), dtype=np.uint8)
    pixels[200:500, 300:700] //= 3
    Image.fromarray(pixels).save(tmp_path / "large.png")
    expected = new_engine(tmp_path).predict(exported.model, data_path=tmp_path, ckpt_path=exported.checkpoint)[0]
    ours = run_onnx(exported.onnx, read(tmp_path / "large.png"))
    assert_same(ours, {key: getattr(expected, key).numpy() for key in FIELDS})


@pytest.mark.slow
def test_files_are_of_the_vision_towers_size(exported: Exported) -> None:
    tower = sum(value.numel() * value.element_size() for value in exported.model.model.visual.state_dict().values())
    weights = {
        # The graph beside them does not grow with the tower's width.
        "onnx": sum(len(weight.raw_data) for weight in onnx.load(exported.onnx).graph.initializer),
        "openvino": exported.openvino.with_suffix(".bin").stat().st_size,
        "torch": exported.torch.stat().st_size,
    }
    for kind, size in weights.items():
        assert 0.8 * tower < size < 1.25 * tower + 150_000, kind
    names = {path.name for kind in ("torch", "onnx", "openvino") for path in getattr(exported, kind).parent.iterdir()}
    assert names == {"model.pt", "model.onnx", "model.xml", "model.bin"}


@pytest.mark.slow
def test_a_loaded_torch_file_says_that_its_class_is_fixed(exported: Exported) -> None:
    loaded = torch.load(exported.torch, weights_only=False)["model"]  # our own file
    with pytest.raises(InputError, match=r"exported for widget; export one for cup\."):
        loaded.model.set_classes(["cup"])
    assert exported.model.model.text_encoder is not None, "the model itself goes on"


@pytest.mark.slow
def test_without_a_checkpoint_the_class_name_and_the_rules_are_baked_in(small_clip: str, tmp_path: Path) -> None:
    model = ClipAdSdp("metal nut", backbone=small_clip)
    path = new_engine(tmp_path).export(model, "onnx", tmp_path, input_size=(32, 32))
    images = torch.rand(2, 3, 32, 32)
    reference = ClipAdSdp("metal nut", backbone=small_clip)
    reference.model.set_classes(["metal nut"])
    assert_same(run_onnx(path, images.numpy()), eager(reference, images))
    shapes = [output.shape for output in onnxruntime.InferenceSession(path).get_inputs()]
    assert shapes == [["batch_size", 3, 32, 32]]


def test_without_any_class_an_object_is_assumed_with_a_warning(
    small_clip: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = ClipAdSdp(backbone=small_clip)
    model.to_torch(tmp_path)
    assert "taken for an 'object'" in caplog.text
    assert model.model.class_names == ("object",)


@pytest.mark.slow
@pytest.mark.parametrize("exported", ["ClipAdSdp"], indirect=True)
def test_eight_bits_give_similar_maps_in_less_room(
    exported: Exported, small_clip: str, category: Path, tmp_path: Path
) -> None:
    model = OnceToOnnx(exported.onnx)(ClipAdSdp(backbone=small_clip))
    kind = CompressionType.INT8_PTQ
    path = new_engine(tmp_path).export(model, "openvino", tmp_path, compression_type=kind, datamodule=folder(category))
    assert model.model.class_names == ("widget",), "the class comes with the data"
    images = torch.cat([torch.from_numpy(read(path)) for path in sorted((category / "test/square").iterdir())])
    ours, expected = run_openvino(path, images.numpy()), eager(exported.model, images)
    # Eight bits are coarse for a small random CLIP; anomalib's own call leaves nothing of the map, -0.07 here.
    assert np.corrcoef(ours["anomaly_map"].ravel(), expected["anomaly_map"].ravel())[0, 1] > 0.8
    tower = sum(value.numel() * 4 for value in model.model.visual.state_dict().values())
    assert path.with_suffix(".bin").stat().st_size < 0.5 * tower


def run_example(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """In an interpreter that sees ONNX Runtime, numpy and Pillow alone, as in a deployment."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'torchvision', 'anomalib', 'anomalib_clipad']))"
    start = f"{blocked}; import runpy; sys.argv = {['run_onnx', *map(str, arguments)]}"
    script = f"{start}; runpy.run_path({str(EXAMPLES / 'run_onnx.py')!r})"
    return run_command(sys.executable, "-c", script, cwd=cwd, ANOMALIB_CLIPAD_AUTOLOAD="0")


@pytest.mark.slow
def test_the_example_needs_neither_anomalib_nor_torch(exported: Exported, category: Path, tmp_path: Path) -> None:
    script = (EXAMPLES / "run_onnx.py").read_text()
    assert len([line for line in script.split("session =")[1].splitlines() if line]) <= 15
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    picture = pictures / "photo.png"
    Image.open(category / "test/square/000.png").resize((90, 60)).save(picture)
    shutil.copy(exported.onnx, tmp_path / "alone.onnx")
    deep = np.asarray(Image.open(picture).convert("L"), dtype=np.uint16) * 100  # which 8 bits would saturate
    Image.fromarray(deep).save(pictures / "deep.png")
    done = run_example("alone.onnx", pictures / "deep.png", picture, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    of_deep = np.tile(deep.astype(np.float32) / 65535, (1, 3, 1, 1))
    for line, pixels in zip(done.stdout.splitlines(), (of_deep, read(picture)), strict=True):
        expected = eager(exported.model, torch.from_numpy(pixels))
        verdict = "anomalous" if expected["pred_label"][0] else "normal"
        assert f"{verdict}, score {expected['pred_score'][0]:.3f}" in line
    assert files(pictures) == ["deep.png", "photo.png"], "the next run over the folder must not find heatmaps in it"
    heatmap = np.asarray(Image.open(tmp_path / "heatmaps/001_photo.png"))
    assert heatmap.shape == (60, 90)
    assert abs(heatmap.mean() / 255 - expected["anomaly_map"].mean()) < 0.02


@pytest.mark.slow
def test_the_example_skips_broken_pictures_and_refuses_other_models(
    exported: Exported, category: Path, tmp_path: Path
) -> None:
    good = category / "test/square/000.png"
    (tmp_path / "broken.png").write_bytes(good.read_bytes()[:60])
    done = run_example(exported.onnx, "broken.png", good, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.splitlines()[0].startswith("broken.png cannot be read and is skipped (")
    assert "score" in done.stdout.splitlines()[1]
    (tmp_path / "other.onnx").write_bytes(b"no model")
    wrong = run_example("other.onnx", good, cwd=tmp_path)
    assert wrong.returncode == 2
    assert "other.onnx cannot be run (" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.slow
def test_the_example_refuses_a_picture_of_more_than_16_bits(exported: Exported, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((40, 60), dtype=np.float32)).save(tmp_path / "deep.tiff")
    done = run_example(exported.onnx, "deep.tiff", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("error: deep.tiff has more than 16 bits a pixel; save it with 8 or 16.")


def test_the_example_names_a_missing_file(tmp_path: Path) -> None:
    done = run_example("gone.onnx", "photo.png", cwd=tmp_path)
    assert done.returncode == 2
    assert "error: gone.onnx is not a file; give" in done.stderr
    assert "Traceback" not in done.stderr
    assert files(tmp_path) == []
