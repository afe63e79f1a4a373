"""What the demonstration backbone is trained on: nothing that it is tested on, and what its losses ask for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from anomalib_clipad.demo.canvas import Canvas
from anomalib_clipad.demo.defects import DEFECTS
from anomalib_clipad.demo.textures import HELD_OUT, SURFACES, TRAINING, VALIDATION

from .conftest import ROOT


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of the training, which lie beside their script."""
    monkeypatch.syspath_prepend(str(ROOT / "examples/demo"))
    import captioned_pictures
    import losses
    import namesakes
    import train_backbone

    return SimpleNamespace(pictures=captioned_pictures, losses=losses, namesakes=namesakes, script=train_backbone)


def test_held_out_surfaces_are_never_rendered_and_namesakes_are_never_broken(
    training: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Canvas) -> None:
        pytest.fail("a held-out surface was rendered")

    for name in HELD_OUT:
        monkeypatch.setitem(SURFACES, name, refuse)
    assert set(training.namesakes.NAMESAKES) == set(HELD_OUT)
    for number, name in enumerate((*TRAINING, *VALIDATION, *HELD_OUT)):
        images, masks, kinds = training.pictures._picture((name, number))
        flawless_only = name in HELD_OUT
        assert (len(images), max(kinds) >= 0, bool(masks.any())) == (
            1 if flawless_only else 3,
            *2 * [not flawless_only],
        )


def test_a_batch_goes_through_every_part_of_the_loss(training: SimpleNamespace) -> None:
    surfaces = list(TRAINING[:3])
    shown = [training.pictures._picture((name, number)) for number, name in enumerate(surfaces)]
    others = [training.pictures._picture((name, number)) for number, name in enumerate(HELD_OUT)]

    def pool(pictures: list, names: list[str]) -> tuple:
        values = (torch.from_numpy(np.stack([np.asarray(p[k]) for p in pictures])) for k in range(3))
        return training.pictures.Pictures(*values, names)

    sampler = training.pictures.Sampler(pool(shown, surfaces), pool(others, list(HELD_OUT)), 0, 32)
    batch = sampler.batch(3, 2)
    lessons = training.losses.Lessons(training.script.new_clip(0), len(sampler.surfaces), len(DEFECTS))
    parts = lessons(batch)
    assert set(parts) == set(training.script.WEIGHTS)
    sum(parts.values()).backward()
    unused = [name for name, p in lessons.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused


def test_the_naming_loss_is_what_the_model_names(training: SimpleNamespace) -> None:
    """Small where the patches that are marked point to the defect's word, large where they point to another."""
    batch = SimpleNamespace(kinds=torch.tensor([2, -1]))
    marked = torch.full((2, 144), -1.0)
    marked[0, 65:67] = 1.0
    tokens = torch.full((2, 145, len(DEFECTS)), 1e-3)
    losses = {}
    for kind in (2, 5):
        tokens[0, 66:68] = torch.eye(len(DEFECTS))[kind]
        evidence = training.losses.naming_evidence([tokens], torch.eye(len(DEFECTS)))
        losses[kind] = training.losses.naming(100 * evidence, training.losses.as_marked(marked), batch).item()
    assert losses[2] < 0.1 < 5 < losses[5]
