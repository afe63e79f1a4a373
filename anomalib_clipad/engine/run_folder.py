"""Where the results of a run go: every run of test or predict has a folder of its own."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, cast

from anomalib.utils.path import create_versioned_dir
from lightning.pytorch import Callback, LightningModule, Trainer

from anomalib_clipad.data.readable import ReadableDataset
from anomalib_clipad.errors import InputError
from anomalib_clipad.files import replacing

ATTEMPTS = 10  # at a folder of a new number, while other runs make theirs
IMAGES = "images"  # folder of the pictures in that of the run
HEATMAPS, MASKS = "heatmaps", "masks"  # likewise, of heatmaps and masks in the pictures' own size


class RunFolder(Callback):
    """Makes a run's folder when it begins, in that of the trainer: ``test/v0``, ``test/v1``, or ``predict/v0``.

    A link ``latest`` beside them points to the newest, where the file system has links. The first process makes the
    folder, all processes know it, and nothing is made for a run that keeps no results. The model puts this callback
    before all that write into the folder; they ask :func:`run_folder` for it when an epoch starts. That is behind the
    model's own start, so a run that cannot begin leaves no folder.

    Example:
        >>> RunFolder().path is None
        True
    """

    def __init__(self) -> None:
        self.path: Path | None = None

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the folder."""
        del pl_module
        path, problem = None, None
        if trainer.is_global_zero:
            try:
                link_latest(trainer)
                path = _new_folder(Path(trainer.default_root_dir) / ("predict" if trainer.predicting else "test"))
            except InputError as error:
                problem = str(error)  # for all processes, which wait for the folder
        path, problem = trainer.strategy.broadcast((path, problem))
        if problem is not None:
            raise InputError(problem)
        self.path = path

    on_predict_epoch_start = on_test_epoch_start


def run_folder(trainer: Trainer) -> Path:
    """Folder of the present run of test or predict, for every callback that writes results.

    ``predictions.csv`` and ``images/`` lie in it. Without a :class:`RunFolder`, as with models of others, it is the
    trainer's own.

    Args:
        trainer: The run's.

    Example:
        >>> run_folder(Trainer(default_root_dir="results", logger=False, accelerator="cpu"))
        PosixPath('results')
    """
    for callback in cast("Any", trainer).callbacks:
        if isinstance(callback, RunFolder) and callback.path is not None:
            return callback.path
    return Path(trainer.default_root_dir)


def images_of(trainer: Trainer) -> Iterator[str]:
    """Paths of all images that the run is to read, also of those that it cannot; none where the data do not say.

    Example:
        >>> list(images_of(Trainer(logger=False, accelerator="cpu")))
        []
    """
    for loader in _loaders(trainer):
        yield from loader.dataset.image_paths()


def skipped_images(trainer: Trainer, scored: Collection[str]) -> list[str]:
    """Images that the run was to read and has not scored; those behind a limit of batches were not asked for.

    Args:
        trainer: The run's, at its end.
        scored: Paths of the images that were scored, by all processes.

    Example:
        >>> skipped_images(Trainer(logger=False, accelerator="cpu"), [])
        []
    """
    done, skipped = set(scored), []
    limits = trainer.num_predict_batches if trainer.predicting else trainer.num_test_batches
    for loader, most in zip(_loaders(trainer), limits, strict=False):
        paths = loader.dataset.image_paths()
        if most < len(loader):  # unreadable batches do not count, so it may have gone on behind them
            last = max((number for number, path in enumerate(paths) if path in done), default=-1)
            paths = paths[: max(last + 1, int(most) * (loader.batch_size or 1) * trainer.world_size)]
        skipped += [path for path in paths if path not in done]
    return sorted(skipped)


def _loaders(trainer: Trainer) -> list[Any]:
    """The loaders of the run whose data set names its images."""
    loaders: Any = trainer.predict_dataloaders if trainer.predicting else trainer.test_dataloaders
    if trainer.validating:
        loaders = trainer.val_dataloaders
    of_run = loaders if isinstance(loaders, list | tuple) else [loaders]
    return [loader for loader in of_run if isinstance(getattr(loader, "dataset", None), ReadableDataset)]


def share_folder(trainer: Trainer) -> None:
    """Have the link ``latest`` point to the folder that training by several processes writes into.

    anomalib makes a folder of its own in every process, and a link to the last one, while the first process alone
    writes. Those of the others are removed.

    Args:
        trainer: The run's, of every process.

    Example:
        >>> share_folder(Trainer(logger=False, accelerator="cpu"))  # nothing to do for one process
    """
    if trainer.world_size == 1:
        return
    folder = Path(trainer.strategy.broadcast(trainer.default_root_dir))
    if (own := Path(trainer.default_root_dir)) != folder:
        with suppress(OSError):  # something is in it
            own.rmdir()
    trainer.strategy.barrier("folders are removed")
    latest = folder.parent / "latest"
    if trainer.is_global_zero and latest.is_symlink():
        with writing(latest), replacing(latest) as draft:
            draft.symlink_to(folder, target_is_directory=True)


def link_latest(trainer: Trainer) -> None:
    """Make the folder ``latest`` of a run before any training as training does: a link to the first version.

    anomalib names it and leaves it to who writes first. Made as a folder, it would end a later fit, which puts a link
    in its place. It stays a folder on Windows, since anomalib does not write through links there, and where the file
    system has no links, as network shares and memory cards may not.

    Args:
        trainer: The run's.

    Raises:
        InputError: If the folder cannot be made.

    Example:
        >>> link_latest(Trainer(default_root_dir="results/latest", logger=False, accelerator="cpu"))
        >>> Path("results/latest").resolve().name
        'v0'
    """
    root = Path(trainer.default_root_dir)
    if root.name != "latest" or root.exists() or not trainer.is_global_zero or os.name == "nt":
        return
    with writing(root), suppress(FileExistsError, IsADirectoryError):  # another run makes it at this moment
        if _has_links(root.parent):
            create_versioned_dir(root.parent)


def check_root(trainer: Trainer) -> None:
    """Say in one sentence that nothing can be written, before anomalib's command line saves its configuration there.

    Args:
        trainer: The run's; its folder is made.

    Raises:
        InputError: If the folder cannot be made or written to.

    Example:
        >>> check_root(Trainer(default_root_dir="results", logger=False, accelerator="cpu"))
        >>> Path("results").is_dir()
        True
    """
    link_latest(trainer)
    root = Path(trainer.default_root_dir)
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=root) as file:
            file.write(b"?")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one sentence what cannot be written, as on a full disk.

    Args:
        path: The file or folder.

    Raises:
        InputError: In place of the system's error.

    Example:
        >>> with writing(Path("missing/table.csv")):
        ...     _ = Path("missing/table.csv").write_text("a,b")
        Traceback (most recent call last):
        ...
        anomalib_clipad.errors.InputError: missing/table.csv cannot be written (No such file or directory); ...
    """
    try:
        yield
    except OSError as error:
        msg = (
            f"{path} cannot be written ({error.strerror or error}); what was written stays. Make room there, or set "
            "default_root_dir to another folder."
        )
        raise InputError(msg) from error


def _has_links(folder: Path) -> bool:
    """Whether links can be made in a folder; by trying it, since systems name the failure differently."""
    if os.name == "nt":
        return True  # anomalib has other means there
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".") as name:
        try:
            (Path(name) / "link").symlink_to(name)
        except OSError:
            return False
    return True


def _new_folder(root: Path) -> Path:
    with writing(root):
        if not _has_links(root):
            return _numbered_folder(root)
        for _ in range(ATTEMPTS - 1):
            try:
                return create_versioned_dir(root)
            except (FileExistsError, FileNotFoundError):  # another run has taken the number, or the link
                continue
        return create_versioned_dir(root)


def _numbered_folder(root: Path) -> Path:
    """As anomalib numbers them."""
    number = 1 + max((int(path.name[1:]) for path in root.glob("v*") if path.name[1:].isdecimal()), default=-1)
    while True:
        try:
            (folder := root / f"v{number}").mkdir()
        except FileExistsError:  # another run has taken the number
            number += 1
        else:
            return folder
