"""Which implementations the tests of the ops run on.

A test that takes `impl` runs on all of them, one that takes `fast` on those with something to prove
against the reference. With TRITON_INTERPRET=1 both mean the Triton kernels on the CPU;
test_triton.py starts a process that sets it. With FASTKD_TEST_DEVICE=cuda both mean the Triton
kernels on the GPU: a launch takes the test's CPU tensors there and brings them back, so that one
matrix of tests serves all three (benchmarks/gpu.py starts that; "cpu" rehearses it).

A test that takes `place` makes its tensors there and lets the dispatcher choose.
"""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkd.kernels import status
from fastkd.testing import interpret_bf16_as_chips_do, interpret_fma_as_fused

# Cases that several test files share are modules of this folder.
sys.path.insert(0, str(Path(__file__).parent))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LAUNCHED_ON = os.environ.get("FASTKD_TEST_DEVICE")
ON_TRITON = INTERPRETED or LAUNCHED_ON is not None
HAS_CPP = status()["kd_loss"]["cpu"].startswith("c++") and not ON_TRITON


def interpret_scalars_as_indices() -> None:
    """Let `range` take scalars: NumPy 2.4 refuses the arrays of size 1 that Triton 3.6 hands it.

    Triton offers no hook for it.
    """
    interpreter: Any = import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if INTERPRETED:
    interpret_fma_as_fused()
    interpret_bf16_as_chips_do()
    if version("triton").startswith("3.6."):
        interpret_scalars_as_indices()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cpp = pytest.param("cpp", marks=pytest.mark.skipif(not HAS_CPP, reason="no C++ core"))
    fast = ["triton"] if ON_TRITON else [cpp]
    if "fast" in metafunc.fixturenames:
        metafunc.parametrize("fast", fast)
    if "impl" in metafunc.fixturenames:
        metafunc.parametrize("impl", fast if ON_TRITON else ["reference", cpp])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the interpreter a share of the matrix by default, and a rehearsal another.

    A rehearsal tests the way to the device; the matrix would prove nothing there.
    """
    if INTERPRETED:
        for item in items:
            share = item.get_closest_marker("interpreter_share")
            parameters = item.callspec.params if share else {}  # type: ignore[attr-defined]
            if share and any(parameters[k] not in values for k, values in share.kwargs.items()):
                item.add_marker(pytest.mark.matrix)
    if LAUNCHED_ON == "cpu":
        items[:] = items[::16]


@pytest.fixture(autouse=True)
def _launch_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    if LAUNCHED_ON is None:
        return
    for op in ("attention_map", "grouped_pointwise", "hardness", "kd_loss", "mix"):
        gpu = import_module(f"fastkd.kernels.{op}.gpu")
        # And the modules beside it that launch for it.
        for name, module in list(sys.modules.items()):
            if name.startswith(gpu.__name__) and hasattr(module, "launch"):
                monkeypatch.setattr(module, "launch", moving(module.launch, LAUNCHED_ON))


def moving(launch: Callable[..., None], device: str) -> Callable[..., None]:
    """`launch` on a copy of the tensors' memory on `device`, which is copied back afterwards.

    Whole storages travel, so that strides, offsets, aliases and poison stay as the test made them.
    """

    def run(kernel: Any, grid: tuple[int, ...], on: Tensor, **arguments: Any) -> None:
        values = arguments.values()
        tensors = [x for v in values for x in (v if isinstance(v, tuple) else (v,))]
        tensors = [x for x in tensors if isinstance(x, Tensor)]
        if any(x.device.type != "cpu" for x in tensors):
            return launch(kernel, grid, on, **arguments)
        homes = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
        bytes_of = {k: torch.tensor([], dtype=torch.uint8).set_(v) for k, v in homes.items()}
        copies = {k: v.to(device, copy=True) for k, v in bytes_of.items()}

        def there(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(there, x))
            if not isinstance(x, Tensor):
                return x
            storage = copies[x.untyped_storage().data_ptr()].untyped_storage()
            empty = torch.tensor([], dtype=x.dtype, device=device)
            return empty.set_(storage, x.storage_offset(), x.shape, x.stride())

        moved = {name: there(x) for name, x in arguments.items()}
        launch(kernel, grid, torch.empty(0, device=device), **moved)
        for key, home in bytes_of.items():
            home.copy_(copies[key])

    return run


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
