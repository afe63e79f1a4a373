"""A region in the engine: thresholds and metrics look inside only, and so do checkpoints and exported files."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from anomalib.deploy import CompressionType
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomalib_clipad import ClipAdSdp, ClipAdSdpPlus
from anomalib_clipad.errors import InputError

from .conftest import ROUNDING, auxiliary, build_model, folder, new_engine, pixels_of, weights
from .test_export import OnceToOnnx, run_onnx, run_openvino
from .test_products import BARE, FOLDERS, mixed, only, run, same
from .test_region import BOX, inside_box, write_mask

__all__ = ["mixed"]  # a fixture
KINDS = ["ClipAdSdp", "ClipAdSdpPlus"]


def spoilt(category: Path, root: Path, inside: np.ndarray) -> Path:
    """The category with bright dots outside of the region, which masks mark, and half of the normal test images too."""
    for path in sorted(category.rglob("*.png")):
        pixels, target = np.array(Image.open(path)), root / path.relative_to(category)
        target.parent.mkdir(parents=True, exist_ok=True)
        pixels[~inside] = 255
        Image.fromarray(pixels).save(target)
    return root


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("few", [{}, {"k_shot": 2, "false_alarm_rate": 0.2}], ids=["labels", "normal"])
def test_a_defect_outside_changes_no_score_threshold_or_metric(
    kind: str, few: dict, small_clip: str, category: Path, tmp_path: Path
) -> None:
    inside = inside_box((48, 48), [0.25, 0.0, 1.0, 1.0])
    region = write_mask(tmp_path / "region.png", inside)
    other = spoilt(category, tmp_path / "spoilt", inside)
    figures, thresholds, predictions = [], [], []
    for number, root in enumerate((category, other)):
        # The default size, so that a pixel of the picture is a pixel of the input.
        model = build_model(kind, small_clip, tmp_path, image_size=48, region=region, visualizer=False, **few)
        engine = new_engine(tmp_path / str(number))
        figures += engine.test(model, datamodule=folder(root), verbose=False)
        state = model.post_processor.state_dict()
        thresholds.append({key: value for key, value in state.items() if value.numel()})
        predictions.append(engine.predict(model, datamodule=folder(root)))
    assert figures[0] == figures[1]
    assert len(figures[0]) == 9
    for key, value in thresholds[0].items():
        torch.testing.assert_close(thresholds[1][key], value, atol=0, rtol=0, equal_nan=True, msg=key)
    for one, two in zip(*predictions, strict=True):
        for name in ("pred_score", "anomaly_map", "pred_mask", "gt_label", "raw_score"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name
        outside = torch.from_numpy(~inside)
        assert not one.anomaly_map[:, outside].any()
        assert not one.pred_mask[:, outside].any()
        assert one.anomaly_map[:, ~outside].any()


def test_metrics_equal_those_of_the_pixels_inside(small_clip: str, category: Path, tmp_path: Path) -> None:
    box = [0.0, 0.0, 0.35, 0.45]
    model = ClipAdSdp(backbone=small_clip, image_size=48, region=box, visualizer=False)
    engine = new_engine(tmp_path)
    figures = engine.test(model, datamodule=folder(category), verbose=False)[0]
    batches = engine.predict(model, datamodule=folder(category))
    inside = inside_box((48, 48), box)
    maps = np.concatenate([batch.anomaly_map.numpy() for batch in batches])
    raw, masks, labels = [], [], []
    network = model.model
    for batch in batches:
        raw.append(network.scores(batch.image).anomaly_map.numpy())
        for path in map(Path, batch.image_path):
            file = category / "ground_truth/square" / f"{path.stem}_mask.png"
            mask = np.asarray(Image.open(file)) > 0 if "square" in path.parts else np.zeros((48, 48), dtype=bool)
            masks.append(mask & inside)
            labels.append(masks[-1].any())
    raw, masks = np.concatenate(raw), np.stack(masks)
    assert 0 < sum(labels) < 6  # of which six are anomalous in the whole picture
    truth, values = masks[:, inside].ravel(), raw[:, inside].ravel()
    assert figures["pixel_AUROC"] == pytest.approx(roc_auc_score(truth, values), abs=1e-5)
    assert figures["pixel_AP"] == pytest.approx(average_precision_score(truth, values), abs=1e-5)
    scores = np.concatenate([batch.raw_score.numpy() for batch in batches])
    assert figures["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-5)
    called = maps[:, inside].ravel() > 0.5
    f1 = 2 * (called & truth).sum() / (called.sum() + truth.sum())
    assert figures["pixel_F1Score"] == pytest.approx(f1, abs=1e-5)
    precision, recall, cuts = precision_recall_curve(truth, values)
    best = (2 * precision * recall / (precision + recall + 1e-10))[: len(cuts)]
    assert figures["pixel_F1Max"] == pytest.approx(best.max(), abs=1e-4)
    assert float(model.post_processor.pixel_threshold) == pytest.approx(cuts[best.argmax()], abs=1e-6)
    assert float(model.post_processor.pixel_min) == values.min()


def test_aupro_counts_false_positives_inside_only(small_clip: str, category: Path, tmp_path: Path) -> None:
    """A region of the left half gives what the left halves of maps and masks give."""
    from anomalib.metrics import AUPRO  # the plain one

    model = ClipAdSdp(backbone=small_clip, image_size=48, region=[0, 0, 0.5, 1], visualizer=False)
    engine = new_engine(tmp_path)
    figures = engine.test(model, datamodule=folder(category), verbose=False)[0]
    plain = AUPRO(fields=("anomaly_map", "gt_mask"), fpr_limit=0.3)
    for batch in engine.predict(model, datamodule=folder(category)):
        batch.anomaly_map = model.model.scores(batch.image).anomaly_map[:, :, :24]
        batch.gt_mask = batch.gt_mask[:, :, :24] if batch.gt_mask is not None else torch.zeros(len(batch), 48, 24)
        plain.update(batch)
    assert figures["pixel_AUPRO"] == pytest.approx(float(plain.compute()), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("ClipAdSdpPlus", {}),
        ("ClipAdSdp", {"image_size": [56, 90], "tile_size": [32, 40], "k_shot": 2, "reference_layers": [2]}),
    ],
)
def test_a_checkpoint_and_an_exported_file_keep_the_region(
    kind: str, arguments: dict, small_clip: str, category: Path, tmp_path: Path
) -> None:
    mask = inside_box((24, 24), [0.2, 0.0, 0.8, 0.7])
    region = write_mask(tmp_path / "region.png", mask)
    model = build_model(kind, small_clip, tmp_path, region=Path(region), visualizer=False, **arguments)
    model = OnceToOnnx()(model)  # its exports to OpenVINO begin with the same file
    engine = new_engine(tmp_path)
    engine.test(model, datamodule=folder(category), verbose=False)
    images = torch.rand(3, 3, 60, 80)
    expected = model.eval()(images)
    size = model.model.image_size
    rows, columns = (((np.arange(side) + 0.5) * 24 / side).astype(int) for side in size)
    outside = torch.from_numpy(~mask[rows][:, columns])
    assert not expected.anomaly_map[:, outside].any()
    again = type(model).load_from_checkpoint(weights(engine, "model.ckpt"), backbone=small_clip).eval()(images)
    path = model.to_onnx(tmp_path)  # which OpenVINO reads, too
    files = [read(path, images.numpy()) for read in (run_onnx, run_openvino)]
    for name in ("pred_score", "anomaly_map"):
        wanted = getattr(expected, name).detach()
        torch.testing.assert_close(getattr(again, name).detach(), wanted, atol=1e-6, rtol=0)
        for found in files:
            assert np.abs(found[name].squeeze() - wanted.numpy()).max() < 1e-4
    kinds = {CompressionType.INT8: None, CompressionType.INT8_PTQ: folder(category)}  # the latter not with tiles
    wanted = expected.anomaly_map.detach().numpy()[:, ~outside]
    for eight, data in list(kinds.items())[: 1 if arguments else 2]:
        path = model.to_openvino(tmp_path / eight.value, compression_type=eight, datamodule=data)
        files.append(run_openvino(path, images.numpy()))
        inside = files[-1]["anomaly_map"].reshape(3, *size)[:, ~outside.numpy()]
        if eight == CompressionType.INT8:
            assert np.abs(inside - wanted).max() < 0.03
        assert np.corrcoef(inside.ravel(), wanted.ravel())[0, 1] > 0.8
    for found in files:
        for name in ("anomaly_map", "pred_mask"):
            assert not found[name].reshape(3, *size)[:, outside.numpy()].any()


def test_each_class_looks_inside_only(small_clip: str, mixed: Path, tmp_path: Path) -> None:
    """Scores, masks and thresholds of several products are those of each one alone, with the same region."""
    region = [0.0, 0.0, 0.6, 1.0]
    model = ClipAdSdp(FOLDERS, small_clip, region=region, **BARE)
    found = run(model, mixed, tmp_path / "both")
    thresholds = model.post_processor.of_class.values[:, [2, 5]]
    for number, (part, name) in enumerate(FOLDERS.items()):
        paths = {str(mixed / path) for path in found if Path(path).parent.name == part}
        alone = ClipAdSdp(name, small_clip, region=region, **BARE)
        for path, one in run(alone, only(mixed, paths, tmp_path / name), tmp_path / f"of {name}").items():
            same(found[path], one)
            assert not found[path]["anomaly_map"][:, 19:].any()
        limits = [float(getattr(alone.post_processor, f"{level}_threshold")) for level in ("image", "pixel")]
        assert thresholds[number].tolist() == pytest.approx(limits, abs=ROUNDING)
    assert len(set(thresholds[:, 1].tolist())) == 2


def test_a_checkpoint_of_another_region_is_refused(small_clip: str, category: Path, tmp_path: Path) -> None:
    engine = new_engine(tmp_path)
    engine.test(ClipAdSdp(backbone=small_clip, region=BOX, visualizer=False), datamodule=folder(category))
    for region in (None, [0.0, 0.0, 0.5, 1.0]):
        with pytest.raises(InputError, match="does not fit this model: region was"):
            ClipAdSdp.load_from_checkpoint(weights(engine, "model.ckpt"), region=region)


def test_the_command_takes_boxes_and_masks_and_pictures_show_them(
    anomalib: Callable[..., CompletedProcess], small_clip: str, image_folder: Path, tmp_path: Path
) -> None:
    mask = write_mask(tmp_path / "mask.png", inside_box((40, 60), [0.0, 0.0, 0.5, 1.0]))
    (image_folder / "b.jpg").unlink()
    pictures = []
    for region in (mask, "[[0, 0, 0.5, 1]]", "[0, 0, 0.5, 1]", None):
        given = () if region is None else ("--model.region", region)
        done = anomalib(
            *("predict", "--model", "ClipAdSdp", "--model.class_name", "nut", "--model.backbone", small_clip),
            *("--data", str(image_folder), *given),
        )
        assert done.returncode == 0, done.stderr
        (picture,) = sorted((tmp_path / "results/ClipAdSdp/latest/predict/latest/images").glob("*.png"))
        pictures.append(pixels_of(Image.open(picture)))
    assert np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[0], pictures[2])
    shown, whole = (picture[:, 14:314] for picture in (pictures[0], pictures[3]))  # the panel of the image
    image = np.asarray(Image.open(image_folder / "a.png").convert("RGB")).repeat(5, axis=0).repeat(5, axis=1)
    (top,) = [y for y in range(len(whole) - 200) if np.array_equal(whole[y : y + 200], image)][:1]
    found = [y for y in range(len(shown) - 200) if np.array_equal(shown[y : y + 200, :150], image[:, :150])]
    assert found == [top]
    assert (shown[top : top + 200, 150:] > image[:, 150:]).mean() > 0.95  # paler


def test_sdp_plus_is_not_trained_on_a_region(small_clip: str, auxiliary_root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train without region"):
        new_engine(tmp_path, max_epochs=1).fit(
            ClipAdSdpPlus(backbone=small_clip, region=BOX), datamodule=auxiliary(auxiliary_root)
        )


WRONG: list[tuple[object, str]] = [
    ("missing.png", "does not exist"),
    ("text.png", "cannot be read as a picture"),
    ("black.png", "no pixel of the mask is white"),
    ([], "leaves nothing"),
    ([[0.5, 0.5, 0.5, 1.0]], "left before right"),
    ([[0.0, 0.0, 1.2, 1.0]], "fractions from 0 to 1"),
    ([[-0.1, 0.0, 1.0, 1.0]], "fractions from 0 to 1"),
    ([[0.0, 0.0, float("nan"), 1.0]], "fractions from 0 to 1"),
    ([[0.0, 0.0, 1.0]], "must be \\[left, top, right, bottom\\]"),
    ([0.0, 1.0], "must be \\[left, top, right, bottom\\]"),
    (["mask.png"], "must be \\[left, top, right, bottom\\]"),
    (7, "must be \\[left, top, right, bottom\\]"),
    (True, "must be \\[left, top, right, bottom\\]"),
    ([[0.5, 0.5, 0.501, 0.501]], "leaves nothing of pictures of 32 x 32 pixels"),
]


@pytest.mark.parametrize(("region", "words"), WRONG, ids=[words[:20] for _, words in WRONG])
def test_a_region_that_cannot_be_used_is_named_in_a_sentence(
    region: object, words: str, small_clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("no picture")
    write_mask(Path("black.png"), np.zeros((4, 4), dtype=bool))
    with pytest.raises(InputError, match=words):
        ClipAdSdp(backbone=small_clip, region=region)


@pytest.mark.parametrize("of", ["last", "reference", "none"])
def test_a_picture_of_another_shape_than_the_mask_is_named_before_any_is_scored(
    of: str, small_clip: str, tmp_path: Path
) -> None:
    """Of the same shape it may be larger or smaller: the mask follows."""
    pictures, references = tmp_path / "pictures", tmp_path / "references"
    for root, last in ((pictures, "last"), (references, "reference")):
        root.mkdir()
        for name, size in (("a.png", (60, 40)), ("b.png", (121, 80)), ("c.png", (50, 50) if of == last else (30, 20))):
            Image.new("RGB", size).save(root / name)
    (pictures / "broken.png").write_text("no picture")
    region = write_mask(tmp_path / "region.png", inside_box((400, 600), [0.0, 0.0, 0.5, 1.0]))
    model = ClipAdSdp("nut", small_clip, region=region, few_shot_source=references)
    if of == "none":
        batches = new_engine(tmp_path).predict(model, data_path=pictures)
        assert len(batches) == 3
        assert all(torch.equal(batch.region, batches[0].region) for batch in batches)
        return
    wrong = {"last": pictures, "reference": references}[of] / "c.png"
    with pytest.raises(
        InputError, match=f"is a mask of 400 x 600 pixels, and {wrong} has 50 x 50, .* keep pictures of"
    ):
        new_engine(tmp_path).predict(model, data_path=pictures)
    assert not list(tmp_path.rglob("predictions.csv"))


def test_a_mask_follows_the_automatic_size(small_clip: str, tmp_path: Path) -> None:
    folder_of_wide = tmp_path / "wide"
    folder_of_wide.mkdir()
    Image.new("RGB", (120, 40)).save(folder_of_wide / "a.png")
    inside = inside_box((40, 120), [0.5, 0.0, 1.0, 1.0])
    model = ClipAdSdp("nut", small_clip, image_size="auto", region=write_mask(tmp_path / "region.png", inside))
    (batch,) = new_engine(tmp_path).predict(model, data_path=folder_of_wide)
    height, width = model.model.image_size
    assert width > height
    assert torch.equal(batch.region[0], torch.from_numpy(inside_box((height, width), [0.5, 0.0, 1.0, 1.0])))
