"""The common form of the zoo's classifiers: stem, stages, global average pooling, linear layer.

A family derives from `StagedNetwork`, builds `conv1`, `bn1`, `layer1`.., `fc`, and overrides only
the steps in which it differs; the walk over the taps is defined here.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from fastkd.models.taps import ZooNetwork

__all__ = ["StagedNetwork", "make_stage"]


class StagedNetwork(ZooNetwork):
    """images [N, 3, H, W] -> stem -> stage 1.. -> neck -> mean over pixels -> fc -> [N, C]."""

    num_stages: int
    fc: nn.Linear

    @property
    def tap_names(self) -> tuple[str, ...]:
        """In the order of the walk."""
        stages = (f"stage{number}" for number in range(1, self.num_stages + 1))
        taps = (tap for stage in stages for tap in (f"{stage}:preact", stage))
        return ("stem", *taps, "pooled", "logits")

    @override
    def stage_paths(self) -> dict[str, tuple[str, ...]]:
        return {f"stage{n}": (f"layer{n}",) for n in range(1, self.num_stages + 1)}

    def stem(self, images_NCHW: Tensor) -> Tensor:
        """What comes before the stages; the `stem` tap."""
        return F.relu(self.get_submodule("bn1")(self.get_submodule("conv1")(images_NCHW)))

    def layers(self, number: int) -> list[Callable[[Tensor], Tensor]]:
        """Of a stage, up to its last activation: they lead to the `stageN:preact` tap."""
        *blocks, last = cast(Iterable[Any], self.get_submodule(f"layer{number}").children())
        return [*blocks, last.preact]

    def activate(self, preact: Tensor) -> Tensor:
        """The last activation of a stage; the `stageN` tap."""
        return F.relu(preact)

    def neck(self, x: Tensor) -> Tensor:
        """Layers between the last stage and the pooling."""
        return x

    def walk(self, x: Tensor, after: str = "images") -> Iterator[tuple[str, Tensor]]:
        """Taps in order; each stage gives first its `:preact` value, then itself."""
        stages = [f"stage{number}" for number in range(1, self.num_stages + 1)]
        done = ["images", "stem", *stages, "pooled"].index(after)
        if done < 1:
            x = self.stem(x)
            yield "stem", x
        for number in range(max(done, 1), self.num_stages + 1):
            for layer in self.layers(number):
                x = layer(x)
            yield f"stage{number}:preact", x
            x = self.activate(x)
            yield f"stage{number}", x
        if done <= self.num_stages + 1:
            x = F.adaptive_avg_pool2d(self.neck(x), 1).flatten(1)
            yield "pooled", x
        yield "logits", self.fc(x)


def make_stage(
    block: Callable[[int, int, int], nn.Module],
    in_channels: int,
    out_channels: int,
    stride: int,
    blocks: int,
) -> nn.Sequential:
    """`block(in_channels, out_channels, stride)` first, then the others with stride 1."""
    rest = (block(out_channels, out_channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(block(in_channels, out_channels, stride), *rest)
