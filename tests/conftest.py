"""Small real parts for the tests: CLIPs, images and the authors' numbers."""

import gc
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from PIL import Image
from safetensors.torch import save_file

from anomalib_clipad import ClipAdSdp, ClipAdSdpPlus
from anomalib_clipad.data import AuxiliaryDataModule
from anomalib_clipad.sdp_plus import save_adapter

from .commands import ANOMALIB, ROOT, limited_files, run_command, run_in_process, start_command

__all__ = ["ANOMALIB", "ROOT", "limited_files", "run_command", "start_command"]  # tests take them from here
# The models are small. Where other programs run too, threads that wait for each other at every layer take up to twenty
# times as long as one thread. The processes that the tests start inherit the variable.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
gc.freeze()  # what was imported stays; a collection, which every job of a comparison begins with, passes it over
LAYOUT = {
    "normal_dir": "train/good",
    "normal_test_dir": "test/good",
    "abnormal_dir": "test/square",
    "mask_dir": "ground_truth/square",
}
SMALL_CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}

# How far two float32 runs of the small CLIP may differ when the batch size or the number of processes differs: a matrix
# product may then take another kernel, which adds the same terms in another order. Estimate, with u = 2**-24 = 6e-8:
# - A sum of n terms in another order moves by about sqrt(n) u. A token passes 4 blocks with 4 products of up to 128
#   terms: sqrt(16 * 128) u = 2.7e-6 of its length, or / sqrt(24) = 5.5e-7 along one direction of the joint space.
# - The text score is a sigmoid (slope 1/4) of 100 times the product with the difference of the text vectors, which is
#   0.14 long: slope 3.5. The map score is less steep: 4 stages times 0.14.
# - Min-max over the category's range of 0.058, halved by the mean of two scores: slope 8.7.
# The product is 1.7e-5. The largest difference seen is 1.3e-6, on a CPU with AVX2.
ROUNDING = 1e-5


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that the processes come to their ends together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _fixed_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # which other tests set, and by which normal images are drawn


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["ANOMALIB_CLIPAD_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def _quiet_lightning() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Parity:
    """The authors' numbers, see tests/data/README.md."""

    def __init__(self) -> None:
        self.arrays = np.load(Path(__file__).parent / "data" / "parity.npz", allow_pickle=False)
        self.meta = json.loads(str(self.arrays["meta"]))

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key])

    def clip(self) -> open_clip.CLIP:
        clip = open_clip.CLIP(**self.meta["cfg"])
        clip.load_state_dict({k[len("weight/") :]: self[k] for k in self.arrays.files if k.startswith("weight/")})
        return clip.eval()

    def text_features(self, method: str = "mean") -> torch.Tensor:
        """(classes, 2, D)."""
        return torch.stack([self[f"rvs/{name}/{method}"].T for name in self.meta["classes"]])


@pytest.fixture(scope="session")
def parity() -> Parity:
    return Parity()


@pytest.fixture(scope="session")
def parity_clip(parity: Parity) -> open_clip.CLIP:
    return parity.clip()


def make_clip(seed: int = 0, **vision: object) -> open_clip.CLIP:
    """A small random CLIP whose blocks differ enough for mistakes to show."""
    torch.manual_seed(seed)
    config = {**SMALL_CONFIG, "vision_cfg": {**SMALL_CONFIG["vision_cfg"], **vision}}
    quick_gelu = config["vision_cfg"].pop("quick_gelu", False)
    return open_clip.CLIP(**config, quick_gelu=quick_gelu).eval()


def save_clip(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL_CONFIG}))
    state = {key: value.contiguous() for key, value in make_clip(seed).state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a small random CLIP, as ``backbone`` takes it."""
    return str(save_clip(tmp_path_factory.mktemp("small_clip")))


def build_model(name: str, small_clip: str, root: Path, **arguments: object) -> ClipAdSdp:
    """A model that can predict: SDP, or SDP+ with random layers, which it reads from a file in ``root``."""
    if name == "ClipAdSdp":
        return ClipAdSdp(backbone=small_clip, **arguments)
    torch.manual_seed(3)
    save_adapter(ClipAdSdpPlus(backbone=small_clip).model.adapter, root / "adapter.safetensors")
    return ClipAdSdpPlus(str(root / "adapter.safetensors"), backbone=small_clip, **arguments)


def new_engine(root: Path, **arguments: object) -> Engine:
    """A quiet engine on one CPU, its results under ``root``."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {**quiet, "accelerator": "cpu", "devices": 1}
    return Engine(default_root_dir=root / "results", **{**defaults, **arguments})


def write_category(root: Path, normal: int = 5, broken: int = 6, size: int = 48) -> Path:
    """A category in MVTec layout: noise, and noise with a bright square that a mask marks."""
    rng = np.random.default_rng(0)
    for split, count in (("train/good", 2), ("test/good", normal), ("test/square", broken)):
        folder = root / split
        folder.mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(60, 120, (size, size, 3), dtype=np.uint8)
            if split == "test/square":
                y, x = rng.integers(4, size - 20, 2)
                pixels[y : y + 14, x : x + 14] += 100
                mask = np.zeros((size, size), dtype=np.uint8)
                mask[y : y + 14, x : x + 14] = 255
                (root / "ground_truth/square").mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(root / f"ground_truth/square/{number:03d}_mask.png")
            Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return root


def folder(root: Path, name: str = "widget", **arguments: object) -> Folder:
    """The data module of a category that ``write_category`` wrote; all its test images are validation images too."""
    return Folder(name, root=root, **{"num_workers": 0, "val_split_mode": "same_as_test", **LAYOUT, **arguments})


def files(root: Path) -> list[str]:
    """Every file below a folder, as a path from there."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.fixture
def anomalib(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """The ``anomalib`` command, in this process; results are under ``tmp_path``."""
    return partial(run_in_process, cwd=tmp_path)


@pytest.fixture(scope="session")
def category(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small MVTec-layout category with masks; not to be written to."""
    return write_category(tmp_path_factory.mktemp("data") / "widget")


def part(root: Path, name: str, **arguments: object) -> Folder:
    """A category to train on: what SDP+ learns from is the test split."""
    return folder(root / name, name, **{"normal_dir": "test/good", "val_split_mode": "from_test", **arguments})


def auxiliary(root: Path, names: Sequence[str] = ("gear", "plate"), **arguments: object) -> AuxiliaryDataModule:
    """The two categories of ``auxiliary_root``, or one, in small batches."""
    defaults = {"num_workers": 0, "val_split_ratio": 0.25, "train_batch_size": 4, "eval_batch_size": 4}
    return AuxiliaryDataModule([part(root, name) for name in names], **{**defaults, **arguments})


def fitted(
    small_clip: str, root: Path, where: Path, epochs: int = 2, **arguments: object
) -> tuple[ClipAdSdpPlus, Engine]:
    """SDP+ after some epochs on ``auxiliary_root``, always the same."""
    torch.manual_seed(0)
    model, engine = ClipAdSdpPlus(backbone=small_clip, lr=1e-2, visualizer=False), new_engine(where, max_epochs=epochs)
    engine.fit(model, datamodule=auxiliary(root, **arguments))
    return model, engine


def state(model: ClipAdSdpPlus) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.model.adapter.state_dict().items()}


def weights(engine: Engine, name: str) -> Path:
    return Path(engine.trainer.default_root_dir) / "weights/lightning" / name


@pytest.fixture(scope="session")
def auxiliary_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two categories in MVTec layout, with masks; not to be written to."""
    root = tmp_path_factory.mktemp("auxiliary")
    for name in ("gear", "plate"):
        write_category(root / name, normal=6, broken=8)
    return root


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two small pictures in a folder of their own."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(folder / name)
    return folder


def write_good(root: Path, images: int, size: int = 48, seed: int = 5) -> Path:
    """Normal images as ``write_category`` makes them."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(images):
        Image.fromarray(rng.integers(60, 120, (size, size, 3), dtype=np.uint8)).save(root / f"{number:03d}.png")
    return root


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A category with 12 normal training images; not to be written to."""
    root = write_category(tmp_path_factory.mktemp("parts") / "widget", normal=6, broken=5)
    shutil.rmtree(root / "train/good")
    write_good(root / "train/good", 12)
    return root


def pixels_of(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB")).astype(int)
