"""Files of checkpoints, which may be damaged or of another kind."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO

from anomalib_clipad.engine.checkpoint_parts import check_parts
from anomalib_clipad.errors import InputError

UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, UnpicklingError)


class CheckedCheckpointIO(AnomalibCheckpointIO):
    """anomalib's reader of checkpoints, for files that may be damaged or of another kind.

    Example:
        >>> CheckedCheckpointIO().load_checkpoint("missing.ckpt")
        Traceback (most recent call last):
        ...
        anomalib_clipad.errors.InputError: ckpt_path missing.ckpt does not exist; give the model.ckpt that ...
    """

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401 - anomalib's
        """Read a checkpoint.

        Raises:
            InputError: If it cannot be read.
        """
        check_is_checkpoint(path)
        try:
            content = super().load_checkpoint(path, *args, **kwargs)
        except UNREADABLE as error:
            raise InputError(unreadable(path, error)) from error
        if not isinstance(content, Mapping):
            msg = f"ckpt_path {path} holds a {type(content).__name__}; give a checkpoint of this model."
            raise InputError(msg)
        check_parts(content)
        return content


def check_is_checkpoint(path: str | Path) -> None:
    """Refuse a file that is no checkpoint.

    Raises:
        InputError: If the file is missing or of another kind.
    """
    path = Path(path)
    if not path.is_file() or not zipfile.is_zipfile(path):
        what = "is not a checkpoint" if path.exists() else "does not exist"
        msg = (
            f"ckpt_path {path} {what}; give the model.ckpt that a test run of this model wrote, or the last.ckpt of a "
            "training to go on with."
        )
        raise InputError(msg)


def unreadable(path: str | Path, error: BaseException) -> str:
    """The sentence about a checkpoint that raised an error.

    Example:
        >>> unreadable("model.ckpt", EOFError())
        'ckpt_path model.ckpt cannot be read (EOFError); it is damaged, or of another program.'
    """
    # Not torch's own words, which advise to load the file without protection.
    return f"ckpt_path {path} cannot be read ({type(error).__name__}); it is damaged, or of another program."
