"""Large pictures are read while the one before is scored; nothing else changes."""

import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from anomalib.data import ImageItem, PredictDataset
from torch.utils.data import DataLoader

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.data.read_ahead import SLOW, read_ahead

from .conftest import new_engine


class SlowPictures(PredictDataset):
    """As from a network share, or of many pixels; remembers by which threads they were read."""

    seconds = 2 * SLOW

    def __getitem__(self, index: int) -> ImageItem:
        self.__dict__.setdefault("readers", []).append(threading.current_thread())
        time.sleep(self.seconds)
        return super().__getitem__(index)


class QuickPictures(SlowPictures):
    seconds = 0.0


def predict(small_clip: str, data: PredictDataset, where: Path, workers: int = 0) -> dict[str, torch.Tensor]:
    model = ClipAdSdp("nut", small_clip, visualizer=False, page=False)
    loader = DataLoader(data, collate_fn=data.collate_fn, num_workers=workers)
    batches = new_engine(where).predict(model, dataloaders=loader)
    return {path: batch.anomaly_map for batch in batches for path in batch.image_path}


def test_a_picture_that_takes_long_is_read_ahead_and_scored_alike(
    small_clip: str, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image_folder / "aa_broken.png").write_bytes(b"no picture")
    before = set(threading.enumerate())
    slow, quick = SlowPictures(image_folder), QuickPictures(image_folder)
    found = predict(small_clip, slow, image_folder.parent)
    # A machine that is busy otherwise may take long for any picture.
    monkeypatch.setattr("anomalib_clipad.data.readable.read_ahead", partial(read_ahead, slow=60.0))
    expected = predict(small_clip, quick, image_folder.parent)
    assert list(found) == list(expected) == [str(image_folder / name) for name in ("a.png", "b.jpg")]
    for path, anomaly_map in expected.items():
        assert torch.equal(found[path], anomaly_map)
    main = threading.main_thread()
    assert [reader is main for reader in slow.readers] == [True, False, False]
    assert set(quick.readers) == {main}
    assert set(threading.enumerate()) <= before


def numbers(ready: threading.Event, last: int = 3) -> Iterator[int]:
    for number in range(last):
        if number == 1:
            ready.set()
        yield number


def test_the_next_one_is_read_while_one_is_in_use() -> None:
    ready = threading.Event()
    found = []
    for number in read_ahead(numbers(ready), slow=0.0):
        assert ready.wait(timeout=60)
        found.append(number)
    assert found == [0, 1, 2]
    ready = threading.Event()
    assert next(read_ahead(numbers(ready), slow=60.0)) == 0
    assert not ready.wait(timeout=0.2)


def test_an_error_comes_behind_what_was_read_before_it() -> None:
    def failing() -> Iterator[int]:
        yield 0
        msg = "the second one"
        raise OSError(msg)

    batches = read_ahead(failing(), slow=0.0)
    assert next(batches) == 0
    with pytest.raises(OSError, match="the second one"):
        next(batches)


def test_a_run_that_ends_early_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    batches = read_ahead(iter(range(100)), slow=0.0)
    assert next(batches) == 0
    batches.close()
    assert set(threading.enumerate()) <= before
