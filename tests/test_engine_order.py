"""One engine, one trainer, several models and runs: each gives what it gives alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from anomalib.callbacks import LoadModelCallback
from anomalib.data import Folder
from anomalib.models import AnomalibModule, Padim, get_model
from anomalib.post_processing import PostProcessor

from anomalib_clipad import ClipAdSdp, ClipAdSdpPlus, InputError
from anomalib_clipad.sdp import ClipAdSdpModel

from .conftest import folder, make_clip, new_engine, write_category

BARE = {"visualizer": False}


def padim() -> Padim:
    torch.manual_seed(0)
    return Padim(backbone="resnet18", layers=["layer1"], pre_trained=False, n_features=10, visualizer=False)


@pytest.fixture(scope="module")
def models(small_clip: str, category: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable]:
    """Ways to make a model that can score; Padim is fitted once."""
    fitted = padim()
    new_engine(tmp_path_factory.mktemp("padim")).fit(fitted, datamodule=folder(category))
    state = fitted.state_dict()

    def restored() -> Padim:
        model = padim()
        model.load_state_dict(state)
        return model

    return {"padim": restored, "sdp": lambda: ClipAdSdp(backbone=small_clip, **BARE)}


def scores(engine: object, model: AnomalibModule, category: Path) -> list[float]:
    return [batch.pred_score.item() for batch in engine.predict(model, data_path=category / "test/good")]


@pytest.mark.parametrize("order", [("padim", "sdp"), ("sdp", "padim", "sdp")])
def test_models_on_one_engine_give_what_each_gives_alone(
    models: dict[str, Callable], category: Path, tmp_path: Path, order: tuple[str, ...]
) -> None:
    shared = new_engine(tmp_path / "shared")
    for number, name in enumerate(order):
        alone = new_engine(tmp_path / str(number))
        for engine_method in ("test", "predict"):
            results = []
            for engine in (alone, shared):
                model = models[name]()
                if engine_method == "test":
                    results.append(engine.test(model, datamodule=folder(category), verbose=False)[0])
                else:
                    results.append(scores(engine, model, category))
            assert results[1] == pytest.approx(results[0], abs=1e-6), (name, engine_method)


def test_a_failed_run_leaves_the_trainer_as_it_was(small_clip: str, category: Path, tmp_path: Path) -> None:
    class Failing(ClipAdSdp):
        def predict_step(self, *_: object, **__: object) -> None:
            msg = "as planned"
            raise RuntimeError(msg)

    engine = new_engine(tmp_path)
    with pytest.raises(RuntimeError, match="as planned"):
        engine.predict(Failing("cup", backbone=small_clip), data_path=category / "test/good")
    assert not vars(engine.trainer.strategy).get("process_dataloader")
    assert not any(isinstance(callback, PostProcessor) for callback in engine.trainer.callbacks)


def test_thresholds_return_with_the_class(small_clip: str, category: Path, tmp_path: Path) -> None:
    model = ClipAdSdp(backbone=small_clip, **BARE)
    new_engine(tmp_path).test(model, datamodule=folder(category))
    before = {key: value.clone() for key, value in model.post_processor.state_dict().items()}
    ranges = model.model.fusion.score_min.clone()
    assert ranges.isfinite().all()
    model.choose_class("gear")
    assert model.post_processor.image_threshold.isnan()
    assert model.model.fusion.score_min.isnan().all()
    model.choose_class("widget")
    assert torch.equal(model.model.fusion.score_min, ranges)
    for key, value in model.post_processor.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_the_class_is_not_taken_from_an_earlier_data_module(small_clip: str, category: Path, tmp_path: Path) -> None:
    engine = new_engine(tmp_path)
    engine.test(ClipAdSdp(backbone=small_clip, **BARE), datamodule=folder(category))
    other = ClipAdSdp(backbone=small_clip, **BARE)
    engine.predict(other, data_path=category / "test/good")
    assert other.model.class_names == ("object",)


def test_images_alone_are_scored_with_the_class_name(small_clip: str) -> None:
    model = ClipAdSdp("cup", backbone=small_clip).eval()
    assert model(torch.rand(2, 3, 40, 50)).pred_label.dtype == torch.bool
    assert model.model.class_names == ("cup",)


def test_a_stock_post_processor_sets_labels_and_masks(small_clip: str, category: Path, tmp_path: Path) -> None:
    model = ClipAdSdp(backbone=small_clip, post_processor=PostProcessor(), **BARE)
    batches = new_engine(tmp_path).predict(model, datamodule=folder(category))
    labels = torch.cat([batch.pred_label for batch in batches])
    expected = torch.cat([batch.pred_score for batch in batches]) > model.post_processor.normalized_image_threshold
    assert torch.equal(labels, expected)
    assert labels.any()
    assert all(batch.pred_mask.dtype == torch.bool for batch in batches)


@pytest.mark.parametrize("way", ["load_state_dict", "callback"])
def test_a_state_dict_brings_class_and_thresholds(small_clip: str, category: Path, tmp_path: Path, way: str) -> None:
    engine, first = new_engine(tmp_path), ClipAdSdp(backbone=small_clip, **BARE)
    engine.test(first, datamodule=folder(category))
    second = ClipAdSdp(backbone=small_clip, **BARE)
    if way == "load_state_dict":
        second.load_state_dict(first.state_dict())
    else:
        weights = Path(engine.trainer.default_root_dir) / "weights/lightning/model.ckpt"
        LoadModelCallback(str(weights)).setup(None, second)
    assert second.model.class_names == ("widget",)
    for key in ("image_threshold", "pixel_threshold"):
        assert torch.equal(getattr(second.post_processor, key), getattr(first.post_processor, key))
    images = torch.rand(2, 3, 48, 48)
    assert torch.equal(second.eval()(images).pred_score, first.eval()(images).pred_score)


@pytest.mark.parametrize(("given", "epochs"), [({"max_epochs": 1000}, 1000), ({}, 5), ({"max_epochs": -1}, -1)])
def test_max_epochs_is_the_users_or_else_the_papers(
    small_clip: str, category: Path, tmp_path: Path, given: dict[str, int], epochs: int
) -> None:
    from anomalib_clipad.data import AuxiliaryDataModule

    class Asking(ClipAdSdpPlus):
        def on_fit_start(self) -> None:
            super().on_fit_start()
            self.asked = self.trainer.max_epochs
            self.trainer.should_stop = True
            self.trainer.fit_loop.max_epochs = 0

    data = AuxiliaryDataModule(
        Folder(
            "widget",
            root=category,
            normal_dir="test/good",
            normal_test_dir="test/good",
            abnormal_dir="test/square",
            mask_dir="ground_truth/square",
        ),
        num_workers=0,
    )
    model = Asking(backbone=small_clip, **BARE)
    new_engine(tmp_path, num_sanity_val_steps=0, **given).fit(model, datamodule=data)
    assert model.asked == epochs


def test_good_images_only_have_no_figures_that_compare(
    small_clip: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_category(tmp_path / "widget")
    data = Folder("widget", root=root, normal_dir="train/good", normal_test_dir="test/good", num_workers=0)
    results = new_engine(tmp_path).test(ClipAdSdp(backbone=small_clip, **BARE), datamodule=data)
    assert not any("AUROC" in key or "AP" in key or "F1" in key for key in results[0])
    assert "all normal or all anomalous" in caplog.text


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (torch.tensor([0]), "a class for each of 3 images, got 1"),
        (torch.tensor([0.0, 1.0, 0.0]), "one whole number an image"),
        (torch.tensor([0, 1, 2]), r"must lie in 0 to 1, got \[0, 1, 2\]"),
        (torch.tensor([0, -1, 0]), "must lie in 0 to 1"),
    ],
)
def test_an_index_that_names_no_class_is_refused(index: torch.Tensor, words: str) -> None:
    model = ClipAdSdpModel(clip=make_clip(), class_names=["cup", "plate"], rvs="mean")
    with pytest.raises(InputError, match=words):
        model(torch.rand(3, 3, 32, 32), index)


def test_printed_class_paths_are_accepted(small_clip: str) -> None:
    for name in ("anomalib_clipad.ClipAdSdp", "anomalib_clipad.sdp.lightning_model.ClipAdSdp"):
        assert isinstance(get_model({"class_path": name, "init_args": {"backbone": small_clip}}), ClipAdSdp)
