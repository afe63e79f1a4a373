"""The pictures of test and predict: a fixed scale, the image's own shape, nothing cut off, nothing overwritten."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.visualization import ImageVisualizer
from PIL import Image

from anomalib_clipad import ClipAdSdp, InputError
from anomalib_clipad.data.verdict import Verdict
from anomalib_clipad.engine.run_folder import _new_folder
from anomalib_clipad.engine.table import NAME
from anomalib_clipad.engine.visualizer import ClipAdVisualizer
from anomalib_clipad.pictures.heatmap import GROUND_TRUTH, outline
from anomalib_clipad.pictures.inspection import BADGES
from anomalib_clipad.pictures.names import LONGEST, PictureNames

from .conftest import files, folder, limited_files, new_engine, pixels_of

GREY = Image.new("RGB", (400, 300), (120, 120, 120))
BAD = Verdict("line/nut.png", "nut", score=0.83, threshold=0.5, label=True, p_value=0.04, truth=False)


def beside_the_page(root: Path) -> list[str]:
    """Files of a run but for those of its page."""
    return [name for name in files(root) if "report.html" not in name and "report_files" not in name]


def test_pictures_of_two_runs_and_of_two_folders_stay_apart(
    small_clip: str, category: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    engine, model = new_engine(tmp_path), ClipAdSdp("cup", small_clip)
    with caplog.at_level("INFO", "anomalib_clipad"):
        first = engine.predict(model, data_path=category / "test")
    assert f"Results in results/ClipAdSdp/v0/predict/v0: {NAME}, images, report.html." in caplog.text
    engine.predict(model, data_path=category / "test/good")
    engine.test(model, datamodule=folder(category), verbose=False)
    runs = Path(engine.trainer.default_root_dir)
    names = [f"images/{path.relative_to(category / 'test')}" for path in (category / "test").rglob("*.png")]
    assert [name for name in beside_the_page(runs / "predict/v0") if name != NAME] == sorted(names)
    assert len(beside_the_page(runs / "predict/v1/images")) == 5
    assert sorted(beside_the_page(runs / "test/v0")) == sorted([*names, NAME])
    table = pd.read_csv(runs / "predict/v0" / NAME)
    assert list(table.picture) == [batch.picture[0] for batch in first]
    for row in table.itertuples():
        assert row.path.endswith(row.picture.removeprefix("images/"))


def test_no_two_images_have_one_picture() -> None:
    long = [f"a/{'x' * 120}{number}{'y' * 120}.png" for number in range(9)]
    paths = ["a/1.png", "a/1.jpg", "b/1.png", "a/1.png.jpg", "a/1?.png", "a/1*.png", "a/1\n.png", *long, "a/\udc80.png"]
    for part in (paths, paths[2:]):
        pictures = [PictureNames(part)(path) for path in part]
        assert len(set(map(str, pictures))) == len(part)
        assert all(len(piece.encode()) <= LONGEST + 20 for picture in pictures for piece in picture.parts)
        assert not any(set(str(picture)) & set('<>:"|?*\\\n') for picture in pictures)
    others = {str(PictureNames([])(path)) for path in paths}
    assert len(others) == len(paths)
    assert not any(name.startswith(("/", "..")) for name in others)


def test_images_whose_names_differ_in_case_alone_have_pictures_where_case_does_not_count() -> None:
    paths = ["a/1.png", "a/1.PNG", "A/1.png", "a/2.jpg", "a/2.JPEG", "B/1.png"]
    names = PictureNames(paths)
    assert len({str(names(path)).casefold() for path in paths}) == len(paths)
    assert str(names("B/1.png")) == "B/1.png.png"  # which no other is like
    assert str(PictureNames(["a/1.png", "B/1.png"])("B/1.png")) == "B/1.png"


def test_runs_that_begin_at_once_have_a_folder_each(tmp_path: Path) -> None:
    made: list[Path] = []
    ready = threading.Barrier(4)

    def begin() -> None:
        ready.wait()
        made.append(_new_folder(tmp_path / "predict"))

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 4


def test_a_picture_shows_score_and_verdict_of_its_image(small_clip: str, category: Path, tmp_path: Path) -> None:
    engine = new_engine(tmp_path)
    batches = engine.predict(ClipAdSdp(backbone=small_clip), datamodule=folder(category, eval_batch_size=4))
    runs = Path(engine.trainer.default_root_dir)
    labels = []
    for item in (item for batch in batches for item in batch.items):
        picture = pixels_of(Image.open(runs / "predict/v0" / item.picture))
        counts = {word: (picture == colour).all(axis=-1).sum() for word, colour in BADGES.items()}
        assert max(counts, key=counts.get) == ("anomalous" if item.pred_label else "normal")
        labels.append(bool(item.pred_label))
        assert ((picture == GROUND_TRUTH).all(axis=-1).sum() > 50) == bool(item.gt_label)
    assert set(labels) == {True, False}


def test_without_a_post_processor_there_is_a_picture_and_no_verdict(
    small_clip: str, image_folder: Path, tmp_path: Path
) -> None:
    engine = new_engine(tmp_path)
    batches = engine.predict(ClipAdSdp("cup", small_clip, post_processor=False), data_path=image_folder)
    picture = pixels_of(Image.open(Path(engine.trainer.default_root_dir) / "predict/v0" / batches[0].picture[0]))
    assert not any((picture == colour).all(axis=-1).any() for colour in BADGES.values())


def test_an_image_that_is_gone_is_drawn_as_the_model_saw_it(
    small_clip: str, image_folder: Path, tmp_path: Path
) -> None:
    class Vanishing(ClipAdSdp):
        def predict_step(self, batch: object, *arguments: object, **others: object) -> object:
            for path in batch.image_path:
                Path(path).unlink()
            return super().predict_step(batch, *arguments, **others)

    Image.new("RGB", (40, 40), (250, 120, 0)).save(image_folder / "a.png")
    engine = new_engine(tmp_path)
    engine.predict(Vanishing("cup", small_clip), data_path=image_folder / "a.png")
    picture = pixels_of(Image.open(Path(engine.trainer.default_root_dir) / "predict/v0/images/a.png"))
    assert (np.abs(picture - (250, 120, 0)).max(axis=-1) <= 2).sum() > 300 * 300


def test_a_full_disk_while_drawing_is_one_sentence_and_leaves_whole_pictures(small_clip: str, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (300, 300), "grey").save(photos / "0.png")
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photos / "1.png")
    engine, model = new_engine(tmp_path), ClipAdSdp("cup", small_clip)
    model.choose_class("cup")
    with limited_files(200_000), pytest.raises(InputError, match="1.png cannot be written .*; what was written stays"):
        engine.predict(model, data_path=photos)
    run = Path(engine.trainer.default_root_dir) / "predict/v0"
    assert beside_the_page(run) == ["images/0.png", NAME]
    Image.open(run / "images/0.png").load()
    assert len(pd.read_csv(run / NAME)) == 1
    assert not [callback for callback in engine.trainer.callbacks if isinstance(callback, ClipAdVisualizer)]


def test_a_folder_that_cannot_be_made_is_one_sentence(small_clip: str, image_folder: Path, tmp_path: Path) -> None:
    engine = new_engine(tmp_path)
    (tmp_path / "results/ClipAdSdp/latest").mkdir(parents=True)
    (tmp_path / "results/ClipAdSdp/latest/predict").write_text("a file")
    with pytest.raises(InputError, match="predict cannot be written .*set default_root_dir to another folder"):
        engine.predict(ClipAdSdp("cup", small_clip), data_path=image_folder)


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        (["false"], ["predict/v0/predictions.csv"]),
        (["ImageVisualizer"], ["images/pictures/a.png", "images/pictures/b.jpg", "predict/v0/predictions.csv"]),
        (
            ["ClipAdVisualizer", "--model.visualizer.longest_side", "100"],
            ["predict/v0/images/a.png", "predict/v0/images/b.png", "predict/v0/predictions.csv"],
        ),
    ],
)
def test_the_command_turns_pictures_off_and_takes_another_visualizer(
    way: list[str], expected: list[str], small_clip: str, image_folder: Path, tmp_path: Path, anomalib: Callable
) -> None:
    model = ["--model", "ClipAdSdp", "--model.backbone", small_clip, "--model.class_name", "cup"]
    done = anomalib("predict", *model, "--data", image_folder, "--model.visualizer", *way)
    assert done.returncode == 0, done.stderr[-3000:]
    results = next((tmp_path / "results").rglob("predict")).parent
    assert [name for name in beside_the_page(results) if name != "config.yaml"] == expected


def test_models_of_others_draw_with_our_visualizer(category: Path, tmp_path: Path) -> None:
    from anomalib.models import Padim

    torch.manual_seed(0)
    model = Padim(
        backbone="resnet18", layers=["layer1"], pre_trained=False, n_features=10, visualizer=ClipAdVisualizer()
    )
    engine = new_engine(tmp_path)
    engine.fit(model, datamodule=folder(category))
    engine.test(model, datamodule=folder(category), verbose=False)
    assert len(beside_the_page(Path(engine.trainer.default_root_dir) / "images")) == 11


def test_the_next_model_on_an_engine_draws_with_its_own(small_clip: str, image_folder: Path, tmp_path: Path) -> None:
    engine = new_engine(tmp_path)
    engine.predict(ClipAdSdp("cup", small_clip), data_path=image_folder)
    engine.predict(ClipAdSdp("cup", small_clip, visualizer=ImageVisualizer()), data_path=image_folder)
    results = Path(engine.trainer.default_root_dir)
    assert beside_the_page(results / "predict/v1") == [NAME]
    assert beside_the_page(results / "images") == ["pictures/a.png", "pictures/b.jpg"]


def test_a_side_that_is_not_positive_is_refused() -> None:
    with pytest.raises(InputError, match="longest_side must be positive, got 0"):
        ClipAdVisualizer(longest_side=0)


def test_threads_change_no_picture(
    small_clip: str, category: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    files = []
    for threads in (1, 4):
        monkeypatch.setattr("anomalib_clipad.engine.scored_batches.MOST_THREADS", threads)
        engine = new_engine(tmp_path / str(threads))
        engine.predict(ClipAdSdp("widget", backbone=small_clip), datamodule=folder(category))
        root = Path(engine.trainer.default_root_dir)
        pictures = [path for ending in ("png", "jpg") for path in sorted(root.rglob(f"*.{ending}"))]
        files.append({path.relative_to(root): path.read_bytes() for path in pictures})
    assert len(files[0]) == 3 * 11, "picture, thumbnail and heatmap of each image"
    assert files[0] == files[1]


@pytest.mark.parametrize("place", range(90, 100))
def test_a_thin_mask_keeps_its_outline_where_it_is_reduced(place: int) -> None:
    mask = np.zeros((960, 1440), dtype=bool)
    mask[place, 100:900] = mask[100:800, place] = True
    drawn = np.asarray(outline(Image.new("RGB", (512, 341), "white"), mask, (255, 0, 0)))
    red = (drawn == (255, 0, 0)).all(axis=-1)
    assert red[:, 40:300].any(axis=0).all(), "a line without a gap"
    assert red[40:280].any(axis=1).all()
    assert red.sum(axis=0)[60:300].max() <= 2, "and no wider than it must be"


def test_a_folder_called_like_a_picture_is_not_in_its_way() -> None:
    names = PictureNames(["photos/a.jpg", "photos/a.png/1.jpg", "photos/B.PNG/1.jpg", "photos/b.jpg"])
    found = [str(names(path)) for path in ("photos/a.jpg", "photos/a.png/1.jpg", "photos/b.jpg")]
    assert found[1] == "a.png/1.png"
    assert found[0].startswith("a-")
    assert found[2].startswith("b-")
