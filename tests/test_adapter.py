"""Files of linear layers: what fits is loaded, anything else is refused in a sentence and never executed."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from anomalib_clipad import InputError
from anomalib_clipad.sdp_plus import load_adapter, save_adapter


def layers(width: int = 32, count: int = 4) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(width, 24) for _ in range(count))


def release(state: dict[str, object]) -> dict[str, object]:
    """What the authors' files hold."""
    return {"linear_layers": {f"fc.{key}": value for key, value in state.items()}}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (layers(width=64), r"do not fit: 0.weight has shape \(24, 64\) instead of \(24, 32\)"),
        (layers(count=2), "has 2 layers, but the model taps 4 blocks"),
    ],
)
def test_layers_of_another_shape_are_refused(tmp_path: Path, other: nn.ModuleList, words: str) -> None:
    save_adapter(other, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=words):
        load_adapter(layers(), tmp_path / "other.safetensors")


def test_layers_of_other_weights_are_refused(tmp_path: Path) -> None:
    save_adapter(layers(), tmp_path / "a.safetensors", weights="abc", backbone="ViT-B-32")
    with pytest.raises(InputError, match=r"trained with other weights of ViT-B-32 \(abc, here def\)"):
        load_adapter(layers(), tmp_path / "a.safetensors", weights="def")


def test_layers_of_other_taps_are_refused(tmp_path: Path) -> None:
    ours, path = layers(), tmp_path / "a.safetensors"
    save_adapter(ours, path, layers=[6, 12, 18, 24], trained_on=["candle"])
    with pytest.raises(InputError, match=r"trained on the taps \[6, 12, 18, 24\], but the model taps \[3, 6, 9, 12\]"):
        load_adapter(layers(), path, taps=[3, 6, 9, 12])
    same = layers()
    assert load_adapter(same, path, taps=(6, 12, 18, 24)) == ["candle"]
    assert torch.equal(same[3].bias, ours[3].bias)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.full((24, 32), float("nan")), "0.weight has values that are not finite"),
        (torch.full((24, 32), 1e300, dtype=torch.float64), "not finite"),
        (torch.ones(24, 32, dtype=torch.int64), "0.weight is of type torch.int64 instead of torch.float32"),
        (torch.ones(24, 32, dtype=torch.complex64), "of type torch.complex64"),
        (torch.ones(24, 32).to_sparse(), "not a dense tensor"),
        (torch.ones(24), r"shape \(24,\)"),
        ([1.0, 2.0], "0.weight is a list instead of a tensor"),
        (None, "0.weight is a NoneType instead of a tensor"),
    ],
)
def test_invalid_values_are_refused(tmp_path: Path, value: object, words: str) -> None:
    ours = layers()
    before = ours[1].weight.clone()
    torch.save(release({**ours.state_dict(), "0.weight": value, "1.weight": before + 1}), tmp_path / "a.pth")
    with pytest.raises(InputError, match=words):
        load_adapter(ours, tmp_path / "a.pth")
    assert torch.equal(ours[1].weight, before), "a refused file changed a layer"


def test_layers_of_half_precision_are_taken(tmp_path: Path) -> None:
    ours = layers()
    torch.save(release(layers().half().state_dict()), tmp_path / "a.pth")
    load_adapter(ours, tmp_path / "a.pth")
    assert ours[0].weight.dtype == torch.float32


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    state = layers().state_dict()
    contents: dict[str, object] = {
        "tensor.pth": torch.zeros(2),
        "list.pth": [1],
        "keys.pth": {1: torch.zeros(2)},
        "empty.pth": {},
        "half.pth": release({"0.weight": torch.zeros(2, 2)}),
        "gap.pth": release({key: value for key, value in state.items() if key[0] != "1"}),
        "number.pth": {"linear_layers": 1},
        "checkpoint.ckpt": {"clip_ad": {}, "state_dict": None},
        "checkpoint2.ckpt": {"clip_ad": None, "state_dict": {}},
        "checkpoint3.ckpt": {"clip_ad": {}},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "nothing.pth").touch()
    (tmp_path / "folder.pth").mkdir()
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(InputError) as caught:
            load_adapter(layers(), path)
        assert path.name in str(caught.value)
        assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    "metadata", [{"layers": "3, 6"}, {"layers": [1.5]}, {"trained_on": "candle"}, {"trained_on": [1]}, {"weights": 3}]
)
def test_damaged_metadata_are_refused(tmp_path: Path, metadata: dict) -> None:
    save_adapter(layers(), tmp_path / "a.safetensors", **metadata)
    with pytest.raises(InputError, match=f"is damaged: its {next(iter(metadata))} are"):
        load_adapter(layers(), tmp_path / "a.safetensors")


def test_metadata_of_other_programs_are_no_obstacle(tmp_path: Path) -> None:
    state = {f"fc.{key}": value for key, value in layers().state_dict().items()}
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert load_adapter(layers(), tmp_path / "a.safetensors") == []


def test_an_adapter_file_is_not_executed(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "executed"),)

    with (tmp_path / "evil.pth").open("wb") as file:
        pickle.dump({"linear_layers": Payload()}, file)
    torch.save({"linear_layers": Payload()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(InputError, match=f"{name} cannot be read as tensors") as caught:
            load_adapter(layers(), tmp_path / name)
        assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_a_failed_save_leaves_no_part_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken.safetensors").mkdir()
    for path in (tmp_path / "missing" / "a.safetensors", tmp_path / "taken.safetensors", tmp_path / "a\0b"):
        with pytest.raises(InputError, match="could not be written"):
            save_adapter(layers(), path)
    with pytest.raises(InputError, match="plain data that JSON can hold"):
        save_adapter(layers(), tmp_path / "a.safetensors", trained_on={1, 2})
    assert [path.name for path in tmp_path.iterdir()] == ["taken.safetensors"]


@pytest.mark.parametrize("ending", ["pth", "pt", "ckpt", "bin"])
def test_layers_are_not_saved_under_an_ending_of_other_files(ending: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give it the ending .safetensors"):
        save_adapter(layers(), tmp_path / f"a.{ending}")
    with pytest.raises(InputError, match="is a folder"):
        load_adapter(layers(), tmp_path)


@pytest.mark.parametrize("wrong", [None, 3, "text", [1], float("nan"), nn.Linear(2, 2), nn.ModuleList([nn.ReLU()])])
def test_arguments_of_another_kind_are_refused(tmp_path: Path, wrong: object) -> None:
    save_adapter(layers(), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="layers must be a ModuleList of linear layers"):
        load_adapter(wrong, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="layers must be a ModuleList of linear layers"):
        save_adapter(wrong, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="adapter must be the path|does not exist"):
        load_adapter(layers(), wrong)


def test_layers_that_are_not_finite_replace_no_file(tmp_path: Path) -> None:
    layers = nn.ModuleList([nn.Linear(4, 3)])
    save_adapter(layers, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    with torch.no_grad():
        layers[0].bias[1] = torch.nan
    with pytest.raises(InputError, match="not finite, so they are not saved"):
        save_adapter(layers, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == before
