"""Weights from a tag, a file, a folder or a hub: loaded without executing them, or one sentence why not."""

import hashlib
import json
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from anomalib_clipad.components import fingerprint, load_backbone
from anomalib_clipad.components import pretrained as module
from anomalib_clipad.errors import InputError
from anomalib_clipad.sdp import ClipAdSdpModel

from .conftest import SMALL_CONFIG, make_clip, save_clip

TINY = "tiny-test-clip"


@pytest.fixture(autouse=True)
def _tiny_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An architecture by name, as open_clip's own are."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, TINY, SMALL_CONFIG)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach a network fails the test."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("reached for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def same_weights(clip: torch.nn.Module, seed: int = 3) -> bool:
    expected = make_clip(seed).state_dict()
    return all(torch.equal(value, expected[key]) for key, value in clip.state_dict().items())


@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w.safetensors", "training.pt"])
@pytest.mark.usefixtures("no_network")
def test_weights_from_a_local_file(tmp_path: Path, name: str) -> None:
    state = make_clip(3).state_dict()
    if name == "training.pt":
        wrapped = {f"module.{key}": value for key, value in state.items()}
        torch.save({"epoch": 3, "state_dict": wrapped}, tmp_path / name)
    elif name.endswith(".safetensors"):
        save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / name)
    else:
        torch.save(state, tmp_path / name)
    loaded = load_backbone(TINY, str(tmp_path / name))
    assert same_weights(loaded.clip)
    assert not loaded.clip.training
    assert not any(parameter.requires_grad for parameter in loaded.clip.parameters())


@pytest.mark.usefixtures("no_network")
def test_a_folder_brings_its_weights(tmp_path: Path) -> None:
    folder = save_clip(tmp_path / "clip", seed=3)
    for name in (str(folder), f"local-dir:{folder}"):
        assert same_weights(load_backbone(name).clip)


def test_a_file_is_not_executed(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "executed"),)

    with (tmp_path / "evil.pt").open("wb") as file:
        pickle.dump({"state_dict": Payload()}, file)
    torch.save({"state_dict": Payload()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(InputError, match=f"{name} cannot be read as tensors"):
            load_backbone(TINY, str(tmp_path / name))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_damaged_file_is_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x00\x01 not weights")
    with pytest.raises(InputError, match="cannot be read as tensors.*save it by"):
        load_backbone(TINY, str(tmp_path / name))


def test_weights_of_another_backbone_are_refused_in_a_sentence(tmp_path: Path) -> None:
    torch.save(make_clip(layers=8).state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match="do not fit: .*resblocks.4.* is unknown and .* more"):
        load_backbone(TINY, str(tmp_path / "w.pt"))
    torch.save(make_clip(width=64).state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match="has shape .* instead of"):
        load_backbone(TINY, str(tmp_path / "w.pt"))


def test_no_weights_are_a_loud_warning_and_the_same_every_time(caplog: pytest.LogCaptureFixture) -> None:
    first = load_backbone(TINY, None).clip
    assert "RANDOM WEIGHTS" in caplog.text
    torch.manual_seed(1)
    assert fingerprint(load_backbone(TINY, None).clip) == fingerprint(first)


def test_unreachable_weights_name_tag_cache_and_ways_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import urllib.request

    def fail(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    monkeypatch.setattr(module, "hf_hub_download", fail)
    with pytest.raises(InputError) as caught:
        load_backbone("ViT-B-16-plus-240", "laion400m_e31")
    message = str(caught.value)
    assert "\n" not in message
    for words in ("'laion400m_e31'", "ViT-B-16-plus-240", str(tmp_path / "home/.cache/clip"), "local file", "copy the"):
        assert words in message


@pytest.mark.usefixtures("no_network")
def test_cached_weights_of_a_url_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "home/.cache/clip"
    cache.mkdir(parents=True)
    torch.save(make_clip(3).state_dict(), cache / "tiny.pt")
    tags = {"some_tag": {"url": "https://example.com/tiny.pt", "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, TINY, tags)
    loaded = load_backbone(TINY, "some_tag")
    assert same_weights(loaded.clip)
    assert loaded.mean == (0.1, 0.2, 0.3)


@pytest.mark.usefixtures("no_network")
def test_the_checksum_of_downloaded_weights_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANOMALIB_CLIPAD_CACHE", str(tmp_path / "cache"))
    cache = tmp_path / "home/.cache/clip"
    cache.mkdir(parents=True)
    torch.save(make_clip(3).state_dict(), cache / "w.pt")
    name = f"tiny-{hashlib.sha256((cache / 'w.pt').read_bytes()).hexdigest()[:8]}.pt"
    (cache / "w.pt").rename(cache / name)
    url = f"https://github.com/mlfoundations/open_clip/{name}"
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, TINY, {"some_tag": {"url": url}})
    verified: list[dict] = []

    def verify(config: dict) -> str:
        verified.append(config)
        return open_clip.pretrained.download_pretrained(config)

    monkeypatch.setattr(module, "download_pretrained", verify)

    def start() -> ClipAdSdpModel:
        return ClipAdSdpModel(TINY, "some_tag", ["nut"])

    assert same_weights(load_backbone(TINY, "some_tag").clip)
    first, second = start(), start()
    assert torch.equal(first.text_features, second.text_features)
    assert len(verified) == 2, "not before a digest was kept, and not after"
    monkeypatch.setenv("ANOMALIB_CLIPAD_CACHE", "0")
    start()
    assert len(verified) == 3, "nothing is known without the cache"
    monkeypatch.setenv("ANOMALIB_CLIPAD_CACHE", str(tmp_path / "cache"))
    with (cache / name).open("ab") as file:
        file.write(b"changed")
    monkeypatch.setattr("urllib.request.urlopen", lambda _: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(InputError, match="could not be downloaded"), pytest.warns(match="checksum does not match"):
        start()


@pytest.mark.usefixtures("no_network")
def test_openais_weights_are_verified_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANOMALIB_CLIPAD_CACHE", str(tmp_path / "cache"))
    cache = tmp_path / "home/.cache/clip"
    cache.mkdir(parents=True)
    torch.save(make_clip(3).state_dict(), cache / "tiny.pt")
    digest = hashlib.sha256((cache / "tiny.pt").read_bytes()).hexdigest()
    url = f"https://openaipublic.azureedge.net/{digest}/tiny.pt"
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, TINY, {"openai": {"url": url}})
    ClipAdSdpModel(TINY, "openai", ["nut"])
    state = (cache / "tiny.pt").stat()
    (cache / "tiny.pt").write_bytes(b"x" * state.st_size)
    os.utime(cache / "tiny.pt", ns=(state.st_atime_ns, state.st_mtime_ns))
    monkeypatch.setattr("urllib.request.urlopen", lambda _: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(InputError, match="could not be downloaded"), pytest.warns(match="checksum does not match"):
        ClipAdSdpModel(TINY, "openai")


@pytest.mark.parametrize("as_tag", [True, False])
@pytest.mark.usefixtures("no_network")
def test_cached_weights_of_a_hub_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_tag: bool) -> None:
    snapshot = tmp_path / "hub/models--org--tiny/snapshots/abc"
    save_clip(snapshot, seed=3)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    if as_tag:
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, TINY, {"some_tag": {"hf_hub": "org/tiny/"}})
        assert same_weights(load_backbone(TINY, "some_tag").clip)
    else:
        assert same_weights(load_backbone("hf-hub:org/tiny").clip)


def test_openai_weights_get_the_activation_they_were_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "home/.cache/clip"
    cache.mkdir(parents=True)
    torch.save(make_clip(3).state_dict(), cache / "tiny.pt")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, TINY, {"openai": {"url": "https://example.com/tiny.pt"}})
    clip = load_backbone(TINY, "openai").clip
    assert type(clip.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ViT-Z-99", None), "open_clip.list_models.*got 'ViT-Z-99'"),
        ((TINY, "nowhere/w.pt"), "a file that exists or a tag of tiny-test-clip .*got 'nowhere/w.pt'"),
        (("coca_ViT-B-32", None), "captioning model"),
    ],
)
def test_wrong_names_are_refused_in_a_sentence(arguments: tuple, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_backbone(*arguments)


@pytest.mark.parametrize("backbone", ["demo", "folder", "hf-hub:org/tiny"])
@pytest.mark.parametrize("missing", ["nowhere/w.pt", "w.safetensors", "W.PT", "./w"])
@pytest.mark.usefixtures("no_network")
def test_a_missing_file_is_not_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: str, missing: str
) -> None:
    """Where the backbone brings weights of its own, a tag is ignored, a file's name is not."""
    save_clip(tmp_path / "folder", seed=3)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"pretrained must be a file that exists .*got '{missing}'"):
        load_backbone(backbone, missing)
    assert same_weights(load_backbone("folder", "laion400m_e31").clip)


def torchscript(path: Path) -> None:
    torch.jit.script(torch.nn.Identity()).save(path)


@pytest.mark.usefixtures("no_network")
def test_only_openais_own_download_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local file that is called like OpenAI's tag, or lies in the cache, is read like any other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("a local file was executed"))
    cache = tmp_path / "home/.cache/clip"
    cache.mkdir(parents=True)
    for path in (tmp_path / "openai", cache / "local.pt"):
        torchscript(path)
        with pytest.raises(InputError, match="cannot be read as tensors"):
            load_backbone(TINY, str(path.relative_to(tmp_path)))
    torch.save(make_clip(3).state_dict(), tmp_path / "openai")
    loaded = load_backbone(TINY, "openai").clip
    assert same_weights(loaded)
    assert type(loaded.visual.transformer.resblocks[0].mlp.gelu).__name__ == "GELU"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.fill_(float("nan")), "conv1.weight has values that are not finite"),
        (lambda w: w.double() * 1e300, "not finite"),
        (lambda w: w.long(), "conv1.weight is of type torch.int64 instead of torch.float32"),
        (lambda w: w[0], "has shape"),
        (lambda w: w.tolist(), "is a list instead of a tensor"),
        (lambda w: w.to_sparse(), "is not a dense tensor"),
    ],
)
def test_invalid_values_are_refused(tmp_path: Path, change: Callable, words: str) -> None:
    state = make_clip(3).state_dict()
    state["visual.conv1.weight"] = change(state["visual.conv1.weight"])
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(InputError, match=words):
        load_backbone(TINY, str(tmp_path / "w.pt"))


@pytest.mark.parametrize("content", [None, "{", json.dumps({"other": 1})])
def test_a_folder_without_a_config_is_refused_in_a_sentence(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(InputError, match="open_clip_config.json"):
        load_backbone(str(tmp_path))
