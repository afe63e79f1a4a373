"""A region in a comparison: per data set or per model, it cuts what every model is measured on."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torchvision.transforms.v2 import Resize

from anomalib_clipad import InputError
from anomalib_clipad.compare import CompareEvaluator, CompareJob, CompareJobGenerator
from anomalib_clipad.compare.job_files import Kept
from anomalib_clipad.compare.outside import FillOutside, fill_outside
from anomalib_clipad.compare.report import write_report
from anomalib_clipad.components import Region

from .conftest import LAYOUT, folder

LEFT = [0.0, 0.0, 0.5, 1.0]


def test_a_region_of_the_data_is_the_models_and_that_of_the_measurement(
    small_clip: str, category: Path, tmp_path: Path
) -> None:
    more = {"name": "widget", "root": str(category), "val_split_mode": "same_as_test", "num_workers": 0}
    data = {"class_path": "Folder", "init_args": {**LAYOUT, **more}}
    rows = []
    for of_data, of_model in ((LEFT, None), (None, LEFT), (None, None)):
        model = {"class_path": "ClipAdSdp", "init_args": {"backbone": small_clip, "region": of_model}}
        given = data if of_data is None else {**data, "region": of_data}
        job = CompareJob(model, given, None, 0, 32, tmp_path / str(len(rows)), "cpu", ["image_AUROC", "pixel_AP"])
        rows.append(job.run())
        assert "error" not in rows[-1], rows[-1].get("error")
    assert rows[0]["key"] != rows[1]["key"] != rows[2]["key"]
    figures = [tuple(row[name] for name in ("image_AUROC", "pixel_AP")) for row in rows]
    assert figures[0] == figures[1]
    assert figures[2] != figures[0]


def test_a_model_without_a_region_is_measured_inside_that_of_the_data() -> None:
    maps, masks = torch.rand(4, 1, 16, 16), torch.zeros(4, 16, 16, dtype=torch.bool)
    masks[1, 3:9, 2:5] = masks[2, 3:9, 12:15] = True  # the latter outside
    evaluator = CompareEvaluator(16, ["pixel_AUROC", "image_AUROC"], region=Region(LEFT))
    batch = ImageBatch(
        image=torch.zeros(4, 3, 16, 16),
        image_path=list("abcd"),
        anomaly_map=maps,
        pred_score=torch.tensor([0.1, 0.9, 0.2, 0.3]),
        gt_mask=masks,
        gt_label=torch.tensor([0, 1, 1, 0]),
    )
    evaluator._start = 0.0
    evaluator.on_test_batch_end(None, None, None, batch, 0)  # type: ignore[arg-type]  # not looked at
    evaluator.on_test_epoch_end(None, None)  # type: ignore[arg-type]  # likewise
    expected = roc_auc_score(masks[:, :, :8].flatten(), maps[:, 0, :, :8].flatten())
    assert evaluator.figures["pixel_AUROC"] == pytest.approx(expected, abs=1e-6)
    assert evaluator.labels == [0, 1, 0, 0]
    assert evaluator.figures["image_AUROC"] == 1
    assert evaluator.map_limits[0] == (float(maps[0, 0, :, :8].min()), float(maps[0, 0, :, :8].max()))
    assert (evaluator.stream.anomaly_map(0)[:, 8:] < -60_000).all()


def test_a_region_that_cannot_be_used_is_named_before_the_first_job(tmp_path: Path) -> None:
    data = {"class_path": "Folder", "init_args": {"name": "widget", "root": str(tmp_path)}, "region": [0, 0, 2, 1]}
    with pytest.raises(InputError, match="fractions from 0 to 1"):
        CompareJobGenerator("cpu").generate_jobs({"models": ["ClipAdSdp"], "data": [data]})
    with pytest.raises(InputError, match="takes the keys class_path, init_args, name, got region"):
        CompareJobGenerator("cpu").generate_jobs({"models": [{**data, "class_path": "ClipAdSdp"}], "images": "x"})


def test_a_mask_of_another_shape_than_the_pictures_is_one_sentence_for_any_model(
    category: Path, tmp_path: Path
) -> None:
    """Also for a model that knows no region, and is only measured there."""
    Image.new("L", (20, 40), 255).save(tmp_path / "region.png")
    more = {"name": "widget", "root": str(category), "val_split_mode": "same_as_test", "num_workers": 0}
    data = {"class_path": "Folder", "init_args": {**LAYOUT, **more}, "region": str(tmp_path / "region.png")}
    small = {"backbone": "resnet18", "layers": ["layer1"], "pre_trained": False, "n_features": 4}
    model = {"class_path": "Padim", "init_args": small}
    row = CompareJob(model, data, None, 0, 32, tmp_path / "out", "cpu", ["image_AUROC"]).run()
    assert "is a mask of 40 x 20 pixels, and" in row["error"]


def _with_other_outside(source: Path, folder: Path) -> Path:
    """A copy of a data set whose pictures are another one right of the middle; masks stay."""
    generator = np.random.default_rng(0)
    for file in source.rglob("*.png"):
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(file) as opened:
            pixels = np.array(opened)
        if pixels.ndim == 3:
            half = pixels[:, pixels.shape[1] // 2 :]
            half[:] = generator.integers(0, 255, half.shape)
        Image.fromarray(pixels).save(copy)
    return folder


@pytest.mark.parametrize("unlabelled", [False, True])
def test_what_is_outside_has_no_influence_on_a_model_that_knows_no_region(
    unlabelled: bool, category: Path, tmp_path: Path
) -> None:
    """Neither where it is trained nor where it is tried; and its pictures are pale there."""
    small = {"backbone": "resnet18", "layers": ["layer1"], "pre_trained": False, "n_features": 4}
    model = {"class_path": "Padim", "init_args": small}
    figures = []
    for number, root in enumerate((category, _with_other_outside(category, tmp_path / "other"))):
        more = {"name": "widget", "root": str(root), "val_split_mode": "same_as_test", "num_workers": 0}
        data = {"class_path": "Folder", "init_args": {**LAYOUT, **more}, "region": LEFT}
        images = str(root / LAYOUT["abnormal_dir"]) if unlabelled else None
        output = tmp_path / str(number)
        row = CompareJob(model, data, images, 0, 32, output, "cpu", ["image_AUROC", "pixel_AP"]).run()
        assert "error" not in row, row["error"]
        kept = Kept.read(output / "jobs" / f"{row['key']}.json")
        assert kept is not None
        assert kept.region is not None
        assert kept.region[:, :16].all()
        assert not kept.region[:, 16:].any()
        scores = [kept.images[path].score for path in sorted(kept.images)]
        figures.append([*scores, *(row.get(name) for name in ("image_AUROC", "pixel_AP"))])
        write_report(output, [row])
    assert figures[0] == figures[1]
    for file in (tmp_path / "1" / "report_files" / "thumbnails").iterdir():
        with Image.open(file) as thumbnail:
            pixels = np.asarray(thumbnail.convert("L"), dtype=float)
        assert pixels[:, pixels.shape[1] // 2 + 2 :].mean() > 160  # where the noise is 127 on average


def test_pictures_of_every_part_of_the_data_are_filled(category: Path) -> None:
    """Those that set a model's thresholds, too."""
    data = folder(category, val_split_mode="from_test")
    fill_outside(data, FillOutside(Region(LEFT)))
    data.setup()
    for pictures in (data.train_data, data.val_data, data.test_data):
        for item in pictures:
            assert (item.image[..., 24:] == item.image[..., 23:24]).all()
            assert item.image[..., :24].unique().numel() > 10


@pytest.mark.parametrize(("of_model", "size"), [(None, (20, 24)), (Resize((32, 32)), (32, 32))])
def test_a_resize_of_the_data_gives_way_to_that_of_a_model_alone(
    of_model: Resize | None, size: tuple[int, int], category: Path
) -> None:
    data = folder(category, augmentations=Resize((20, 24)))
    data.trainer = SimpleNamespace(model=SimpleNamespace(pre_processor=SimpleNamespace(transform=of_model)))
    fill_outside(data, FillOutside(Region(LEFT)), of_model)
    data.setup()
    assert data.test_data[0].image.shape[1:] == size
