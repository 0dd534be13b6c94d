"""Every test starts from one seed, and uninitialised memory holds NaN in tests of the ops.

Tests marked `gpu` are skipped without a CUDA device. With FASTKD_REHEARSE=1 those that take the
fixture `device` run on CPU tensors instead: every line that does not need the chip.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

# A shell that starts pytest in the background hands down an ignored SIGINT, which Python keeps.
signal.signal(signal.SIGINT, signal.default_int_handler)

OPS = Path(__file__).parent / "ops"
REHEARSED = os.environ.get("FASTKD_REHEARSE") == "1" and not torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` are skipped where there is no CUDA device, but for rehearsals."""
    rehearsed = REHEARSED and "device" in getattr(item, "fixturenames", ())
    if item.get_closest_marker("gpu") and not torch.cuda.is_available() and not rehearsed:
        pytest.skip("needs a CUDA device")
