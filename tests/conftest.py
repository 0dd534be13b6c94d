"""Every test starts from one seed, and uninitialised memory holds NaN in tests of the ops."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastkd.testing import poisoned_empty

OPS = Path(__file__).parent / "ops"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison(request: pytest.FixtureRequest) -> Iterator[None]:
    if OPS not in request.path.parents:
        yield
        return
    with poisoned_empty():
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` are skipped where there is no CUDA device."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
