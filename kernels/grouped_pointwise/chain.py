"""The stages of a block with their tensors, and the same taken apart for an autograd.Function."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fastkd.kernels.grouped_pointwise.inputs import Geometry, Norm

__all__ = ["TENSORS", "Chain", "Stage", "chain_of", "without_running"]

TENSORS = 6
"""Of a stage: weight, bias, and weight, bias, running_mean, running_var of the norm before it."""


@dataclass(frozen=True)
class Stage:
    """A convolution of act(norm(input))."""

    name: Literal["expand", "grouped", "pointwise"]
    weight: Tensor
    """[C, C / groups, 3, 3], or [CO, C, 1, 1]."""
    bias: Tensor | None
    norm: Norm | None
    geometry: Geometry | None
    """Of the 3x3 convolution; None: pointwise."""

    @property
    def kind(self) -> Literal["grouped", "pointwise"]:
        """The stage of op.py that it is."""
        return "pointwise" if self.geometry is None else "grouped"


@dataclass(frozen=True)
class Chain:
    """The stages of a block, the last two of which are grouped and pointwise."""

    stages: tuple[Stage, ...]
    after: Norm | None
    """The norm behind them."""
    activate_sum: bool
    """Add the residual before the activation of `after`, not behind it."""

    @property
    def norms(self) -> list[Norm | None]:
        """The norm in front of each stage, and the last one."""
        return [*(stage.norm for stage in self.stages), self.after]

    def tensors(self) -> list[Tensor | None]:
        """TENSORS of each stage and of the last norm."""
        flat: list[Tensor | None] = []
        convolutions = [*((stage.weight, stage.bias) for stage in self.stages), (None, None)]
        for convolution, norm in zip(convolutions, self.norms, strict=True):
            flat += convolution
            if norm is None:
                flat += [None] * 4
            else:
                flat += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        return flat

    def constants(self) -> tuple[Any, ...]:
        """Everything but the tensors, as values that torch.compile takes for constants."""
        norms = tuple(
            None if n is None else (n.training, n.momentum, n.eps, n.activation, n.gather)
            for n in self.norms
        )
        stages = tuple((stage.name, stage.geometry) for stage in self.stages)
        return norms, stages, self.activate_sum


def chain_of(constants: tuple[Any, ...], flat: Any) -> Chain:
    """The chain with these `Chain.constants()` and `Chain.tensors()`."""
    norms, stages, activate_sum = constants
    built, rebuilt = [], []
    for place, norm in enumerate(norms):
        vectors = flat[TENSORS * place + 2 : TENSORS * (place + 1)]
        rebuilt.append(None if norm is None else Norm(*vectors, *norm))
    for place, (name, geometry) in enumerate(stages):
        weight, bias = flat[TENSORS * place : TENSORS * place + 2]
        built.append(Stage(name, weight, bias, rebuilt[place], geometry))
    return Chain(tuple(built), rebuilt[-1], activate_sum)


def without_running(flat: Any, constants: tuple[Any, ...]) -> list[Tensor | None]:
    """`Chain.tensors()` without the running statistics of norms that train."""
    kept = list(flat)
    for place, norm in enumerate(constants[0]):
        if norm is not None and norm[0]:
            kept[TENSORS * place + 4 : TENSORS * place + 6] = [None, None]
    return kept
