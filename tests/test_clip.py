"""Which CLIP is built: its activation, and its random weights."""

from typing import NoReturn

import pytest
import torch

from anomalib_clipad import InputError
from anomalib_clipad.components import fingerprint, load_backbone
from anomalib_clipad.components.clip import Architecture

from .conftest import SMALL_CONFIG, make_clip


def test_another_activation_is_another_clip() -> None:
    exact, quick, again = (make_clip(3, quick_gelu=quick).visual for quick in (False, True, False))
    assert fingerprint(exact) == fingerprint(again) != fingerprint(quick)


@pytest.mark.parametrize(
    ("backbone", "tag", "quick"),
    [
        ("ViT-B-32", "laion400m_e32", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
        ("ViT-B-16", "dfn2b", True),
        ("ViT-B-16", "openai", True),
        ("ViT-B-16-plus-240", "laion400m_e31", False),
    ],
)
def test_weights_have_the_activation_that_they_were_trained_with(
    backbone: str, tag: str, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def build(*arguments: object) -> NoReturn:
        asked.append(arguments[2])
        raise InputError

    monkeypatch.setattr("anomalib_clipad.components.backbone.Architecture", build)
    with pytest.raises(InputError):
        load_backbone(backbone, tag)
    assert asked == [quick]


def test_random_weights_leave_generators_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "manual_seed", lambda _: pytest.fail("seeds the GPUs, too"))
    before = torch.get_rng_state()
    Architecture("tiny", SMALL_CONFIG).build()
    assert torch.equal(torch.get_rng_state(), before)
