"""SDP in anomalib's engine: scores, class names, checkpoints, and images as they come."""

import logging
import shutil
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageBatch, PredictDataset
from anomalib.engine import Engine
from anomalib.models import Padim
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch.utils.data import DataLoader

from anomalib_clipad import ClipAdSdp, InputError

from . import conftest
from .conftest import new_engine, save_clip, write_category


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return new_engine(tmp_path)


folder = partial(conftest.folder, eval_batch_size=4)


def collect(model: ClipAdSdp, category: Path) -> dict[str, torch.Tensor]:
    """Own scores of all test images, straight from the network."""
    data = folder(category)
    data.setup()
    items = [data.test_data[i] for i in range(len(data.test_data))]
    images = model.pre_processor.transform(torch.stack([item.image for item in items]))
    scores = model.model.scores(images)
    labels = torch.tensor([int(item.gt_label) for item in items])
    return {"labels": labels, "text": scores.text_score, "maps": scores.map_score, "anomaly_map": scores.anomaly_map}


def test_image_score_is_the_papers_with_labelled_validation_data(
    small_clip: str, category: Path, engine: Engine
) -> None:
    model = ClipAdSdp(visualizer=False, backbone=small_clip)
    results = engine.test(model, datamodule=folder(category))[0]
    own = collect(model, category)
    fused = sum((s - s.min()) / (s.max() - s.min()) for s in (own["text"].double(), own["maps"].double())) / 2

    ours = model.model.fuse(own["text"], own["maps"])
    torch.testing.assert_close(ours.double(), fused, atol=1e-5, rtol=0)
    predictions = engine.predict(model, datamodule=folder(category))
    predicted = torch.cat([batch.pred_score for batch in predictions])
    shown = (fused - model.post_processor.image_threshold) / (fused.max() - fused.min()) + 0.5
    torch.testing.assert_close(predicted.double(), shown.clamp(0, 1), atol=1e-5, rtol=0)
    assert results["image_AUROC"] == pytest.approx(roc_auc_score(own["labels"], fused), abs=1e-6)
    assert results["image_AP"] == pytest.approx(average_precision_score(own["labels"], fused), abs=1e-6)


def test_labels_and_masks_follow_the_best_thresholds(small_clip: str, category: Path, engine: Engine) -> None:
    model = ClipAdSdp(visualizer=False, backbone=small_clip)
    batches = engine.predict(model, datamodule=folder(category))
    scores, labels = (torch.cat([getattr(batch, key) for batch in batches]) for key in ("pred_score", "gt_label"))
    maps, masks = collect(model, category)["anomaly_map"], torch.cat([batch.gt_mask for batch in batches])
    for predicted, values, truth in (("pred_label", scores, labels), ("pred_mask", maps, masks)):
        threshold = best_threshold(values.flatten().numpy(), truth.flatten().numpy())
        ours = torch.cat([getattr(batch, predicted) for batch in batches])
        # What lies on the threshold itself may fall on either side.
        clear = (values - threshold).abs() > 1e-6
        assert torch.equal(ours[clear], (values > threshold)[clear])


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    return float(thresholds[np.argmax(2 * precision * recall / np.maximum(precision + recall, 1e-12))])


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_figures_do_not_depend_on_the_batch_size(
    small_clip: str, category: Path, tmp_path: Path, batch_size: int
) -> None:
    model = ClipAdSdp(visualizer=False, backbone=small_clip)
    expected = new_engine(tmp_path / "a").test(model, datamodule=folder(category))[0]
    ours = new_engine(tmp_path / "b").test(model, datamodule=folder(category, eval_batch_size=batch_size))[0]
    assert ours == pytest.approx(expected, abs=1e-6)
    assert len(ours) == 9


def test_figures_see_scores_beyond_the_validation_range(small_clip: str, category: Path, engine: Engine) -> None:
    model = ClipAdSdp(visualizer=False, backbone=small_clip)
    results = engine.test(model, datamodule=folder(category, val_split_mode="from_test", val_split_ratio=0.4, seed=0))[
        0
    ]
    data = folder(category, val_split_mode="from_test", val_split_ratio=0.4, seed=0)
    data.setup()
    model.eval()
    batch = data.test_data.collate_fn([data.test_data[i] for i in range(len(data.test_data))])
    scores = model.model(model.pre_processor.transform(batch.image)).pred_score
    assert ((scores < 0) | (scores > 1)).any(), "the case is not met"
    assert results["image_AP"] == pytest.approx(average_precision_score(batch.gt_label, scores), abs=1e-6)


def test_classification_data_leave_pixel_figures_out(small_clip: str, category: Path, engine: Engine) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = engine.test(
            ClipAdSdp(visualizer=False, backbone=small_clip), datamodule=folder(category, mask_dir=None)
        )[0]
    assert not [str(warning.message) for warning in caught if "metric" in str(warning.message)]
    assert set(results) == {"image_AUROC", "image_F1Max", "image_AP", "image_F1Score"}


def test_predict_needs_no_labels_and_no_checkpoint(small_clip: str, image_folder: Path, engine: Engine) -> None:
    batches = engine.predict(ClipAdSdp(backbone=small_clip, class_name="cup"), data_path=image_folder)
    assert len(batches) == 2
    for batch in batches:
        assert 0 < batch.pred_score.item() < 1
        assert batch.pred_label.dtype == torch.bool
        assert batch.anomaly_map.shape == batch.pred_mask.shape == (1, 32, 32)
        assert batch.anomaly_map.min() >= 0
        assert batch.anomaly_map.max() <= 1
        assert batch.pred_mask.dtype == torch.bool
    pictures = list((engine.trainer.default_root_dir / Path("predict/v0/images")).rglob("*.*"))
    assert len(pictures) == 2


@pytest.mark.parametrize("labelled", [True, False])
def test_data_without_a_validation_part_are_scored_by_rule(
    small_clip: str, category: Path, engine: Engine, labelled: bool
) -> None:
    arguments = {"name": "cup", "root": category, "num_workers": 0, "val_split_mode": "none", "normal_dir": "test/good"}
    if labelled:
        arguments |= {"normal_test_dir": "test/good", "abnormal_dir": "test/square"}
    model = ClipAdSdp(visualizer=False, backbone=small_clip)
    batches = engine.predict(model, datamodule=Folder(**arguments))
    assert model.model.fusion.score_min.isnan().all()
    assert all(batch.pred_label.dtype == torch.bool for batch in batches)
    assert engine.trainer.limit_val_batches == 1.0


def test_predict_on_one_image(small_clip: str, image_folder: Path, engine: Engine) -> None:
    assert (
        len(
            engine.predict(
                ClipAdSdp(visualizer=False, backbone=small_clip, class_name="cup"), data_path=image_folder / "b.jpg"
            )
        )
        == 1
    )


@pytest.mark.parametrize(
    ("class_name", "name", "expected"), [("gear", "widget", "gear"), (None, "widget", "widget"), (None, " ", "object")]
)
def test_class_name_comes_from_the_argument_then_the_data(
    small_clip: str,
    category: Path,
    engine: Engine,
    caplog: pytest.LogCaptureFixture,
    class_name: str | None,
    name: str,
    expected: str,
) -> None:
    model = ClipAdSdp(visualizer=False, class_name=class_name, backbone=small_clip)
    engine.predict(model, datamodule=folder(category, name=name))
    assert model.model.class_names == (expected,)
    assert ("taken for an 'object'" in caplog.text) == (expected == "object")


def test_category_comes_before_the_name(small_clip: str, category: Path, engine: Engine) -> None:
    data = folder(category)
    data.category = "metal nut"
    model = ClipAdSdp(visualizer=False, backbone=small_clip)
    engine.test(model, datamodule=data)
    assert model.model.class_names == ("metal nut",)


def test_a_second_category_gets_its_own_text_vectors_and_thresholds(
    small_clip: str, category: Path, tmp_path: Path
) -> None:
    model = ClipAdSdp(visualizer=False, backbone=small_clip)
    new_engine(tmp_path / "a").test(model, datamodule=folder(category))
    new_engine(tmp_path / "b").test(model, datamodule=folder(category, name="gear"))
    fresh = ClipAdSdp(visualizer=False, backbone=small_clip)
    new_engine(tmp_path / "c").test(fresh, datamodule=folder(category, name="gear"))
    for key, value in fresh.state_dict().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(model.state_dict()[key], value, msg=key)
    assert model.model.class_names == fresh.model.class_names == ("gear",)


def checkpoint(engine: Engine) -> Path:
    return Path(engine.trainer.default_root_dir) / "weights/lightning/model.ckpt"


@pytest.mark.parametrize("way", ["ckpt_path", "load_from_checkpoint"])
def test_checkpoint_needs_no_labels_no_text_tower_and_no_class_name(
    small_clip: str, category: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    first, model = new_engine(tmp_path / "a"), ClipAdSdp(visualizer=False, backbone=small_clip)
    first.test(model, datamodule=folder(category))
    path = checkpoint(first)
    expected = new_engine(tmp_path / "b").predict(model, data_path=category / "test")

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the text tower was asked")

    monkeypatch.setattr("anomalib_clipad.components.text_encoder.TextEncoder.encode", refuse)
    second = new_engine(tmp_path / "c")
    if way == "ckpt_path":
        ours = second.predict(
            ClipAdSdp(visualizer=False, backbone=small_clip), data_path=category / "test", ckpt_path=path
        )
    else:
        ours = second.predict(ClipAdSdp.load_from_checkpoint(path), data_path=category / "test")
    for a, b in zip(ours, expected, strict=True):
        for key in ("pred_score", "pred_label", "anomaly_map", "pred_mask"):
            assert torch.equal(getattr(a, key), getattr(b, key)), key


def test_checkpoint_holds_what_is_not_clip(small_clip: str, category: Path, engine: Engine) -> None:
    model = ClipAdSdp(
        visualizer=False, backbone=small_clip, prompts={"normal_states": ["good {}"]}, rvs={"method": "kde"}
    )
    engine.test(model, datamodule=folder(category))
    content = torch.load(checkpoint(engine), weights_only=True)
    assert not any("visual" in key for key in content["state_dict"])
    tensors = [value for value in content["state_dict"].values() if isinstance(value, torch.Tensor)]
    assert sum(value.numel() for value in tensors) < 100
    restored = ClipAdSdp.load_from_checkpoint(checkpoint(engine))
    assert restored.model.prompts == model.model.prompts
    assert restored.model.rvs == {"method": "kde"}


def test_checkpoint_of_other_weights_is_refused(small_clip: str, category: Path, tmp_path: Path) -> None:
    engine = new_engine(tmp_path)
    engine.test(ClipAdSdp(visualizer=False, backbone=small_clip), datamodule=folder(category))
    other = str(save_clip(tmp_path / "other", seed=5))
    with pytest.raises(InputError, match="does not fit this model: backbone was .*; weights was '.*', here it is"):
        ClipAdSdp.load_from_checkpoint(checkpoint(engine), backbone=other)
    moved = ClipAdSdp.load_from_checkpoint(checkpoint(engine), backbone=str(save_clip(tmp_path / "moved")))
    assert moved.model.class_names == ("widget",)
    with pytest.raises(InputError, match=r"layers was \[1, 2, 3, 4\], here it is \[2, 4\]"):
        new_engine(tmp_path / "b").test(
            ClipAdSdp(visualizer=False, backbone=small_clip, layers=[2, 4]),
            datamodule=folder(category),
            ckpt_path=checkpoint(engine),
        )


def test_wrong_checkpoints_are_refused_in_a_sentence(small_clip: str, image_folder: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.ckpt"
    notes.write_text("hello")
    with pytest.raises(InputError, match=r"notes\.ckpt is not a checkpoint"):
        new_engine(tmp_path).predict(
            ClipAdSdp(visualizer=False, backbone=small_clip), data_path=image_folder, ckpt_path=notes
        )
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.0.0"}, notes)
    with pytest.raises(InputError, match="not one of ClipAdSdp"):
        new_engine(tmp_path).predict(
            ClipAdSdp(visualizer=False, backbone=small_clip), data_path=image_folder, ckpt_path=notes
        )


def test_checkpoints_class_prevails_and_says_so(
    small_clip: str, category: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = new_engine(tmp_path)
    engine.test(ClipAdSdp(visualizer=False, backbone=small_clip), datamodule=folder(category))
    model = ClipAdSdp(visualizer=False, class_name="gear", backbone=small_clip)
    new_engine(tmp_path / "b").predict(model, data_path=category / "test/good", ckpt_path=checkpoint(engine))
    assert model.model.class_names == ("widget",)
    assert "class 'widget' is used, not 'gear'" in caplog.text


@pytest.fixture
def strange_folder(image_folder: Path) -> Path:
    """One image of each strange kind, and two that cannot be read."""
    rng = np.random.default_rng(2)
    colour = Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8))
    colour.convert("L").save(image_folder / "grey.png")
    colour.convert("RGBA").save(image_folder / "rgba.png")
    colour.convert("P").save(image_folder / "palette.png")
    colour.convert("CMYK").save(image_folder / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 255, (1, 1, 3), dtype=np.uint8)).save(image_folder / "pixel.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    colour.save(image_folder / "rotated.jpg", exif=exif)
    Image.fromarray(rng.integers(0, 65535, (40, 60), dtype=np.uint16)).save(image_folder / "deep.png")
    (image_folder / "corrupt.png").write_bytes(b"no image at all")
    whole = (image_folder / "b.jpg").read_bytes()
    (image_folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    return image_folder


@pytest.mark.parametrize("workers", [0, 2])
def test_strange_images_are_scored_and_unreadable_ones_named(
    small_clip: str, strange_folder: Path, engine: Engine, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    model = ClipAdSdp(visualizer=False, backbone=small_clip, class_name="cup")
    dataset = PredictDataset(strange_folder)
    loader = DataLoader(dataset, batch_size=2, collate_fn=dataset.collate_fn, num_workers=workers)
    batches = engine.predict(model, dataloaders=loader)
    scored = {Path(path).name for batch in batches for path in batch.image_path}
    assert scored == {path.name for path in strange_folder.iterdir()} - {"corrupt.png", "truncated.jpg"}
    assert all(batch.pred_score.isfinite().all() for batch in batches)
    if not workers:  # workers log in their own process
        assert "corrupt.png, which cannot be read" in caplog.text
        assert "truncated.jpg, which cannot be read" in caplog.text
        assert "rotated.jpg is stored rotated" in caplog.text


def test_sixteen_bit_images_are_not_saturated(small_clip: str, tmp_path: Path) -> None:
    shades = np.linspace(0, 255, 32 * 32).reshape(32, 32).astype(np.uint8)
    for name, pixels in (("eight.png", shades), ("sixteen.png", shades.astype(np.uint16) * 257)):
        (tmp_path / name.split(".")[0]).mkdir()
        Image.fromarray(pixels).save(tmp_path / name.split(".")[0] / name)
    model = ClipAdSdp(visualizer=False, backbone=small_clip, class_name="cup")
    eight, sixteen = (
        new_engine(tmp_path).predict(model, data_path=tmp_path / kind)[0] for kind in ("eight", "sixteen")
    )
    torch.testing.assert_close(eight.anomaly_map, sixteen.anomaly_map, atol=1e-5, rtol=0)


def test_a_very_large_image(small_clip: str, tmp_path: Path, engine: Engine) -> None:
    Image.new("RGB", (10_000, 9_000), (90, 120, 60)).save(tmp_path / "large.jpg")
    batch = engine.predict(
        ClipAdSdp(visualizer=False, backbone=small_clip, class_name="cup"), data_path=tmp_path / "large.jpg"
    )[0]
    assert batch.anomaly_map.shape == (1, 32, 32)
    assert batch.pred_score.isfinite().all()


def test_an_unreadable_test_image_costs_only_itself(
    small_clip: str, tmp_path: Path, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_category(tmp_path / "widget")
    model = ClipAdSdp(visualizer=False, backbone=small_clip)
    (root / "test/good/001.png").write_bytes(b"gone")
    broken = engine.test(model, datamodule=folder(root))[0]
    assert "001.png or its mask, which cannot be read" in caplog.text
    (root / "test/good/001.png").unlink()
    assert broken == pytest.approx(new_engine(tmp_path / "b").test(model, datamodule=folder(root))[0], abs=1e-6)


def test_other_models_read_images_as_before(
    small_clip: str, category: Path, image_folder: Path, engine: Engine
) -> None:
    engine.test(ClipAdSdp(visualizer=False, backbone=small_clip), datamodule=folder(category))
    assert "process_dataloader" not in vars(engine.trainer.strategy)
    (image_folder / "corrupt.png").write_bytes(b"no image at all")
    with pytest.raises(OSError, match="cannot identify image file"):
        list(DataLoader(PredictDataset(image_folder), collate_fn=ImageBatch.collate))


def test_not_a_number_is_named(
    small_clip: str, engine: Engine, image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(PredictDataset):
        def __getitem__(self, index: int) -> object:
            item = super().__getitem__(index)
            if index == 0:
                item.image[0, 0, 0] = float("nan")
            return item

    dataset = Broken(image_folder)
    loader = DataLoader(dataset, batch_size=2, collate_fn=dataset.collate_fn)
    with caplog.at_level(logging.WARNING):
        batch = engine.predict(ClipAdSdp(visualizer=False, backbone=small_clip, class_name="cup"), dataloaders=loader)[
            0
        ]
    assert "a.png" in caplog.text
    assert batch.pred_label[0]
    assert batch.pred_score[0].isnan()
    assert batch.pred_score[1].isfinite()


def test_an_empty_class_name_is_refused(small_clip: str) -> None:
    with pytest.raises(InputError, match="class_name is empty"):
        ClipAdSdp(visualizer=False, class_name="", backbone=small_clip)


def test_own_components_are_kept(small_clip: str, image_folder: Path, engine: Engine) -> None:
    model = ClipAdSdp("cup", small_clip, post_processor=False, evaluator=False, visualizer=False)
    assert model.evaluator is None
    batch = engine.predict(model, data_path=image_folder)[0]
    assert batch.anomaly_map.min() < 0, "without a post-processor the map is the model's own"


def test_neighbours_run_as_before(category: Path, tmp_path: Path) -> None:
    shutil.copytree(category, tmp_path / "widget")
    model = Padim(backbone="resnet18", layers=["layer1"], pre_trained=False, n_features=10, visualizer=False)
    engine = new_engine(tmp_path)
    engine.fit(model, datamodule=folder(tmp_path / "widget"))
    assert "image_AUROC" in engine.test(model, datamodule=folder(tmp_path / "widget"))[0]
