"""What may go wrong around ``anomalib compare``: names, files, signals and configurations."""

import argparse
import json
import logging
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from anomalib_clipad import InputError
from anomalib_clipad.compare import CompareJob, CompareJobGenerator, write_report
from anomalib_clipad.compare.examples import choose_examples, short_names
from anomalib_clipad.compare.job_files import Kept
from anomalib_clipad.compare.memory import AddedMemory
from anomalib_clipad.compare.pipeline import Compare
from anomalib_clipad.compare.screen import interruptible, logging_to
from anomalib_clipad.files import remove_abandoned, slug

from .conftest import limited_files

SDP = {"class_path": "ClipAdSdp", "name": "SDP"}


def generate(**config: object) -> list[CompareJob]:
    return list(CompareJobGenerator("cpu").generate_jobs({"models": SDP, "images": "photos", **config}))


@pytest.fixture
def job(small_clip: str, image_folder: Path, tmp_path: Path) -> CompareJob:
    model = {**SDP, "init_args": {"backbone": small_clip, "class_name": "widget"}}
    return CompareJob(model, None, str(image_folder), 0, 32, tmp_path / "out", "cpu")


def test_every_value_of_a_grid_has_a_row_of_its_own() -> None:
    grid = {"class_path": "ClipAdSdp", "name": "SDP", "init_args": {"rvs": {"grid": ["mean", "kde"]}}}
    assert [job.model_name for job in generate(models=[grid])] == ["SDP rvs=mean", "SDP rvs=kde"]


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="Several models are called SDP; give each"):
        generate(models=[SDP, SDP])
    rows = [{"model": "SDP", "category": "nut", "image_AUROC": value} for value in (0.1, 0.9)]
    with pytest.raises(InputError, match="several rows of SDP on nut"):
        write_report(Path(), rows)


def test_one_model_as_a_text_is_one_model() -> None:
    assert [job.model_name for job in generate(models="ClipAdSdp")] == ["ClipAdSdp"]


def test_categories_of_one_name_in_two_data_sets_have_names_of_their_own() -> None:
    data = [{"class_path": kind, "init_args": {"category": "nut"}} for kind in ("MVTecAD", "Visa")]
    assert [job.category for job in generate(data=data, images=None)] == ["MVTecAD nut", "Visa nut"]


def test_similar_category_names_keep_their_own_pictures(job: CompareJob, tmp_path: Path) -> None:
    row = job.run()
    names = ("metal nut", "metal_nut", "metal-nut")
    write_report(tmp_path / "out", [{**row, "category": name} for name in names])
    assert {path.stem for path in (tmp_path / "out/examples").iterdir()} == {slug(name) for name in names}
    assert len({slug(name) for name in names}) == 3


def test_strange_names_end_nothing(
    job: CompareJob, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    names = ["[/red]", "a" * 300, "$x^$ | \\", "two\nlines", "[red"]
    models = [{**job.model_config, "name": name} for name in names]
    models.append({"class_path": "Nobody", "name": "[/green]"})
    config = {"compare": {"models": models, "images": str(image_folder), "output": str(tmp_path / "many")}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"accelerator": "cpu", **config}))
    with pytest.raises(InputError, match=r"1 of 6 jobs failed: \[/green\] on pictures"):
        Compare().run(argparse.Namespace(config=tmp_path / "c.yaml"))
    shown = capsys.readouterr()
    assert "failed [/green] on pictures" in shown.out + shown.err
    assert (tmp_path / "many/report.md").is_file()
    assert (tmp_path / "many/examples/pictures.png").is_file()


@pytest.mark.parametrize("ending", [".json", ".csv", ".npz"])
def test_a_damaged_job_file_means_that_the_job_runs_again(job: CompareJob, ending: str) -> None:
    row = job.run()
    assert job.result() is not None
    whole = job.file.with_suffix(ending).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    for damaged in (b"", b"{}", b"[1]", b"\xff\x00", whole[: len(whole) // 2], bytes(flipped)):
        job.file.with_suffix(ending).write_bytes(damaged)
        assert job.result() is None
        assert Kept.read(job.file) is None
    assert job.run()["key"] == row["key"]
    assert job.result() is not None


def test_a_job_runs_again_when_what_it_read_has_changed(job: CompareJob, image_folder: Path, tmp_path: Path) -> None:
    job.run()
    assert job.result() is not None
    Image.new("RGB", (30, 30), "red").save(image_folder / "c.png")
    assert job.result() is None
    assert job.run()["images"] == 3
    weights = tmp_path / "adapter.bin"
    weights.write_bytes(b"one")
    job.model_config["init_args"]["adapter"] = str(weights)
    before = job.inputs()
    weights.write_bytes(b"another")
    assert job.inputs() != before


def test_another_version_of_a_package_runs_the_job_again(job: CompareJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job.run()
    monkeypatch.setattr("anomalib_clipad.compare.fingerprint.version", lambda _: "9.9")
    assert job.result() is None


def test_a_full_disk_costs_the_job_only(job: CompareJob) -> None:
    with limited_files(100):
        row = job.run()
    assert "OSError" in row["error"]
    assert job.result() is None
    assert not list(job.file.parent.glob(".*"))
    assert "error" not in job.run()


def test_skipped_images_are_named(job: CompareJob, image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "broken.png").write_bytes(b"no image")
    row = job.run()
    assert row["skipped"] == [str(image_folder / "broken.png")]
    write_report(tmp_path / "out", [row])
    assert "broken.png (SDP)" in (tmp_path / "out/report.md").read_text()


def test_an_unwritable_log_is_said_and_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "compare.log").mkdir()
    with logging_to(tmp_path / "compare.log"):
        logging.getLogger("anomalib_clipad").warning("lost")
    assert "No log is kept" in capsys.readouterr().err


def test_every_line_stands_once_in_the_log(tmp_path: Path) -> None:
    with logging_to(tmp_path / "compare.log"):
        logging.getLogger("anomalib.engine.engine").warning("one line")
    assert (tmp_path / "compare.log").read_text().count("one line") == 1


def test_examples_come_from_every_folder() -> None:
    paths = [f"photos/{folder}/{number:03d}.png" for folder in "abc" for number in range({"a": 90}.get(folder, 2))]
    assert {Path(path).parent.name for path in choose_examples(paths, [None] * len(paths))} == set("abc")
    assert paths[-1] in choose_examples(paths, [None] * len(paths))
    assert short_names(paths)[-1] == "c/001.png"


@pytest.mark.parametrize("earlier_mib", [0, 300])
def test_peak_memory_is_the_jobs_own(earlier_mib: int) -> None:
    np.ones(earlier_mib * 2**17).sum()
    added = AddedMemory("cpu")
    np.ones(100 * 2**17).sum()
    assert math.isnan(added.before) or 95 < added.peak_mib() < 130


def test_old_drafts_are_removed_and_new_ones_are_not(tmp_path: Path) -> None:
    for name, age in ((".old.1.json", 7200), (".new.2.json", 0)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, (tmp_path / name).stat().st_mtime - age))
    remove_abandoned(tmp_path, ".*")
    assert [path.name for path in tmp_path.iterdir()] == [".new.2.json"]


def test_sigterm_ends_with_its_status() -> None:
    with pytest.raises(SystemExit) as ended, interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143


WRONG = [None, 7, -1.5, math.nan, True, "", "\0", [], [None], {1: 2}, {"a": 1}]


@pytest.mark.parametrize("key", ["models", "data", "images", "seed", "map_size", "metrics", "output"])
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_any_value_gives_jobs_or_a_sentence(key: str, value: object) -> None:
    config = {"models": "ClipAdSdp", "images": "photos", key: value}
    as_if_not_given = (value is None and key not in ("models", "images")) or (key == "data" and value == [])
    if as_if_not_given or (key == "seed" and value == 7):
        assert len(CompareJobGenerator("cpu").generate_jobs(config)) == 1
        return
    with pytest.raises(InputError) as refused:
        CompareJobGenerator("cpu").generate_jobs(config)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[1, 2]", "compare: 3", "a: [", "compare: {models: x}\nthreads: 3"])
def test_a_file_that_is_not_a_configuration_is_refused_in_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError) as refused:
        Compare().run(argparse.Namespace(config=tmp_path / "c.yaml"))
    assert "\n" not in str(refused.value)


def test_an_example_keeps_its_true_mask(small_clip: str, category: Path, tmp_path: Path) -> None:
    folders = {"normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/square"}
    more = {"name": "w", "root": str(category), "mask_dir": "ground_truth/square", "num_workers": 0}
    data = {"class_path": "Folder", "init_args": {**folders, **more, "val_split_mode": "same_as_test"}}
    one = CompareJob({**SDP, "init_args": {"backbone": small_clip}}, data, None, 0, 48, tmp_path, "cpu")
    assert "error" not in one.run()
    kept = Kept.read(one.file)
    assert kept is not None
    for path, mask in kept.masks.items():
        marked = category / "ground_truth/square" / f"{Path(path).stem}_mask.png"
        true = np.asarray(Image.open(marked)) > 0 if "square" in path else np.zeros((48, 48))
        np.testing.assert_array_equal(mask, true)
    json.loads(one.file.read_text())
