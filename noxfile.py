"""Every command that checks a change, once: people, `.ci/run` and hosted CI call these sessions.

    pip install -e ".[dev]"
    nox -s fast                     # about a minute: while you work
    nox                             # lint, types and tests: before a pull request
    nox -s test -- tests/ops -x     # words after -- go to pytest
    nox -l                          # the list

nox and not make or just: pip installs it, and `oldest` and `wheel` need environments of their own.
All other sessions run where nox was started, because an environment with torch takes minutes to
make and gigabytes to keep.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.10"
nox.options.sessions = ["lint", "types", "test"]

ROOT = Path(__file__).parent
# The oldest release that pyproject.toml allows, and packages of its time: the interpreter of Triton
# 3.6, in which the kernels are tested, fails with NumPy 2.4.
OLDEST = ["torch==2.11.0", "torchvision==0.26.0", "numpy<2.4"]
# The README's command; .ci/run ends with it too.
PYTEST = ["pytest", "-n", "2", "--dist", "loadfile"]
# Threads that spin while they wait would starve the other test process.
QUIET = {"OMP_WAIT_POLICY": "passive"}
# The small parts, and what takes long among their tests.
FAST = ["compute", "data", "losses", "ops", "output", "recipe", "storage", "training"]
SLOWER = [
    "rank",
    "triton",
    "transforms",
    "compil",
    "contract",
    "torch_loader",
    "trainer",
    "simkd_run",
]
# Share of public symbols whose types are known; raise it when it has grown.
LEAST_KNOWN = 0.80


@nox.session(venv_backend="none")
def test(session: nox.Session) -> None:
    """The default tests."""
    session.run(*PYTEST, "--durations=15", *session.posargs, external=True, env=QUIET)


@nox.session(venv_backend="none")
def fast(session: nox.Session) -> None:
    """The tests of the small parts, about a minute."""
    chosen = ["-k", " and ".join(f"not {word}" for word in SLOWER)]
    chosen += [f"tests/{name}" for name in FAST]
    session.run(*PYTEST, "-q", *chosen, *session.posargs, external=True, env=QUIET)


@nox.session(venv_backend="none")
def matrix(session: nox.Session) -> None:
    """The exhaustive combinations: tests marked `matrix`, except those that are also slow."""
    session.run(*PYTEST, "-m", "matrix and not slow", *session.posargs, external=True, env=QUIET)


@nox.session(venv_backend="none")
def coverage(session: nox.Session) -> None:
    """The default tests, with the lines and branches that they reach: a report, no threshold."""
    reports = ["--cov", "--cov-report=term", "--cov-report=xml", "--cov-report=html"]
    session.run(*PYTEST, *reports, *session.posargs, external=True, env=QUIET)


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """All hooks on all files; without git, which lists the files, only those that need no list."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        hooks = ["pre-commit", "run", "--all-files", "--show-diff-on-failure"]
        session.run(*hooks, external=True, env={"PRE_COMMIT_HOME": session.create_tmp()})
        return
    session.run("ruff", "check", ".", external=True)
    session.run("ruff", "format", "--check", ".", external=True)
    session.run("codespell", external=True)
    session.run("python", "tools/house_style.py", external=True)


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """The import contracts and pyright, on a copy that is laid out as fastkd is installed.

    A clone that is not installed has no `fastkd.kernels`. Both read their tables of pyproject.toml.
    """
    copy = Path(session.create_tmp()).resolve() / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    # An editable install has put a link to kernels/ into fastkd/.
    shutil.copytree(ROOT / "fastkd", copy / "fastkd", ignore=shutil.ignore_patterns("kernels"))
    shutil.copytree(ROOT / "kernels", copy / "fastkd" / "kernels")
    shutil.copy(ROOT / "pyproject.toml", copy)
    pyright = ["pyright", "--pythonpath", shutil.which("python") or "python"]
    packages = [path for path in sys.path if path.endswith("site-packages")]
    env = {"PYTHONPATH": os.pathsep.join([str(copy), *packages])}
    with session.chdir(copy):
        session.run("lint-imports", "--no-cache", external=True, env=env)
        session.run(*pyright, external=True, env=env)
        verify = [*pyright, "--verifytypes", "fastkd", "--ignoreexternal", "--outputjson"]
        some_unknown = 1
        said = session.run(
            *verify, external=True, env=env, silent=True, success_codes=[0, some_unknown]
        )
    known = json.loads(str(said))["typeCompleteness"]["completenessScore"]
    session.log(f"{known:.1%} of the public symbols have known types, at least {LEAST_KNOWN:.0%}")
    if known < LEAST_KNOWN:
        session.error(f"annotate what is new; the list: {' '.join(verify[:-1])}")


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Correctness gates, then the clock; needs an idle machine."""
    session.run("pytest", "benchmarks", *session.posargs, external=True)


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Make the pages that come from the code, then build the site in site/; a warning fails."""
    for name in ("losses", "papers"):
        session.run("python", f"docs/make_{name}.py", external=True)
    # Without the news of the next major version, for which plugins do not exist.
    env = {"NO_MKDOCS_2_WARNING": "1"}
    session.run("mkdocs", "build", "--strict", *session.posargs, external=True, env=env)


@nox.session
def oldest(session: nox.Session) -> None:
    """Ops, losses, steps and resuming on the oldest torch, and the Triton that it brings."""
    session.install("-e", ".[test]", *OLDEST)
    versions = (
        "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"
    )
    session.run("python", "-c", versions)
    parts = ["compute", "losses", "ops", "training", "runs/test_resume.py"]
    chosen = session.posargs or [f"tests/{part}" for part in parts]
    session.run(*PYTEST, *chosen, env=QUIET)


@nox.session
def wheel(session: nox.Session) -> None:
    """An sdist, a wheel from it, installed and tried in a folder without a checkout."""
    session.install("build", "twine")
    neutral = Path(session.create_tmp()).resolve()
    shutil.rmtree(neutral)
    neutral.mkdir()
    dist = neutral / "dist"
    session.run("python", "-m", "build", "--outdir", str(dist))
    session.run("twine", "check", "--strict", *[str(path) for path in dist.iterdir()])
    session.install(*[str(path) for path in dist.glob("*.whl")])
    with session.chdir(neutral):
        session.run("fastkd", "doctor")
        session.run("fastkd", "train", "--dry-run")
        tiny = ["epochs=1", "teacher.epochs=2", "baseline.lrs=", "compile=off", "out=smoke"]
        session.run("fastkd", "train", *tiny)
