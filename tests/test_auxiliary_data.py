"""The data that SDP+ is trained on: what is held out, categories, masks."""

from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from anomalib_clipad import ClipAdSdp, ClipAdSdpPlus, InputError
from anomalib_clipad.data import AuxiliaryDataModule

from .conftest import (
    auxiliary,
    new_engine,
    part,
    weights,
    write_category,
)

BARE = {"visualizer": False}


def test_held_out_images_are_of_every_category_and_label(auxiliary_root: Path) -> None:
    data = auxiliary(auxiliary_root)
    data.setup()
    groups = {name: set() for name in ("train", "val")}
    for name in groups:
        part_ = getattr(data, f"{name}_data")
        groups[name] = {part_.path(i) for i in range(len(part_))}
        labels = {(item.class_index, int(item.gt_label)) for item in (part_[i] for i in range(len(part_)))}
        assert labels == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert not groups["train"] & groups["val"]
    assert len(groups["train"] | groups["val"]) == 2 * (6 + 8)
    again = auxiliary(auxiliary_root)
    again.setup()
    assert [again.val_data.path(i) for i in range(len(again.val_data))] == [
        data.val_data.path(i) for i in range(len(data.val_data))
    ]


def test_each_image_is_scored_with_its_own_category(small_clip: str, auxiliary_root: Path, tmp_path: Path) -> None:
    seen = []

    class Watching(ClipAdSdpPlus):
        def training_step(self, batch: object, *args: object, **kwargs: object) -> object:
            seen.extend(zip(batch.image_path, batch.class_index.tolist(), strict=True))
            return super().training_step(batch, *args, **kwargs)

    new_engine(tmp_path, max_epochs=1).fit(Watching(backbone=small_clip), datamodule=auxiliary(auxiliary_root))
    assert seen
    assert all((f"/{('gear', 'plate')[index]}/") in path for path, index in seen)


def test_images_without_masks_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_category(tmp_path / "gear")
    write_category(tmp_path / "plate")
    data = AuxiliaryDataModule([part(tmp_path, "gear"), part(tmp_path, "plate", mask_dir=None)], num_workers=0)
    data.setup()
    assert "plate: 6 anomalous images without a mask are left out" in caplog.text
    assert "plate has no anomalous image with a mask" in caplog.text
    assert len(data.train_data) + len(data.val_data) == 5 + 6 + 5
    data = AuxiliaryDataModule(part(tmp_path, "plate", mask_dir=None))
    with pytest.raises(InputError, match="None of plate has an anomalous image with a mask"):
        data.setup()


def test_a_mask_of_another_size_is_fitted_to_its_image(small_clip: str, tmp_path: Path) -> None:
    root = write_category(tmp_path / "gear")
    for path in (root / "ground_truth/square").iterdir():
        Image.open(path).resize((20, 20), Image.Resampling.NEAREST).save(path)
    engine = new_engine(tmp_path, max_epochs=1)
    engine.fit(
        ClipAdSdpPlus(backbone=small_clip, visualizer=False),
        datamodule=AuxiliaryDataModule(part(tmp_path, "gear"), num_workers=0),
    )
    assert engine.trainer.callback_metrics["train_loss"].isfinite()


def test_what_was_held_out_is_scored_as_its_own_category(small_clip: str, auxiliary_root: Path, tmp_path: Path) -> None:
    """As anomalib's train does behind fit, and with SDP, too."""
    model = ClipAdSdpPlus(backbone=small_clip, lr=1e-2, **BARE)
    data = auxiliary(auxiliary_root)
    figures = new_engine(tmp_path, max_epochs=1).train(model, datamodule=data)[0]
    assert 0 <= figures["pixel_AP"] <= 1
    for one in (model, ClipAdSdp(backbone=small_clip, **BARE)):
        engine = new_engine(tmp_path)
        engine.test(one, datamodule=auxiliary(auxiliary_root), verbose=False)
        assert one.model.class_names == ("gear", "plate")
        table = pd.read_csv(Path(engine.trainer.default_root_dir) / "test/latest/predictions.csv")
        assert all(row["class"] in row.path for _, row in table.iterrows())
        assert set(table["class"]) == {"gear", "plate"}


def test_auxiliary_data_are_of_their_own_categories_whatever_the_argument(
    small_clip: str, auxiliary_root: Path, tmp_path: Path
) -> None:
    for names in ("cup", ["plate", "gear"]):
        model = ClipAdSdp(names, small_clip, **BARE)
        new_engine(tmp_path).test(model, datamodule=auxiliary(auxiliary_root), verbose=False)
        assert model.model.class_names == ("gear", "plate")


@pytest.mark.parametrize("names", [["gear", "plate"], {"gear": "cog", "plate": "dish"}])
def test_auxiliary_data_of_one_category_are_of_that(
    names: list | dict, small_clip: str, auxiliary_root: Path, tmp_path: Path
) -> None:
    engine = new_engine(tmp_path)
    engine.test(ClipAdSdp(names, small_clip, **BARE), datamodule=auxiliary(auxiliary_root, names=["plate"]))
    table = pd.read_csv(Path(engine.trainer.default_root_dir) / "test/latest/predictions.csv")
    assert set(table["class"]) == {"plate"}


@pytest.mark.parametrize("names", [["gear", "plate"], ["gear"]])
@pytest.mark.parametrize("classes", [["plate", "gear"], ["plate", "cup", "gear"], "cup"])
def test_a_checkpoint_counts_its_classes_as_it_likes(
    names: list, classes: list | str, small_clip: str, auxiliary_root: Path, tmp_path: Path
) -> None:
    engine = new_engine(tmp_path / "a")
    engine.test(ClipAdSdp(classes, small_clip, **BARE), datamodule=part(auxiliary_root, "plate"), verbose=False)
    path = weights(engine, "model.ckpt")
    engine = new_engine(tmp_path / "b")
    model = ClipAdSdp(backbone=small_clip, **BARE)
    engine.test(model, datamodule=auxiliary(auxiliary_root, names=names), ckpt_path=path, verbose=False)
    table = pd.read_csv(Path(engine.trainer.default_root_dir) / "test/latest/predictions.csv")
    for path, found in zip(table["path"], table["class"], strict=True):
        assert found == ("cup" if classes == "cup" else Path(path).parts[-4])
