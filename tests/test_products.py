"""Several products in one run: each image is treated as in a run of its own class alone."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from anomalib.post_processing import PostProcessor
from PIL import Image

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.engine.products import Products
from anomalib_clipad.errors import InputError

from .conftest import ROUNDING, folder, make_clip, new_engine

NAMES = ["plate", "tile"]  # between which the small random CLIP finds pictures of both
FOLDERS = {"b": "plate", "n": "tile"}
BARE = {"visualizer": False, "evaluator": False}
NUMBERS = ("pred_score", "anomaly_map", "p_value")


def write_mixed(root: Path, count: int = 8, size: int = 48) -> Path:
    """Pictures of any colours in the folders ``b`` and ``n`` of each split, a bright square in the anomalous ones."""
    rng = np.random.default_rng(7)
    for split in ("train/good", "test/good", "test/square"):
        for part in FOLDERS:
            (root / split / part).mkdir(parents=True)
            (root / "ground_truth/square" / part).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = rng.integers(20, 200, 3) + rng.integers(-20, 20, (size, size, 3))
                if split == "test/square":
                    y, x = rng.integers(4, size - 20, 2)
                    pixels[y : y + 14, x : x + 14] += 60
                    mask = np.zeros((size, size), dtype=np.uint8)
                    mask[y : y + 14, x : x + 14] = 255
                    Image.fromarray(mask).save(root / f"ground_truth/square/{part}/{number:03d}_mask.png")
                picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                picture.save(root / split / part / f"{number:03d}.png")
    return root


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two products in one data set; not to be written to."""
    return write_mixed(tmp_path_factory.mktemp("mixed") / "line")


def only(root: Path, paths: set[str], where: Path) -> Path:
    """A data set of some of the test images."""
    for path in map(Path, paths):
        inside = path.relative_to(root)
        files = [inside]
        if inside.parts[1] == "square":
            files.append(Path("ground_truth/square") / inside.parts[2] / f"{path.stem}_mask.png")
        for file in files:
            (where / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / file, where / file)
    shutil.copytree(root / "train", where / "train")
    return where


def run(model: ClipAdSdp, root: Path, where: Path, **arguments: object) -> dict[str, dict[str, object]]:
    """What a model says of the test images behind thresholds from the same ones, by path below the root."""
    data, engine = folder(root, **{"eval_batch_size": 5, **arguments}), new_engine(where)
    engine.validate(model, datamodule=data, verbose=False)
    batches = engine.predict(model, dataloaders=data.test_dataloader())
    keys = (*NUMBERS, "pred_label", "pred_mask", "class_name")
    return {
        str(Path(path).relative_to(root)): {
            key: getattr(batch, key)[row] for key in keys if getattr(batch, key) is not None
        }
        for batch in batches
        for row, path in enumerate(batch.image_path)
    }


def same(one: dict, other: dict) -> None:
    """Two answers to one image; batches of another size may take another kernel."""
    assert one.keys() == other.keys()
    for key in (key for key in NUMBERS if key in one):
        torch.testing.assert_close(one[key], other[key], atol=ROUNDING, rtol=0)
    assert bool(one["pred_label"]) == bool(other["pred_label"])
    assert (one["pred_mask"] != other["pred_mask"]).float().mean() < 0.002
    assert one["class_name"] == other["class_name"]


@pytest.fixture(scope="module")
def listed(small_clip: str, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ClipAdSdp, dict]:
    """A run with a list of names; both are found."""
    model = ClipAdSdp(NAMES, small_clip, **BARE)
    found = run(model, mixed, tmp_path_factory.mktemp("listed"))
    for name in NAMES:
        assert sum(one["class_name"] == name and "/good/" in path for path, one in found.items()) >= 3
    return model, found


def test_each_image_is_treated_as_in_a_run_of_its_class_alone(
    small_clip: str, mixed: Path, listed: tuple[ClipAdSdp, dict], tmp_path: Path
) -> None:
    model, found = listed
    for number, name in enumerate(NAMES):
        paths = {str(mixed / path) for path, one in found.items() if one["class_name"] == name}
        alone = ClipAdSdp(name, small_clip, **BARE)
        expected = run(alone, only(mixed, paths, tmp_path / name), tmp_path / f"of {name}")
        assert len(expected) == len(paths)
        for path, one in expected.items():
            same(found[path], one)
        ours = model.post_processor.of_class.values[number]
        torch.testing.assert_close(ours, alone.post_processor._values(), atol=ROUNDING, rtol=0)
    assert not torch.equal(*model.post_processor.of_class.values)


def test_a_folder_says_the_class(small_clip: str, mixed: Path, tmp_path: Path) -> None:
    found = run(ClipAdSdp(FOLDERS, small_clip, **BARE), mixed, tmp_path / "mapped")
    for part, name in FOLDERS.items():
        of_part = {path: one for path, one in found.items() if f"/{part}/" in path}
        assert {one["class_name"] for one in of_part.values()} == {name}
        where = only(mixed, {str(mixed / path) for path in of_part}, tmp_path / part)
        expected = run(ClipAdSdp(name, small_clip, **BARE), where, tmp_path / f"of {part}")
        assert len(expected) == 16
        for path, one in expected.items():
            same(found[path], one)


def test_order_and_batch_size_change_nothing(
    small_clip: str, mixed: Path, listed: tuple[ClipAdSdp, dict], tmp_path: Path
) -> None:
    """Neither those of the images nor that of the names."""
    other = run(
        ClipAdSdp(NAMES[::-1], small_clip, **BARE), mixed, tmp_path, eval_batch_size=3, normal_test_dir="test/good"
    )
    for path, one in listed[1].items():
        same(one, other[path])


def test_the_choice_is_the_nearest_mean_of_all_prompts(mixed: Path, listed: tuple[ClipAdSdp, dict]) -> None:
    """By the equation, in float64, from the CLIP's own image and text features."""
    clip = make_clip()
    model, found = listed
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    means = []
    for name in NAMES:
        prompts = [prompt for state in model.model.prompts.prompts(name) for prompt in state]
        with torch.no_grad():
            vectors = clip.encode_text(tokenizer(prompts)).double()
        mean = (vectors / vectors.norm(dim=1, keepdim=True)).sum(dim=0)
        means.append(mean / mean.norm())
    for path, one in found.items():
        picture = torch.from_numpy(np.array(Image.open(mixed / path))).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            image = clip.encode_image(model.pre_processor(picture)).double()[0]
        cosines = [float(image @ mean / image.norm()) for mean in means]
        assert one["class_name"] == NAMES[int(np.argmax(cosines))]


@pytest.mark.parametrize("class_name", [["plate"], {"b": "plate", "n": "plate"}])
def test_one_class_in_a_list_is_the_class_to_the_last_bit(
    small_clip: str, mixed: Path, tmp_path: Path, class_name: object
) -> None:
    one, other = (
        run(ClipAdSdp(name, small_clip, **BARE), mixed, tmp_path / where)
        for where, name in (("list", class_name), ("name", "plate"))
    )
    for path in other:
        assert all(torch.equal(one[path][key], other[path][key]) for key in (*NUMBERS[:2], "pred_label", "pred_mask"))


def test_a_class_with_few_images_says_so_and_takes_the_thresholds_of_all(
    small_clip: str, mixed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As one run over all images has them, each scored with its own class's text vectors."""
    root = only(mixed, {str(path) for path in (mixed / "test").rglob("*.png")}, tmp_path / "few")
    for number in range(1, 8):
        (root / f"test/good/n/{number:03d}.png").unlink()
    model = ClipAdSdp(FOLDERS, small_clip, **BARE)
    run(model, root, tmp_path / "run")
    assert "'tile' has 1 normal image, and thresholds of its own take 3; it has those of all" in caplog.text
    assert "'plate' has" not in caplog.text
    assert torch.equal(model.post_processor.of_class.values[1], model.post_processor._values())
    assert not torch.equal(model.post_processor.of_class.values[0], model.post_processor._values())


def test_thresholds_return_with_the_classes(listed: tuple[ClipAdSdp, dict]) -> None:
    model, _ = listed
    before = model.post_processor.of_class.values.clone()
    model.choose_class("plate")
    assert not model.post_processor.of_class.known
    assert model.post_processor.image_threshold.isnan()
    assert not model.model.class_choice.ready, "there is nothing to choose from"
    model.choose_class(*NAMES)
    assert torch.equal(model.post_processor.of_class.values, before)
    assert model.model.class_choice.ready


@pytest.mark.parametrize("class_name", [NAMES, FOLDERS])
def test_a_checkpoint_brings_the_classes_back(small_clip: str, mixed: Path, tmp_path: Path, class_name: object) -> None:
    """With their thresholds, the vectors to choose by, and which folder is of which class."""
    model, engine = ClipAdSdp(class_name, small_clip, **BARE), new_engine(tmp_path / "a")
    engine.test(model, datamodule=folder(mixed), verbose=False)
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    before, after = (
        {
            path: (float(batch.pred_score[row]), bool(batch.pred_label[row]), batch.class_name[row])
            for batch in batches
            for row, path in enumerate(batch.image_path)
        }
        for batches in (
            engine.predict(model, data_path=mixed / "test"),
            new_engine(tmp_path / "b").predict(
                ClipAdSdp(backbone=small_clip, **BARE), data_path=mixed / "test", ckpt_path=tmp_path / "model.ckpt"
            ),
        )
    )
    assert before == after
    assert {name for _, _, name in after.values()} == set(NAMES)


@pytest.mark.parametrize(
    ("class_name", "words"),
    [
        ([], "empty list"),
        ({}, "empty mapping"),
        (["nut", "nut"], "'nut' twice"),
        (["nut", " "], "an empty name"),
        (["nut", 3], "got 3"),
        ({"n": ""}, "an empty name"),
        ({"": "nut"}, "the key ''"),
        ({"line/n": "nut"}, "the key 'line/n'"),
        (7, "got 7"),
    ],
)
def test_names_that_cannot_be_used_are_one_sentence(small_clip: str, class_name: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ClipAdSdp(class_name, small_clip)


def test_a_mapping_that_leaves_images_out_is_refused_before_the_first(
    small_clip: str, mixed: Path, image_folder: Path, tmp_path: Path
) -> None:
    model = ClipAdSdp({"b": "plate"}, small_clip, **BARE)
    with pytest.raises(InputError, match=r"no class for .*/good/n/000.png, .* and 13 more; none of their folders is b"):
        new_engine(tmp_path).test(model, datamodule=folder(mixed), verbose=False)
    model = ClipAdSdp(FOLDERS, small_clip, **BARE)
    with pytest.raises(InputError, match="no class for"):
        new_engine(tmp_path).predict(model, data_path=image_folder)
    assert not list(tmp_path.rglob("*.csv"))


def test_a_post_processor_with_one_threshold_is_refused(small_clip: str) -> None:
    with pytest.raises(InputError, match="default post-processor"):
        ClipAdSdp(NAMES, small_clip, post_processor=PostProcessor())


def test_patterns_come_before_folders_and_inner_folders_before_outer_ones() -> None:
    products = Products({"a": "outer", "b": "inner", "a/b/x*": "pattern", "/root/*.jpg": "root"})
    expected = {"/a/b/1.png": "inner", "/b/a/1.png": "outer", "/c/a/b/x1.png": "pattern", "/root/a/1.jpg": "root"}
    assert {path: products.name_of(path) for path in expected} == expected
    assert products.name_of("/c/a.png") is None


@pytest.mark.slow
def test_the_command_takes_a_list_and_a_mapping(
    anomalib: Callable, small_clip: str, mixed: Path, tmp_path: Path
) -> None:
    common = ("--model", "ClipAdSdp", "--model.backbone", small_clip)
    data = ("--data", "Folder", "--data.name", "line", "--data.root", mixed, "--data.num_workers", 0)
    layout = (
        *(
            "--data.normal_dir",
            "train/good",
            "--data.normal_test_dir",
            "test/good",
            "--data.abnormal_dir",
            "test/square",
        ),
        *("--data.mask_dir", "ground_truth/square", "--data.val_split_mode", "same_as_test"),
    )
    tested = anomalib("test", *common, "--model.class_name", "[plate, tile]", *data, *layout)
    assert tested.returncode == 0, tested.stderr
    predicted = anomalib(
        "predict", *common, "--model.class_name", "{b: plate, n: metal nut}", "--data", mixed / "test/good"
    )
    assert predicted.returncode == 0, predicted.stderr
    (of_test,), (of_predict,) = ([*tmp_path.rglob(f"{kind}/v0/predictions.csv")] for kind in ("test", "predict"))
    with of_test.open() as file:
        assert {row["class"] for row in csv.DictReader(file)} == {"plate", "tile"}
    with of_predict.open() as file:
        rows = list(csv.DictReader(file))
    assert all(row["class"] == ("plate" if "/b/" in row["path"] else "metal nut") for row in rows)
    assert len(rows) == 16
