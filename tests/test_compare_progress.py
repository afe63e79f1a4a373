"""What a comparison shows while it works, and how it ends when a signal is swallowed."""

import io
import logging
import os
import signal
import sys
from pathlib import Path

import pytest

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.compare import CompareJob, CompareJobGenerator, write_report
from anomalib_clipad.compare.bars import Bars
from anomalib_clipad.compare.pipeline import _show
from anomalib_clipad.compare.runners import SerialCompareRunner
from anomalib_clipad.compare.screen import interruptible

from .conftest import new_engine
from .test_compare_pictures import configuration


@pytest.fixture
def jobs(category: Path, small_clip: str, tmp_path: Path) -> list[CompareJob]:
    return list(CompareJobGenerator("cpu").generate_jobs(configuration(category, tmp_path, small_clip)))


def test_images_within_a_job_are_counted(jobs: list[CompareJob], tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    jobs[0].tell = lambda *what: told.append(what)
    row = jobs[0].run()
    words = list(dict.fromkeys(what for what, *_ in told))
    assert words[:2] == ["reading the data", "loading the model"]
    assert words[-3:] == ["validation", "images", "heatmaps"]
    assert ("images", 11, 11) in told
    told.clear()
    write_report(tmp_path, [row], tell=lambda *what: told.append(what))
    assert ("drawing examples/widget.png", 3, 4) in told


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_are_drawn_although_a_job_hides_its_output(
    jobs: list[CompareJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with Bars(1) as bars:
        shown = bars.tell

        def tell(what: str, done: int, total: int | None) -> None:
            shown(what, done, total)
            bars._progress.refresh()

        jobs[0].tell = tell
        jobs[0].run()
    assert "heatmaps" in screen.getvalue()
    assert "11/11" in screen.getvalue()


def test_in_a_pipe_there_is_a_line_a_job(jobs: list[CompareJob], capsys: pytest.CaptureFixture) -> None:
    jobs[1].model_config["init_args"]["rvs"] = "median"  # there is none
    SerialCompareRunner(lambda *_: jobs).run({})
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("1/2 SDP on widget: 11 images in ")
    assert " s, image AUROC " in first
    assert second.startswith("2/2 failed raw on widget: InputError: ")
    SerialCompareRunner(lambda *_: jobs[:1]).run({})
    assert capsys.readouterr().err.rstrip().endswith("(measured before)")


class Ending:
    """Python cannot raise what is raised in here."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_is_swallowed_in_a_job_ends_the_run_after_it(jobs: list[CompareJob]) -> None:
    class Swallowing(CompareJob):
        def run(self, task_id: int | None = None) -> dict:  # noqa: ARG002 - as its parent
            ending = Ending()
            del ending
            return self.failed("no images")

    jobs[0].__class__ = Swallowing
    with pytest.raises(SystemExit) as ended, interruptible():
        SerialCompareRunner(lambda *_: jobs).run({})
    assert ended.value.code == 128 + signal.SIGTERM
    assert not jobs[1].file.exists()


def test_all_means_fit_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = ("image_AUROC", "image_F1Max", "image_AP", "pixel_AUROC", "pixel_F1Max", "pixel_AP", "pixel_AUPRO")
    _show([{"model": "SDP, 4 normal images", "category": "nut", **dict.fromkeys(names, 0.5)}])
    shown = capsys.readouterr().out
    assert "AUPRO" in shown
    assert shown.count("50.0") == 7


def test_loading_and_encoding_are_said(
    small_clip: str,
    tmp_path: Path,
    image_folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ANOMALIB_CLIPAD_CACHE", "0")
    with caplog.at_level(logging.INFO, "anomalib_clipad"):
        model = ClipAdSdp("widget", small_clip, visualizer=False)
        new_engine(tmp_path).predict(model, data_path=image_folder)
    assert f"Loading the CLIP {small_clip}." in caplog.messages
    assert any(words.startswith("Encoding ") and words.endswith(" prompts of 'widget'.") for words in caplog.messages)
