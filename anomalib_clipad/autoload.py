"""How the stock ``anomalib`` finds the models of this package.

anomalib looks models up among the classes already imported, and imports no third party. The wheel therefore puts
``anomalib_clipad_autoload.pth`` into site-packages, a line that runs at every start of Python and costs next to
nothing: it adds a finder that calls :func:`find_spec` here when one of two modules of anomalib is imported.
``ANOMALIB_CLIPAD_AUTOLOAD=0`` turns it off.
"""

import importlib.util
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType

MODELS = {
    "ClipAdSdp": "anomalib_clipad.sdp.lightning_model",
    "ClipAdSdpPlus": "anomalib_clipad.sdp_plus.lightning_model",
}


def register_models(anomalib_models: ModuleType) -> None:
    """Make the models known wherever anomalib looks for one; a failure is a warning, not anomalib's end."""
    try:
        for name, module in MODELS.items():
            setattr(anomalib_models, name, getattr(importlib.import_module(module), name))
    except Exception as error:  # noqa: BLE001 - whatever is broken here, every other model must still run
        warnings.warn(
            f"anomalib-clipad could not be loaded and its models are missing ({type(error).__name__}: {error}); "
            "reinstall it, or set ANOMALIB_CLIPAD_AUTOLOAD=0.",
            stacklevel=2,
        )


def register_pipelines(anomalib_pipelines: ModuleType) -> None:
    """Enter ``anomalib compare`` beside ``anomalib benchmark``."""
    try:
        if anomalib_pipelines.PIPELINE_REGISTRY is not None:
            pipeline = importlib.import_module("anomalib_clipad.compare.pipeline")
            anomalib_pipelines.PIPELINE_REGISTRY["compare"] = pipeline.Compare
    except Exception as error:  # noqa: BLE001 - as above
        warnings.warn(f"anomalib compare is missing ({type(error).__name__}: {error}).", stacklevel=2)


def tell_input_errors(_cli: ModuleType) -> None:
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


AFTER: dict[str, Callable[[ModuleType], None]] = {
    "anomalib.models": register_models,
    "anomalib.cli.pipelines": register_pipelines,
    "anomalib.cli.cli": tell_input_errors,
}


def find_spec(name: str) -> ModuleSpec | None:
    """Let the other finders find a watched module of anomalib, and add our call behind its execution."""
    callback = AFTER.pop(name, None)
    if callback is None:  # asked again by ourselves, in the next line
        return None
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.loader is not None:
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            callback(module)

        spec.loader.exec_module = execute_and_call
    return spec
