"""What anomalib and Lightning have no seam for, each as a context manager that leaves the trainer as it was.

A run enters them through :class:`RunGuard`, which also ends them when the run fails.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

from anomalib.callbacks.checkpoint import ModelCheckpoint
from anomalib.data import AnomalibDataModule
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from anomalib_clipad.data.readable import ReadableDataLoader
from anomalib_clipad.engine.checkpoint_file import CheckedCheckpointIO
from anomalib_clipad.engine.precision import warn_of_rounded_weights, warn_of_slow_precision
from anomalib_clipad.engine.scored_batches import ScoredBatches

LOOPS = {
    TrainerFn.FITTING: "fit_loop",
    TrainerFn.VALIDATING: "validate_loop",
    TrainerFn.TESTING: "test_loop",
    TrainerFn.PREDICTING: "predict_loop",
}


def datamodule_of(trainer: Trainer) -> AnomalibDataModule | None:
    """The data module of the present run; ``trainer.datamodule`` may be that of an earlier one."""
    source = _source_of(trainer)
    return source if isinstance(source, AnomalibDataModule) else None


def has_validation(trainer: Trainer) -> bool:
    """Whether the present run may have validation images: a data module without any lacks the data set."""
    datamodule = datamodule_of(trainer)
    return datamodule is None or hasattr(datamodule, "val_data")


def datasets_of(trainer: Trainer) -> list[Any]:
    """The data sets of the present run, normal training images first."""
    source = _source_of(trainer)
    if isinstance(source, AnomalibDataModule):
        return datasets_in(source)
    loaders = source if isinstance(source, list | tuple) else [source]
    return [loader.dataset for loader in loaders if isinstance(loader, DataLoader)]


def datasets_in(datamodule: AnomalibDataModule) -> list[Any]:
    """The data sets of a data module that was set up, normal training images first."""
    subsets = (getattr(datamodule, name, None) for name in ("train_data", "val_data", "test_data"))
    return [subset for subset in subsets if subset is not None]


def _source_of(trainer: Trainer) -> object:
    return None if trainer.state.fn is None else getattr(trainer, LOOPS[trainer.state.fn])._data_source.instance


def drop_components_of_other_models(trainer: Trainer) -> None:
    """Remove the callbacks that another model has left in the trainer.

    Lightning replaces a callback by one of the same class or of a subclass only. One engine then runs the components of
    two models at once if their classes differ. Users give these kinds to the model; an evaluator of a class of its own
    may be the engine's and stays.
    """
    kinds = (PreProcessor, PostProcessor, Visualizer, RunGuard)
    _keep_callbacks(trainer, lambda callback: not isinstance(callback, kinds) and type(callback) is not Evaluator)


def _keep_callbacks(trainer: Trainer, wanted: Callable[[Callback], bool]) -> None:
    owner = cast("Any", trainer)  # Lightning adds the list outside of the class, where no type checker sees it
    owner.callbacks = [callback for callback in owner.callbacks if wanted(callback)]


@contextmanager
def readable_images(trainer: Trainer) -> Iterator[None]:
    """Skip images that cannot be read, give each image to one process, read large ones ahead, and keep small copies.

    Only a strategy of one's own could wrap the loaders that Lightning makes, and the strategy is the user's choice.
    """
    strategy = trainer.strategy
    process_dataloader = strategy.process_dataloader
    # Not while fitting, where the processes wait for each other at every batch, and reading may draw random numbers.
    each_once = trainer.state.fn != TrainerFn.FITTING
    drawing = trainer.state.fn in (TrainerFn.TESTING, TrainerFn.PREDICTING)
    sides = [one.longest_side for one in cast("Any", trainer).callbacks if isinstance(one, ScoredBatches)]
    preview_side = max(sides, default=0) if drawing else 0

    def process(dataloader: object) -> object:
        loader = process_dataloader(dataloader)
        if not isinstance(loader, DataLoader) or not ReadableDataLoader.can_wrap(loader):
            return loader
        on_gpu = strategy.root_device.type == "cuda"
        return ReadableDataLoader(loader, each_once, on_gpu, ahead=each_once, preview_side=preview_side)

    strategy.process_dataloader = process  # type: ignore[method-assign]  # for this run, see above
    try:
        yield
    finally:
        del strategy.process_dataloader


@contextmanager
def images_converted_on_the_gpu(trainer: Trainer) -> Iterator[None]:
    """Leave images in float32 until they are on the GPU, where the network takes them to its own precision.

    Under ``bf16-true`` and ``16-true`` Lightning converts every batch on the host before it is copied: large pictures,
    into memory that is not pinned. Training, whose features may be kept, stays as it is.
    """
    plugin = trainer.precision_plugin
    on_gpu = trainer.strategy.root_device.type == "cuda"
    wanted = on_gpu and isinstance(plugin, HalfPrecision) and trainer.state.fn != TrainerFn.FITTING
    if wanted:
        plugin.convert_input = lambda data: data  # type: ignore[method-assign]  # for this run
    try:
        yield
    finally:
        if wanted:
            del plugin.convert_input


@contextmanager
def own_figures(trainer: Trainer) -> Iterator[None]:
    """Let the trainer forget which figures were logged, before and after this run.

    It keeps them under their names, and refuses a figure of one name that comes from another metric of another model.
    """
    loops = (trainer.validate_loop, trainer.test_loop)
    for loop in loops:
        loop._results.clear()
    try:
        yield
    finally:
        for loop in loops:
            loop._results.clear()


@contextmanager
def checked_checkpoints(trainer: Trainer) -> Iterator[None]:
    """Read checkpoints with sentences for those that cannot be read; Lightning's own seam, used for one run."""
    reader = trainer.strategy.checkpoint_io
    if type(reader) is AnomalibCheckpointIO:
        trainer.strategy.checkpoint_io = CheckedCheckpointIO(reader.extra_safe_globals)
    try:
        yield
    finally:
        trainer.strategy.checkpoint_io = reader


@contextmanager
def no_validation(trainer: Trainer) -> Iterator[None]:
    """Run no validation batch: anomalib validates zero-shot models first, also without validation data."""
    limit, trainer.limit_val_batches = trainer.limit_val_batches, 0
    trainer.validate_loop._max_batches = []  # an earlier run's, which a limit of 0 leaves
    try:
        yield
    finally:
        trainer.limit_val_batches = limit


def _name_best(callback: ModelCheckpoint, path: str) -> None:
    """Let an engine's checkpoint name the best of a run until the next that writes one, over what is named."""
    callback.best_model_path = path
    callback.setup = partial(_set_up_anew, callback)  # type: ignore[method-assign]  # until then


def _set_up_anew(callback: ModelCheckpoint, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
    if stage in (TrainerFn.FITTING, TrainerFn.VALIDATING):
        del callback.setup
        callback.best_model_path = ""
    type(callback).setup(callback, trainer, pl_module, stage)


class RunGuard(Callback):
    """Enters the context managers of this file at the start of a run, and leaves them at its end.

    It then takes the model's callbacks out of the trainer, and puts those back that they have displaced, so that the
    next model on one engine runs as if there had been none.

    Args:
        callbacks: The model's.

    Example:
        >>> RunGuard([]).state_key
        'RunGuard'
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._stack = ExitStack()
        self._ours = {id(callback) for callback in (self, *callbacks)}
        self._displaced: list[Checkpoint] = []
        self._best: ModelCheckpoint | None = None

    def add_checkpoints(self, trainer: Trainer, own: Sequence[ModelCheckpoint]) -> None:
        """Take checkpoints of this run alone among the model's callbacks; the first one keeps the best."""
        self._best = own[0]
        self._ours |= {id(callback) for callback in own}
        self._displaced = [one for one in cast("Any", trainer).callbacks if isinstance(one, Checkpoint)]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepare the trainer."""
        warn_of_slow_precision(trainer)
        warn_of_rounded_weights(trainer, next(pl_module.parameters()).dtype)
        self._stack.enter_context(readable_images(trainer))
        self._stack.enter_context(images_converted_on_the_gpu(trainer))
        self._stack.enter_context(checked_checkpoints(trainer))
        self._stack.enter_context(own_figures(trainer))
        if stage == "validate" and not has_validation(trainer):
            self._stack.enter_context(no_validation(trainer))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint that anomalib writes after validation, where there was none."""
        if has_validation(trainer) or getattr(pl_module, "restored", False):
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor is None:
                found = callback._monitor_candidates(trainer)
                path = callback._get_metric_interpolated_filepath_name(found, trainer, callback.best_model_path)
                trainer.save_checkpoint(path)
                callback.best_model_path = path

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        del pl_module, stage
        self._stack.close()
        _keep_callbacks(trainer, lambda callback: id(callback) not in self._ours)
        for callback in self._displaced:
            if callback not in cast("Any", trainer).callbacks:
                if isinstance(callback, ModelCheckpoint) and self._best is not None:
                    _name_best(callback, self._best.best_model_path)
                cast("Any", trainer).callbacks.append(callback)
        self._displaced = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise after a failure."""
        del exception
        self.teardown(trainer, pl_module, "")
