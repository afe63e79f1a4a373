"""What a run leaves on the screen, in its log and as its exit status."""

import logging
import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

_received: list[int] = []  # signals of the run at hand
INTERRUPTED = "Interrupted; start the same command again for what is missing."


def say(line: str, stderr: bool = True) -> None:
    """Print a line as it is, whatever brackets are in it.

    Example:
        >>> say("[/red] on metal nut", stderr=False)
        [/red] on metal nut
    """
    Console(stderr=stderr).print(line, markup=False, highlight=False, soft_wrap=True)


class _QuietFile(logging.FileHandler):
    """A log that a full disk does not turn into a flood of stack traces."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        del record


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Send every logger's lines to a file, each once, and nothing to the screen; where it cannot be written, say so.

    Example:
        >>> with logging_to(Path("compare.log")):
        ...     logging.getLogger("anomalib_clipad").warning("one line")
        >>> Path("compare.log").read_text().count("one line")
        1
    """
    handler: logging.Handler
    try:
        handler = _QuietFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        say(f"No log is kept ({error}).")
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s - %(name)s - %(levelname)s - %(message)s"))
    children = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    before = [(one, one.handlers, one.propagate) for one in (logging.root, *children)]
    for one in children:
        one.handlers, one.propagate = [], True
    logging.root.handlers = [handler]
    logging.captureWarnings(capture=True)
    try:
        yield
    finally:
        logging.captureWarnings(capture=False)
        for one, handlers, propagate in before:
            one.handlers, one.propagate = handlers, propagate
        handler.close()


@contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGINT and SIGTERM end the run with a line on the screen and status 128 + signal, as shells expect.

    Lightning would end the process with status 0 or 1. Python ignores an exception that is raised while an object is
    finalised, as during the garbage collection before every job; the signal is then sent once more.

    Example:
        >>> with interruptible():
        ...     pass
    """
    if threading.current_thread() is not threading.main_thread():  # Python takes signals in the main thread only
        yield
        return
    _received.clear()

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        _received.append(number)
        for process in multiprocessing.active_children():
            process.terminate()
        raise SystemExit(128 + number)

    def send_again(ignored: "sys.UnraisableHookArgs") -> None:
        if not isinstance(ignored.exc_value, SystemExit) or not _received:
            hook(ignored)
            return
        threading.Timer(0.01, signal.raise_signal, [_received[0]]).start()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    hook, sys.unraisablehook = sys.unraisablehook, send_again
    try:
        yield
        check_interrupted()
    except BaseException:
        if not _received:
            raise
        say(INTERRUPTED)
        raise SystemExit(128 + _received[0]) from None
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def check_interrupted() -> None:
    """End the run between two jobs if a signal has come in the last one.

    The exception that the signal raises may come where Python cannot raise it, such as in the end of an object.

    Raises:
        SystemExit: If there was a signal.

    Example:
        >>> check_interrupted()
    """
    if _received:
        raise SystemExit(128 + _received[0])
