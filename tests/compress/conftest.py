"""A clock that says what the MACs of a network are, so that no test depends on the machine."""

from collections.abc import Mapping
from pathlib import Path

import onnx
import pytest
from torch import nn

from fastkd.compress.table import Times
from fastkd.models.counting.count import count


class MacsMeter:
    """A layer takes a millisecond for every million MACs and some more; a network a little less
    than its parts. Grouped convolutions of this runtime are slow."""

    def __init__(self, slow_groups: int | None = None, **target: str) -> None:
        self.slow_groups = slow_groups
        self._target = {"on": "ort-cpu", "threads": "1", "batch": "1", "cpu": "fake"} | target
        self.layers = 0
        self.wholes = 0
        self.stop_after: int | None = None
        """Measurements, after which the power fails."""

    @property
    def target(self) -> Mapping[str, str]:
        return self._target

    def _count(self) -> None:
        if self.stop_after is not None:
            self.stop_after -= 1
            if self.stop_after < 0:
                raise KeyboardInterrupt

    def layer(self, module: nn.Module, shape: tuple[int, ...]) -> Times:
        self._count()
        self.layers += 1
        ms = count(module, shape).macs / 1e6 + 0.02
        groups = [one.groups for one in module.modules() if isinstance(one, nn.Conv2d)]
        if self.slow_groups is not None and max(groups, default=1) >= self.slow_groups:
            ms *= 20
        return Times(0.9 * ms, ms, 1.2 * ms)

    def whole(self, network: nn.Module | Path, shape: tuple[int, ...]) -> Times:
        self._count()
        self.wholes += 1
        if isinstance(network, Path):
            said = {one.key: one.value for one in onnx.load(str(network)).metadata_props}
            macs = int(said["macs"])
        else:
            macs = count(network, shape).macs
        ms = 0.8 * macs / 1e6 + 0.1
        return Times(0.9 * ms, ms, 1.2 * ms)


@pytest.fixture
def meter() -> MacsMeter:
    return MacsMeter()


@pytest.fixture
def make_meter() -> type[MacsMeter]:
    return MacsMeter
