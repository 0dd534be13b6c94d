"""Every test starts from one seed, and uninitialised memory holds NaN in tests of the ops.

Tests marked `gpu` are skipped without a CUDA device. With FASTKD_REHEARSE=1 those that take the
fixture `device` run on CPU tensors instead: every line that does not need the chip.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# Before torch: threads that spin while they wait would starve the other test process.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# A shell that starts pytest in the background hands down an ignored SIGINT, which Python keeps.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test of a network depends on a clock, nor does a program that it starts.
os.environ.setdefault("FASTKD_PLANNER", "table")

OPS = Path(__file__).parent / "ops"
PROGRAMS = Path(__file__).parent / "programs"
REHEARSED = os.environ.get("FASTKD_REHEARSE") == "1" and not torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> Iterator[None]:
    """torch.compile counts the graphs of a function over the whole process, and gives up at 8."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill torch's uninitialised memory with NaN (integers: the largest value) inside.

    A kernel that forgets to write an element then shows it. Uses torch's own switch, which fills
    the result of `torch.empty`, `empty_like`, `new_empty` and of resizing.
    """
    switch: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        switch.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    switch.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switch.fill_uninitialized_memory = before[2]


@pytest.fixture(autouse=True)
def _poison(request: pytest.FixtureRequest) -> Iterator[None]:
    if OPS not in request.path.parents:
        yield
        return
    with poisoned_empty():
        yield


@pytest.fixture
def device() -> torch.device:
    """The GPU of a test marked `gpu`; a CPU in rehearsals."""
    return torch.device("cpu" if REHEARSED else "cuda")


class Said(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    """`fastkd WORDS` in this process, in the empty folder `tmp_path`, with a cache of its own."""
    from fastkd.cli.commands import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTKD_CACHE", str(tmp_path.parent / f"{tmp_path.name}-cache"))

    def run(*words: str) -> Said:
        capsys.readouterr()
        try:
            code = main(words)
        except SystemExit as end:  # argparse ends so after --help
            code = int(end.code or 0)
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen[str]]:
    """Start `python WORDS` on one thread; a first word that ends in .py is a file of `programs/`.

    Further keywords are environment variables. With `own_group` a signal can be sent to the process
    and all its children at once.
    """

    def start(
        *words: str | Path,
        cwd: str | Path | None = None,
        own_group: bool = False,
        **environment: str,
    ) -> subprocess.Popen[str]:
        first, *rest = map(str, words)
        return subprocess.Popen(
            [sys.executable, str(PROGRAMS / first) if first.endswith(".py") else first, *rest],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=own_group,
        )

    return start


def ended(process: subprocess.Popen[str], timeout: float) -> Said:
    """Wait for a process; it does not outlive the wait."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return Said(process.returncode, out, err)


@pytest.fixture(scope="session")
def program(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., Said]:
    """Run `python WORDS` as `start` does, to its end; `code` is what it must end with."""

    def run(*words: str | Path, code: int = 0, timeout: float = 600, **how: Any) -> Said:
        said = ended(start(*words, **how), timeout)
        assert said.code == code, said.out + said.err
        return said

    return run


@pytest.fixture(scope="session")
def ranks(
    start: Callable[..., subprocess.Popen[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[Said]]:
    """Run `python WORDS` as several ranks of one group, as torchrun would; all must succeed.

    They are forks of one process, programs/forked_ranks.py: importing takes longer than most of
    these programs do.
    """

    def run(num: int, *words: str | Path, timeout: float = 240, **how: Any) -> list[Said]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(num)}
        folder = tmp_path_factory.mktemp("ranks")
        first, *rest = map(str, words)
        first = str(PROGRAMS / first) if first.endswith(".py") else first
        process = start(
            "forked_ranks.py", str(num), folder, first, *rest, own_group=True, **{**group, **how}
        )
        try:
            _, trouble = process.communicate(timeout=timeout)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        said = [
            Said(
                process.returncode, *((folder / f"{n}.{end}").read_text() for end in ("out", "err"))
            )
            for n in range(num)
        ]
        assert not process.returncode, trouble + "\n".join(one.out + one.err for one in said)
        return said

    return run


@pytest.fixture(scope="session")
def killed_runs(program: Callable[..., Said]) -> Callable[..., dict[str, Any]]:
    """What programs/killed_runs.py found for the named scenarios, in a folder that it fills."""

    def run(folder: Path, *names: str, timeout: float = 600) -> dict[str, Any]:
        # A pool of compiling processes would not survive the program's forks.
        one = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
        program("killed_runs.py", folder, *names, timeout=timeout, **one)
        return json.loads((folder / "found.json").read_text())

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests take as long as they take."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(0))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` are skipped where there is no CUDA device, except in rehearsals."""
    rehearsed = REHEARSED and "device" in getattr(item, "fixturenames", ())
    if item.get_closest_marker("gpu") and not torch.cuda.is_available() and not rehearsed:
        pytest.skip("needs a CUDA device")
