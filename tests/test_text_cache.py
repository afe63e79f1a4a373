"""Text vectors are computed once: what a second start reads, and what makes it compute again."""

import copy
import json
import logging
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.components import open_backbone
from anomalib_clipad.components.text_cache import TextVectorCache
from anomalib_clipad.errors import InputError
from anomalib_clipad.sdp import ClipAdSdpModel

from .conftest import SMALL_CONFIG, make_clip, save_clip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANOMALIB_CLIPAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_clip(tmp_path / "clip", seed=3)


def start(folder: Path, class_name: str = "nut", **arguments: object) -> tuple[torch.Tensor, bool]:
    """Text vectors of a new model, and whether its text tower was read."""
    model = ClipAdSdpModel(str(folder), **arguments)
    model.set_classes([class_name])
    return model.text_features, not model.text_encoder.clip.token_embedding.weight.is_meta


def test_a_second_start_encodes_nothing(folder: Path) -> None:
    first, read = start(folder)
    again, read_again = start(folder)
    assert (read, read_again) == (True, False)
    assert torch.equal(again, first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANOMALIB_CLIPAD_CACHE", "0")
        assert torch.equal(start(folder)[0], first)


@pytest.mark.parametrize(
    "other",
    [
        {"class_name": "bolt"},
        {"rvs": "pca"},
        {"rvs": {"method": "dbscan", "eps": 0.7}},
        {"prompts": "medical"},
    ],
    ids=str,
)
def test_other_prompts_and_another_rvs_are_computed(folder: Path, other: dict) -> None:
    first, _ = start(folder)
    vectors, read = start(folder, **other)
    assert read
    assert start(folder)[1] is False
    assert other == {"rvs": {"method": "dbscan", "eps": 0.7}} or not torch.equal(vectors, first)


def test_changed_weights_are_computed_again(folder: Path, tmp_path: Path) -> None:
    first, _ = start(folder)
    save_clip(folder, seed=4)
    vectors, read = start(folder)
    assert read
    assert not torch.allclose(vectors, first)
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    assert start(copied)[1] is False  # the same weights elsewhere


@pytest.mark.parametrize(
    "change", [{"quick_gelu": True}, {"text_cfg": {**SMALL_CONFIG["text_cfg"], "heads": 4}}], ids=str
)
def test_the_same_weights_in_another_clip_are_computed(folder: Path, change: dict) -> None:
    first, _ = start(folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"] |= change
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    vectors, read = start(folder)
    assert read
    assert not torch.equal(vectors, first)


@pytest.mark.parametrize("content", [b"", b"not tensors", None], ids=["empty", "text", "a flipped bit"])
def test_a_damaged_file_is_computed_again(cache: Path, folder: Path, content: bytes | None) -> None:
    first, _ = start(folder)
    for file in (*cache.rglob("*.safetensors"), *cache.rglob("*.json")):
        bad = bytearray(file.read_bytes())
        bad[-2] ^= 4
        file.write_bytes(bytes(bad) if content is None else content)
    vectors, read = start(folder)
    assert read
    assert torch.equal(vectors, first)
    assert start(folder)[1] is False


def test_without_a_cache_nothing_is_written(cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANOMALIB_CLIPAD_CACHE", "0")
    assert start(folder)[1]
    assert start(folder)[1]
    assert not cache.exists()


def test_a_folder_that_cannot_be_written_to_is_no_error(cache: Path, folder: Path) -> None:
    cache.write_text("a file in its place")
    assert start(folder)[1]
    assert start(folder)[1]


@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_text_tower_that_is_read_later_equals_open_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type, dtype: torch.dtype
) -> None:
    config = {**SMALL_CONFIG, "custom_text": True} if kind is open_clip.CustomTextCLIP else SMALL_CONFIG
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small", config)
    torch.manual_seed(7)
    theirs = kind(**SMALL_CONFIG).eval()
    state = {key: value.to(dtype).contiguous() for key, value in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    save_file(state, tmp_path / "w.safetensors")
    opened = open_backbone("small", str(tmp_path / "w.safetensors"))
    ours = opened.loaded.clip
    assert type(ours) is kind
    images, tokens = torch.rand(2, 3, 32, 32), opened.loaded.tokenizer(["a nut", "a bolt with a scratch"])
    assert torch.allclose(ours.encode_image(images), theirs.encode_image(images), atol=1e-6)
    opened.fill_text()
    assert torch.allclose(ours.encode_text(tokens), theirs.encode_text(tokens), atol=1e-6)
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in (*ours.parameters(), *ours.buffers()))
    assert {tensor.dtype for tensor in ours.parameters()} == {torch.float32}


def test_invalid_values_in_the_text_tower_are_refused_before_it_is_used(tmp_path: Path) -> None:
    state = make_clip(3).state_dict()
    state["ln_final.weight"] = torch.full_like(state["ln_final.weight"], torch.nan)
    folder = save_clip(tmp_path / "bad")
    for file in folder.glob("open_clip_*model*"):
        file.unlink()
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(InputError, match=r"ln_final.weight has values that are not finite"):
        start(folder)


def test_weights_that_were_damaged_since_are_refused(folder: Path) -> None:
    start(folder)
    state = {key: value.contiguous() for key, value in make_clip(3).state_dict().items()}
    state["visual.proj"] = torch.full_like(state["visual.proj"], torch.nan)
    save_file(state, folder / "open_clip_model.safetensors")
    with pytest.raises(InputError, match=r"visual.proj has values that are not finite"):
        start(folder)


def test_a_file_that_changes_leaves_the_model_as_it_is(folder: Path) -> None:
    model = ClipAdSdpModel(str(folder))
    expected = make_clip(3).visual.state_dict()
    (folder / "open_clip_model.safetensors").write_bytes(b"something else")
    for name, value in model.text_encoder.clip.visual.state_dict().items():
        assert torch.equal(value, expected[name])
    with pytest.raises(InputError, match="have changed since the model was loaded"):
        model.set_classes(["nut"])


def test_weights_are_hashed_once_a_start_where_nothing_can_be_kept(
    cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file in its place")
    opened: list[Path] = []
    original = Path.open

    def count(self: Path, *arguments: object, **options: object) -> object:
        opened.extend([self] if self.suffix == ".safetensors" else [])
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", count)
    ClipAdSdpModel(str(folder)).set_classes(["nut", "bolt", "screw"])
    assert len(opened) == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_reads_a_text_tower_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, duplicate: Callable[[ClipAdSdp], ClipAdSdp]
) -> None:
    monkeypatch.setenv("ANOMALIB_CLIPAD_CACHE", "0")  # so that each needs its own
    model = ClipAdSdp(backbone=str(folder))
    other = duplicate(model)
    images = torch.rand(2, 3, 32, 32)
    maps = []
    for one in (other, model, duplicate(model)):
        one.choose_class("cup")
        maps.append(one.eval()(images).anomaly_map)
    assert torch.equal(maps[0], maps[1])
    assert torch.equal(maps[0], maps[2])


def test_threads_that_start_at_once_keep_their_vectors(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As those of a server; no draft of one is taken for another's."""
    kept = TextVectorCache(folder / "open_clip_model.safetensors", SMALL_CONFIG)
    vectors = torch.rand(2, 24)
    with caplog.at_level(logging.INFO), ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: kept.write({"prompts": ["a nut"]}, vectors), range(400)))
    assert "are not kept" not in caplog.text
    assert torch.equal(kept.read({"prompts": ["a nut"]}), vectors)
    assert [path.suffix for path in (cache / "text").iterdir()] == [".safetensors"]
