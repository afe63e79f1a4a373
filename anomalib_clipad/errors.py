"""The one kind of error that a user can correct."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

PARSER_STATUS = 2


class InputError(ValueError):
    """Something given to the package cannot be used; the message says what was found and what to do.

    On the ``anomalib`` command line it is printed as its sentence alone, without a stack trace.

    Example:
        >>> raise InputError("sigma must not be negative, got -1.")
        Traceback (most recent call last):
        ...
        anomalib_clipad.errors.InputError: sigma must not be negative, got -1.
    """


def check_flag(name: str, value: object) -> None:
    """Refuse an argument that is neither true nor false.

    Raises:
        InputError: If it is not.

    Example:
        >>> check_flag("single_pass", True)
    """
    if not isinstance(value, bool):
        msg = f"{name} must be true or false, got {value!r}."
        raise InputError(msg)


def input_error_behind(error: BaseException | None) -> InputError | None:
    """The ``InputError`` that an error was raised from, or that was being handled, at any depth.

    Example:
        >>> input_error_behind(RuntimeError("anything")) is None
        True
    """
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        current = waiting.pop()
        if isinstance(current, InputError):
            return current
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            waiting += [current.__context__, current.__cause__, *_errors_of_union(current)]
    return None


def _errors_of_union(error: BaseException) -> Iterator[BaseException]:
    """The errors of every member of a union type, of which jsonargparse chains the first only.

    The others stay in a list of the frame that raised.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__", "").startswith("jsonargparse."):
            for value in frame.f_locals.values():
                if isinstance(value, list):
                    yield from (entry for entry in value if isinstance(entry, BaseException))


@contextmanager
def one_sentence() -> Iterator[None]:
    """Print an ``InputError`` as its sentence and exit with status 1.

    anomalib's command line has no seam for how an error is shown, and its parser raises errors of its own in place of
    those of the classes that it builds.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        # The parser exits with status 2. Any other status is meant, such as that of an interrupted run.
        found = input_error_behind(error) if not isinstance(error, SystemExit) or error.code == PARSER_STATUS else None
        if found is None:
            raise
        sys.stderr.write(f"error: {found}\n")
        raise SystemExit(1) from error
