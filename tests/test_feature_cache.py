"""Auxiliary data as batches with fields of their own, and taps that are computed once."""

import os
import shutil
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from lightning.fabric.utilities import move_data_to_device
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import Dataset

from anomalib_clipad import ClipAdSdp, ClipAdSdpPlus, InputError
from anomalib_clipad.components.dual_path import DualPathFeatures
from anomalib_clipad.data import AuxiliaryDataModule, DemoTextures
from anomalib_clipad.data.batch import ZeroShotBatch, ZeroShotItem

from .conftest import auxiliary, folder, limited_files, new_engine, state, write_category


def features(batch_size: int) -> DualPathFeatures:
    return DualPathFeatures(*([torch.rand(batch_size, 5, 4) for _ in range(2)] for _ in DualPathFeatures._fields))


widgets = partial(folder, val_split_mode="from_test")


def test_categories_and_numbers_are_fields_of_a_batch(category: Path) -> None:
    data = AuxiliaryDataModule([widgets(category), widgets(category)], num_workers=0, train_batch_size=20)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, ZeroShotBatch)
    assert {"class_index", "index"} <= set(batch.keys(include_none=False))
    assert sorted(batch.index.tolist()) == list(range(len(data.train_data)))
    assert batch.class_index.tolist() == [data.train_data.rows[i][0] for i in batch.index.tolist()]


def test_a_batch_of_taps_is_taken_apart_and_put_together_again() -> None:
    batch = ZeroShotBatch(
        image=torch.rand(3, 3, 8, 8), image_path=["a", "b", "c"], class_index=torch.arange(3), features=features(3)
    )
    again = ZeroShotBatch.collate(list(batch))
    assert again.image_path == ["a", "b", "c"]
    assert torch.equal(again.class_index, batch.class_index)
    for ours, theirs in zip(again.features, batch.features, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_all_fields_move_to_the_device() -> None:
    batch = ZeroShotBatch(image=torch.rand(2, 3, 8, 8), class_index=torch.arange(2), features=features(2))
    moved = move_data_to_device(batch, torch.device("meta"))
    assert moved.class_index.is_meta
    assert all(tokens.is_meta for taps in moved.features for tokens in taps)


def test_anomalibs_numpy_classes_take_our_batch() -> None:
    batch = ZeroShotBatch.of(ImageBatch(image=torch.rand(2, 3, 8, 8), pred_score=torch.rand(2)))
    batch.raw_score = torch.rand(2)
    assert batch.to_numpy().pred_score.shape == (2,)
    assert batch.items[1].to_numpy().image.shape == (8, 8, 3)


def test_items_take_every_field_of_a_batch() -> None:
    own_size = {"own_maps", "own_masks"}  # an item's anomaly_map and pred_mask
    assert {field.name for field in fields(ZeroShotItem)} == {field.name for field in fields(ZeroShotBatch)} - own_size


def compute(batch: ZeroShotBatch) -> tuple[DualPathFeatures, torch.Tensor]:
    """Taps that say which image they are of."""
    computed.extend(batch.image_path)
    tokens = batch.image.mean(dim=(1, 2, 3)).reshape(-1, 1, 1)
    return DualPathFeatures([tokens], [tokens + 1]), batch.gt_mask


computed: list[str] = []


def cached(category: Path, folder: Path | bool, key: str = "clip") -> AuxiliaryDataModule:
    """The data with their taps; ``computed`` then holds the images whose taps were not there yet."""
    computed.clear()
    data = AuxiliaryDataModule(
        widgets(category), num_workers=0, cache_features=folder if folder is True else str(folder)
    )
    data.setup()
    data.cache(compute, key)
    return data


def masks(data: AuxiliaryDataModule) -> dict[str, torch.Tensor]:
    return {item.image_path: item.gt_mask for part in (data.train_data, data.val_data) for item in iterate(part)}


def iterate(data: Dataset) -> list[ZeroShotItem]:
    return [data[position] for position in range(len(data))]


@pytest.fixture
def own_category(tmp_path: Path) -> Path:
    return write_category(tmp_path / "widget")


def test_a_changed_mask_is_seen(own_category: Path, tmp_path: Path) -> None:
    before = masks(cached(own_category, tmp_path / "cache"))
    assert len(computed) == 11
    path = own_category / "ground_truth/square/002_mask.png"
    stamp = path.stat()
    pixels = np.asarray(Image.open(path))
    Image.fromarray(255 - pixels).save(path)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    after = masks(cached(own_category, tmp_path / "cache"))
    image = str(own_category / "test/square/002.png")
    assert computed == [image]
    assert torch.equal(after[image], ~before[image])


def test_a_mask_replaced_by_another_file_is_seen(own_category: Path, tmp_path: Path) -> None:
    cached(own_category, tmp_path / "cache")
    shutil.move(own_category / "ground_truth/square/001_mask.png", tmp_path / "kept.png")
    shutil.copy2(own_category / "ground_truth/square/000_mask.png", own_category / "ground_truth/square/001_mask.png")
    cached(own_category, tmp_path / "cache")
    assert computed == [str(own_category / "test/square/001.png")]


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "of another program"])
def test_a_damaged_cache_file_is_computed_again(own_category: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "cache"
    before = masks(cached(own_category, folder))
    file = sorted(folder.iterdir())[3]
    whole = file.read_bytes()
    if damage == "of another program":
        save_file({"weight": torch.zeros(3)}, file)
    else:
        file.write_bytes({"truncated": whole[:-20], "empty": b"", "text": b"not safetensors"}[damage])
    after = masks(cached(own_category, folder))
    assert len(computed) == 1
    assert file.read_bytes() == whole
    assert all(torch.equal(after[path], mask) for path, mask in before.items())


@pytest.mark.parametrize("age", [10, 7200])
def test_drafts_of_an_interrupted_run_are_removed_when_they_are_old(
    own_category: Path, tmp_path: Path, age: int
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    draft = folder / f".{'0' * 32}.12345.safetensors"
    draft.write_bytes(b"half")
    os.utime(draft, (time.time() - age,) * 2)
    cached(own_category, folder)
    assert draft.exists() == (age == 10), "a young draft may belong to another run"


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(own_category: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with limited_files(200), pytest.raises(InputError, match="could not be kept in .*make room there"):
        cached(own_category, folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("kept", [True, "cache"])
def test_only_an_unreadable_image_is_left_out(
    own_category: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: bool | str
) -> None:
    (own_category / "test/good/001.png").write_bytes(b"gone")
    data = cached(own_category, kept if kept is True else tmp_path / kept)
    assert "001.png, which cannot be read" in caplog.text
    seen = masks(data)
    assert len(seen) == 10
    batch = next(iter(data.train_dataloader()))
    assert [data.train_data.data.path(i) for i in batch.index.tolist()] == batch.image_path


@pytest.mark.parametrize("in_memory, workers", [(True, 0), (False, 2)])
def test_taps_in_memory_are_not_copied_into_workers(
    own_category: Path, tmp_path: Path, in_memory: bool, workers: int
) -> None:
    where = True if in_memory else tmp_path / "taps"
    data = AuxiliaryDataModule(widgets(own_category), num_workers=2, cache_features=where)
    data.setup()
    data.cache(compute, "clip")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert loader.num_workers == workers
        assert {path for batch in loader for path in batch.image_path} == {
            item.image_path for item in iterate(loader.dataset)
        }


def test_cached_images_are_brightened_as_others_are(own_category: Path) -> None:
    """Pixels of 16 bits are not saturated on the way into the cache."""
    path = own_category / "test/good/000.png"
    shades = np.asarray(Image.open(path).convert("L"))
    Image.fromarray(shades.astype(np.uint16) * 257).save(path)
    data = cached(own_category, folder=True)
    item = next(i for part in (data.train_data, data.val_data) for i in iterate(part) if i.image_path == str(path))
    assert float(item.features.original[0]) == pytest.approx(shades.mean() / 255, abs=1e-5)


WRONG = [None, 3, "text", ["text"], float("nan"), {}]


@pytest.mark.parametrize(
    "name, values",
    [
        ("datamodules", [*WRONG, [], [None], [{"class_path": 3}], {"class_path": "a.B", "init_args": 3}]),
        ("datamodules", [{"class_path": "anomalib_clipad.data.DemoTextures", "init_args": {"nothing": 1}}]),
        ("datamodules", [{"class_path": "pathlib.Path"}, {"class_path": "no.Where"}, {"class_path": ".."}]),
        ("categories", [3, "text", [3], float("nan"), {}]),
        ("train_batch_size", [None, 0, -1, 2.5, "8", [8], float("nan"), True]),
        ("eval_batch_size", [None, 0, -1, 2.5, "8", [8], float("nan"), True]),
        ("num_workers", [None, -1, 2.5, "8", [8], float("nan"), True]),
        ("seed", [None, -1, 2.5, "8", [8], float("nan"), True]),
        ("val_split_ratio", [None, 0, 1, -1, "0.1", [0.1], float("nan"), float("inf")]),
        ("cache_features", [None, 3, "", ["text"], float("nan"), {}]),
    ],
)
def test_wrong_arguments_are_one_sentence(category: Path, name: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(InputError):
            AuxiliaryDataModule(**{"datamodules": widgets(category), name: value})


@pytest.mark.parametrize("name, values", [("category", WRONG), ("root", [None, 3, ["text"], float("nan"), {}])])
def test_wrong_arguments_of_the_demonstration_are_one_sentence(name: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(InputError, match=name):
            DemoTextures(**{name: value})


def test_taps_in_memory_are_computed_once(category: Path) -> None:
    data = cached(category, folder=True)
    assert len(computed) == 11
    data.cache(compute, "clip")
    assert len(computed) == 11
    data.cache(compute, "another clip")
    assert len(computed) == 22


def sizes_trained(small_clip: str, data: AuxiliaryDataModule, where: Path, *sizes: int) -> dict[str, torch.Tensor]:
    """What models of these sizes learn one after the other on a data module; the last one's layers."""
    for size in sizes:
        torch.manual_seed(0)
        model = ClipAdSdpPlus(backbone=small_clip, image_size=size, lr=1e-2, visualizer=False, page=False)
        new_engine(where, max_epochs=1).fit(model, datamodule=data)
    return state(model)


@pytest.mark.parametrize("kept", [True, "cache"])
def test_features_of_another_size_are_made_of_the_pictures_themselves(
    small_clip: str, auxiliary_root: Path, tmp_path: Path, kept: bool | str
) -> None:
    """Not of those that were made smaller for the model before."""
    cache = kept if kept is True else str(tmp_path / kept)
    expected = sizes_trained(small_clip, auxiliary(auxiliary_root, cache_features=True), tmp_path / "a", 64)
    data = auxiliary(auxiliary_root, cache_features=cache)
    found = sizes_trained(small_clip, data, tmp_path / "b", 32, 64)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("arguments", [{"layers": [1, 2]}, {"image_size": 64}, {"region": [[0.0, 0.0, 0.5, 0.5]]}])
def test_another_model_is_tested_on_images_and_not_on_what_was_kept_for_training(
    small_clip: str, auxiliary_root: Path, tmp_path: Path, arguments: dict
) -> None:
    data = auxiliary(auxiliary_root, cache_features=True)
    sizes_trained(small_clip, data, tmp_path / "fit", 32)
    figures = []
    for one in (data, auxiliary(auxiliary_root)):
        model = ClipAdSdp(backbone=small_clip, visualizer=False, page=False, **arguments)
        figures.append(new_engine(tmp_path / "test").test(model, datamodule=one, verbose=False)[0])
    assert figures[0] == pytest.approx(figures[1], abs=1e-6)
