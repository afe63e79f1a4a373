"""SDP+: the authors' numbers, the losses from their equations, and training as a user does it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from PIL import Image
from safetensors import safe_open

from anomalib_clipad import ClipAdSdpPlus, InputError
from anomalib_clipad.data import AuxiliaryDataModule
from anomalib_clipad.sdp_plus import ClipAdSdpPlusModel, dice_loss, focal_loss, save_adapter

from .conftest import Parity, new_engine, save_clip, write_category

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


@pytest.fixture(scope="module")
def auxiliary_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two categories in MVTec layout, with masks."""
    root = tmp_path_factory.mktemp("auxiliary")
    for name in ("gear", "plate"):
        write_category(root / name, normal=6, broken=8)
    return root


def part(root: Path, name: str, **arguments: object) -> Folder:
    keys = {"normal_dir": "test/good", "normal_test_dir": "test/good", "abnormal_dir": "test/square"}
    return Folder(name, root=root / name, **{"mask_dir": "ground_truth/square", **keys, **arguments})


def auxiliary(root: Path, **arguments: object) -> AuxiliaryDataModule:
    parts = [part(root, name) for name in ("gear", "plate")]
    defaults = {"num_workers": 0, "val_split_ratio": 0.25, "train_batch_size": 4, "eval_batch_size": 4}
    return AuxiliaryDataModule(parts, **{**defaults, **arguments})


def fitted(
    small_clip: str, root: Path, where: Path, epochs: int = 2, **arguments: object
) -> tuple[ClipAdSdpPlus, Engine]:
    torch.manual_seed(0)
    model, engine = ClipAdSdpPlus(backbone=small_clip, lr=1e-2), new_engine(where, max_epochs=epochs)
    engine.fit(model, datamodule=auxiliary(root, **arguments))
    return model, engine


def state(model: ClipAdSdpPlus) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.model.adapter.state_dict().items()}


def weights(engine: Engine, name: str) -> Path:
    return Path(engine.trainer.default_root_dir) / "weights/lightning" / name


def test_training_learns_what_a_defect_is(
    small_clip: str, auxiliary_root: Path, category: Path, tmp_path: Path
) -> None:
    untrained = tmp_path / "untrained.safetensors"
    torch.manual_seed(0)
    model = ClipAdSdpPlus(backbone=small_clip)
    save_adapter(model.model.adapter, untrained)
    before = new_engine(tmp_path).test(
        ClipAdSdpPlus(untrained, backbone=small_clip),
        datamodule=part(category.parent, "widget", val_split_mode="same_as_test", num_workers=0),
    )[0]
    model, _ = fitted(small_clip, auxiliary_root, tmp_path / "fit", epochs=6)
    after = new_engine(tmp_path / "test").test(
        model, datamodule=part(category.parent, "widget", val_split_mode="same_as_test", num_workers=0)
    )[0]
    assert after["pixel_AP"] > 2 * before["pixel_AP"]
    assert model.model.class_names == ("widget",)


def test_only_the_linear_layers_are_trained(small_clip: str, auxiliary_root: Path, tmp_path: Path) -> None:
    clip = ClipAdSdpPlus(backbone=small_clip).model.visual.state_dict()
    model, engine = fitted(small_clip, auxiliary_root, tmp_path, epochs=1)
    assert all(torch.equal(value, clip[key]) for key, value in model.model.visual.state_dict().items())
    assert not model.model.visual.training
    assert {"train_loss", "train_focal", "train_dice", "pixel_AP"} <= set(engine.trainer.callback_metrics)


def test_best_checkpoint_is_small_and_the_last_can_be_resumed(
    small_clip: str, auxiliary_root: Path, tmp_path: Path
) -> None:
    whole, _ = fitted(small_clip, auxiliary_root, tmp_path / "whole", epochs=3)
    _, engine = fitted(small_clip, auxiliary_root, tmp_path / "part", epochs=1)
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002 - another global state than before the interruption
    resumed = ClipAdSdpPlus(backbone=small_clip, lr=1e-2)
    second = new_engine(tmp_path / "rest", max_epochs=3)
    second.fit(resumed, datamodule=auxiliary(auxiliary_root), ckpt_path=weights(engine, "last.ckpt"))
    for key, value in state(whole).items():
        torch.testing.assert_close(state(resumed)[key], value, atol=1e-6, rtol=0)
    best = torch.load(weights(engine, "model.ckpt"), weights_only=True)
    assert "optimizer_states" not in best
    assert not any("visual" in key for key in best["state_dict"])


@pytest.mark.parametrize("kept", ["memory", "folder"])
def test_cached_features_change_nothing(small_clip: str, auxiliary_root: Path, tmp_path: Path, kept: str) -> None:
    plain, plain_engine = fitted(small_clip, auxiliary_root, tmp_path / "a")
    cache = True if kept == "memory" else str(tmp_path / "cache")
    cached, engine = fitted(small_clip, auxiliary_root, tmp_path / "b", cache_features=cache)
    for key, value in state(plain).items():
        torch.testing.assert_close(state(cached)[key], value, atol=1e-6, rtol=0)
    for key, value in plain_engine.trainer.callback_metrics.items():
        torch.testing.assert_close(engine.trainer.callback_metrics[key], value, atol=1e-6, rtol=1e-6)
    if kept == "folder":
        count = len(list(Path(cache).iterdir()))
        assert count == 2 * (6 + 8)
        fitted(small_clip, auxiliary_root, tmp_path / "c", epochs=1, cache_features=cache)
        assert len(list(Path(cache).iterdir())) == count
        other = str(save_clip(tmp_path / "other", seed=9))
        fitted(other, auxiliary_root, tmp_path / "d", epochs=1, cache_features=cache)
        assert len(list(Path(cache).iterdir())) == 2 * count, "another CLIP must not be served these features"


def test_bf16_mixed_trains_and_tests(small_clip: str, auxiliary_root: Path, category: Path, tmp_path: Path) -> None:
    model = ClipAdSdpPlus(backbone=small_clip)
    engine = new_engine(tmp_path, max_epochs=1, precision="bf16-mixed")
    engine.fit(model, datamodule=auxiliary(auxiliary_root))
    assert engine.trainer.callback_metrics["train_loss"].isfinite()
    data = part(category.parent, "widget", val_split_mode="same_as_test", num_workers=0)
    assert new_engine(tmp_path / "t", precision="bf16-mixed").test(model, datamodule=data)[0]["pixel_AUROC"] > 0


DDP = """
import sys, torch
from pathlib import Path
from anomalib.engine import Engine
from anomalib_clipad import ClipAdSdpPlus
from tests.test_sdp_plus import auxiliary
if __name__ == "__main__":
    clip, root, out, devices = sys.argv[1:]
    torch.manual_seed(0)
    model = ClipAdSdpPlus(backbone=clip, lr=1e-2)
    engine = Engine(default_root_dir=out, logger=False, enable_progress_bar=False, accelerator="cpu", max_epochs=2,
                    devices=int(devices), strategy="ddp" if int(devices) > 1 else "auto", num_sanity_val_steps=0)
    engine.fit(model, datamodule=auxiliary(Path(root), train_batch_size=4 // int(devices), categories=None))
    if engine.trainer.is_global_zero:
        keep = {k: v.clone() for k, v in engine.trainer.callback_metrics.items() if k.startswith("train")}
        torch.save({"losses": keep, "adapter": model.model.adapter.state_dict()}, out + "/result.pt")
"""


def test_two_processes_learn_what_one_does(small_clip: str, auxiliary_root: Path, tmp_path: Path) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    results = []
    for devices in (1, 2):
        out = tmp_path / str(devices)
        out.mkdir()
        root = Path(__file__).parents[1]
        done = subprocess.run(
            [sys.executable, str(script), small_clip, str(auxiliary_root), str(out), str(devices)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(torch.load(out / "result.pt", weights_only=True))
    one, two = results
    for key, value in one["losses"].items():
        if key.endswith("epoch"):
            torch.testing.assert_close(two["losses"][key], value, atol=1e-5, rtol=1e-5, msg=key)
    for key, value in one["adapter"].items():
        torch.testing.assert_close(two["adapter"][key], value, atol=1e-5, rtol=0, msg=key)


def test_untrained_layers_refuse_to_judge(small_clip: str, category: Path, image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no trained layers yet; give adapter a file, or train it"):
        new_engine(tmp_path).predict(ClipAdSdpPlus(backbone=small_clip), data_path=image_folder)
    data = part(category.parent, "widget", num_workers=0)
    with pytest.raises(InputError, match="no trained layers yet"):
        new_engine(tmp_path).test(ClipAdSdpPlus(backbone=small_clip), datamodule=data)
    with pytest.raises(InputError, match="no trained layers yet"):
        ClipAdSdpPlus(backbone=small_clip).save_adapter(tmp_path / "a.safetensors")


def test_other_data_than_auxiliary_are_refused_for_training(small_clip: str, category: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trained on an AuxiliaryDataModule, got Folder"):
        new_engine(tmp_path).fit(
            ClipAdSdpPlus(backbone=small_clip), datamodule=part(category.parent, "widget", num_workers=0)
        )


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


def test_a_trained_checkpoint_judges_the_class_at_hand(
    small_clip: str, auxiliary_root: Path, category: Path, image_folder: Path, tmp_path: Path
) -> None:
    model, engine = fitted(small_clip, auxiliary_root, tmp_path, epochs=1)
    data = part(category.parent, "widget", val_split_mode="same_as_test", num_workers=0)
    expected = new_engine(tmp_path / "a").test(model, datamodule=data)[0]
    model.save_adapter(tmp_path / "ours.safetensors")
    for arguments in ({"adapter": str(weights(engine, "model.ckpt"))}, {"adapter": str(tmp_path / "ours.safetensors")}):
        other = ClipAdSdpPlus(**arguments, backbone=small_clip)
        assert new_engine(tmp_path / "b").test(other, datamodule=data)[0] == pytest.approx(expected, abs=1e-6)
    restored = ClipAdSdpPlus(backbone=small_clip)
    ours = new_engine(tmp_path / "c").test(restored, datamodule=data, ckpt_path=weights(engine, "model.ckpt"))[0]
    assert restored.model.class_names == ("widget",)
    assert ours == pytest.approx(expected, abs=1e-6)
    batch = new_engine(tmp_path / "d").predict(other, data_path=image_folder)[0]
    assert 0 <= batch.pred_score.item() <= 1


def test_testing_on_what_was_trained_on_warns(
    small_clip: str, auxiliary_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = fitted(small_clip, auxiliary_root, tmp_path, epochs=1)
    assert "not a zero-shot result" not in caplog.text
    new_engine(tmp_path).test(model, datamodule=part(auxiliary_root, "gear", num_workers=0))
    assert "trained on gear: what they score there is not a zero-shot result" in caplog.text


def test_held_out_images_are_of_every_category_and_label(auxiliary_root: Path) -> None:
    data = auxiliary(auxiliary_root)
    data.setup()
    groups = {name: set() for name in ("train", "val")}
    for name in groups:
        part_ = getattr(data, f"{name}_data")
        groups[name] = {part_.path(i) for i in range(len(part_))}
        labels = {(item.class_index, int(item.gt_label)) for item in (part_[i] for i in range(len(part_)))}
        assert labels == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert not groups["train"] & groups["val"]
    assert len(groups["train"] | groups["val"]) == 2 * (6 + 8)
    again = auxiliary(auxiliary_root)
    again.setup()
    assert [again.val_data.path(i) for i in range(len(again.val_data))] == [
        data.val_data.path(i) for i in range(len(data.val_data))
    ]


def test_each_image_is_scored_with_its_own_category(small_clip: str, auxiliary_root: Path, tmp_path: Path) -> None:
    seen = []

    class Watching(ClipAdSdpPlus):
        def training_step(self, batch: object, *args: object, **kwargs: object) -> object:
            seen.extend(zip(batch.image_path, batch.class_index.tolist(), strict=True))
            return super().training_step(batch, *args, **kwargs)

    new_engine(tmp_path, max_epochs=1).fit(Watching(backbone=small_clip), datamodule=auxiliary(auxiliary_root))
    assert seen
    assert all((f"/{('gear', 'plate')[index]}/") in path for path, index in seen)


def test_images_without_masks_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_category(tmp_path / "gear")
    write_category(tmp_path / "plate")
    data = AuxiliaryDataModule([part(tmp_path, "gear"), part(tmp_path, "plate", mask_dir=None)], num_workers=0)
    data.setup()
    assert "plate: 6 anomalous images without a mask are left out" in caplog.text
    assert "plate has no anomalous image with a mask" in caplog.text
    assert len(data.train_data) + len(data.val_data) == 5 + 6 + 5
    data = AuxiliaryDataModule(part(tmp_path, "plate", mask_dir=None))
    with pytest.raises(InputError, match="None of plate has an anomalous image with a mask"):
        data.setup()


def test_a_mask_of_another_size_is_fitted_to_its_image(small_clip: str, tmp_path: Path) -> None:
    root = write_category(tmp_path / "gear")
    for path in (root / "ground_truth/square").iterdir():
        Image.open(path).resize((20, 20), Image.Resampling.NEAREST).save(path)
    engine = new_engine(tmp_path, max_epochs=1)
    engine.fit(
        ClipAdSdpPlus(backbone=small_clip), datamodule=AuxiliaryDataModule(part(tmp_path, "gear"), num_workers=0)
    )
    assert engine.trainer.callback_metrics["train_loss"].isfinite()
