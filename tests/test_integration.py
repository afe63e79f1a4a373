"""The sequence of anomalib's own integration tests: every entry point of the engine, with checkpoints handed on.

In anomalib's form: dummy data in MVTec layout, a model by its short name, one engine a call. The last step, every
export and its loading, is what test_export.py begins with.
"""

from pathlib import Path

import pytest
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.models import get_model, list_models

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.data import AuxiliaryDataModule

from .conftest import ROUNDING, write_category

NAMES = ["clip_ad_sdp", "clip_ad_sdp_plus"]


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("datasets")
    for name in ("dummy", "other"):
        write_category(root / "mvtecad" / name)
    return root


@pytest.fixture(scope="module")
def project_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("project")


def dummy(dataset_path: Path, category: str = "dummy") -> MVTecAD:
    return MVTecAD(dataset_path / "mvtecad", category, eval_batch_size=4, train_batch_size=4, num_workers=0)


def auxiliary(dataset_path: Path) -> AuxiliaryDataModule:
    return AuxiliaryDataModule([dummy(dataset_path, "other")], categories=["other"], num_workers=0)


def objects(name: str, small_clip: str, project_path: Path) -> tuple[ClipAdSdp, Engine]:
    engine = Engine(
        logger=False, default_root_dir=project_path, max_epochs=1, devices=1, accelerator="cpu", num_sanity_val_steps=0
    )
    return get_model(name, backbone=small_clip, visualizer=False), engine


@pytest.fixture(scope="module", params=NAMES)
def fitted(
    request: pytest.FixtureRequest, small_clip: str, dataset_path: Path, project_path: Path
) -> tuple[str, Path, Path]:
    """A model's name, the checkpoint of its fit, and that of its test."""
    name = request.param
    assert name in list_models()
    model, engine = objects(name, small_clip, project_path)
    # SDP+ is trained on other data than those that it is meant for, and only on an AuxiliaryDataModule.
    engine.fit(model, datamodule=auxiliary(dataset_path) if "plus" in name else dummy(dataset_path))
    fit = checkpoint(engine)
    model, engine = objects(name, small_clip, project_path)
    assert "image_AUROC" in engine.test(model, datamodule=dummy(dataset_path), ckpt_path=fit)[0]
    model, engine = objects(name, small_clip, project_path)
    engine.test(
        model if "plus" not in name else model.__class__(str(fit), backbone=small_clip, visualizer=False),
        dummy(dataset_path),
    )
    return name, fit, checkpoint(engine)


def checkpoint(engine: Engine) -> Path:
    return Path(engine.trainer.default_root_dir) / "weights/lightning/model.ckpt"


def test_train(fitted: tuple[str, Path, Path], small_clip: str, dataset_path: Path, project_path: Path) -> None:
    """Train fits what can be fitted and tests."""
    name, fit, _ = fitted
    model, engine = objects(name, small_clip, project_path)
    if "plus" in name:
        figures = engine.train(model, datamodule=auxiliary(dataset_path))
    else:
        figures = engine.train(model, datamodule=dummy(dataset_path), ckpt_path=fit)
    model, engine = objects(name, small_clip, project_path)
    tested = engine.test(model, datamodule=dummy(dataset_path), ckpt_path=fit)[0]
    assert figures[0].keys() == tested.keys()
    assert "plus" in name or figures[0] == pytest.approx(tested, abs=ROUNDING)


def test_validate(fitted: tuple[str, Path, Path], small_clip: str, dataset_path: Path, project_path: Path) -> None:
    name, fit, _ = fitted
    model, engine = objects(name, small_clip, project_path)
    engine.validate(model, datamodule=dummy(dataset_path), ckpt_path=fit)
    assert model.post_processor.image_threshold.isfinite()


@pytest.mark.parametrize("way", ["datamodule", "dataloader", "path"])
def test_predict(
    fitted: tuple[str, Path, Path], small_clip: str, dataset_path: Path, project_path: Path, way: str
) -> None:
    name, _, tested = fitted
    model, engine = objects(name, small_clip, project_path)
    data = dummy(dataset_path)
    data.setup()
    source = {
        "datamodule": {"datamodule": data},
        "dataloader": {"dataloaders": data.test_dataloader()},
        "path": {"data_path": dataset_path / "mvtecad/dummy/test"},
    }[way]
    batches = engine.predict(model, ckpt_path=tested, **source)
    assert sum(len(batch.pred_label) for batch in batches) == 11
    assert all(batch.anomaly_map.shape[-2:] == (32, 32) for batch in batches)
