"""Thresholds in the engine: from labelled images, from normal ones alone, and from neither."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib import LearningType
from anomalib.data import Folder, PredictDataset
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.components import MapScale, Prediction
from anomalib_clipad.engine.post_processing import ClipAdPostProcessor

from .conftest import LAYOUT, folder, new_engine, write_category, write_good
from .test_few_shot import BARE, predict
from .test_products import FOLDERS, mixed

__all__ = ["mixed"]  # a fixture


def normal_only(parts: Path) -> Folder:
    """Normal images alone, as on the first day."""
    return Folder("widget", root=parts, normal_dir="train/good", num_workers=0)


def test_thresholds_come_from_references_alone_where_there_is_nothing_else(
    small_clip: str, parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = ClipAdSdp("cup", small_clip, few_shot_source=parts / "train/good", **BARE)
    with caplog.at_level(logging.INFO, "anomalib_clipad"):
        found = predict(model, tmp_path, data_path=parts / "test")
    assert (
        "set from 12 normal images (all of them references). False-alarm rate: 7.7% expected, at most 22.1%"
        in caplog.text
    )
    scores = model.post_processor.good_scores
    assert len(scores) == 12
    assert model.post_processor.image_threshold == scores.max()
    assert ((found["p_value"] * 13 - (found["p_value"] * 13).round()).abs() < 1e-5).all()


def test_a_rate_takes_the_other_training_images_and_not_the_test_images(
    small_clip: str, parts: Path, tmp_path: Path
) -> None:
    model = ClipAdSdp(backbone=small_clip, k_shot=2, false_alarm_rate=0.1, **BARE)
    new_engine(tmp_path).test(model, datamodule=folder(parts), verbose=False)  # validates on the test images
    assert len(model.post_processor.good_scores) == 12
    plain = []
    for path in sorted((parts / "train/good").iterdir()):
        image = model.pre_processor.transform(PredictDataset(path)[0].image)[None]
        prediction = model.model(image)
        if model.model.references(model.model.taps(image).original).max() > 1e-3:
            plain.append((prediction.pred_score.item(), prediction.anomaly_map.max().item()))
    assert len(plain) == 10
    scores = model.post_processor.good_scores
    for score, _ in plain:
        assert (scores - score).abs().min() < 1e-5
    assert model.post_processor.image_threshold == scores.sort().values[11]  # ceil(13 * 0.9) of 12


def test_a_rate_works_without_references(small_clip: str, parts: Path, tmp_path: Path) -> None:
    model = ClipAdSdp(backbone=small_clip, false_alarm_rate=0.1, **BARE)
    assert model.learning_type == LearningType.ZERO_SHOT
    found = predict(model, tmp_path, datamodule=folder(parts))
    assert not model.model.references.fitted
    assert len(model.post_processor.good_scores) == 12
    assert "p_value" in found


def test_validation_images_serve_where_no_others_are_normal(small_clip: str, parts: Path, tmp_path: Path) -> None:
    class WithoutTraining(Folder):
        def _setup(self, stage: str | None = None) -> None:
            super()._setup(stage)
            self.train_data.samples = self.train_data.samples[:0]

    data = WithoutTraining("widget", root=parts, num_workers=0, val_split_mode="same_as_test", **LAYOUT)
    model = ClipAdSdp(backbone=small_clip, false_alarm_rate=0.2, **BARE)
    new_engine(tmp_path).validate(model, datamodule=data, verbose=False)
    assert len(model.post_processor.good_scores) == 6


def test_no_normal_image_of_the_calibration_shows_more_than_promised(
    small_clip: str, parts: Path, tmp_path: Path
) -> None:
    """Of 12 normal images and a rate of 0.2, ceil(13 * 0.8) = 11 stay below: one may be above."""
    model = ClipAdSdp("cup", small_clip, false_alarm_rate=0.2, **BARE)
    new_engine(tmp_path / "a").validate(model, datamodule=folder(parts), verbose=False)
    found = predict(model, tmp_path / "b", data_path=parts / "train/good")
    assert found["pred_label"].sum() == 1
    assert found["pred_mask"].flatten(1).any(dim=1).sum() == 1
    assert (found["p_value"] <= 0.2).sum() == 1


def test_a_normal_image_stays_normal_whatever_the_last_digits_of_its_score(
    small_clip: str, parts: Path, tmp_path: Path
) -> None:
    """As in another batch, or on another machine."""
    model = ClipAdSdp("cup", small_clip, false_alarm_rate=0.2, **BARE)
    new_engine(tmp_path / "a").validate(model, datamodule=folder(parts), verbose=False)
    images = [PredictDataset(path)[0].image for path in sorted((parts / "train/good").iterdir())]
    raw = model.model(model.pre_processor.transform(torch.stack(images)))
    for digits in (-1, 0, 1):
        scores, maps = raw.pred_score + digits * 1e-6, raw.anomaly_map + digits * 1e-6 * raw.anomaly_map.std()
        again = model.post_processor(raw._replace(pred_score=scores, anomaly_map=maps))
        assert again.pred_label.sum() == 1
        assert again.pred_mask.flatten(1).any(dim=1).sum() == 1
        assert (model.post_processor.p_values(scores, None) <= 0.2).sum() == 1


def raw_of(model: ClipAdSdp, where: Path) -> Prediction:
    images = [PredictDataset(path)[0].image for path in sorted(where.iterdir())]
    with torch.no_grad():
        return model.model(model.pre_processor.transform(torch.stack(images)))


def test_what_the_class_token_adds_to_a_whole_map_marks_nothing(small_clip: str, parts: Path, tmp_path: Path) -> None:
    """As far as it adds more than to a normal image; none of these shows more than by the threshold alone."""
    model = ClipAdSdp("cup", small_clip, false_alarm_rate=0.2, **BARE)
    new_engine(tmp_path / "a").validate(model, datamodule=folder(parts), verbose=False)
    processor = model.post_processor
    normal, bad = (raw_of(model, parts / part) for part in ("train/good", "test/square"))
    threshold, largest = processor.pixel_threshold, float(normal.map_offset.max())
    assert torch.equal(processor(normal).pred_mask, normal.anomaly_map > threshold)
    masks = []
    for more in (-1.0, 2.0, 4.0):  # in units of the maps' spread
        added = more * bad.anomaly_map.std() + largest - bad.map_offset
        raised = bad._replace(anomaly_map=bad.anomaly_map + added[:, None, None], map_offset=bad.map_offset + added)
        shown = processor(raised)
        own = threshold + (raised.map_offset - largest).clamp(min=0)[:, None, None]
        masks.append(shown.pred_mask)
        assert (masks[-1] != (raised.anomaly_map > own)).float().mean() < 2e-3  # but for a pixel at the threshold
        assert torch.equal(masks[-1], shown.anomaly_map > 0.5)
        assert torch.equal(shown.pred_label, processor(bad).pred_label)
    assert (raised.anomaly_map > threshold).float().mean() > masks[-1].float().mean() + 0.2
    assert (masks[-1] != masks[-2]).float().mean() < 2e-3
    # A map that is raised by anything else is marked.
    other = bad._replace(anomaly_map=bad.anomaly_map + 4 * bad.anomaly_map.std())
    assert processor(other).pred_mask.float().mean() > processor(bad).pred_mask.float().mean() + 0.2


def test_thresholds_from_labels_mark_what_is_above_them(small_clip: str, parts: Path, tmp_path: Path) -> None:
    """Also where references, or thresholds from normal images, came first."""
    model = ClipAdSdp("cup", small_clip, k_shot=2, **BARE)
    new_engine(tmp_path / "a").validate(model, datamodule=normal_only(parts), verbose=False)
    assert len(model.post_processor.map_offset.largest) == 1
    new_engine(tmp_path / "b").validate(model, datamodule=folder(parts), verbose=False)
    raw = raw_of(model, parts / "test/square")
    raised = raw._replace(anomaly_map=raw.anomaly_map + 5)
    assert torch.equal(
        model.post_processor(raised).pred_mask, raised.anomaly_map > model.post_processor.pixel_threshold
    )


@pytest.mark.parametrize(
    "arguments", [{}, {"k_shot": 3}, {"false_alarm_rate": 0.2}, {"k_shot": 2, "false_alarm_rate": 0.2}]
)
@pytest.mark.parametrize("labels", ["labelled", "normal", "none"])
def test_label_and_mask_follow_what_is_shown(
    small_clip: str, parts: Path, tmp_path: Path, arguments: dict, labels: str
) -> None:
    model = ClipAdSdp("cup", small_clip, **arguments, **BARE)
    if labels == "none":
        if "k_shot" in arguments:
            model.few_shot_source = parts / "train/good"
    else:
        data = folder(parts) if labels == "labelled" else normal_only(parts)
        new_engine(tmp_path / "a").validate(model, datamodule=data, verbose=False)
    found = predict(model, tmp_path / "b", data_path=parts / "test")
    assert torch.equal(found["pred_label"], found["pred_score"] > 0.5)
    assert torch.equal(found["pred_mask"], found["anomaly_map"] > 0.5)
    for key in ("pred_score", "anomaly_map"):
        assert ((found[key] >= 0) & (found[key] <= 1)).all()
    threshold = model.post_processor.image_threshold
    if threshold.isfinite():
        shown = model.post_processor._shown("image", threshold, threshold)
        assert shown.item() == pytest.approx(0.5, abs=1e-6)


def test_normal_images_of_another_category_set_no_threshold(small_clip: str, parts: Path, tmp_path: Path) -> None:
    """One category, another, the first again, on one model: as each alone."""
    gear = write_category(tmp_path / "gear", normal=4, broken=3)
    write_good(gear / "train/more", 7, seed=11)

    class WithoutTraining(Folder):
        def _setup(self, stage: str | None = None) -> None:
            super()._setup(stage)
            self.train_data.samples = self.train_data.samples[:0]

    def other(kind: type[Folder]) -> Folder:
        layout = {**LAYOUT, "normal_dir": "train/more"}
        return kind("gear", root=gear, num_workers=0, val_split_mode="same_as_test", **layout)

    model = ClipAdSdp(backbone=small_clip, false_alarm_rate=0.2, **BARE)
    found = []
    for number, data in enumerate((folder(parts), other(Folder), folder(parts), other(WithoutTraining))):
        new_engine(tmp_path / str(number)).validate(model, datamodule=data, verbose=False)
        found.append(model.post_processor.good_scores.clone())
    assert [len(scores) for scores in found[:3]] == [12, 7, 12]
    torch.testing.assert_close(found[2], found[0])
    alone = ClipAdSdp(backbone=small_clip, false_alarm_rate=0.2, **BARE)
    new_engine(tmp_path / "alone").validate(alone, datamodule=other(Folder), verbose=False)
    torch.testing.assert_close(found[3], alone.post_processor.good_scores)


@pytest.mark.parametrize("rate", [None, 0.2])
def test_sensitivities_move_the_threshold_of_what_is_shown(
    small_clip: str, parts: Path, tmp_path: Path, rate: float | None
) -> None:
    found = {}
    for sensitivity in (0.2, 0.8):
        model = ClipAdSdp("cup", small_clip, false_alarm_rate=rate, **BARE)
        model.post_processor.image_sensitivity = model.post_processor.pixel_sensitivity = sensitivity
        new_engine(tmp_path / f"{sensitivity}a").validate(model, datamodule=folder(parts), verbose=False)
        found[sensitivity] = predict(model, tmp_path / f"{sensitivity}b", data_path=parts / "test")
        assert torch.equal(found[sensitivity]["pred_label"], found[sensitivity]["pred_score"] > 1 - sensitivity)
    assert found[0.2]["pred_mask"].sum() < found[0.8]["pred_mask"].sum()


def test_a_class_without_masks_leaves_the_others_thresholds_as_they_are(
    small_clip: str, mixed: Path, tmp_path: Path
) -> None:
    limits = []
    for names in (set(), {"n"}):
        data = folder(mixed, eval_batch_size=1)
        data.setup()
        batches = list(data.val_dataloader())
        for batch in batches:
            if Path(batch.image_path[0]).parent.name in names:
                batch.gt_mask = None
        model, engine = ClipAdSdp(FOLDERS, small_clip, **BARE), new_engine(tmp_path)
        engine.validate(model, dataloaders=DataLoader(batches, batch_size=None), verbose=False)
        limits.append(model.post_processor.of_class.values)
    assert torch.equal(limits[0][0], limits[1][0])
    assert torch.equal(limits[0][1, :3], limits[1][1, :3])
    assert limits[1][1, -1].isnan(), "of the class without masks"


def test_a_post_processor_of_ones_own_has_its_rate(small_clip: str) -> None:
    model = ClipAdSdp("cup", small_clip, post_processor=ClipAdPostProcessor(false_alarm_rate=0.1))
    assert model.post_processor.false_alarm_rate == 0.1
    assert model.post_processor.map_scale == model.model.map_scale


def test_good_parts_of_which_some_have_a_raised_map_keep_a_range(small_clip: str, tmp_path: Path) -> None:
    """The mean of all maps is then above the threshold of a larger rate."""
    source = tmp_path / "good"
    source.mkdir()
    generator = np.random.default_rng(0)
    for number in range(10):
        low, high = (60, 70) if number < 8 else (0, 256)
        pixels = generator.integers(low, high, (64, 64, 3), dtype=np.uint16).astype(np.uint8)
        Image.fromarray(pixels).save(source / f"{number}.png")
    for rate in (0.3, 0.5):
        model = ClipAdSdp("cup", small_clip, few_shot_source=source, false_alarm_rate=rate, **BARE)
        maps = predict(model, tmp_path / str(rate), data_path=source)["anomaly_map"]
        assert model.post_processor.pixel_max - model.post_processor.pixel_min > 1e-3
        assert len(maps[:8].unique()) > 100


def test_an_image_that_is_not_a_number_is_anomalous_where_scores_have_no_range(small_clip: str, tmp_path: Path) -> None:
    pixels = np.full((64, 64), 0.5, np.float32)
    pixels[3, 3] = np.nan
    Image.fromarray(pixels).save(tmp_path / "nan.tiff")
    model = ClipAdSdp("cup", small_clip, **BARE)
    model.choose_class("cup")
    for name in ("image_min", "image_max", "_image_threshold", "pixel_min", "pixel_max", "_pixel_threshold"):
        getattr(model.post_processor, name).fill_(0.3)
    found = predict(model, tmp_path, data_path=tmp_path / "nan.tiff")
    assert found["pred_score"].isnan().all()
    assert found["anomaly_map"].isnan().all()
    assert found["pred_label"].all()
    assert found["pred_mask"].all()


@pytest.mark.parametrize("processor", [False, {"enable_thresholding": False}])
def test_without_labels_and_masks_the_other_figures_are_there(
    small_clip: str, parts: Path, tmp_path: Path, processor: bool | dict
) -> None:
    processor = processor and ClipAdPostProcessor(**processor)
    model = ClipAdSdp("cup", small_clip, post_processor=processor, **BARE)
    (figures,) = new_engine(tmp_path / "a").test(model, datamodule=folder(parts), verbose=False)
    kinds = {f"{level}_{kind}" for level in ("image", "pixel") for kind in ("AUROC", "F1Max", "AP")}
    assert set(figures) == kinds | {"pixel_AUPRO"}
    assert predict(model, tmp_path / "b", data_path=parts / "test").keys() == {"pred_score", "anomaly_map"}


def test_without_thresholding_nothing_is_called_anomalous() -> None:
    processor = ClipAdPostProcessor(MapScale(0.0, 50.0), enable_thresholding=False)
    scores, maps = torch.tensor([0.9]), torch.full((1, 4, 4), 0.1)
    shown = processor(Prediction(scores, maps, scores, scores))
    assert shown.pred_label is None
    assert shown.pred_mask is None
    assert processor.pixel_mask(shown.anomaly_map) is None
    raw = ClipAdPostProcessor(MapScale(0.0, 50.0), enable_normalization=False)(Prediction(scores, maps, scores, scores))
    assert torch.equal(raw.anomaly_map, maps)
    assert raw.pred_mask.all()
