"""Parts of anomalib, Lightning and open_clip that are not their public interface, and that this package relies on.

A new minor version may move any of them; each failure here names the part that is gone.
"""

import importlib
import inspect

import pytest
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Trainer

PARTS = [
    # Where the models and the commands are registered, see plugin.py.
    "anomalib.models:ALLOWED_MODULES",
    "anomalib.cli.cli:main",
    "anomalib.cli.pipelines:PIPELINE_REGISTRY",
    # What the comparison overrides or calls.
    "anomalib.pipelines.components:Pipeline._get_args",
    "anomalib.pipelines.components:Pipeline._setup_runners",
    "anomalib.pipelines.components.runners.parallel:ParallelRunner._await_cleanup_processes",
    # Scores and export.
    "anomalib.post_processing:PostProcessor._normalize",
    "anomalib.models.components.base.export_mixin:ExportMixin._post_training_quantization_ov",
    # Several processes.
    "lightning.pytorch.strategies:Strategy.process_dataloader",
    "lightning.pytorch.strategies:Strategy.checkpoint_io",
    "anomalib.engine.plugins.checkpoint_io:AnomalibCheckpointIO",
    "lightning.pytorch.overrides.distributed:UnrepeatedDistributedSampler",
    # How open_clip names, finds and renames weights.
    "open_clip.model:convert_to_custom_text_state_dict",
    "open_clip.pretrained:download_pretrained",
    "open_clip.pretrained:get_pretrained_cfg",
    "open_clip.pretrained:list_pretrained_tags_by_model",
]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_host_is_where_it_was(part: str) -> None:
    module, path = part.split(":")
    found: object = importlib.import_module(module)
    for name in path.split("."):
        assert hasattr(found, name), f"{part} is gone: {name} is missing in {found!r}"
        found = getattr(found, name)


@pytest.mark.parametrize(
    "name",
    [
        "_image_threshold",
        "_image_threshold_metric",
        "_image_min_max_metric",
        "_pixel_threshold_metric",
        "_pixel_min_max_metric",
    ],
)
def test_the_post_processor_has_its_metrics(name: str) -> None:
    assert hasattr(PostProcessor(), name), f"PostProcessor.{name} is gone"


def test_the_trainer_has_what_a_run_is_cleaned_of() -> None:
    """``engine/host.py`` looks the data module up there, and empties what was logged."""
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    for loop in (trainer.fit_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        assert hasattr(loop, "_data_source"), f"{type(loop).__name__}._data_source is gone"
    for loop in (trainer.validate_loop, trainer.test_loop):
        assert isinstance(loop._results, dict), f"{type(loop).__name__}._results is gone"
    assert isinstance(trainer.callbacks, list)


def test_the_errors_of_a_union_are_in_a_list_of_the_parser() -> None:
    """``errors.py`` looks there for an InputError."""
    typehints = importlib.import_module("jsonargparse._typehints")
    assert "exceptions" in inspect.signature(typehints.raise_union_unexpected_value).parameters
