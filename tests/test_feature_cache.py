"""Auxiliary data as batches with fields of their own, and taps that are computed once."""

from dataclasses import fields
from pathlib import Path

import torch
from anomalib.data import Folder, ImageBatch
from lightning.fabric.utilities import move_data_to_device

from anomalib_clipad.components.dual_path import DualPathFeatures
from anomalib_clipad.data import AuxiliaryDataModule
from anomalib_clipad.data.batch import ZeroShotBatch, ZeroShotItem


def features(batch_size: int) -> DualPathFeatures:
    return DualPathFeatures(*([torch.rand(batch_size, 5, 4) for _ in range(2)] for _ in DualPathFeatures._fields))


def widgets(category: Path) -> Folder:
    return Folder(
        "widget",
        root=category,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir="test/square",
        mask_dir="ground_truth/square",
        num_workers=0,
    )


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
    assert {field.name for field in fields(ZeroShotItem)} == {field.name for field in fields(ZeroShotBatch)}
