"""The registry: every name under which anomalib finds a part of this package.

anomalib looks models up among the classes already imported, and imports no third party. The wheel therefore puts
``anomalib_clipad_autoload.pth`` into site-packages, a line that runs at every start of Python and costs next to
nothing: it adds a finder that calls :func:`find_spec` here when one of the modules in ``AFTER`` is looked up.
``ANOMALIB_CLIPAD_AUTOLOAD=0`` turns it off.
"""

import importlib.util
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

MODELS = {
    "ClipAdSdp": "anomalib_clipad.sdp.lightning_model",
    "ClipAdSdpPlus": "anomalib_clipad.sdp_plus.lightning_model",
}
PIPELINES = {"compare": ("anomalib_clipad.compare.pipeline", "Compare")}
DEMO = "demo"  # as backbone and as adapter: the demonstration's, in this package
DEMO_FOLDER = Path(__file__).parent / "demo"


def register_models(anomalib_models: ModuleType) -> None:
    """Make the models known wherever anomalib looks for one; a failure is a warning, so other models still run."""
    try:
        for name, module in MODELS.items():
            setattr(anomalib_models, name, getattr(importlib.import_module(module), name))
        # get_model takes dotted paths from these modules only; the second form is the one that is printed.
        anomalib_models.ALLOWED_MODULES.update({"anomalib_clipad", *MODELS.values()})
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
            for name, (module, pipeline) in PIPELINES.items():
                anomalib_pipelines.PIPELINE_REGISTRY[name] = getattr(importlib.import_module(module), pipeline)
    except Exception as error:  # noqa: BLE001 - as above
        warnings.warn(f"anomalib compare is missing ({type(error).__name__}: {error}).", stacklevel=2)


def show_sentences(anomalib_cli: ModuleType) -> None:
    """On anomalib's command line, print an ``InputError`` as its sentence; all other errors look as they did."""
    from anomalib_clipad.errors import one_sentence

    vars(anomalib_cli)["main"] = one_sentence()(vars(anomalib_cli)["main"])


AFTER: dict[str, Callable[[ModuleType], None]] = {
    "anomalib.models": register_models,
    "anomalib.cli.pipelines": register_pipelines,
    "anomalib.cli.cli": show_sentences,
}
_searching: set[str] = set()


def find_spec(name: str) -> ModuleSpec | None:
    """Let the other finders find a module of anomalib, and add our call after its execution."""
    if name in _searching or name not in AFTER:
        return None
    _searching.add(name)  # the next line asks us again
    try:
        spec = importlib.util.find_spec(name)
    finally:
        _searching.discard(name)
    if spec is not None and spec.loader is not None:
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            AFTER[name](module)

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
    return spec
