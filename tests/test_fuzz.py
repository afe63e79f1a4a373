"""Mutated files: each is read or refused in a sentence, nothing else. Seeded, a few seconds."""

import copy
import io
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from anomalib_clipad import ClipAdSdp, ClipAdSdpPlus
from anomalib_clipad.compare import CompareJobGenerator
from anomalib_clipad.compare.pipeline import Compare, preflight
from anomalib_clipad.components import PromptEnsemble, load_backbone
from anomalib_clipad.errors import InputError
from anomalib_clipad.sdp_plus import load_adapter, save_adapter

from .conftest import LAYOUT, auxiliary, fitted, folder, make_clip, new_engine, save_clip, weights, write_category

ROUNDS = 40
YAML = """normal_states: ['sound {}']
anomalous_states:
- porous {}
- "cracked {}"
templates: ['a {}', 'the {}']
"""


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes flipped, removed, doubled or cut off, mostly near the ends, where a format keeps its structure."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        reach = min(len(data), int(rng.choice([64, 1024, len(data)])))
        at = int(rng.integers(reach))
        at = at if rng.random() < 0.5 else len(data) - 1 - at
        kind = rng.integers(4)
        if kind == 0:
            data[at] ^= int(rng.integers(1, 256))
        elif kind == 1:
            del data[at : at + int(rng.integers(1, 9))]
        elif kind == 2:
            data[at:at] = data[at : at + int(rng.integers(1, 9))]
        else:
            del data[max(at, 1) :]
        if not data:
            break
    return bytes(data)


VALUES = [
    None,
    True,
    -1,
    10**30,
    0.5,
    float("nan"),
    "text",
    "",
    "\0",
    {"grid": [1, "a"]},
    "n" * 300,
    [],
    [None],
    {},
    {"a": 1},
    {1: 2},
]
TENSORS = [
    torch.zeros(2),
    torch.full((2,), float("nan")),
    torch.zeros(2).to_sparse(),
    torch.zeros((), dtype=torch.int8),
]


def changed(content: dict[str, Any], rng: np.random.Generator, values: list[object]) -> dict[str, Any]:
    """A copy in which one key, at any depth, is missing, unknown, renamed, or has another value."""
    content = copy.deepcopy(content)
    place: Any = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = keys[rng.integers(len(keys))]
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        value = copy.deepcopy(values[rng.integers(len(values))])
        kind = rng.integers(4) if isinstance(place, dict) else rng.integers(2)
        if kind == 0:
            del place[key]
        elif kind == 1:
            place[key] = value
        elif kind == 2:
            place["more"] = value
        else:
            place[f"{key}x"] = place.pop(key)
        return content


def outcomes(
    read: Callable[[Path], object],
    path: Path,
    seed: int,
    mutate: Callable[[bytes, np.random.Generator], bytes] = mutated,
    rounds: int = ROUNDS,
) -> set[str]:
    rng = np.random.default_rng(seed)
    whole = path.read_bytes()
    read(path)
    seen = set()
    for _ in range(rounds):
        path.write_bytes(mutate(whole, rng))
        sentence = ""
        try:
            read(path)
        except InputError as error:
            sentence = str(error)
        assert "weights_only" not in sentence
        assert "\n" not in sentence
        seen.add("refused" if sentence else "read")
    return seen


def layers() -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(8, 6) for _ in range(4))


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.ckpt", "old.pth"])
def test_mutated_adapters(tmp_path: Path, name: str) -> None:
    state = layers().state_dict()
    if name == "a.safetensors":
        save_adapter(layers(), tmp_path / name, weights="abc", layers=[1, 2, 3, 4], trained_on=["cup"])
    elif name == "a.ckpt":
        values = {f"model.adapter.{key}": value for key, value in state.items()}
        torch.save({"clip_ad": {"layers": [1, 2, 3, 4], "trained_on": ["cup"]}, "state_dict": values}, tmp_path / name)
    else:
        values = {f"fc.{key}": value for key, value in state.items()}
        torch.save({"linear_layers": values}, tmp_path / name, _use_new_zipfile_serialization=name != "old.pth")
    assert "refused" in outcomes(lambda path: load_adapter(layers(), path, "abc", [1, 2, 3, 4]), tmp_path / name, 0)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_mutated_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = save_clip(tmp_path / "clip")
    clip = make_clip()
    # Only the reading is tested: the tokenizer and the tower need not be built forty times.
    monkeypatch.setattr("anomalib_clipad.components.clip.Architecture.build_empty", lambda *_, **__: clip)
    monkeypatch.setattr("open_clip.get_tokenizer", lambda *_, **__: list)
    if name == "w.pt":
        torch.save(clip.state_dict(), tmp_path / name)
    else:
        (folder / "open_clip_model.safetensors").rename(tmp_path / name)
    assert "refused" in outcomes(lambda path: load_backbone(str(folder), path), tmp_path / name, 1)
    assert all(parameter.isfinite().all() for parameter in clip.parameters())


def test_mutated_configurations(tmp_path: Path) -> None:
    folder = save_clip(tmp_path / "clip")
    assert "refused" in outcomes(lambda path: load_backbone(str(path.parent)), folder / "open_clip_config.json", 2)


def test_mutated_prompt_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(YAML)
    assert outcomes(lambda p: PromptEnsemble.from_config(p).prompts("cup"), path, 3) == {"read", "refused"}


def changed_checkpoint(whole: bytes, rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    torch.save(changed(torch.load(io.BytesIO(whole), weights_only=True), rng, [*VALUES, *TENSORS]), file)
    return file.getvalue()


@pytest.mark.parametrize("mutate", [mutated, changed_checkpoint], ids=["bytes", "keys"])
def test_mutated_checkpoints(small_clip: str, category: Path, tmp_path: Path, mutate: Callable) -> None:
    """Read by the class, and by the engine, where Lightning restores more than the model."""
    engine, model = new_engine(tmp_path), ClipAdSdp(backbone=small_clip, visualizer=False)
    engine.test(model, datamodule=folder(category), verbose=False)

    def read(path: Path) -> None:
        ClipAdSdp.load_from_checkpoint(path)

    def predict(path: Path) -> None:
        image = category / "test/good/000.png"
        new_engine(tmp_path).predict(model, data_path=image, ckpt_path=path)

    for seed, reader in enumerate((read, predict)):
        path = tmp_path / f"{seed}.ckpt"
        path.write_bytes(weights(engine, "model.ckpt").read_bytes())
        assert "refused" in outcomes(reader, path, seed, mutate, rounds=20)


@pytest.mark.parametrize("mutate", [mutated, changed_checkpoint], ids=["bytes", "keys"])
def test_mutated_checkpoints_to_resume(small_clip: str, auxiliary_root: Path, tmp_path: Path, mutate: Callable) -> None:
    _, engine = fitted(small_clip, auxiliary_root, tmp_path / "first", epochs=1)

    def resume(path: Path) -> None:
        model, data = ClipAdSdpPlus(backbone=small_clip, visualizer=False), auxiliary(auxiliary_root)
        new_engine(tmp_path / "rest", max_epochs=2).fit(model, datamodule=data, ckpt_path=path)

    assert "refused" in outcomes(resume, weights(engine, "last.ckpt"), 0, mutate, rounds=12)


def comparison(root: Path) -> dict[str, Any]:
    """A configuration with every kind of key."""
    for name in ("gear", "plate"):
        write_category(root / name, normal=1, broken=1)
    grid = {"backbone": "demo", "layers": [2, 4], "rvs": {"grid": ["mean", "kde"]}}
    every = {"class_path": "MVTecAD", "init_args": {"root": str(root), "category": "all"}}
    one = {"class_path": "Folder", "name": "own", "init_args": {"name": "gear", "root": str(root / "gear"), **LAYOUT}}
    settings = {"output": "out", "map_size": 64, "seed": 1, "metrics": ["pixel_AP", "image_AUROC"]}
    models = [{"class_path": "ClipAdSdp", "name": "SDP", "init_args": grid}, "Padim"]
    return {"accelerator": "cpu", "compare": {**settings, "models": models, "data": [every, one]}}


def changed_comparison(whole: bytes, rng: np.random.Generator) -> bytes:
    return yaml.safe_dump(changed(yaml.safe_load(whole), rng, VALUES)).encode()


@pytest.mark.parametrize("mutate", [mutated, changed_comparison], ids=["bytes", "keys"])
def test_mutated_comparisons(tmp_path: Path, mutate: Callable) -> None:
    """All that is done before the first job."""
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(comparison(tmp_path / "data")))

    def prepare(path: Path) -> None:
        config = Compare()._read(Namespace(config=path))
        assert preflight(CompareJobGenerator("cpu").generate_jobs(config["compare"]))

    assert outcomes(prepare, path, 4, mutate, rounds=200) == {"read", "refused"}
