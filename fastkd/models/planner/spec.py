"""What is asked of the planner, and what it answers."""

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch

from fastkd.kernels.grouped_pointwise.inputs import Activation, Geometry

__all__ = [
    "DEFAULT_KERNELS",
    "KINDS",
    "BlockSpec",
    "Case",
    "Choice",
    "KernelChoice",
    "Kind",
    "Shape",
]

Kind = Literal["fused", "plain"]
"""`fastkd.kernels.grouped_pointwise`, or torch's own operations in the layout of the network."""

KINDS: tuple[Kind, ...] = get_args(Kind)


KernelChoice = Literal["auto", "fused", "plain"]
"""What a user asks for: as the planner finds faster, as one op wherever that is possible, or as
plain modules."""

DEFAULT_KERNELS: KernelChoice = "plain"
"""Of recipes and `create_model`: what is faster has been measured on too few machines yet."""


Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class BlockSpec:
    """A chain [1x1] -> [norm] -> grouped 3x3 -> norm -> 1x1 [-> norm] [+ residual].

    Each norm is a batch norm with an activation behind it.
    """

    in_channels: int
    """Of the chain's input."""
    out_channels: int
    groups: int
    expand: int | None = None
    """Channels behind a 1x1 convolution in front; None: there is none, the 3x3 sees the input."""
    before: Activation | None = None
    """Behind the norm in front of the 3x3 convolution; None: there is no such norm."""
    activation: Activation = "relu"
    """Behind the norm between the two convolutions."""
    after: Activation | None = None
    """Behind the norm behind the last convolution; None: there is no such norm."""
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    residual: bool = False
    activate_sum: bool = False
    """The last activation acts on the sum with the residual, not on the branch."""
    biases: bool = False
    """Convolutions have biases."""

    @property
    def channels(self) -> int:
        """Of the grouped convolution."""
        return self.in_channels if self.expand is None else self.expand

    @property
    def geometry(self) -> Geometry:
        """Of the 3x3 convolution."""
        return Geometry(self.stride, self.padding, self.dilation, self.groups)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `grouped_pointwise` that are no tensors and no norms."""
        return {**self.geometry._asdict(), "activate_sum": self.activate_sum}

    def __str__(self) -> str:
        """For example `32 -> 4 a group -> 64, stride 2, residual`."""
        words = [] if self.expand is None else [f"1x1 -> {self.expand}"]
        words += [f"{self.channels // self.groups} a group", str(self.out_channels)]
        extra = [] if self.stride == 1 else [f"stride {self.stride}"]
        extra += [] if self.dilation == 1 else [f"dilation {self.dilation}"]
        extra += ["residual"] if self.residual else []
        return ", ".join([f"{self.in_channels} -> " + " -> ".join(words), *extra])


@dataclass(frozen=True)
class Case:
    """A block, what it is given, and what is asked of it."""

    spec: BlockSpec
    shape: Shape
    """Of the input, [N, C, H, W]."""
    dtype: torch.dtype
    """That the block computes in: torch.float32, or the type of autocast."""
    device: torch.device
    training: bool
    """Forward and backward pass; else the forward pass alone."""
    batch_statistics: bool
    """Norms normalise with those of the batch; else with the running ones, as in evaluation and
    where they are frozen."""
    channels_last: bool = True
    """Layout of the input and the weights, which is that of the output too: what the fused kind
    changes is counted."""

    @property
    def key(self) -> str:
        """All of it except for the device, as text."""
        facts = json.loads(self.family) | {"shape": self.shape}
        return json.dumps(facts, sort_keys=True)

    @property
    def family(self) -> str:
        """The key without the shape, which the cases of one block share."""
        facts = (self.training, self.batch_statistics, self.channels_last)
        return _family(self.spec, self.dtype, *facts)


@functools.lru_cache(1024)
def _family(
    spec: BlockSpec,
    dtype: torch.dtype,
    training: bool,
    batch_statistics: bool,
    channels_last: bool,
) -> str:
    """Made once: networks ask for it in every call of a block."""
    facts = asdict(spec) | {
        "dtype": str(dtype).removeprefix("torch."),
        "training": training,
        "batch_statistics": batch_statistics,
        "channels_last": channels_last,
    }
    return json.dumps(facts, sort_keys=True)


@dataclass(frozen=True)
class Choice:
    """What is picked, and why."""

    kind: Kind
    ms: Mapping[Kind, float] = field(default_factory=dict[Kind, float])
    """Median milliseconds of a call of each kind; empty where nothing was measured."""
    source: Literal["measured", "disk", "run", "near", "table", "default"] = "default"
    """Measured now; measured before and kept; chosen by the run that this one resumes; that of the
    nearest size among those; the committed costs; or nothing is known, and the block stays plain.
    """

    @property
    def gain(self) -> float:
        """Time of the plain kind over that of the chosen one; 1 where nothing is known."""
        return self.ms["plain"] / self.ms[self.kind] if self.ms else 1.0
