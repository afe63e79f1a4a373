"""SDP+: the authors' numbers, and the losses from their equations."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from anomalib_clipad import ClipAdSdpPlus
from anomalib_clipad.sdp_plus import ClipAdSdpPlusModel, dice_loss, focal_loss

from .conftest import Parity, fitted, state, weights

TAPS = range(4)


@pytest.fixture
def release(parity: Parity) -> ClipAdSdpPlusModel:
    """SDP+ as the release ran it for the parity numbers."""
    classes, sigma = parity.meta["classes"], parity.meta["smoothing"]
    model = ClipAdSdpPlusModel(clip=parity.clip(), class_names=classes, rvs="mean", sigma=sigma)
    keys = [f"{tap}.{kind}" for tap in TAPS for kind in ("weight", "bias")]
    model.adapter.load_state_dict({key: parity[f"plus/weight/fc.{key}"] for key in keys})
    return model


def probabilities(model: ClipAdSdpPlusModel, parity: Parity) -> list[torch.Tensor]:
    original = [parity[f"features/original/{layer}"] for layer in parity.meta["features_list"]]
    return model.linear_probabilities(original, model.select_text_features(parity["input/class_index"]))


def test_maps_and_scores_equal_release(parity: Parity, release: ClipAdSdpPlusModel) -> None:
    linear = sum(p[:, 1] for p in probabilities(release, parity))
    torch.testing.assert_close(linear, parity["plus/linear_map"], atol=1e-5, rtol=0)
    scores = release.scores(parity["input/image"], parity["input/class_index"])
    for key in ("text_score", "map_score"):
        torch.testing.assert_close(getattr(scores, key), parity[f"plus/{key}"], atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.anomaly_map, parity["plus/map"], atol=1e-5, rtol=0)


def test_loss_parts_equal_release(parity: Parity, release: ClipAdSdpPlusModel) -> None:
    for tap, p in enumerate(probabilities(release, parity)):
        ours = [focal_loss(p, parity["plus/mask"]).item(), dice_loss(p[:, 1], parity["plus/mask"]).item()]
        assert ours == pytest.approx(parity["plus/loss_parts"][tap].tolist(), rel=1e-4)


def test_five_adam_steps_equal_release(parity: Parity, release: ClipAdSdpPlusModel) -> None:
    optimizer = torch.optim.Adam(release.adapter.parameters(), lr=1e-4)
    losses = []
    for _ in range(5):
        parts = [
            focal_loss(p, parity["plus/mask"]) + dice_loss(p[:, 1], parity["plus/mask"])
            for p in probabilities(release, parity)
        ]
        loss = sum(parts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(parity["plus/losses"].tolist(), rel=1e-4)
    for key, value in release.adapter.state_dict().items():
        torch.testing.assert_close(value, parity[f"plus/weight_after_5_steps/fc.{key}"], atol=1e-5, rtol=0)


def naive_losses(anomalous: torch.Tensor, masks: torch.Tensor) -> tuple[float, float]:
    """Pixel by pixel and image by image, in float64."""
    focal, dice = [], []
    for p, m in zip(anomalous.double().tolist(), masks.tolist(), strict=True):
        inside = total = 0.0
        for values, marks in zip(p, m, strict=True):
            for value, mark in zip(values, marks, strict=True):
                one_hot = [min(max(1.0 - mark, 1e-5), 1 - 1e-5), min(max(float(mark), 1e-5), 1 - 1e-5)]
                true = one_hot[0] * (1 - value) + one_hot[1] * value + 1e-5
                focal.append(-((1 - true) ** 2) * np.log(true))
                inside += value * mark
                total += value + mark
        dice.append((2 * inside + 1) / (total + 1))
    return float(np.mean(focal)), 1 - float(np.mean(dice))


@pytest.mark.parametrize("mask", ["some", "empty", "full"])
@pytest.mark.parametrize("level", ["random", 0.0, 1.0])
def test_losses_follow_the_equations_and_stay_finite(mask: str, level: float | str) -> None:
    masks = {"some": torch.rand(3, 6, 5) > 0.7, "empty": torch.zeros(3, 6, 5), "full": torch.ones(3, 6, 5)}[mask].int()
    anomalous = torch.rand(3, 6, 5) if level == "random" else torch.full((3, 6, 5), level)
    anomalous.requires_grad_()
    ours = focal_loss(torch.stack([1 - anomalous, anomalous], dim=1), masks), dice_loss(anomalous, masks)
    assert [loss.item() for loss in ours] == pytest.approx(naive_losses(anomalous.detach(), masks), rel=1e-5, abs=1e-7)
    sum(ours).backward()
    assert anomalous.grad.isfinite().all()


def test_every_kind_of_adapter_file_gives_the_same_layers(
    small_clip: str, auxiliary_root: Path, tmp_path: Path
) -> None:
    model, engine = fitted(small_clip, auxiliary_root, tmp_path, epochs=1)
    model.save_adapter(tmp_path / "ours.safetensors")
    linear = {f"fc.{key}": value for key, value in model.model.adapter.state_dict().items()}
    torch.save({"linear_layers": linear}, tmp_path / "release.pth")
    for path in (tmp_path / "ours.safetensors", tmp_path / "release.pth", weights(engine, "model.ckpt")):
        loaded = ClipAdSdpPlus(str(path), backbone=small_clip)
        for key, value in state(model).items():
            assert torch.equal(state(loaded)[key], value), path
        assert loaded.trained_on == ([] if path.suffix == ".pth" else ["gear", "plate"])
    with safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
        assert {"backbone", "weights", "layers", "trained_on"} <= set(file.metadata())
