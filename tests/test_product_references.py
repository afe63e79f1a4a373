"""Several products in one run, each with normal images of its own."""

import shutil
from pathlib import Path

import pytest
import torch
from anomalib.data.utils import read_image

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.engine.normal_images import NormalImages
from anomalib_clipad.errors import InputError
from anomalib_clipad.sdp import ClipAdSdpModel

from .conftest import ROUNDING, build_model, folder, new_engine
from .test_products import BARE, FOLDERS, NAMES, mixed

__all__ = ["mixed"]  # a fixture
PATCHES = 16  # of a picture of the small CLIP


def predict(model: ClipAdSdp, where: Path, pictures: Path, **arguments: object) -> dict[str, dict[str, torch.Tensor]]:
    batches = new_engine(where).predict(model, data_path=pictures, **arguments)
    keys = ("pred_score", "anomaly_map", "pred_label", "p_value", "class_name")
    return {
        path: {key: getattr(batch, key)[row] for key in keys}
        for batch in batches
        for row, path in enumerate(batch.image_path)
    }


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ClipAdSdp", {"false_alarm_rate": 0.3}),
        ("ClipAdSdp", {"image_size": (32, 56), "tile_size": 32, "defects": ["dent", "hole"]}),
        ("ClipAdSdpPlus", {}),
    ],
)
def test_each_image_is_compared_with_normal_images_of_its_class(
    name: str, small_clip: str, mixed: Path, tmp_path: Path, arguments: dict
) -> None:
    """As in a run of the class alone: scores, maps, labels, p-values, and the zero of words."""
    good = mixed / "train/good"
    model = build_model(name, small_clip, tmp_path, class_name=FOLDERS, few_shot_source=good, **arguments, **BARE)
    found = predict(model, tmp_path / "both", mixed / "test")
    assert len(found) == 32
    start = 0
    for number, (part, class_name) in enumerate(FOLDERS.items()):
        own = {"class_name": class_name, "few_shot_source": good / part, **arguments}
        alone = build_model(name, small_clip, tmp_path, **own, **BARE)
        expected = predict(alone, tmp_path / part, mixed / "test/square" / part)
        for path, one in expected.items():
            for key in ("pred_score", "anomaly_map", "p_value"):
                torch.testing.assert_close(found[path][key], one[key], atol=ROUNDING, rtol=0)
            assert bool(found[path]["pred_label"]) == bool(one["pred_label"])
        assert model.model.references.counts[number] == len(alone.model.references.patches)
        baseline = alone.model.defect_names.baseline.mean
        both = model.model.defect_names.baseline.mean
        torch.testing.assert_close(both[start : start + len(baseline)], baseline, atol=ROUNDING, rtol=0)
        start += len(baseline)


@pytest.mark.parametrize("class_name", [FOLDERS, NAMES])
def test_k_shot_takes_as_many_of_each_class_from_the_training_split(
    small_clip: str, mixed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, class_name: object
) -> None:
    """With a list those that the network takes for the class. Thresholds are the validation images' affair."""
    model = ClipAdSdp(class_name, small_clip, k_shot=2, **BARE)
    new_engine(tmp_path).validate(model, datamodule=folder(mixed), verbose=False)
    assert "thresholds of its own" not in caplog.text
    network = model.model
    assert network.references.counts.tolist() == [2 * PATCHES, 2 * PATCHES]
    known = {0: 0, 1: 0}
    for batch in new_engine(tmp_path / "train").predict(model, data_path=mixed / "train/good"):
        tokens = network.taps(batch.image).original
        for row, number in enumerate(batch.class_index.tolist()):
            distance = network.references([tap[row : row + 1] for tap in tokens], torch.tensor([number]))
            known[number] += bool(distance.max() < 1e-3)
    assert known == {0: 2, 1: 2}


def test_a_class_with_few_references_says_so_and_takes_those_of_all(
    small_clip: str, mixed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = shutil.copytree(mixed / "train/good", tmp_path / "good")
    shutil.rmtree(source / "n")
    model = ClipAdSdp(FOLDERS, small_clip, few_shot_source=source, **BARE)
    predict(model, tmp_path, mixed / "test/good")
    assert "'tile' has 0 of the 1 normal images that are wanted as references" in caplog.text
    assert "'tile' has 0 normal images, and thresholds of its own take 3" in caplog.text
    bank = model.model.references
    first, second = bank.patches.split(bank.counts.tolist())
    assert torch.equal(first, second)
    with pytest.raises(InputError, match="No class has the 20 normal images that are wanted as references; give more"):
        new_engine(tmp_path).validate(ClipAdSdp(NAMES, small_clip, k_shot=20, **BARE), datamodule=folder(mixed))


def test_its_own_few_set_its_thresholds_as_further_images_are_scored(
    small_clip: str, mixed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each of its normal images is compared with those of all classes but itself, as one class alone compares them."""
    same_words = {"b": "tile", "n": "Tile"}  # which CLIP reads as one
    source = shutil.copytree(mixed / "train/good", tmp_path / "good")
    for number in range(3, 8):
        (source / f"n/00{number}.png").unlink()
    arguments = {"few_shot_source": source, "k_shot": 4, "false_alarm_rate": 0.25}
    model = ClipAdSdp(same_words, small_clip, **arguments, **BARE)
    predict(model, tmp_path, mixed / "test/good")
    assert "'Tile' has 3 of the 4 normal images" in caplog.text
    assert "thresholds of its own" not in caplog.text
    assert model.post_processor.of_class.normal_images == [8, 3]
    paths = NormalImages.of_folder(source, lambda image: image).paths
    plates, tiles = ([path for path in paths if Path(path).parent.name == part] for part in same_words)
    read = [read_image(path, as_tensor=True) for path in [*plates[:4], *tiles]]
    pictures = torch.stack([model.pre_processor.transform(image) for image in read])
    alone = ClipAdSdpModel(small_clip, class_names=["tile"])
    scored = alone.set_references([pictures])
    expected = alone.fuse(scored.text_score, scored.map_score)[4:].sort().values
    own = model.post_processor.of_class.good_scores[-3:]
    torch.testing.assert_close(own, expected, atol=ROUNDING, rtol=0)


def test_a_class_without_normal_images_has_no_p_values(small_clip: str, mixed: Path, tmp_path: Path) -> None:
    """With thresholds of its own, from labelled images: neither the other class's nor 1, which is perfectly normal."""
    source = shutil.copytree(mixed / "train/good", tmp_path / "good")
    shutil.rmtree(source / "n")
    model = ClipAdSdp(FOLDERS, small_clip, few_shot_source=source, **BARE)
    new_engine(tmp_path).validate(model, datamodule=folder(mixed), verbose=False)
    data = folder(mixed)
    data.setup()
    batches = new_engine(tmp_path / "again").predict(model, dataloaders=data.test_dataloader())
    assert model.post_processor.of_class.normal_images == [8, 0]
    for batch in batches:
        assert batch.p_value.isnan().tolist() == [name == "tile" for name in batch.class_name]


def test_a_broken_file_costs_no_reference_where_there_are_others(
    small_clip: str, mixed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As with one class, the next one that can be read takes its place, and is a reference only."""
    source = shutil.copytree(mixed / "train/good", tmp_path / "good")
    first = next(
        path for path in NormalImages.of_folder(source, lambda image: image).paths if Path(path).parent.name == "n"
    )
    Path(first).write_bytes(b"no picture")
    model = ClipAdSdp(FOLDERS, small_clip, k_shot=2, few_shot_source=source, false_alarm_rate=0.3, **BARE)
    predict(model, tmp_path, mixed / "test/good")
    assert "is compared with all classes'" not in caplog.text
    assert caplog.text.count(f"Skipped {first}") == 1
    assert model.model.references.counts.tolist() == [2 * PATCHES, 2 * PATCHES]
    assert model.post_processor.of_class.normal_images == [8, 7]


def test_folders_that_name_no_class_are_refused(
    small_clip: str, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ClipAdSdp(NAMES, small_clip, few_shot_source=mixed / "train/good", **BARE)
    with pytest.raises(InputError, match=r"png in no folder of a class; .* of its name: plate, tile"):
        predict(model, tmp_path, mixed / "test/good")
    shutil.copytree(mixed / "train/good/b", tmp_path / "good/plate")
    shutil.copytree(mixed / "train/good/n", tmp_path / "good/tile")
    (tmp_path / "link").symlink_to(tmp_path / "good")
    monkeypatch.chdir(tmp_path)
    for source in ("good", tmp_path / "link"):
        model = ClipAdSdp(NAMES, small_clip, few_shot_source=source, **BARE)
        predict(model, tmp_path, mixed / "test/good")
        assert model.model.references.counts.tolist() == [8 * PATCHES, 8 * PATCHES]


def test_a_checkpoint_brings_the_references_of_each_class(small_clip: str, mixed: Path, tmp_path: Path) -> None:
    model, engine = ClipAdSdp(FOLDERS, small_clip, k_shot=3, **BARE), new_engine(tmp_path / "a")
    engine.test(model, datamodule=folder(mixed), verbose=False)
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    before = predict(model, tmp_path / "b", mixed / "test")
    fresh = ClipAdSdp(backbone=small_clip, **BARE)
    after = predict(fresh, tmp_path / "c", mixed / "test", ckpt_path=tmp_path / "model.ckpt")
    for path, one in before.items():
        torch.testing.assert_close(after[path]["pred_score"], one["pred_score"], atol=ROUNDING, rtol=0)
        assert torch.equal(after[path]["pred_label"], one["pred_label"])
        assert after[path]["class_name"] == one["class_name"]


def test_outside_of_an_engine_the_first_class_is_the_default(small_clip: str) -> None:
    network = ClipAdSdpModel(small_clip)
    network.set_classes(["plate", "tile"])
    normal = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network.set_references_of_classes([[normal[:2]], [normal[2:]]])
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ours, first, second = (
        network.references(network.reference_tokens(network.taps(images)), index)
        for index in (None, torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long))
    )
    assert torch.equal(ours, first)
    assert not torch.equal(ours, second)
