"""What a run says of its thresholds."""

import logging
import shutil
from pathlib import Path

import pytest

from anomalib_clipad import ClipAdSdp

from .conftest import folder, new_engine, write_category, write_good
from .test_few_shot import BARE, predict


def test_a_rate_that_too_few_images_support_is_said(
    small_clip: str, parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = ClipAdSdp(backbone=small_clip, false_alarm_rate=0.01, **BARE)
    new_engine(tmp_path).validate(model, datamodule=folder(parts), verbose=False)
    assert (
        "A false-alarm rate of 1.0% needs 99 normal images. The largest score of 12 normal images is the threshold: "
        "7.7% expected, at most 22.1% with 95 % confidence." in caplog.text
    )


def test_a_warning_says_when_scores_do_not_separate_images(
    small_clip: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_category(tmp_path / "widget", normal=4, broken=4)
    for path in (root / "test/square").iterdir():  # anomalous by name only
        shutil.copy(root / "test/good" / path.name, path)
    new_engine(tmp_path).validate(ClipAdSdp(backbone=small_clip, **BARE), datamodule=folder(root), verbose=False)
    assert "hardly tell anomalous validation images from normal ones (AUROC 0.50)" in caplog.text


@pytest.mark.parametrize(("images", "said"), [(4, False), (6, True)])
def test_all_images_anomalous_is_said(
    small_clip: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, images: int, said: bool
) -> None:
    model = ClipAdSdp("cup", small_clip, **BARE)
    model.post_processor.image_sensitivity = 1.0  # everything is
    predict(model, tmp_path, data_path=write_good(tmp_path / "photos", images))
    assert ("All 6 images are called anomalous; if they are not, check class_name" in caplog.text) is said


@pytest.mark.parametrize("several", [False, True])
def test_thresholds_are_said_where_they_stay(
    several: bool, small_clip: str, parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not those of references that labelled images take the place of; nor twice."""
    caplog.set_level(logging.INFO, logger="anomalib_clipad")
    names = ["cup", "nut"] if several else "cup"
    unlabelled = {"val_split_mode": "none"}
    for arguments, data, said in (
        ({"k_shot": 4}, {}, 0),
        ({"k_shot": 4}, unlabelled, 1),
        ({"k_shot": 4, "false_alarm_rate": 0.25}, {}, 1),
        ({"false_alarm_rate": 0.25}, unlabelled, 1),
    ):
        caplog.clear()
        model = ClipAdSdp(names, small_clip, **arguments, **BARE)
        new_engine(tmp_path).test(model, datamodule=folder(parts, **data), verbose=False)
        found = [line for line in caplog.messages if "False-alarm rate:" in line or "is the threshold:" in line]
        assert len(found) == said * len({line.split(" of '")[-1] for line in found} or {""}), found
        assert bool(found) == bool(said)
        assert len(set(found)) == len(found)
