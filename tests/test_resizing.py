"""Resizing of pictures and position embeddings, the same in the engine and in exported files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.engine.pre_processing import ClipAdPreProcessor, bicubic_matrix

from .test_export import run_onnx, run_openvino


@pytest.mark.parametrize(("length", "size"), [(240, 240), (100, 32), (31, 32), (7, 96), (3001, 240)])
def test_resize_matrix_equals_torchvision(length: int, size: int) -> None:
    lines = torch.rand(1, 1, 1, length)
    expected = resize(lines.expand(-1, -1, 4, -1), [4, size], InterpolationMode.BICUBIC, antialias=True)[..., :1, :]
    torch.testing.assert_close(lines @ bicubic_matrix(length, size).T, expected, atol=2e-6, rtol=0)


def test_own_transforms_are_kept() -> None:
    images = torch.rand(2, 3, 40, 40)
    assert torch.equal(ClipAdPreProcessor(None)(images), images)
    transform = ClipAdSdp.configure_pre_processor((16, 24)).transform
    torch.testing.assert_close(ClipAdPreProcessor(transform)(images), transform(images), atol=1e-5, rtol=0)


def test_images_of_few_bits_are_resized_in_float32() -> None:
    images = torch.rand(2, 3, 40, 40).bfloat16()
    ours = ClipAdPreProcessor(ClipAdSdp.configure_pre_processor((16, 24)).transform.transforms[0])(images)
    assert ours.dtype == torch.bfloat16
    expected = resize(images.float(), [16, 24], InterpolationMode.BICUBIC, antialias=True)
    torch.testing.assert_close(ours.float(), expected, atol=2**-8, rtol=0)


@pytest.mark.slow
def test_files_of_another_size_resize_position_embeddings_as_torch_does(tmp_path: Path) -> None:
    # Of a CLIP large enough that no exporter computes them before; of the small ones the whole resize is folded away.
    model = ClipAdSdp("nut", "demo", image_size=(72, 128)).eval()
    images = torch.rand(2, 3, 72, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
    file = model.to_onnx(tmp_path)
    for found in (run_onnx(file, images.numpy()), run_openvino(file, images.numpy())):
        for name in ("pred_score", "anomaly_map"):
            np.testing.assert_allclose(found[name], getattr(expected, name).numpy(), atol=1e-6, rtol=0, err_msg=name)
