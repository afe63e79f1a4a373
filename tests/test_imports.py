"""Imports in an interpreter of their own: their order must not matter, and none may bring too much."""

import sys

import pytest

from .conftest import ROOT, run_command

pytestmark = pytest.mark.slow
FIND_SPEC = "import importlib.util; assert importlib.util.find_spec('anomalib.models')"


def modules_after(*statements: str) -> set[str]:
    """What a fresh interpreter has imported."""
    done = run_command(sys.executable, "-c", "; ".join([*statements, "import sys; print(*sys.modules)"]), cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "first",
    [
        f"{FIND_SPEC}; import anomalib_clipad.components",
        "import anomalib_clipad.data",
        "import anomalib_clipad.engine.export",
        "import anomalib_clipad.sdp.torch_model",
    ],
    ids=["parts", "data", "engine", "network"],
)
def test_models_are_found_whatever_is_imported_first_and_leave_the_demonstration_alone(first: str) -> None:
    """The demonstration needs scikit-image, which a model does not."""
    found = "from anomalib.models import list_models; assert {'clip_ad_sdp', 'clip_ad_sdp_plus'} <= set(list_models())"
    modules = modules_after(first, found, "import anomalib_clipad.sdp, anomalib_clipad.sdp_plus, anomalib_clipad.data")
    assert "anomalib_clipad.sdp_plus" in modules
    assert not [name for name in modules if name.startswith("anomalib_clipad.demo")]
