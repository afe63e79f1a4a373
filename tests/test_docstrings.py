"""Every public name says what it does, with an example that runs."""

import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch

import anomalib_clipad

from .conftest import folder

MODULES = sorted(info.name for info in pkgutil.walk_packages(anomalib_clipad.__path__, "anomalib_clipad."))
PACKAGES = (
    "anomalib_clipad",
    "anomalib_clipad.compare",
    "anomalib_clipad.components",
    "anomalib_clipad.data",
    "anomalib_clipad.demo",
    "anomalib_clipad.page",
    "anomalib_clipad.sdp",
    "anomalib_clipad.sdp_plus",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(
    name: str, small_clip: str, image_folder: Path, category: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(image_folder.parent)
    widgets = folder(category, normal_dir="test/good", val_split_mode="from_test")
    torch.manual_seed(0)
    failed, _ = doctest.testmod(
        importlib.import_module(name),
        extraglobs={"small_clip": small_clip, "image_folder": image_folder, "widgets": widgets},
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
    assert not failed


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_an_example(package: str) -> None:
    module = importlib.import_module(package)
    lacking = [
        name
        for name in module.__all__
        if callable(getattr(module, name)) and ">>>" not in (inspect.getdoc(getattr(module, name)) or "")
    ]
    assert not lacking
