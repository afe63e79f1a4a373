"""What is drawn of an image is drawn of what was read for the model: the same pictures, and each file read once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import ImageItem, PredictDataset
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.data import ReadableDataLoader
from anomalib_clipad.data.preview import Preview
from anomalib_clipad.engine.visualizer import ClipAdVisualizer
from anomalib_clipad.pictures.image_file import preview_picture, read_picture

from .conftest import files, folder, new_engine

SIZES = {"small": (60, 40), "usual": (900, 700), "long": (3000, 90), "large": (2900, 2111)}


def noisy(width: int, height: int, dtype: type = np.uint8) -> np.ndarray:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, np.iinfo(dtype).max, (height // 20 + 1, width // 20 + 1, 3), dtype=dtype)
    return coarse.repeat(20, axis=0).repeat(20, axis=1)[:height, :width]


def read(path: Path, longest_side: int) -> Preview:
    dataset = PredictDataset(path)
    loader = DataLoader(dataset, collate_fn=dataset.collate_fn)
    (batch,) = ReadableDataLoader(loader, preview_side=longest_side)
    return batch.preview[0]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("longest_side", [240, 512])
def test_a_picture_of_a_preview_is_that_of_the_file(size: tuple[int, int], longest_side: int, tmp_path: Path) -> None:
    """To the last bit, but for large ones: averages are rounded twice, and Pillow reduces each side for itself."""
    Image.fromarray(noisy(*size)).save(tmp_path / "a.png")
    preview = read(tmp_path / "a.png", 512)
    for enlarge in (True, False):
        expected = read_picture(tmp_path / "a.png", longest_side, enlarge)
        found = preview_picture(preview, longest_side, enlarge)
        assert found.size == expected.size
        difference = np.abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int))
        if max(size) < 1024:
            assert not difference.any()
        elif max(size) < 2.5 * min(size):
            assert difference.max() <= 2
        assert difference.mean() < 1


@pytest.mark.parametrize("kind", ["sixteen bits", "palette", "alpha", "grey"])
def test_it_is_so_for_every_kind_of_pixel(kind: str, tmp_path: Path) -> None:
    picture = {
        "sixteen bits": lambda: Image.fromarray(noisy(90, 50, np.uint16)[..., 0]),
        "palette": lambda: Image.fromarray(noisy(90, 50)).quantize(16),
        "alpha": lambda: Image.fromarray(noisy(90, 50)).convert("RGBA"),
        "grey": lambda: Image.fromarray(noisy(90, 50)[..., 0]),
    }[kind]()
    picture.save(tmp_path / "a.png")
    found, expected = preview_picture(read(tmp_path / "a.png", 512), 512), read_picture(tmp_path / "a.png", 512)
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_what_is_not_a_number_is_black_and_infinity_white() -> None:
    image = torch.ones(3, 2, 2)
    image[:, 0, 0], image[:, 0, 1], image[:, 1, 0] = torch.nan, torch.inf, -torch.inf
    assert Preview.of(image, 512).pixels[..., 0].tolist() == [[0, 255], [0, 255]]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_no_file_is_read_again_to_draw_it(
    batch_size: int, small_clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But a JPEG, which is decoded at a fraction of its size."""
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.bmp", "c.png", "d.jpg"):
        Image.fromarray(noisy(700, 300)).save(tmp_path / "photos" / name)
    drawn: list[str] = []

    def seen(path: Path, *arguments: object, **options: object) -> Image.Image:
        drawn.append(path.name)
        return read_picture(path, *arguments, **options)

    data = PredictDataset(tmp_path / "photos")
    loader = DataLoader(data, batch_size, collate_fn=data.collate_fn)
    made = {}
    for where in ("previews", "files"):
        if where == "files":
            monkeypatch.setattr(Preview, "of", lambda *_: None)
        for user in ("engine.visualizer", "page.thumbnails"):
            monkeypatch.setattr(f"anomalib_clipad.{user}.read_picture", seen)
        model = ClipAdSdp("nut", small_clip, visualizer=ClipAdVisualizer(300))
        engine = new_engine(tmp_path / where)
        batches = engine.predict(model, dataloaders=loader)
        assert all(batch.preview is None for batch in batches)
        root = Path(engine.trainer.default_root_dir).resolve() / "predict/v0"
        made[where] = {name: (root / name).read_bytes() for name in files(root) if name.endswith((".png", ".jpg"))}
        assert sorted(set(drawn)) == (["d.jpg"] if where == "previews" else ["a.png", "b.bmp", "c.png", "d.jpg"])
    assert len(made["files"]) == 3 * 4  # picture, thumbnail and heat layer
    assert made["previews"] == made["files"]


def test_images_that_a_data_module_has_resized_are_drawn_of_their_files(
    small_clip: str, category: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Preview, "of", lambda *_: pytest.fail("these pixels are not the file's"))
    model = ClipAdSdp("cup", small_clip)
    new_engine(tmp_path).test(model, datamodule=folder(category), verbose=False)


def test_images_that_a_data_set_resizes_by_itself_are_drawn_of_their_files(tmp_path: Path) -> None:
    class Halved(PredictDataset):
        def __getitem__(self, index: int) -> ImageItem:
            item = super().__getitem__(index)
            item.image = item.image[:, ::2, ::2]
            return item

    Image.fromarray(noisy(90, 50)).save(tmp_path / "a.png")
    for kind, previewed in ((PredictDataset, True), (Halved, False)):
        dataset = kind(tmp_path)
        loader = DataLoader(dataset, collate_fn=dataset.collate_fn)
        (batch,) = ReadableDataLoader(loader, preview_side=512)
        assert (batch.preview is not None) is previewed
