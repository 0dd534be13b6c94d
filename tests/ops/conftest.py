"""Which implementations the tests of the ops run on.

A test that takes `impl` runs on all of them, one that takes `fast` on those with something to prove
against the reference. With TRITON_INTERPRET=1 both mean the Triton kernels on the CPU;
test_triton.py starts a process that sets it.
"""

import os

import pytest
import torch
from fastkd.kernels import status

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_CPP = status()["kd_loss"]["cpu"].startswith("c++") and not INTERPRETED


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cpp = pytest.param("cpp", marks=pytest.mark.skipif(not HAS_CPP, reason="no C++ core"))
    fast = ["triton"] if INTERPRETED else [cpp]
    if "fast" in metafunc.fixturenames:
        metafunc.parametrize("fast", fast)
    if "impl" in metafunc.fixturenames:
        metafunc.parametrize("impl", fast if INTERPRETED else ["reference", cpp])


@pytest.fixture
def interpreted() -> bool:
    return INTERPRETED


@pytest.fixture
def needs_cpp() -> None:
    if not HAS_CPP:
        pytest.skip("no C++ core")


@pytest.fixture(autouse=True)
def _no_float64_on_triton(request: pytest.FixtureRequest) -> None:
    params = getattr(request.node, "callspec", None)
    values = params.params.values() if params else ()
    needs = torch.float64 in values or request.node.get_closest_marker("float64")
    if "triton" in values and needs:
        pytest.skip("float64 takes the reference on a GPU")
