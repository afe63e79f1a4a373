"""The table that test and predict leave: a row an image, written as it comes."""

import errno
import logging
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from lightning.pytorch import Callback
from PIL import Image

from anomalib_clipad import ClipAdSdp, InputError
from anomalib_clipad.engine.table import COLUMNS, NAME, largest_box

from .commands import run_in_process
from .conftest import ANOMALIB, folder, limited_files, new_engine, start_command, write_category

BARE = {"visualizer": False}


def table_of(engine: object, run: str = "predict/v0") -> pd.DataFrame:
    return pd.read_csv(Path(engine.trainer.default_root_dir) / run / NAME)


def test_a_row_says_what_the_batch_says(small_clip: str, category: Path, tmp_path: Path) -> None:
    engine = new_engine(tmp_path)
    model = ClipAdSdp(backbone=small_clip, k_shot=2, **BARE)
    batches = engine.predict(model, datamodule=folder(category, eval_batch_size=4))
    table = table_of(engine)
    assert tuple(table.columns) == COLUMNS
    items = [item for batch in batches for item in batch.items]
    assert list(table.path) == [item.image_path for item in items]
    assert set(table["class"]) == {"widget"}
    assert (table.threshold == 0.5).all()
    for row, item in zip(table.itertuples(), items, strict=True):
        assert row.score == pytest.approx(item.pred_score.item(), rel=1e-5)
        assert row.p_value == pytest.approx(item.p_value.item(), rel=1e-5)
        assert row.label == ("anomalous" if item.pred_label else "normal")
        assert row.true_label == ("anomalous" if "square" in row.path else "normal")
        assert row.marked_area == pytest.approx(item.pred_mask.float().mean().item(), abs=1e-6)
        if item.pred_mask.any():
            rows, columns = np.nonzero(item.pred_mask.numpy())
            assert columns.min() / 32 - 1e-4 <= row.box_left < row.box_right <= (columns.max() + 1) / 32 + 1e-4
            assert rows.min() / 32 - 1e-4 <= row.box_top < row.box_bottom <= (rows.max() + 1) / 32 + 1e-4
        else:
            assert np.isnan(row.box_left)


def test_pictures_of_an_earlier_run_among_the_images_are_said(
    small_clip: str, category: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = tmp_path / "photos"
    for name in ("a", "images/b"):  # a folder of this name alone says nothing
        (photos / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(category / "test/good/000.png", photos / f"{name}.png")
    model = ClipAdSdp("cup", small_clip)
    for drawn in (0, 6):  # a picture of each, its thumbnail and its heatmap
        caplog.clear()
        engine = new_engine(photos / "results")
        engine.predict(model, data_path=photos)
        assert len(table_of(engine, "predict/latest")) == 2 + drawn
        assert ("6 of the 8 images are pictures that an earlier run has drawn" in caplog.text) is bool(drawn)


def test_predicted_images_have_no_true_label(small_clip: str, category: Path, tmp_path: Path) -> None:
    engine = new_engine(tmp_path)
    engine.predict(ClipAdSdp("cup", small_clip, **BARE), data_path=category / "test/good")
    table = table_of(engine)
    assert len(table) == 5
    assert table.true_label.isna().all()
    assert table.p_value.isna().all()


def test_the_largest_of_several_regions_has_the_box() -> None:
    mask = np.zeros((10, 20), dtype=bool)
    mask[0, :5] = True  # five pixels
    mask[4:7, 10:12] = True  # six
    mask[7, 12] = True  # touches at a corner
    assert largest_box(mask) == (0.5, 0.4, 0.65, 0.8)
    assert largest_box(np.zeros((3, 3), dtype=bool)) == ()


def test_the_end_of_a_run_says_how_many_and_what_was_skipped(
    small_clip: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_category(tmp_path / "widget", normal=4, broken=3)
    (root / "test/good/001.png").write_bytes(b"not an image")
    engine = new_engine(tmp_path)
    with caplog.at_level(logging.INFO, "anomalib_clipad"):
        engine.test(ClipAdSdp(backbone=small_clip, **BARE), datamodule=folder(root), verbose=False)
    table = table_of(engine, "test/v0")
    words = (
        f"6 images, {(table.label == 'anomalous').sum()} of them anomalous; 1 skipped: {root / 'test/good/001.png'}."
    )
    assert words in caplog.text
    assert NAME in caplog.text


@pytest.mark.parametrize("limit, skipped", [(2, 1), (1.0, 2)])
def test_images_that_were_not_asked_for_are_not_called_skipped(
    limit: float, skipped: int, small_clip: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(6):
        Image.new("RGB", (40, 40), "grey").save(photos / f"{number}.png")
    for number in (1, 5):
        (photos / f"{number}.png").write_bytes(b"not an image")
    engine = new_engine(tmp_path, limit_predict_batches=limit)
    with caplog.at_level(logging.INFO, "anomalib_clipad"):
        engine.predict(ClipAdSdp("cup", small_clip, **BARE), data_path=photos)
    assert f"; {skipped} skipped: {photos / '1.png'}" in caplog.text
    page = next(tmp_path.rglob("report.html"))
    assert f"are not on the page: {skipped};" in page.read_text()


class Stop(Callback):
    """Interrupts a run in its third batch."""

    def on_predict_batch_start(self, *arguments: object) -> None:
        if arguments[-1] == 2:  # number of the batch
            raise KeyboardInterrupt


def test_an_interrupted_run_says_what_it_leaves_and_where(
    small_clip: str, category: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = new_engine(tmp_path, callbacks=[Stop()])
    with caplog.at_level(logging.INFO, "anomalib_clipad"), pytest.raises(SystemExit):
        engine.predict(ClipAdSdp("cup", small_clip), data_path=category / "test/good", return_predictions=False)
    assert len(table_of(engine)) == 2
    place = Path(engine.trainer.default_root_dir).resolve() / "predict/v0"
    assert "2 images, " in caplog.text
    assert f"when the run ended. Results in {place}: {NAME}, images, report.html." in caplog.text


def test_a_folder_that_cannot_be_written_to_is_one_sentence(
    small_clip: str, image_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file")
    arguments = ["--model", "ClipAdSdp", "--model.backbone", small_clip, "--model.class_name", "cup"]
    place = ["--default_root_dir", tmp_path / "taken", "--data", image_folder]
    done = run_in_process("predict", *arguments, *place, cwd=tmp_path)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'taken'}")
    assert "cannot be written" in last


def test_every_run_keeps_a_table_of_its_own(small_clip: str, category: Path, tmp_path: Path) -> None:
    engine, model = new_engine(tmp_path), ClipAdSdp("cup", small_clip, **BARE)
    for part in ("test/square", "test/good"):
        engine.predict(model, data_path=category / part)
    assert [len(table_of(engine, f"predict/{run}")) for run in ("v0", "v1", "latest")] == [6, 5, 5]


def test_a_run_before_any_training_does_not_stand_in_its_way(small_clip: str, category: Path, tmp_path: Path) -> None:
    for start in ("test", "train", "test"):
        getattr(new_engine(tmp_path), start)(ClipAdSdp("cup", small_clip, **BARE), datamodule=folder(category))
    versions = tmp_path / "results/ClipAdSdp/widget"
    assert sorted(path.name for path in versions.iterdir()) == ["latest", "v0", "v1"]
    tables = sorted(path.relative_to(versions).as_posix() for path in versions.glob("v*/test/v*/predictions.csv"))
    assert tables == [f"{run}/predictions.csv" for run in ("v0/test/v0", "v1/test/v0", "v1/test/v1")]
    assert (versions / "latest/weights/lightning/model.ckpt").samefile(versions / "v1/weights/lightning/model.ckpt")


def test_results_are_kept_where_the_file_system_has_no_links(
    small_clip: str, category: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")  # as on a memory card

    monkeypatch.setattr(os, "symlink", refuse)
    model = ClipAdSdp("cup", small_clip, **BARE)
    for _ in range(2):
        new_engine(tmp_path).test(model, datamodule=folder(category))
    latest = tmp_path / "results/ClipAdSdp/widget/latest"
    assert not latest.is_symlink()
    tables = sorted(path.relative_to(latest).as_posix() for path in latest.rglob("predictions.csv"))
    assert tables == ["test/v0/predictions.csv", "test/v1/predictions.csv"]
    assert sorted(path.name for path in (latest / "test").iterdir()) == ["v0", "v1"]


def test_names_with_commas_quotes_and_line_breaks_stay_whole(small_clip: str, tmp_path: Path) -> None:
    names = ['a,"b".png', "two\nlines.png", "größe.png"]
    (tmp_path / "photos").mkdir()
    for name in names:
        Image.new("RGB", (40, 40), "grey").save(tmp_path / "photos" / name)
    engine = new_engine(tmp_path)
    engine.predict(ClipAdSdp("cup", small_clip, **BARE), data_path=tmp_path / "photos")
    assert {Path(path).name for path in table_of(engine).path} == set(names)


def test_a_full_disk_is_one_sentence_and_leaves_what_was_written(
    small_clip: str, category: Path, tmp_path: Path
) -> None:
    model = ClipAdSdp("cup" * 300, small_clip, **BARE)
    engine = new_engine(tmp_path)
    model.choose_class("cup" * 300)
    with limited_files(3000), pytest.raises(InputError, match="cannot be written .*; what was written stays"):
        engine.predict(model, data_path=category / "test")
    written = (Path(engine.trainer.default_root_dir) / "predict/v0" / NAME).read_text()
    assert written.startswith(",".join(COLUMNS))
    assert written.count("\n") >= 2


def test_scores_that_are_not_a_number_are_in_the_table(small_clip: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.full((40, 40), np.nan, dtype=np.float32)).save(tmp_path / "photos/nan.tiff")
    engine = new_engine(tmp_path)
    engine.predict(ClipAdSdp("cup", small_clip, **BARE), data_path=tmp_path / "photos")
    table = table_of(engine)
    assert table.score.isna().all()
    assert set(table.label) == {"anomalous"}


@pytest.mark.slow
def test_a_killed_run_leaves_the_rows_of_all_images_it_has_scored(small_clip: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(600):
        Image.fromarray(np.full((64, 64, 3), number % 255, dtype=np.uint8)).save(tmp_path / f"photos/{number:03d}.png")
    arguments = ["--model.backbone", small_clip, "--model.class_name", "cup", "--data", "photos"]
    process = start_command(ANOMALIB, "predict", "--model", "ClipAdSdp", *arguments, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        tables = list(tmp_path.rglob(NAME))
        if tables and tables[0].read_text().count("\n") > 20:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, "the run ended before"
    table = pd.read_csv(tables[0])
    assert 20 <= len(table) < 600
    assert table.label.notna().all()


def test_the_trainer_is_left_without_our_callbacks(small_clip: str, category: Path, tmp_path: Path) -> None:
    engine = new_engine(tmp_path)
    engine.predict(ClipAdSdp("cup", small_clip), data_path=category / "test/good")
    ours = [
        callback for callback in engine.trainer.callbacks if type(callback).__module__.startswith("anomalib_clipad")
    ]
    assert not ours


def test_a_run_that_cannot_begin_leaves_no_folder(
    small_clip: str, image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = new_engine(tmp_path)
    model = ClipAdSdp("cup", small_clip, few_shot_source=tmp_path / "gone")
    with pytest.raises(InputError, match="gone does not exist"):
        engine.predict(model, data_path=image_folder)
    assert not list(tmp_path.rglob("predict"))
    assert "images," not in caplog.text
