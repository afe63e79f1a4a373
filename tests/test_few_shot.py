"""Normal images in the engine: references, thresholds, and what a checkpoint and an export keep of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from anomalib import LearningType
from anomalib.data import PredictDataset
from anomalib.data.utils import read_image
from anomalib.deploy import TorchInferencer
from lightning.pytorch import seed_everything
from PIL import Image

from anomalib_clipad import ClipAdSdp, InputError

from .conftest import build_model, folder, new_engine, weights, write_category, write_good

BARE = {"visualizer": False}
MODELS = ("ClipAdSdp", "ClipAdSdpPlus")


def predict(model: ClipAdSdp, where: Path, **arguments: object) -> dict[str, torch.Tensor]:
    batches = new_engine(where).predict(model, **arguments)
    fields = ("pred_score", "pred_label", "anomaly_map", "pred_mask", "p_value")
    return {
        key: torch.cat([getattr(batch, key) for batch in batches])
        for key in fields
        if getattr(batches[0], key) is not None
    }


def files_of(network: object, transform: Callable, folder: Path) -> list[str]:
    """Which images of a folder the bank holds."""
    found = []
    for path in sorted(folder.iterdir()):
        image = read_image(path, as_tensor=True)
        tokens = network.taps(transform(image)[None]).original
        if network.references(tokens).max() < 1e-3:
            found.append(path.name)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_k_shot_takes_images_of_the_training_split_by_the_seed(
    name: str, small_clip: str, parts: Path, tmp_path: Path
) -> None:
    found = []
    for run, seed in enumerate((0, 0, 7)):
        seed_everything(seed, verbose=False)
        model = build_model(name, small_clip, tmp_path, k_shot=3, **BARE)
        assert model.learning_type == LearningType.FEW_SHOT
        new_engine(tmp_path / str(run)).test(model, datamodule=folder(parts), verbose=False)
        found.append(files_of(model.model, model.pre_processor.transform, parts / "train/good"))
    assert len(found[0]) == 3
    assert found[0] == found[1] != found[2]


def test_few_shot_source_takes_all_images_of_the_folder_or_k_of_them(
    small_clip: str, parts: Path, tmp_path: Path
) -> None:
    good = write_good(tmp_path / "gute Prüflinge", 4)  # anomalib's own folders must be ASCII
    for k_shot, expected in ((0, 4), (2, 2)):
        model = ClipAdSdp("cup", small_clip, few_shot_source=str(good), k_shot=k_shot, **BARE)
        predict(model, tmp_path / str(k_shot), data_path=parts / "test/good")
        assert len(files_of(model.model, model.pre_processor.transform, good)) == expected


def test_few_shot_source_goes_before_the_training_split(small_clip: str, parts: Path, tmp_path: Path) -> None:
    good = write_good(tmp_path / "good", 2, seed=9)
    model = ClipAdSdp("cup", small_clip, few_shot_source=good, **BARE)
    new_engine(tmp_path).test(model, datamodule=folder(parts), verbose=False)
    assert len(files_of(model.model, model.pre_processor.transform, good)) == 2
    assert not files_of(model.model, model.pre_processor.transform, parts / "train/good")


@pytest.mark.parametrize("name", MODELS)
def test_batch_size_changes_nothing(name: str, small_clip: str, parts: Path, tmp_path: Path) -> None:
    results = []
    for size in (1, 5):
        model = build_model(name, small_clip, tmp_path, k_shot=3, false_alarm_rate=0.2, **BARE)
        data = folder(parts, eval_batch_size=size)
        results.append(new_engine(tmp_path / str(size)).test(model, datamodule=data, verbose=False)[0])
    assert results[0] == pytest.approx(results[1], abs=1e-5)
    assert len(results[0]) == 9


def test_another_category_gets_references_of_its_own_and_the_first_keeps_them(
    small_clip: str, parts: Path, tmp_path: Path
) -> None:
    other = write_category(tmp_path / "gear", normal=3, broken=3)
    model, fresh = (ClipAdSdp(backbone=small_clip, k_shot=2, **BARE) for _ in range(2))
    for number, (one, data) in enumerate(
        [(model, folder(parts)), (model, folder(other, "gear")), (fresh, folder(other, "gear"))]
    ):
        new_engine(tmp_path / str(number)).test(one, datamodule=data, verbose=False)
    assert torch.equal(model.model.references.patches, fresh.model.references.patches)
    model.choose_class("widget")
    assert len(files_of(model.model, model.pre_processor.transform, parts / "train/good")) == 2
    assert model.post_processor.image_threshold.isfinite()


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_brings_references_and_thresholds(name: str, small_clip: str, parts: Path, tmp_path: Path) -> None:
    model = build_model(name, small_clip, tmp_path, k_shot=3, false_alarm_rate=0.2, **BARE)
    engine = new_engine(tmp_path / "a")
    engine.test(model, datamodule=folder(parts), verbose=False)
    path = Path(engine.trainer.default_root_dir) / "weights/lightning/model.ckpt"
    expected = predict(model, tmp_path / "b", data_path=parts / "test")
    assert path.stat().st_size < 1e6
    ours = {
        "ckpt_path": predict(
            build_model(name, small_clip, tmp_path, **BARE), tmp_path / "c", data_path=parts / "test", ckpt_path=path
        ),
        "load_from_checkpoint": predict(
            type(model).load_from_checkpoint(path, **BARE), tmp_path / "d", data_path=parts / "test"
        ),
    }
    for way, found in ours.items():
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, msg=f"{way}: {key}")


def test_what_a_checkpoint_leaves_unused_is_said(
    small_clip: str, parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine, made_with = new_engine(tmp_path / "a"), {"k_shot": 3, "false_alarm_rate": 0.2}
    engine.test(ClipAdSdp(backbone=small_clip, **made_with, **BARE), datamodule=folder(parts), verbose=False)
    path = weights(engine, "model.ckpt")
    for given, unused in (
        ({}, None),
        (made_with, None),
        ({**made_with, "false_alarm_rate": 0.5}, "used, false_alarm_rate 0.5 is not"),
        ({"few_shot_source": str(parts), "k_shot": 2}, f"used, k_shot 2, few_shot_source {parts} is not"),
    ):
        caplog.clear()
        model = ClipAdSdp(backbone=small_clip, **given, **BARE)
        new_engine(tmp_path / "b").predict(model, data_path=parts / "test", ckpt_path=path)
        assert ("references and thresholds are used" in caplog.text) is (unused is not None)
        assert (unused or "") in caplog.text
    for mode, said in (("same_as_test", False), ("none", True)):  # validation sets thresholds by the rate that is given
        caplog.clear()
        model = ClipAdSdp(backbone=small_clip, **{**made_with, "false_alarm_rate": 0.5}, **BARE)
        data = folder(parts, val_split_mode=mode)
        new_engine(tmp_path / "c").validate(model, datamodule=data, ckpt_path=path, verbose=False)
        assert ("used, false_alarm_rate 0.5 is not" in caplog.text) is said


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_exports_have_references_and_thresholds(
    name: str, small_clip: str, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # anomalib's inferencer keeps a cache where it is started
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")  # anomalib's word for a file of one's own
    good = write_good(tmp_path / "good", 3)
    model = build_model(name, small_clip, tmp_path, few_shot_source=str(good), class_name="cup", **BARE)
    expected = predict(model, tmp_path / "a", data_path=parts / "test/square")
    engine, images = new_engine(tmp_path / "b"), PredictDataset(parts / "test/square")
    fresh = build_model(name, small_clip, tmp_path, few_shot_source=str(good), class_name="cup", **BARE)
    exported = engine.export(fresh, "torch", tmp_path / "out")
    inferencer = TorchInferencer(exported, device="cpu")
    session = onnxruntime.InferenceSession(str(engine.export(fresh, "onnx", tmp_path / "out")))
    for number in range(len(images)):
        image = images[number].image
        with torch.no_grad():
            from_torch = inferencer.predict(image)
        outputs = dict(
            zip([o.name for o in session.get_outputs()], session.run(None, {"input": image[None].numpy()}), strict=True)
        )
        for key in ("pred_score", "anomaly_map"):
            wanted = expected[key][number].numpy()
            np.testing.assert_allclose(np.asarray(getattr(from_torch, key)).squeeze(), wanted, atol=1e-4)
            np.testing.assert_allclose(outputs[key].squeeze(), wanted, atol=1e-4)
        assert bool(outputs["pred_label"].squeeze()) is bool(expected["pred_label"][number])


def test_a_model_is_called_with_gradients_right_after_a_run(small_clip: str, parts: Path, tmp_path: Path) -> None:
    """SDP+ has layers with gradients, and what is set in inference mode could not be used with them, or exported."""
    model = build_model("ClipAdSdpPlus", small_clip, tmp_path, k_shot=2, class_name="cup", **BARE)
    new_engine(tmp_path / "a").validate(model, datamodule=folder(parts), verbose=False)
    image = PredictDataset(parts / "test/square")[0].image[None]
    raw = model.eval().model(model.pre_processor(image))
    raw.anomaly_map.sum().backward()
    assert all(parameter.grad is not None for parameter in model.model.adapter.parameters())
    assert torch.equal(model.post_processor(raw).anomaly_map, model(image).anomaly_map)


def test_an_export_of_k_shot_takes_the_data_or_says_what_it_needs(small_clip: str, parts: Path, tmp_path: Path) -> None:
    model = ClipAdSdp("cup", small_clip, k_shot=2, **BARE)
    with pytest.raises(InputError, match="few_shot_source, or a checkpoint of such a run"):
        model.to_onnx(tmp_path)
    model.prepare_export(folder(parts))
    assert len(files_of(model.model, model.pre_processor.transform, parts / "train/good")) == 2


def test_a_reference_that_cannot_be_read_is_named_and_skipped(
    small_clip: str, parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = write_good(tmp_path / "good", 3)
    (good / "001.png").write_bytes(b"not an image")
    model = ClipAdSdp("cup", small_clip, few_shot_source=good, **BARE)
    predict(model, tmp_path, data_path=parts / "test/good")
    assert "001.png, which cannot be read" in caplog.text
    assert len(model.post_processor.good_scores) == 2


def test_references_of_any_size_are_taken(small_clip: str, parts: Path, tmp_path: Path) -> None:
    good = write_good(tmp_path / "good", 2)
    Image.new("L", (300, 20), 90).save(good / "grey.png")
    model = ClipAdSdp("cup", small_clip, few_shot_source=good, **BARE)
    assert predict(model, tmp_path, data_path=parts / "test/good")["pred_score"].isfinite().all()


def test_a_run_without_data_goes_on_with_the_references_of_an_earlier_one(
    small_clip: str, parts: Path, tmp_path: Path
) -> None:
    model = ClipAdSdp("widget", small_clip, k_shot=2, **BARE)
    new_engine(tmp_path / "a").test(model, datamodule=folder(parts), verbose=False)
    before = model.model.references.patches.clone()
    predict(model, tmp_path / "b", data_path=parts / "test/good")
    assert torch.equal(model.model.references.patches, before)


def refused(model: ClipAdSdp, words: str, where: Path, **arguments: object) -> None:
    with pytest.raises(InputError, match=words):
        new_engine(where).predict(model, **arguments)


def test_sources_that_cannot_serve_are_one_sentence(small_clip: str, parts: Path, tmp_path: Path) -> None:
    empty, broken = tmp_path / "empty", write_good(tmp_path / "broken", 2)
    empty.mkdir()
    for path in broken.iterdir():
        path.write_bytes(b"no image")
    images = {"data_path": parts / "test/good"}
    for number, (arguments, words, run) in enumerate(
        [
            ({"few_shot_source": tmp_path / "gone"}, "gone does not exist; give a folder", images),
            ({"few_shot_source": empty}, "empty has no images", images),
            ({"few_shot_source": broken}, "0 of the 2 references wanted .* can be read", images),
            ({"few_shot_source": parts / "train/good", "k_shot": 13}, "k_shot is 13, but .* has 12 normal", images),
            ({"k_shot": 13}, "k_shot is 13, but the training split has 12", {"datamodule": folder(parts)}),
            ({"k_shot": 2}, "k_shot 2 takes normal images of the data's training split, and there are none", images),
        ]
    ):
        refused(ClipAdSdp("cup", small_clip, **arguments, **BARE), words, tmp_path / str(number), **run)


def test_a_checkpoint_without_references_is_refused_where_they_are_wanted(
    small_clip: str, parts: Path, tmp_path: Path
) -> None:
    engine = new_engine(tmp_path / "a")
    engine.test(ClipAdSdp(backbone=small_clip, **BARE), datamodule=folder(parts), verbose=False)
    path = Path(engine.trainer.default_root_dir) / "weights/lightning/model.ckpt"
    model = ClipAdSdp(backbone=small_clip, k_shot=2, **BARE)
    refused(model, "The checkpoint holds no references", tmp_path / "b", data_path=parts / "test/good", ckpt_path=path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *(({"k_shot": value}, "k_shot must be a number of images") for value in (-1, 1.5, "2", None, True, [1])),
        *(({"few_shot_source": value}, "few_shot_source must be the path") for value in ("", 3, ["a"])),
        *(({"false_alarm_rate": value}, "false_alarm_rate must be a number") for value in (0, 1, 2.0, "0.05", [0.1])),
        *(
            ({"reference_layers": value}, "reference_layers must be some of the layers")
            for value in ([], [5], [2, 1], 1)
        ),
        *(({"max_references": value}, "max_references must be a whole number") for value in (0, -1, 2.5, None)),
        ({"augment_references": "yes"}, "augment_references must be true or false"),
        ({"false_alarm_rate": 0.05, "post_processor": False}, "false_alarm_rate belongs to the default"),
    ],
)
def test_wrong_arguments_are_one_sentence(small_clip: str, arguments: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ClipAdSdp("cup", small_clip, **arguments)
