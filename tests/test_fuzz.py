"""Mutated files: each is read or refused in a sentence, nothing else. Seeded, a few seconds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from anomalib_clipad.components import PromptEnsemble, load_backbone
from anomalib_clipad.errors import InputError
from anomalib_clipad.sdp_plus import load_adapter, save_adapter

from .conftest import make_clip, save_clip

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


def outcomes(read: Callable[[Path], object], path: Path, seed: int) -> set[str]:
    rng = np.random.default_rng(seed)
    whole = path.read_bytes()
    read(path)
    seen = set()
    for _ in range(ROUNDS):
        path.write_bytes(mutated(whole, rng))
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
    monkeypatch.setattr("anomalib_clipad.components.backbone._build", lambda *_, **__: clip)
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
