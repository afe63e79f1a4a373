"""The page of a run: test and predict write it as their images are scored."""

import re
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.engine import Engine
from lightning.pytorch import Callback
from PIL import Image

from anomalib_clipad import ClipAdSdp, InputError
from anomalib_clipad.engine.page import PageWriter
from anomalib_clipad.engine.post_processing import ClipAdPostProcessor
from anomalib_clipad.engine.table import NAME as TABLE
from anomalib_clipad.page import write_thumbnail

from .conftest import folder, limited_files, new_engine, write_category
from .test_page import data_of, paths_of

BARE = {"visualizer": False}


def page_of(engine: Engine) -> Path:
    page, *others = Path(engine.trainer.default_root_dir).rglob("report.html")
    assert page.with_name(TABLE).is_file(), "the page lies beside the table of its run"
    assert not others
    return page


@pytest.mark.parametrize("sensitivity", [0.5, 0.7])
def test_a_test_run_leaves_a_page_that_agrees_with_its_table(
    sensitivity: float, small_clip: str, category: Path, tmp_path: Path
) -> None:
    engine = new_engine(tmp_path)
    post_processor = ClipAdPostProcessor(image_sensitivity=sensitivity)
    model = ClipAdSdp(backbone=small_clip, post_processor=post_processor, **BARE)
    figures = engine.test(model, datamodule=folder(category, eval_batch_size=4), verbose=False)[0]
    page = page_of(engine)
    table = pd.read_csv(page.with_name(TABLE)).set_index("path")
    data = data_of(page)
    assert paths_of(page) == sorted(table.index)
    assert data["models"], data["categories"] == (["ClipAdSdp"], ["widget"])
    assert data["folders"] == ["good", "square"]
    for path, _, group, truth, thumbnail, original, (finding,) in data["images"]:
        row = table.loc[path]
        assert (row.label == "anomalous") == (not finding[0] <= data["threshold"])
        assert (row.true_label == "anomalous") == truth == group
        assert np.clip(finding[0], 0, 1) == pytest.approx(row.score, abs=1e-5)
        assert (page.parent / original).samefile(path)
        sizes = []
        for name in (thumbnail, finding[2]):
            with Image.open(page.parent / name) as picture:
                sizes.append(picture.size)
        assert sizes == [(48, 48), (32, 32)]
    cells = re.findall(r'<td class="number" data-sort="([^"]*)"', page.read_text())
    assert sorted(map(float, cells)) == pytest.approx(sorted(figures.values()))


def test_scores_beyond_the_scale_keep_their_order_on_the_page(small_clip: str, category: Path, tmp_path: Path) -> None:
    engine = new_engine(tmp_path)
    model = ClipAdSdp(backbone=small_clip, k_shot=2, **BARE)  # two normal images make a narrow scale
    batches = engine.predict(model, datamodule=folder(category, val_split_mode="none"))
    raw = {item.image_path: float(item.raw_score) for batch in batches for item in batch.items}
    scores = {image[0]: image[6][0][0] for image in data_of(page_of(engine))["images"]}
    assert pd.read_csv(page_of(engine).with_name(TABLE)).score.max() == 1
    assert max(scores.values()) > 1.5
    assert sorted(raw, key=raw.get) == sorted(scores, key=scores.get)
    low, high = (float(getattr(model.post_processor, f"image_{end}")) for end in ("min", "max"))
    for path, score in scores.items():
        assert score == pytest.approx((raw[path] - (low + high) / 2) / (high - low) + 0.5, abs=1e-4)


def test_images_of_one_name_in_two_folders_have_pictures_of_their_own(small_clip: str, tmp_path: Path) -> None:
    for place, colour in (("left", "white"), ("right", "black")):
        (tmp_path / "photos" / place).mkdir(parents=True)
        Image.new("RGB", (40, 20), colour).save(tmp_path / "photos" / place / "a.png")
    engine = new_engine(tmp_path)
    engine.predict(ClipAdSdp("cup", small_clip, **BARE), data_path=tmp_path / "photos")
    page = page_of(engine)
    left, right = sorted(data_of(page)["images"])
    assert data_of(page)["folders"] == ["left", "right"]
    colours = [np.asarray(Image.open(page.parent / image[4])).mean() for image in (left, right)]
    assert colours == [255, 0]
    assert left[6][0][2] != right[6][0][2]
    assert left[3] is None, "predicted images have no ground truth"


class Stop(Callback):
    """Ends a run in its second batch."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def on_predict_batch_start(self, *arguments: object) -> None:
        if arguments[-1] == 1:  # number of the batch
            raise self.error


@pytest.mark.parametrize("error, ending", [(KeyboardInterrupt, SystemExit), (RuntimeError, RuntimeError)])
def test_an_interrupted_run_leaves_a_page_of_what_it_has_done(
    error: type, ending: type, small_clip: str, category: Path, tmp_path: Path
) -> None:
    engine = new_engine(tmp_path, callbacks=[Stop(error)])
    with pytest.raises(ending):
        engine.predict(
            ClipAdSdp(backbone=small_clip, **BARE),
            datamodule=folder(category, eval_batch_size=4),
            return_predictions=False,
        )
    assert len(paths_of(page_of(engine))) == 4
    assert "the page has the images that were done" in page_of(engine).read_text()


@pytest.mark.parametrize("batches", [1, 2])
def test_thumbnails_of_a_batch_are_made_while_the_next_one_is_scored(
    batches: int, small_clip: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, met = threading.Event(), []

    class Second(Callback):
        def on_predict_batch_start(self, *arguments: object) -> None:
            if arguments[-1] == 1:  # number of the batch
                begun.set()
                if batches == 1:
                    raise KeyboardInterrupt

    def late(*arguments: object) -> str | None:
        met.append(begun.wait(20))
        return write_thumbnail(*arguments)

    monkeypatch.setattr("anomalib_clipad.engine.page.write_thumbnail", late)
    engine = new_engine(tmp_path, callbacks=[Second()])
    with pytest.raises(SystemExit) if batches == 1 else nullcontext():
        engine.predict(ClipAdSdp("cup", small_clip, **BARE), data_path=image_folder, return_predictions=False)
    assert met == [True] * batches
    assert len(paths_of(page_of(engine))) == batches


def test_a_full_disk_is_one_sentence_and_leaves_no_part_of_a_page(
    small_clip: str, image_folder: Path, tmp_path: Path
) -> None:
    engine = new_engine(tmp_path)
    with limited_files(20_000), pytest.raises(InputError, match=r"report\.html cannot be written"):
        engine.predict(ClipAdSdp("cup", small_clip, **BARE), data_path=image_folder)
    where = Path(engine.trainer.default_root_dir)
    assert not [path for path in where.rglob("*") if "report.html" in path.name]
    assert len(pd.read_csv(next(where.rglob(TABLE)))) == 2


def test_the_page_says_what_is_not_on_it(small_clip: str, tmp_path: Path) -> None:
    root = write_category(tmp_path / "widget", normal=4, broken=3)
    (root / "test/good/001.png").write_bytes(b"not an image")
    engine, model = new_engine(tmp_path), ClipAdSdp(backbone=small_clip, **BARE)
    model.page = PageWriter(most_images=5)
    engine.test(model, datamodule=folder(root, eval_batch_size=4), verbose=False)
    words = page_of(engine).read_text()
    assert len(paths_of(page_of(engine))) == 5
    assert "The page has 5 of the 6 images" in words
    assert "could not be read and are not on the page: 1;" in words


def test_a_model_without_a_page_writes_none_and_the_trainer_is_left_without_it(
    small_clip: str, image_folder: Path, tmp_path: Path
) -> None:
    engine, model = new_engine(tmp_path), ClipAdSdp("cup", small_clip, page=False, **BARE)
    engine.predict(model, data_path=image_folder)
    assert not list(tmp_path.rglob("report*"))
    assert list(tmp_path.rglob(TABLE))
    model.page = PageWriter()
    engine.predict(model, data_path=image_folder)
    assert not any(isinstance(callback, PageWriter) for callback in engine.trainer.callbacks)
    assert page_of(engine).is_file()


def test_an_image_that_is_not_finite_is_on_the_page(small_clip: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.full((40, 40), np.nan, dtype=np.float32)).save(tmp_path / "photos/nan.tiff")
    engine = new_engine(tmp_path)
    batches = engine.predict(ClipAdSdp("cup", small_clip, **BARE), data_path=tmp_path / "photos")
    assert torch.isnan(batches[0].pred_score).all()
    (image,) = data_of(page_of(engine))["images"]
    assert image[6][0][0] is None
    assert (page_of(engine).parent / image[4]).is_file()
