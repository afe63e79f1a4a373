"""How the stock ``anomalib`` finds the models of this package.

anomalib looks models up among the classes already imported, and imports no third party. The wheel therefore puts a
line into site-packages that imports this file at every start of Python. It adds one finder, which does nothing until
anomalib's own modules are imported and then adds ours right behind them. ``ANOMALIB_CLIPAD_AUTOLOAD=0`` turns it off.
"""

import sys

MODELS = {"ClipAdSdp": "anomalib_clipad.sdp.lightning_model"}

if False:  # typing.TYPE_CHECKING without importing typing, which would be felt at every start of Python
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def register_models(anomalib_models: "ModuleType") -> None:
    """Make the models known wherever anomalib looks for one; a failure is a warning, not anomalib's end."""
    try:
        from importlib import import_module

        for name, module in MODELS.items():
            setattr(anomalib_models, name, getattr(import_module(module), name))
    except Exception as error:  # noqa: BLE001 - whatever is broken here, every other model must still run
        import warnings

        warnings.warn(
            f"anomalib-clipad could not be loaded and its models are missing ({type(error).__name__}: {error}); "
            "reinstall it, or set ANOMALIB_CLIPAD_AUTOLOAD=0.",
            stacklevel=2,
        )


def tell_input_errors(_cli: "ModuleType") -> None:
    """On anomalib's command line, print an ``InputError`` as its sentence; all other errors look as they did."""
    from anomalib_clipad.errors import InputError

    show = sys.excepthook

    def show_sentence(kind: type[BaseException], error: BaseException, trace: object) -> None:
        latest = InputError.latest
        if latest is not None and str(latest) in str(error):
            sys.stderr.write(f"error: {latest}\n")
        else:
            show(kind, error, trace)

    sys.excepthook = show_sentence


class Finder:
    """Calls us back right after a watched module of anomalib was executed; finds nothing itself."""

    after: dict[str, "Callable[[ModuleType], None]"] = {
        "anomalib.models": register_models,
        "anomalib.cli.cli": tell_input_errors,
    }

    @classmethod
    def find_spec(
        cls,
        name: str,
        path: "Sequence[str] | None" = None,  # noqa: ARG003 - the import system's signature
        target: "ModuleType | None" = None,  # noqa: ARG003
    ) -> "ModuleSpec | None":
        """Let the other finders find a watched module, and add our call behind its execution."""
        callback = cls.after.pop(name, None)
        if callback is None:
            return None
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module: "ModuleType") -> None:
                execute(module)
                callback(module)

            spec.loader.exec_module = execute_and_call
        return spec


if Finder not in sys.meta_path:
    sys.meta_path.insert(0, Finder)
