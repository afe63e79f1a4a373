"""A built wheel in an environment of its own: found by its short name, harmless when broken, gone when removed."""

import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SHORT_NAME = "from anomalib.models import list_models, get_model; assert 'clip_ad_sdp' in list_models(); {}"
WITHOUT = (
    "from anomalib.models import list_models; assert 'clip_ad_sdp' not in list_models(); print(len(list_models()))"
)


def run(*command: object, **environment: str) -> subprocess.CompletedProcess:
    keep = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "PYTHONWARNINGS"}}
    return subprocess.run(
        list(map(str, command)),
        cwd="/",
        env={**keep, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that borrows this one's packages, but for ours, whose checkout it does not see."""
    root = tmp_path_factory.mktemp("venv")
    venv.create(root, with_pip=True)
    # Paths only: the start-up lines of a borrowed folder are not run, so ours must come from the wheel.
    borrowed = "\n".join(path for path in site.getsitepackages() if Path(path).is_dir())
    (packages(root) / "borrowed.pth").write_text(borrowed + "\n")
    return root


def packages(environment: Path) -> Path:
    return next((environment / "lib").glob("python*/site-packages"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source") / "checkout"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "dist", "results", "*_cache"))
    done = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", source)
    assert done.returncode == 0, done.stderr[-3000:]
    built = next((source / "dist").glob("*.whl"))
    assert built.stat().st_size < 15e6  # the demonstration's weights are in it
    return built


def install(environment: Path, wheel: Path) -> Path:
    """Python of the environment, with the wheel freshly installed."""
    executable = environment / "bin/python"
    done = run(executable, "-m", "pip", "install", "--no-deps", "--force-reinstall", "-q", wheel)
    assert done.returncode == 0, done.stderr[-3000:]
    return executable


@pytest.fixture(scope="module")
def python(environment: Path, wheel: Path) -> Path:
    """Python of the environment with the wheel, which every test leaves installed and whole."""
    return install(environment, wheel)


def test_the_wheel_is_found_by_its_short_name_and_has_the_template_of_the_page(
    python: Path, environment: Path, small_clip: str
) -> None:
    build = f"get_model('clip_ad_sdp', backbone={small_clip!r}); import anomalib_clipad as ours; print(ours.__file__)"
    page = f"from anomalib_clipad.page import write_page; print(write_page(Path({str(python.parent)!r}), '', []))"
    done = run(python, "-c", SHORT_NAME.format(f"{build}; from pathlib import Path; {page}"))
    assert done.returncode == 0, done.stderr[-3000:]
    found, written = done.stdout.split()
    assert found.startswith(str(environment))
    assert Path(written) == python.parent / "report.html"


def test_it_can_be_turned_off(python: Path) -> None:
    done = run(python, "-c", WITHOUT, ANOMALIB_CLIPAD_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 30


def test_nothing_is_imported_at_the_start_of_python(python: Path) -> None:
    done = run(python, "-c", "import sys; print([m for m in sys.modules if m.split('.')[0] in ('anomalib', 'torch')])")
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("victim", ["plugin.py", "sdp/torch_model.py"])
def test_a_broken_plugin_is_one_warning_and_every_other_model_runs(
    python: Path, environment: Path, victim: str
) -> None:
    path = packages(environment) / "anomalib_clipad" / victim
    content = path.read_text()
    path.write_text("this is not Python\n")
    try:
        started = run(python, "-c", "print('started')")
        done = run(python, "-W", "ignore::FutureWarning", "-c", "import anomalib.cli.cli; " + WITHOUT)
    finally:
        path.write_text(content)
    assert (started.stdout.strip(), started.stderr) == ("started", "")
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 30
    assert done.stderr.count("anomalib-clipad could not be loaded") == 1


def test_python_starts_without_anomalib(python: Path, environment: Path) -> None:
    borrowed = packages(environment) / "borrowed.pth"
    content = borrowed.read_text()
    borrowed.write_text("")
    try:
        done = run(python, "-c", "import anomalib_clipad; print('started')")
    finally:
        borrowed.write_text(content)
    assert (done.stdout.strip(), done.stderr) == ("started", "")


def test_an_editable_install_is_found_and_uninstalling_leaves_nothing(
    environment: Path, python: Path, wheel: Path, small_clip: str
) -> None:
    uninstall(python, environment)
    source = environment / "checkout"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "results", "*_cache"))
    done = run(python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-q", "-e", source)
    assert done.returncode == 0, done.stderr[-3000:]
    done = run(python, "-c", SHORT_NAME.format(f"get_model('ClipAdSdp', backbone={small_clip!r})"))
    assert done.returncode == 0, done.stderr[-3000:]
    uninstall(python, environment)
    install(environment, wheel)


def uninstall(python: Path, environment: Path) -> None:
    done = run(python, "-m", "pip", "uninstall", "-y", "anomalib-clipad")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(packages(environment).rglob("*clipad*"))
