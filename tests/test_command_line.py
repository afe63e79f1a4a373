"""The stock ``anomalib`` command as a user types it, in a process of its own where that proves more."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from anomalib.cli import AnomalibCLI
from PIL import Image

from anomalib_clipad.errors import InputError, one_sentence

from .conftest import ANOMALIB, LAYOUT, ROOT, run_command, run_in_process, write_category

CONFIGS = sorted((ROOT / "configs").glob("sdp*.yaml"))


def folder_arguments(category: Path) -> list[object]:
    keys = {"name": "widget", "root": category, **LAYOUT, "num_workers": 0, "val_split_mode": "same_as_test"}
    return ["--data", "Folder", *(part for key, value in keys.items() for part in (f"--data.{key}", value))]


@pytest.fixture(scope="module")
def tested(small_clip: str, category: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where a test run wrote, and what it printed."""
    root = tmp_path_factory.mktemp("run")
    model = ["--model", "ClipAdSdp", "--model.backbone", small_clip]
    done = run_in_process("test", *model, *folder_arguments(category), cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return root / "results/ClipAdSdp/widget/latest", done.stdout


def test_test_prints_the_seven_metrics_and_draws(tested: tuple[Path, str], category: Path) -> None:
    results, printed = tested
    for name in ("image_AUROC", "image_F1Max", "image_AP", "pixel_AUROC", "pixel_F1Max", "pixel_AP", "pixel_AUPRO"):
        assert re.search(rf"{name}\s*│\s*[01]\.\d+", printed), name
    pictures = list((results / "test/v0/images").rglob("*.png"))
    assert len(pictures) == len(list((category / "test").rglob("*.png")))
    assert Image.open(pictures[0]).size[0] > 3 * 200


def test_test_writes_a_small_checkpoint(tested: tuple[Path, str]) -> None:
    assert (tested[0] / "weights/lightning/model.ckpt").stat().st_size < 1_000_000


def test_predict_from_a_checkpoint_and_without(
    tested: tuple[Path, str], small_clip: str, image_folder: Path, tmp_path: Path, anomalib: Callable
) -> None:
    arguments = ["predict", "--model", "ClipAdSdp", "--model.backbone", small_clip, "--data"]
    checkpoint = tested[0] / "weights/lightning/model.ckpt"
    done = anomalib(*arguments, image_folder / "a.png", "--ckpt_path", checkpoint)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "No class name is known" not in done.stdout + done.stderr
    assert len(list((tmp_path / "results").rglob("a.png"))) == 1
    done = anomalib(*arguments, image_folder, "--model.class_name", "metal nut")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "results").rglob("predict/v1/images/b.png"))) == 1


def test_benchmark_knows_the_short_name(small_clip: str, tmp_path: Path, anomalib: Callable) -> None:
    write_category(tmp_path / "widget")
    data = {"name": "widget", "root": str(tmp_path / "widget"), "num_workers": 0, **LAYOUT}
    config = {
        "accelerator": "cpu",
        "benchmark": {
            "seed": 1,
            "model": {"class_path": "ClipAdSdp", "init_args": {"backbone": small_clip, "class_name": "widget"}},
            "data": {"class_path": "Folder", "init_args": data},
        },
    }
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump(config))
    done = anomalib("benchmark", "--config", tmp_path / "benchmark.yaml")
    table = next((tmp_path / "runs").rglob("results.csv"), None)
    assert table is not None, done.stdout[-2000:] + done.stderr[-2000:]
    assert "pixel_AUPRO" in table.read_text()


BAD_ARGUMENTS = [
    (["--model.rvs", "median"], "rvs method must be one of mean, pca, kde, dbscan, mean_shift, got 'median'"),
    (["--model.backbone", "ViT-Z"], "backbone must be a name from open_clip.list_models"),
    (["--model.class_name", ""], "class_name is empty"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD_ARGUMENTS)
def test_bad_input_is_one_sentence_without_a_stack_trace(
    small_clip: str, image_folder: Path, anomalib: Callable, arguments: list[str], words: str
) -> None:
    model = ["--model", "ClipAdSdp", "--model.backbone", small_clip, *arguments]
    done = anomalib("predict", *model, "--data", image_folder)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_bad_input_ends_the_process_with_the_same_sentence(image_folder: Path, tmp_path: Path) -> None:
    arguments, words = BAD_ARGUMENTS[1]
    done = run_command(ANOMALIB, "predict", "--model", "ClipAdSdp", *arguments, "--data", image_folder, cwd=tmp_path)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@one_sentence()
def interrupted_while_handling_bad_input() -> None:
    try:
        msg = "anything."
        raise InputError(msg)
    except InputError:
        raise SystemExit(130) from None


def test_an_interruption_keeps_its_status_while_bad_input_is_handled() -> None:
    with pytest.raises(SystemExit) as ended:
        interrupted_while_handling_bad_input()
    assert ended.value.code == 130


def test_help_lists_every_argument_with_its_meaning(anomalib: Callable) -> None:
    done = anomalib("test", "--model.help", "ClipAdSdp")
    text = re.sub(r"\s+", " ", done.stdout)
    for argument, meaning in {
        "class_name": "What the images show",
        "backbone": "CLIP architecture",
        "pretrained": "Weights of the backbone",
        "layers": "Blocks of the vision tower",
        "rvs": "How one text vector is chosen",
        "prompts": "Prompt ensemble",
        "image_size": "Side of the input in pixels",
        "sigma": "Standard deviation, in pixels",
    }.items():
        # Older versions of jsonargparse name them after the class.
        assert re.search(rf"--model\.(init_args\.)?{argument} \S+.*?{meaning}", text), argument


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses(config: Path) -> None:
    cli = AnomalibCLI.__new__(AnomalibCLI)  # its constructor would go on to build what it parsed
    cli.parser = cli.init_parser()
    cli.subcommand_parsers, cli.subcommand_method_arguments = {}, {}
    cli.add_subcommands()
    subcommand = "fit" if "train" in config.stem else "test"
    parsed = cli.parser.parse_args([subcommand, "--config", str(config)])[subcommand]
    assert parsed.model.class_path.split(".")[-1] == ("ClipAdSdpPlus" if "plus" in config.stem else "ClipAdSdp")
    assert parsed.data.class_path


def test_there_are_configs() -> None:
    assert {"sdp_mvtec", "sdp_visa", "sdp_folder", "sdp_plus_train_visa", "sdp_plus_train_mvtec"} <= {
        path.stem for path in CONFIGS
    }


def test_sdp_plus_is_trained_tested_and_used(
    small_clip: str, category: Path, image_folder: Path, tmp_path: Path, anomalib: Callable
) -> None:
    """Fit from a file, resume, test from the checkpoint and from the layers, predict."""
    for name in ("gear", "plate"):
        write_category(tmp_path / "mvtec" / name)
    config = {
        "model": {"class_path": "ClipAdSdpPlus", "init_args": {"backbone": small_clip, "visualizer": False}},
        "data": {
            "class_path": "anomalib_clipad.data.AuxiliaryDataModule",
            "init_args": {
                "datamodules": [{"class_path": "MVTecAD", "init_args": {"root": str(tmp_path / "mvtec")}}],
                "num_workers": 0,
                "train_batch_size": 4,
            },
        },
        "trainer": {"max_epochs": 1},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    done = anomalib("fit", "--config", tmp_path / "train.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    best = next((tmp_path / "results").rglob("model.ckpt"))
    last = best.with_name("last.ckpt")
    done = anomalib("fit", "--config", tmp_path / "train.yaml", "--trainer.max_epochs", "2", "--ckpt_path", last)
    assert done.returncode == 0, done.stderr[-3000:]

    model = ["--model", "ClipAdSdpPlus", "--model.backbone", small_clip]
    figures = []
    for way in (["--ckpt_path", best], ["--model.adapter", best]):
        done = anomalib("test", *model, "--model.visualizer", "false", *way, *folder_arguments(category))
        assert done.returncode == 0, done.stderr[-3000:]
        figures.append(re.findall(r"(\w+_\w+)\s*│\s*([01]\.\d+)", done.stdout))
    assert len(figures[0]) == 9
    assert figures[0] == figures[1]
    done = anomalib("predict", *model, "--model.adapter", best, "--model.class_name", "cup", "--data", image_folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "results/ClipAdSdpPlus").rglob("a.png"))) == 1

    missing = [*model, "--data", "anomalib_clipad.data.AuxiliaryDataModule", "--data.categories", "[gear, valve]"]
    source = json.dumps([{"class_path": "MVTecAD", "init_args": {"root": str(tmp_path / "mvtec")}}])
    done = anomalib("fit", *missing, "--data.datamodules", source)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "There is no folder of the categories valve in" in done.stderr
    assert "found gear, plate" in done.stderr
