"""What `grouped_pointwise` accepts, and the values that its stages take.

A stage is a convolution (grouped 3x3, or pointwise) of act(norm(input)). It writes its result raw,
in the input's dtype, and counts the statistics of what it wrote; the next stage normalises as it
reads. The gradient travels the same way: a stage hands back the gradient behind its norm, with the
two sums that the norm's derivative needs, and the stage before forms the derivative as it reads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Tensor

__all__ = [
    "Activation",
    "After",
    "Geometry",
    "Norm",
    "Normalised",
    "activation_code",
]

Activation = Literal["none", "relu", "relu6"]
_CODES: dict[str, int] = {name: place for place, name in enumerate(get_args(Activation))}


def activation_code(name: Activation) -> int:
    """The number by which the kernels know an activation: its place in `Activation`."""
    code = _CODES.get(name)
    if code is None:
        raise ValueError(f"grouped_pointwise: activation={name!r} is none of {', '.join(_CODES)}")
    return code


@dataclass(frozen=True)
class Norm:
    """A batch norm and the activation behind it, as `F.batch_norm` takes them.

    All tensors are [C]. `weight` and `bias` may be None (1 and 0).
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    training: bool = True
    """Normalise with the batch's statistics, and update the running ones where there are any."""
    momentum: float = 0.1
    """Weight of the batch in the running statistics. For `momentum=None` of nn.BatchNorm2d the
    caller gives 1 / (number of batches)."""
    eps: float = 1e-5
    activation: Activation = "relu"
    gather: Callable[[Tensor], Tensor] | None = None
    """SyncBN: takes a vector [K] of this rank, returns those of all ranks [ranks, K]."""


class Normalised(NamedTuple):
    """A norm whose statistics are known, as a stage takes it; tensors fp32 [C]."""

    mean: Tensor
    var: Tensor
    """Biased."""
    weight: Tensor
    bias: Tensor


class After(NamedTuple):
    """The norm behind a stage's output, as its backward pass takes it.

    The gradient at the output is
        weight * invstd * (g - mean_sums[0] - xhat * mean_sums[1]),  xhat = (out - mean) * invstd.
    """

    out: Tensor
    """What the stage wrote, [N, C, H, W]."""
    mean: Tensor
    var: Tensor
    weight: Tensor
    mean_sums: Tensor
    """[2, C] fp32: means over all values (of all ranks) of g and of g * xhat. 0 where the norm used
    running statistics, which do not depend on the batch."""


class Geometry(NamedTuple):
    """Of the 3x3 convolution; the same in both directions."""

    stride: int
    padding: int
    dilation: int
    groups: int

    def out_size(self, size: int) -> int:
        """Height or width of the output."""
        return (size + 2 * self.padding - 2 * self.dilation - 1) // self.stride + 1
