"""Installing fastkd: with and without a compiler, twice, from sdist; and what importing costs."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def python(code: str, cwd: Path, **environment: str) -> str:
    done = run(sys.executable, "-c", code, cwd=cwd, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what git would ship, so that nothing here touches the tree under test."""
    return copied(tmp_path / "checkout")


def copied(target: Path) -> Path:
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for name in ("README.md", "CHANGELOG.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target)
    skip = ("*.so", "__pycache__", "*.egg-info")
    # fastkd/kernels is a link that an editable install has made.
    shutil.copytree(
        ROOT / "fastkd", target / "fastkd", ignore=shutil.ignore_patterns(*skip, "kernels")
    )
    shutil.copytree(ROOT / "kernels", target / "kernels", ignore=shutil.ignore_patterns(*skip))
    return target


def build_wheel(checkout: Path, out: Path, **environment: str) -> list[str]:
    """Names inside a wheel built without isolation: the build needs no torch and no index."""
    words = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, "."]
    done = run(sys.executable, *words, cwd=checkout, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    wheel.unlink()
    return names


HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
NEEDS_CORE = pytest.mark.skipif(
    bool(os.environ.get("FASTKD_NO_CPP")) or not HAS_COMPILER, reason="installed without the core"
)


@pytest.mark.matrix
@pytest.mark.skipif(not HAS_COMPILER or not shutil.which("cmake"), reason="needs C++ and CMake")
def test_wheel_holds_the_core_and_building_twice_works(checkout: Path, tmp_path: Path) -> None:
    for _ in range(2):
        names = build_wheel(checkout, tmp_path / "wheels")
        assert "fastkd/kernels/libfastkd_cpu.so" in names
        assert "fastkd/kernels/kd_loss/reference.py" in names
        data = ("py.typed", "losses/__init__.pyi", "recipes/published.json")
        assert {f"fastkd/{name}" for name in data} <= set(names)
        # Only fastkd: a top-level `kernels` would shadow the package of that name on PyPI.
        assert {n.split("/")[0].split("-")[0] for n in names} == {"fastkd"}


@pytest.mark.parametrize(
    "environment",
    [{"FASTKD_NO_CPP": "1"}, {"CXX": "/nonexistent/c++", "PATH": "/nonexistent"}],
    ids=["switched-off", "no-compiler"],
)
def test_without_the_core_it_still_builds(checkout: Path, tmp_path: Path, environment) -> None:
    names = build_wheel(checkout, tmp_path / "wheels", **environment)
    assert "fastkd/kernels/__init__.py" in names
    assert not any(n.endswith(".so") for n in names)


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
def test_a_broken_compiler_is_reported_and_builds_without_the_core(
    checkout: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "bin" / "c++"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    names = build_wheel(checkout, tmp_path / "wheels", CXX=str(broken))
    assert not any(n.endswith(".so") for n in names)


def kd_backend(checkout: Path, folder: Path, core: Path | None = None) -> str:
    """What a copy of the checkout in `folder` says runs kd_loss, which it also calls."""
    package = folder / "fastkd"
    shutil.copytree(checkout / "fastkd", package)
    shutil.copytree(checkout / "kernels", package / "kernels")
    if core is not None:
        shutil.copy(core, package / "kernels")
    code = (
        f"import torch, fastkd.kernels as k; assert {folder.name!r} in k.__file__, k.__file__; "
        "s = torch.randn(4, 10, requires_grad=True); "
        "k.kd_loss_mean(s, torch.randn(4, 10)).backward(); "
        "print(k.status()['kd_loss']['cpu'])"
    )
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    # -S and no .pth files: an editable install of the tree under test must not answer.
    paths = os.pathsep.join([str(package.parent), str(Path(torch.origin).parents[1])])
    done = run(sys.executable, "-S", "-c", code, cwd=folder, PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_status_says_why_the_reference_runs(checkout: Path, tmp_path: Path) -> None:
    """The copy has no library: its kernels answer from plain torch and say so."""
    runs = kd_backend(checkout, tmp_path / "bare")
    assert runs.startswith("reference (C++ core not built: libfastkd_cpu.so is missing")


@NEEDS_CORE
def test_a_core_of_other_sources_is_not_used(checkout: Path, tmp_path: Path) -> None:
    """As after `git pull` in an editable install: the sources have changed, the library has not."""
    import fastkd.kernels

    core = Path(fastkd.kernels.__file__).with_name("libfastkd_cpu.so")
    assert kd_backend(checkout, tmp_path / "same", core).startswith("c++ (")
    with (checkout / "kernels/kd_loss/args.h").open("a") as file:
        file.write("// one more argument\n")
    runs = kd_backend(checkout, tmp_path / "other", core)
    assert runs.startswith("reference (C++ core not used: libfastkd_cpu.so was built from other")
    assert "`pip install -e .`" in runs


@NEEDS_CORE
def test_the_core_is_built_in_this_environment(tmp_path: Path) -> None:
    """Where a compiler exists, falling back to the reference in silence is a failure."""
    out = python("import fastkd.kernels as k; print(k.status()['kd_loss']['cpu'])", tmp_path)
    assert out.startswith("c++ ("), out


def test_core_shares_torchs_openmp_runtime(tmp_path: Path) -> None:
    code = """
import re, torch
from fastkd.kernels import kd_loss_mean
from fastkd.kernels._library import Core, core
torch.randn(1000, 1000).sum()
kd_loss_mean(torch.randn(512, 1000), torch.randn(512, 1000))
found = core()
maps = open("/proc/self/maps").read()
names = {m for m in re.findall(r"/\\S*lib(?:gomp|omp|iomp5)\\S*\\.so\\S*", maps)}
print(len(names), isinstance(found, Core) and found.threads)
"""
    count, name = python(code, tmp_path).split(" ", 1)
    assert count == "1"
    assert name == "False" or "omp" in name


def test_import_is_light(tmp_path: Path) -> None:
    code = (
        "import sys, fastkd; "
        "heavy = {'triton', 'nvidia', 'timm', 'matplotlib', 'sklearn', 'torch'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert python(code, tmp_path) == "[]"
    kernels = (
        "import sys, fastkd.kernels, fastkd.losses.drop_in; "
        "heavy = {'triton', 'timm', 'matplotlib', 'sklearn', 'nvidia.dali'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert python(kernels, tmp_path) == "[]"


def test_bare_checkout_and_foreign_name_are_one_clear_sentence(
    checkout: Path, tmp_path: Path
) -> None:
    done = run(sys.executable, "-S", "-c", "import fastkd", cwd=checkout)
    assert done.returncode != 0
    assert "Install the checkout once: pip install -e ." in done.stderr
    done = run(sys.executable, "-c", "import kernels", cwd=checkout)
    assert "this folder is the package `fastkd.kernels`" in done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A clone named fastkd, installed with `pip install -e .`; its folder and the interpreter."""
    base = tmp_path_factory.mktemp("home")
    checkout = copied(base / "fastkd")
    run(sys.executable, "-m", "venv", "--without-pip", base / "venv", cwd=base)
    (site,) = (base / "venv" / "lib").glob("python*/site-packages")
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    # A path of a .pth file is not searched for further .pth files: the tree under test stays out.
    (site / "dependencies.pth").write_text(f"{Path(torch.origin).parents[1]}\n")
    python = base / "venv" / "bin" / "python"
    words = ["-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-e", "."]
    done = run(python, *words, cwd=checkout, FASTKD_NO_CPP="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return checkout, python


WHERE = {
    "above-the-clone": lambda checkout: checkout.parent,
    "in-the-clone": lambda checkout: checkout,
    "in-a-folder-of-it": lambda checkout: checkout / "fastkd" / "losses",
    "elsewhere": lambda checkout: Path("/"),
}


@pytest.mark.parametrize("where", WHERE)
def test_an_editable_install_is_imported_from_any_folder(installed, where) -> None:
    checkout, python = installed
    code = (
        "import fastkd, fastkd.kernels as k, importlib.util, pathlib; "
        "files = [pathlib.Path(m.__file__).resolve() for m in (fastkd, k)]; "
        "print(*files, callable(fastkd.count), k.status()['kd_loss']['cpu'][:9]); "
        "print([n for n in ('tests', 'docs', 'tools') if importlib.util.find_spec(n)])"
    )
    folder = WHERE[where](checkout)
    done = run(python, "-P" if where.startswith("in-") else "-B", "-c", code, cwd=folder)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    files = [checkout / "fastkd/__init__.py", checkout / "kernels/__init__.py"]
    assert first == f"{files[0]} {files[1]} True reference"
    assert second == "[]"  # nothing else of the clone can be imported


@pytest.mark.parametrize("module", ["fastkd", "fastkd.train", "fastkd.cli.commands"])
def test_modules_run_from_above_the_clone(installed, module) -> None:
    checkout, python = installed
    done = run(python, "-m", module, "--help", cwd=checkout.parent)
    assert (done.returncode, done.stderr) == (0, "")


def test_new_modules_need_no_second_install(installed) -> None:
    checkout, python = installed
    (checkout / "fastkd" / "later.py").write_text("NAME = __name__\n")
    (checkout / "kernels" / "later").mkdir()
    (checkout / "kernels" / "later" / "__init__.py").write_text("NAME = __name__\n")
    code = "import fastkd.later, fastkd.kernels.later as k; print(fastkd.later.NAME, k.NAME)"
    done = run(python, "-c", code, cwd=checkout.parent)
    assert done.stdout == "fastkd.later fastkd.kernels.later\n", done.stderr


def test_after_an_editable_install_a_wheel_holds_everything_once(installed, tmp_path: Path) -> None:
    names = build_wheel(installed[0], tmp_path / "wheels", FASTKD_NO_CPP="1")
    assert len(names) == len(set(names))
    assert "fastkd/kernels/kd_loss/reference.py" in names
    assert {n.split("/")[0].split("-")[0] for n in names} == {"fastkd"}


def test_unknown_name_is_an_attribute_error(tmp_path: Path) -> None:
    done = run(sys.executable, "-c", "import fastkd; fastkd.distil", cwd=tmp_path)
    assert "module 'fastkd' has no attribute 'distil'; it has ['cheapen', 'count'" in done.stderr
