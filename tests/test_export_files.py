"""Exports that cannot be made: a sentence says why, and no half-written file is left."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from anomalib.deploy import CompressionType

from anomalib_clipad import ClipAdSdp, ClipAdSdpPlus, InputError

from .conftest import files, limited_files, new_engine


def test_untrained_layers_are_not_exported(small_clip: str, tmp_path: Path) -> None:
    for kind in ("torch", "onnx", "openvino"):
        with pytest.raises(InputError, match="no trained layers yet; give adapter a file, or train it"):
            new_engine(tmp_path).export(ClipAdSdpPlus(backbone=small_clip), kind, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("package", "kind"), [("onnx", "onnx"), ("onnxscript", "onnx"), ("openvino", "openvino"), ("nncf", "openvino")]
)
def test_a_missing_package_is_named(
    small_clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, kind: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # Python's own way of not finding a module
    with pytest.raises(InputError, match=rf"needs {package}; pip install 'anomalib\[openvino\]'"):
        new_engine(tmp_path).export(
            ClipAdSdp("cup", small_clip), kind, tmp_path / "out", compression_type=CompressionType.INT8_PTQ
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (CompressionType.INT8_PTQ, {}, "INT8_PTQ chooses its ranges by images; give a datamodule"),
        (CompressionType.INT8_ACQ, {}, "INT8_ACQ is not offered: .*; use INT8_PTQ"),
        (CompressionType.INT8_PTQ, {"image_size": (48, 48), "tile_size": 32}, "not offered with tile_size"),
    ],
)
def test_eight_bits_that_cannot_work_are_refused(
    small_clip: str, tmp_path: Path, kind: CompressionType, arguments: dict, message: str
) -> None:
    model = ClipAdSdp("cup", small_clip, **arguments)
    with pytest.raises(InputError, match=message):
        new_engine(tmp_path).export(model, "openvino", tmp_path / "out", compression_type=kind)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["torch", "onnx", "openvino"])
def test_a_folder_that_cannot_be_written_to_is_named(small_clip: str, tmp_path: Path, kind: str) -> None:
    (tmp_path / "taken").write_text("a file where a folder should be")
    with pytest.raises(InputError, match=r"could not be written to .*taken.* choose another export_root"):
        new_engine(tmp_path).export(ClipAdSdp("cup", small_clip), kind, tmp_path / "taken/out")
    assert files(tmp_path) == ["taken"]


def test_a_full_disk_leaves_no_half_file(small_clip: str, tmp_path: Path) -> None:
    with limited_files(20_000), pytest.raises(InputError, match=r"could not be written to .*out \("):
        new_engine(tmp_path).export(ClipAdSdp("cup", small_clip), "torch", tmp_path / "out")
    assert files(tmp_path) == []


def test_a_missing_checkpoint_is_named(small_clip: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.ckpt does not exist; give the model\.ckpt"):
        new_engine(tmp_path).export(ClipAdSdp("cup", small_clip), "torch", tmp_path, ckpt_path=tmp_path / "gone.ckpt")


def test_an_earlier_export_survives_a_failed_one(small_clip: str, tmp_path: Path) -> None:
    path = ClipAdSdp("cup", small_clip).to_torch(tmp_path)
    before = path.read_bytes()
    with limited_files(20_000), pytest.raises(InputError, match="could not be written"):
        ClipAdSdp("plate", small_clip).to_torch(tmp_path)
    assert path.read_bytes() == before
    assert files(tmp_path) == ["weights/torch/model.pt"]


def test_the_command_line_exports(small_clip: str, tmp_path: Path, anomalib: Callable) -> None:
    arguments = ["--model.backbone", small_clip, "--model.class_name", "cup", "--export_type", "torch"]
    done = anomalib("export", "--model", "ClipAdSdp", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [Path(name).name for name in files(tmp_path)] == ["model.pt"]
    done = anomalib("export", "--model", "ClipAdSdpPlus", *arguments)
    assert done.returncode == 1
    assert "SDP+ has no trained layers yet" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("age", [10, 7200])
def test_drafts_of_an_interrupted_export_are_removed_when_they_are_old(
    small_clip: str, tmp_path: Path, age: int
) -> None:
    draft = tmp_path / ".export-abc/weights/model.pt"
    draft.parent.mkdir(parents=True)
    draft.write_bytes(b"half")
    for path in (draft, draft.parent, draft.parent.parent):
        os.utime(path, (time.time() - age,) * 2)
    ClipAdSdp("cup", small_clip).to_torch(tmp_path)
    assert draft.exists() == (age == 10), "a young draft may belong to another export"


@pytest.mark.parametrize(
    "arguments, message",
    [
        *(({"export_root": value}, "export_root must be") for value in (None, 3, ["a"], float("nan"))),
        *(({"model_file_name": value}, "model_file_name must be") for value in (None, 3, "", "a/b", ["a"])),
        *(({"input_size": value}, "input_size must be") for value in (3, "32", [32], (0, 32), (32.0, 32), (True, 2))),
        *(({"compression_type": value}, "compression_type must be") for value in (3, "int9", ["int8"])),
    ],
)
def test_wrong_arguments_are_one_sentence(
    small_clip: str, tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ClipAdSdp("cup", small_clip).to_openvino(**{"export_root": tmp_path / "out", **arguments})
    assert not (tmp_path / "out").exists()
