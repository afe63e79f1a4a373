"""Imports in an interpreter of their own: their order must not matter, and none may bring too much."""

import sys

import pytest

from .conftest import ROOT, run_command

pytestmark = pytest.mark.slow
FIND_SPEC = "import importlib.util; assert importlib.util.find_spec('anomalib.models')"
FOUND = "from anomalib.models import list_models; assert {'clip_ad_sdp', 'clip_ad_sdp_plus'} <= set(list_models())"
OURS = "import anomalib_clipad.sdp, anomalib_clipad.sdp_plus, anomalib_clipad.data"
FIRST = {
    "parts": f"{FIND_SPEC}; import anomalib_clipad.components",
    "data": "import anomalib_clipad.data",
    "engine": "import anomalib_clipad.engine.export",
    "network": "import anomalib_clipad.sdp.torch_model",
}
# Each order in a process of its own, forked where what both need and takes long is imported, and nothing of anomalib.
PROGRAM = """
import os, sys, lightning.pytorch, open_clip, sklearn.cluster, torchvision
assert not [name for name in sys.modules if name.startswith("anomalib.")]
for statements in sys.argv[1:]:
    if not os.fork():
        exec(statements)
        print(*sys.modules, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, statements
"""


@pytest.fixture(scope="module")
def modules() -> dict[str, set[str]]:
    """What each order has imported."""
    orders = ["; ".join([first, FOUND, OURS]) for first in FIRST.values()]
    done = run_command(sys.executable, "-c", PROGRAM, *orders, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(FIRST, map(set, map(str.split, done.stdout.splitlines())), strict=True))


@pytest.mark.parametrize("first", FIRST)
def test_models_are_found_whatever_is_imported_first_and_leave_the_demonstration_alone(
    modules: dict[str, set[str]], first: str
) -> None:
    """The demonstration needs scikit-image, which a model does not."""
    assert "anomalib_clipad.sdp_plus" in modules[first]
    assert not [name for name in modules[first] if name.startswith("anomalib_clipad.demo")]
