"""SDP in anomalib's engine: scores, figures and class names."""

import shutil
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Padim
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomalib_clipad import ClipAdSdp, InputError

from . import conftest
from .conftest import new_engine


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
