"""A model that was used before gives what a new one gives, and an engine likewise."""

import shutil
from pathlib import Path

import pytest
import torch
from anomalib.data import PredictDataset
from PIL import Image
from torch.utils.data import DataLoader, Subset

from anomalib_clipad import ClipAdSdp, ClipAdSdpPlus

from .conftest import auxiliary, fitted, folder, new_engine, state, weights, write_category, write_good

BARE = {"page": False, "visualizer": False}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A category whose pictures are other ones than those of ``parts``."""
    root = write_category(tmp_path_factory.mktemp("other") / "gear", normal=5, broken=6, size=40)
    shutil.rmtree(root / "train/good")
    write_good(root / "train/good", 8, seed=5)
    return root


def outcome(model: ClipAdSdp, root: Path, where: Path, **arguments: object) -> dict[str, object]:
    """Figures of a test, and all that it has set."""
    engine = new_engine(where, **{name: arguments.pop(name) for name in ("precision",) if name in arguments})
    ckpt_path = arguments.pop("ckpt_path", None)
    torch.manual_seed(0)  # by which anomalib splits
    data = folder(root, **{"name": "cup", **arguments})
    figures = engine.test(model, datamodule=data, ckpt_path=ckpt_path, verbose=False)[0]
    set_there = {**model.post_processor.state_dict(), **model.model.fusion.state_dict()}
    references = {f"references.{key}": value for key, value in model.model.references.state_dict().items()}
    return {"figures": figures, **set_there, **references}


def assert_equal(found: dict[str, object], expected: dict[str, object]) -> None:
    assert found.pop("figures") == expected.pop("figures")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, equal_nan=True, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize(
    "arguments",
    [{"val_split_mode": "from_train", "val_split_ratio": 0.5}, {"mask_dir": None}, {"normal_test_dir": None}],
    ids=["only normal ones", "no masks", "only anomalous ones"],
)
@pytest.mark.parametrize("several", [False, True])
def test_what_earlier_validation_images_have_set_does_not_stay(
    several: bool, arguments: dict, small_clip: str, parts: Path, other: Path, tmp_path: Path
) -> None:
    names = ["cup", "nut"] if several else "cup"
    used, fresh = (ClipAdSdp(names, small_clip, **BARE) for _ in range(2))
    outcome(used, parts, tmp_path)
    assert_equal(outcome(used, other, tmp_path, **arguments), outcome(fresh, other, tmp_path, **arguments))


@pytest.mark.parametrize("several", [False, True])
def test_scores_of_normal_images_do_not_outlive_their_run(
    several: bool, small_clip: str, parts: Path, other: Path, tmp_path: Path
) -> None:
    """Else images of labelled data would have p-values among those of earlier data."""
    names = ["cup", "nut"] if several else "cup"
    used, fresh = (ClipAdSdp(names, small_clip, **BARE) for _ in range(2))
    outcome(used, parts, tmp_path, val_split_mode="from_train", val_split_ratio=0.5)
    assert len(used.post_processor.good_scores) == 6
    assert_equal(outcome(used, other, tmp_path), outcome(fresh, other, tmp_path))
    assert len(used.post_processor.good_scores) == 0


@pytest.mark.parametrize("arguments", [{"k_shot": 2}, {"false_alarm_rate": 0.2}])
def test_a_state_dict_takes_the_place_of_all_that_was_measured(
    arguments: dict, small_clip: str, parts: Path, other: Path, tmp_path: Path
) -> None:
    used, fresh, source = (ClipAdSdp("cup", small_clip, **arguments, **BARE) for _ in range(3))
    outcome(used, parts, tmp_path)
    outcome(source, other, tmp_path)
    found = []
    for model in (used, fresh):
        model.load_state_dict(source.state_dict())
        found.append(outcome(model, parts, tmp_path))
    assert_equal(*found)


@pytest.mark.parametrize("arguments", [{"k_shot": 2}, {"false_alarm_rate": 0.2}])
def test_trained_layers_take_the_place_of_all_that_was_measured(
    arguments: dict, small_clip: str, auxiliary_root: Path, parts: Path, other: Path, tmp_path: Path
) -> None:
    model, engine = fitted(small_clip, auxiliary_root, tmp_path, epochs=1)
    last = weights(engine, "last.ckpt")
    model.save_adapter(tmp_path / "other.safetensors")
    layers = {"adapter": str(tmp_path / "other.safetensors")}
    used, fresh = (ClipAdSdpPlus(**layers, backbone=small_clip, **arguments, **BARE) for _ in "ab")
    used.model.adapter[0].weight.data.neg_()  # of another training
    outcome(used, parts, tmp_path)
    outcome(used, other, tmp_path, name="nut")
    found = [outcome(one, parts, tmp_path, ckpt_path=last) for one in (used, fresh)]
    assert_equal(*found)


@pytest.mark.parametrize("arguments", [{"k_shot": 2}, {"false_alarm_rate": 0.2}])
def test_another_precision_measures_anew(arguments: dict, small_clip: str, parts: Path, tmp_path: Path) -> None:
    used, fresh = (ClipAdSdp("cup", small_clip, **arguments, **BARE) for _ in range(2))
    outcome(used, parts, tmp_path, precision="bf16-mixed")
    assert_equal(outcome(used, parts, tmp_path), outcome(fresh, parts, tmp_path))


def test_rounded_weights_are_said(
    small_clip: str, parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = ClipAdSdp("cup", small_clip, **BARE)
    for precision, said in (("32-true", False), ("bf16-true", False), ("32-true", True)):
        caplog.clear()
        outcome(model, parts, tmp_path, precision=precision)
        assert ("weights were rounded to bfloat16" in caplog.text) is said


def test_an_engine_tests_without_validation_after_a_test_with_it(small_clip: str, parts: Path, tmp_path: Path) -> None:
    engine = new_engine(tmp_path)
    for mode in ("same_as_test", "none", "same_as_test"):
        model = ClipAdSdp("cup", small_clip, **BARE)
        figures = engine.test(model, datamodule=folder(parts, val_split_mode=mode), verbose=False)[0]
        assert 0 <= figures["image_AUROC"] <= 1
        assert model.post_processor.image_threshold.isnan() == (mode == "none")


def test_a_checkpoint_is_of_the_last_test_also_without_validation(small_clip: str, parts: Path, tmp_path: Path) -> None:
    engine = new_engine(tmp_path)
    for name in ("cup", "nut"):
        model = ClipAdSdp(name, small_clip, **BARE)
        engine.test(model, datamodule=folder(parts, val_split_mode="none"), verbose=False)
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["model.ckpt"]
    assert ClipAdSdp.load_from_checkpoint(weights(engine, "model.ckpt"), **BARE).model.class_names == ("nut",)


@pytest.mark.slow
def test_a_training_that_reads_with_processes_goes_on_and_learns_the_same(
    small_clip: str, auxiliary_root: Path, tmp_path: Path
) -> None:
    whole, _ = fitted(small_clip, auxiliary_root, tmp_path / "whole", epochs=3, num_workers=1)
    _, engine = fitted(small_clip, auxiliary_root, tmp_path / "half", epochs=1, num_workers=1)
    model = ClipAdSdpPlus(backbone=small_clip, lr=1e-2, visualizer=False)
    data = auxiliary(auxiliary_root, num_workers=1)
    last = weights(engine, "last.ckpt")
    new_engine(tmp_path / "rest", max_epochs=3).fit(model, datamodule=data, ckpt_path=last)
    for key, value in state(whole).items():
        torch.testing.assert_close(state(model)[key], value, rtol=0, atol=1e-7)


def test_layers_that_are_trained_are_not_trained_again(
    small_clip: str, auxiliary_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = fitted(small_clip, auxiliary_root, tmp_path, epochs=1)
    before = state(model)
    caplog.set_level("INFO", logger="anomalib_clipad")
    new_engine(tmp_path, max_epochs=1).fit(model, datamodule=auxiliary(auxiliary_root))
    assert "The layers are trained already; fit validates them and does not go on with them" in caplog.text
    assert all(torch.equal(state(model)[key], value) for key, value in before.items())


def test_a_part_of_a_data_set_is_read_as_the_whole(small_clip: str, parts: Path, tmp_path: Path) -> None:
    """Deep pictures are scaled and broken files skipped, also where torch would read a batch at once."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    with Image.open(next((parts / "test/good").iterdir())) as picture:
        picture.save(pictures / "a.png")
        deep = picture.convert("L").convert("I;16")
    deep.point(lambda value: value * 200).save(pictures / "b.tiff")
    (pictures / "c.png").write_bytes(b"broken")
    whole = PredictDataset(pictures)
    found = []
    for dataset in (whole, Subset(whole, range(3))):
        loader = DataLoader(dataset, batch_size=2, collate_fn=whole.collate_fn)
        batches = new_engine(tmp_path).predict(ClipAdSdp("cup", small_clip, **BARE), dataloaders=loader)
        found.append(torch.cat([batch.pred_score for batch in batches]))
    assert len(found[0]) == 2
    assert torch.equal(*found)


def test_images_of_two_loaders_have_names_of_their_own(small_clip: str, tmp_path: Path) -> None:
    class Nameless(PredictDataset):
        def __getitem__(self, index: int) -> object:
            item = super().__getitem__(index)
            item.image_path = None
            return item

    write_good(tmp_path / "good", 2)
    data = Nameless(tmp_path / "good")
    loaders = [DataLoader(data, collate_fn=data.collate_fn) for _ in range(2)]
    engine = new_engine(tmp_path)
    engine.predict(ClipAdSdp("cup", small_clip), dataloaders=loaders)
    run = Path(engine.trainer.default_root_dir) / "predict/latest"
    assert len(list((run / "images").rglob("*.png"))) == 4
    assert len(list((run / "report_files/heat").iterdir())) == 4


def test_what_labelled_data_have_set_stays_where_later_runs_set_nothing(
    small_clip: str, parts: Path, tmp_path: Path
) -> None:
    """In a prediction of another precision, and where the images of a test have no labels."""
    source = write_good(tmp_path / "good", 3)
    model = ClipAdSdp("cup", small_clip, few_shot_source=source, **BARE)
    engine = new_engine(tmp_path / "a")
    engine.test(model, datamodule=folder(parts), verbose=False)
    expected = model.post_processor.image_threshold.clone()
    new_engine(tmp_path / "b", precision="bf16-mixed").predict(model, data_path=parts / "test/good")
    assert model.post_processor.image_threshold == expected
    data = PredictDataset(parts / "test/good")
    loader = DataLoader(data, collate_fn=data.collate_fn)
    for one in (model, ClipAdSdp.load_from_checkpoint(weights(engine, "model.ckpt"), **BARE)):
        new_engine(tmp_path / "c").validate(one, dataloaders=loader, verbose=False)
        assert one.post_processor.image_threshold == expected
