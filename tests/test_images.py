"""Images as they come: a damaged file is skipped alone, and every kind of pixel has its brightness."""

import logging
import struct
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, PredictDataset
from PIL import Image
from torch.utils.data import DataLoader, DistributedSampler

from anomalib_clipad.data import ReadableDataLoader
from anomalib_clipad.errors import InputError

from .conftest import folder

SHADES = np.linspace(0, 255, 32 * 24).reshape(24, 32).astype(np.uint8)
SAVED: dict[str, tuple[Callable[[], Image.Image], dict[str, object]]] = {
    "rgb.png": (lambda: Image.fromarray(SHADES).convert("RGB"), {}),
    "palette.png": (lambda: Image.fromarray(SHADES).convert("P"), {}),
    "deep.png": (lambda: Image.fromarray(SHADES.astype(np.uint16) * 257), {}),
    "rgb.jpg": (lambda: Image.fromarray(SHADES).convert("RGB"), {}),
    "raw.tiff": (lambda: Image.fromarray(SHADES).convert("RGB"), {}),
    "packed.tiff": (lambda: Image.fromarray(SHADES), {"compression": "tiff_lzw"}),
    "float.tiff": (lambda: Image.fromarray(SHADES.astype(np.float32) / 255), {"compression": "tiff_adobe_deflate"}),
    "gif.png": (lambda: Image.fromarray(SHADES), {"format": "GIF"}),
    "rgb.ppm": (lambda: Image.fromarray(SHADES).convert("RGB"), {}),
    "rgb.bmp": (lambda: Image.fromarray(SHADES).convert("RGB"), {}),
    "rgb.webp": (lambda: Image.fromarray(SHADES).convert("RGB"), {}),
}


def read(path: Path) -> torch.Tensor | None:
    """One image, (3, H, W), as a run reads it; ``None`` if it is skipped."""
    dataset = PredictDataset(path)
    batches = list(ReadableDataLoader(DataLoader(dataset, collate_fn=dataset.collate_fn)))
    return batches[0].image[0] if batches else None


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """The file with a few other bytes, without its end, or with bytes too many."""
    kind = rng.integers(4)
    position = int(rng.integers(len(content)))
    if kind == 0:
        return content[:position]
    if kind == 1:
        return content[:position] + rng.bytes(3) + content[position:]
    changed = bytearray(content)
    # The header decides most, so every other mutation hits it.
    end = len(content) if kind == 2 else min(64, len(content))
    for place in rng.integers(end, size=rng.integers(1, 4)):
        changed[place] = rng.integers(256)
    return bytes(changed)


@pytest.mark.filterwarnings("ignore")  # Pillow warns about what it could still read
@pytest.mark.parametrize("name", SAVED)
def test_every_damaged_file_is_read_or_skipped_and_named(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture, options = SAVED[name]
    path = tmp_path / name
    picture().save(path, **options)
    content = path.read_bytes()
    assert read(path) is not None
    rng = np.random.default_rng(sum(name.encode()))
    outcomes = set()
    for _ in range(60):
        path.write_bytes(mutated(content, rng))
        caplog.clear()
        image = read(path)
        assert (image is None) == (f"Skipped {path}, which cannot be read (" in caplog.text)
        assert image is None or image.shape[0] == 3
        outcomes.add(image is None)
    assert outcomes == {False, True}, "the mutations should leave some files readable, and others not"


@pytest.mark.parametrize(
    "name, position, value", [("rgb.png", 11, 0), ("raw.tiff", 12, 1), ("gif.png", 786, 0), ("rgb.ppm", 3, 127)]
)
def test_one_bad_byte_skips_only_its_image(
    name: str, position: int, value: int, image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each of these makes Pillow raise ValueError, which is not an OSError."""
    picture, options = SAVED[name]
    picture().save(image_folder / name, **options)
    content = bytearray((image_folder / name).read_bytes())
    content[position] = value
    (image_folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="IHDR|dimensions|outside|literal"):
        Image.open(image_folder / name).convert("RGB")
    dataset = PredictDataset(image_folder)
    batches = list(ReadableDataLoader(DataLoader(dataset, collate_fn=dataset.collate_fn)))
    assert sum(len(batch) for batch in batches) == 2
    assert f"{name}, which cannot be read" in caplog.text


@pytest.mark.parametrize("data", ["pictures", "train_data", "test_data"])
def test_an_image_alone_is_what_anomalib_makes_of_it_without_a_copy(
    data: str, image_folder: Path, category: Path
) -> None:
    """Two copies of a picture of 12 megapixels take a sixth of the time of a prediction."""
    module = folder(category)
    module.setup()
    dataset = PredictDataset(image_folder) if data == "pictures" else getattr(module, data)
    for index in range(len(dataset)):
        item = dataset[index]
        expected = ImageBatch.collate([dataset[index]])
        found = ReadableDataLoader(DataLoader(dataset, collate_fn=dataset.collate_fn)).collate_fn([item])
        for field in fields(expected):
            ours, theirs = getattr(found, field.name), getattr(expected, field.name)
            assert type(ours) is type(theirs)
            if isinstance(theirs, torch.Tensor):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
            else:
                assert ours == theirs
        assert found.image.data_ptr() == item.image.data_ptr()


def test_more_processes_than_images_is_one_sentence_in_each_of_them(image_folder: Path) -> None:
    dataset = PredictDataset(image_folder)

    def paths(processes: int, rank: int) -> list[str]:
        sampler = DistributedSampler(dataset, processes, rank, shuffle=False)
        loader = DataLoader(dataset, sampler=sampler, collate_fn=dataset.collate_fn)
        return [path for batch in ReadableDataLoader(loader, each_once=True) for path in batch.image_path]

    assert sorted(paths(2, 0) + paths(2, 1)) == sorted(map(str, image_folder.iterdir()))
    for rank in range(3):
        with pytest.raises(InputError, match="there are 3 processes for 2; use fewer devices"):
            paths(3, rank)


@pytest.mark.parametrize("error", [ValueError("a wrong transform"), TypeError("a wrong type"), IndexError("too far")])
def test_an_error_of_the_program_is_raised(error: Exception, image_folder: Path) -> None:
    def transform(_: torch.Tensor) -> torch.Tensor:
        raise error

    dataset = PredictDataset(image_folder, transform=transform)
    with pytest.raises(type(error), match=str(error)):
        list(ReadableDataLoader(DataLoader(dataset, collate_fn=dataset.collate_fn)))


@pytest.mark.parametrize(
    "name, pixels",
    [
        ("int32_of_8_bits.tiff", SHADES.astype(np.int32)),
        ("int32_of_16_bits.tiff", SHADES.astype(np.int32) * 257),
        ("int32_of_24_bits.tiff", (SHADES.astype(np.int64) * (2**24 - 1) // 255).astype(np.int32)),
        ("uint16.tiff", SHADES.astype(np.uint16) * 257),
        ("uint16.png", SHADES.astype(np.uint16) * 257),
        ("uint16_big_endian.pgm", SHADES.astype(np.uint16) * 257),
        ("fractions.tiff", SHADES.astype(np.float32) / 255),
        ("float_of_8_bits.tiff", SHADES.astype(np.float32)),
        ("float_of_16_bits.tiff", SHADES.astype(np.float32) * 257),
        ("fractions_and_less.tiff", np.where(SHADES, SHADES / 255, -1).astype(np.float32)),
    ],
)
def test_every_kind_of_pixel_has_the_same_brightness(name: str, pixels: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / name)
    expected = torch.from_numpy(SHADES.astype(np.float32) / 255).expand(3, -1, -1)
    torch.testing.assert_close(read(tmp_path / name).as_subclass(torch.Tensor), expected, atol=1e-6, rtol=0)


def test_a_dark_image_of_16_bits_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(SHADES.astype(np.uint16)).save(tmp_path / "dark.png")
    assert read(tmp_path / "dark.png").max() == pytest.approx(255 / 65535)


def test_not_a_number_in_a_float_image_stays(tmp_path: Path) -> None:
    pixels = SHADES.astype(np.float32) / 255
    pixels[3, 4], pixels[5, 6] = np.nan, np.inf
    Image.fromarray(pixels).save(tmp_path / "nan.tiff")
    image = read(tmp_path / "nan.tiff")
    assert image[:, 3, 4].isnan().all()
    assert image[:, 5, 6].eq(1).all()
    assert image.isfinite().sum() == image.numel() - 3


@pytest.mark.parametrize("kind", ["png", "webp", "jpg", "tiff"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_rotated_images_are_named_in_every_format(
    kind: str, orientation: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{kind}"
    Image.fromarray(SHADES).convert("RGB").save(path, exif=exif)
    image = read(path)
    if kind != "tiff":
        assert image.shape == (3, 24, 32), "scored as stored"
    assert (f"{path} is stored rotated" in caplog.text) == (orientation != 1)


def test_a_rotation_behind_the_pixels_of_a_png_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    path = tmp_path / "photo.png"
    Image.fromarray(SHADES).save(path, exif=exif)
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    path.write_bytes(content[:start] + content[end:-12] + content[start:end] + content[-12:])
    assert read(path) is not None
    assert f"{path} is stored rotated" in caplog.text


def test_an_image_with_invalid_exif_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "photo.jpg"
    Image.fromarray(SHADES).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff")
    with caplog.at_level(logging.WARNING):
        assert read(path) is not None
    assert "cannot be read" not in caplog.text


@pytest.mark.parametrize("blank", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_an_image_of_one_colour_is_named(
    mode: str, blank: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "dark.png"
    image = Image.new(mode, (40, 30))
    if not blank:
        image.putpixel((39, 29), 1 if mode == "I;16" else (0, 0, 1))
    image.save(path)
    assert read(path) is not None
    assert (f"{path} has one colour all over" in caplog.text) == blank


def test_fractions_may_exceed_one_a_little(tmp_path: Path) -> None:
    pixels = SHADES.astype(np.float32) / 255
    pixels[0, 0] = 1.02  # as sharpening makes it
    Image.fromarray(pixels).save(tmp_path / "sharpened.tiff")
    found = read(tmp_path / "sharpened.tiff")
    torch.testing.assert_close(found[0], torch.from_numpy(pixels).clamp(max=1))


def test_a_dark_pgm_of_16_bits_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(SHADES.astype(np.uint16)).save(tmp_path / "dark.pgm")
    assert read(tmp_path / "dark.pgm").max() == pytest.approx(255 / 65535)


def test_a_tiff_of_12_bits_tells_where_white_is(tmp_path: Path) -> None:
    # Pillow reads such files and writes none: two pixels are three bytes.
    values = np.array([[0, 4095, 2048, 1024]], dtype=np.uint16)
    packed = bytes(
        byte
        for one, two in values.reshape(-1, 2).tolist()
        for byte in (one >> 4, (one & 15) << 4 | two >> 8, two & 255)
    )
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, len(packed))]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    header = struct.pack("<2sHI", b"II", 42, 8 + len(packed))
    content = header + packed + struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "camera.tiff").write_bytes(content)
    found = read(tmp_path / "camera.tiff")[0]
    torch.testing.assert_close(found, torch.from_numpy(values / np.float32(4095)))
