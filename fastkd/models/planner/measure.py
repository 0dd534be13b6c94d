"""The clock of the planner: a block's kinds take turns on tensors of their own.

Nothing of the caller is touched: no parameter, gradient or running statistic, no random number, no
autocast cache, no hook on saved tensors.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._autograd import (
    _saved_tensors_hooks_is_enabled,  # pyright: ignore[reportAttributeAccessIssue]
)

from fastkd.kernels.grouped_pointwise import grouped_pointwise
from fastkd.kernels.grouped_pointwise.inputs import Activation, Norm
from fastkd.models.planner.spec import BlockSpec, Case, Kind

__all__ = ["Tensors", "computing", "fused", "measure", "plain", "sides"]

BUDGET_S = 0.25
"""Seconds of a measurement; `FEWEST` turns are made in any case."""
FEWEST, MOST = 5, 20
_SHORTEST_S = 5e-4
"""A sample is as many calls as take this long."""

Recompute = Literal["auto", "on", "off"]

_ACT: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
}


@dataclass(frozen=True)
class Tensors:
    """What a block computes with: fp32 weights, a norm for each place, an input."""

    x_NCHW: Tensor
    residual: Tensor | None
    expand: Tensor | None
    before: Norm | None
    grouped: Tensor
    norm: Norm
    pointwise: Tensor
    after: Norm | None
    grouped_bias: Tensor | None = None
    pointwise_bias: Tensor | None = None
    expand_bias: Tensor | None = None

    @classmethod
    def of(cls, case: Case, seed: int = 0) -> "Tensors":
        """The same numbers for the same case and seed, whatever torch's random state is."""
        spec, device = case.spec, case.device
        random = torch.Generator("cpu").manual_seed(seed)
        layout = torch.channels_last if case.channels_last else torch.contiguous_format

        def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
            values = scale * torch.randn(shape, generator=random, device="cpu", dtype=torch.float32)
            moved = values.to(device, dtype)
            if len(shape) == 4:
                moved = moved.contiguous(memory_format=layout)
            return moved.requires_grad_(case.training)

        def norm(channels: int, activation: Activation | None) -> Norm | None:
            if activation is None:
                return None
            zeros = torch.zeros(channels, device=device, dtype=torch.float32)
            ones = torch.ones_like(zeros)
            return Norm(
                ones.clone().requires_grad_(case.training),
                zeros.clone().requires_grad_(case.training),
                running_mean=zeros,
                running_var=ones,
                training=case.batch_statistics,
                activation=activation,
            )

        def bias(channels: int) -> Tensor | None:
            return draw(channels, scale=0.1) if spec.biases else None

        out = (case.shape[0], spec.out_channels, *map(spec.geometry.out_size, case.shape[2:]))
        wide, cpg = spec.channels, spec.channels // spec.groups
        inner = norm(wide, spec.activation)
        assert inner is not None
        return cls(
            x_NCHW=draw(*case.shape, dtype=case.dtype),
            residual=draw(*out, dtype=case.dtype) if spec.residual else None,
            expand=draw(wide, spec.in_channels, 1, 1, scale=spec.in_channels**-0.5)
            if spec.expand is not None
            else None,
            before=norm(wide, spec.before),
            grouped=draw(wide, cpg, 3, 3, scale=(9 * cpg) ** -0.5),
            norm=inner,
            pointwise=draw(spec.out_channels, wide, 1, 1, scale=wide**-0.5),
            after=norm(spec.out_channels, spec.after),
            grouped_bias=bias(wide),
            pointwise_bias=bias(spec.out_channels),
            expand_bias=bias(wide) if spec.expand is not None else None,
        )

    def leaves(self) -> list[Tensor]:
        """What a gradient is computed for: the input first."""
        norms = [self.before, self.norm, self.after]
        affine = [t for one in norms if one for t in (one.weight, one.bias)]
        weights = [self.residual, self.expand, self.grouped, self.pointwise]
        biases = [self.expand_bias, self.grouped_bias, self.pointwise_bias]
        given = [*weights, *biases, *affine]
        return [self.x_NCHW, *(one for one in given if one is not None)]


def fused(spec: BlockSpec, given: Tensors, recompute: Recompute = "auto") -> Tensor:
    """The block as one op."""
    return grouped_pointwise(
        given.x_NCHW,
        given.grouped,
        given.pointwise,
        norm=given.norm,
        grouped_bias=given.grouped_bias,
        pointwise_bias=given.pointwise_bias,
        expand_weight=given.expand,
        expand_bias=given.expand_bias,
        before=given.before,
        after=given.after,
        residual=given.residual,
        recompute=recompute,
        **spec.settings,
    )


def plain(spec: BlockSpec, given: Tensors) -> Tensor:
    """The block as modules of torch compute it, in the layout of the tensors."""
    x = given.x_NCHW
    if given.expand is not None:
        x = F.conv2d(x, given.expand, given.expand_bias)
    if given.before is not None:
        x = _act(_norm(x, given.before), given.before)
    x = F.conv2d(x, given.grouped, given.grouped_bias, *spec.geometry)
    x = _act(_norm(x, given.norm), given.norm)
    x = F.conv2d(x, given.pointwise, given.pointwise_bias)
    if given.after is not None:
        x = _norm(x, given.after)
        x = x if spec.activate_sum else _act(x, given.after)
    if given.residual is not None:
        x = x + given.residual
    if given.after is not None and spec.activate_sum:
        x = _act(x, given.after)
    return x


def _norm(x: Tensor, norm: Norm) -> Tensor:
    running = norm.running_mean, norm.running_var
    return F.batch_norm(x, *running, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps)


def _act(x: Tensor, norm: Norm) -> Tensor:
    return _ACT[norm.activation](x)


@contextmanager
def computing(case: Case) -> Iterator[None]:
    """Gradients and autocast as the case has them, whatever they are outside.

    Tensors saved for the backward pass stay here: the hooks of a checkpoint outside would compute
    its block again.
    """
    wide = case.dtype == torch.float32
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(case.training),
        torch.autocast(
            case.device.type, None if wide else case.dtype, enabled=not wide, cache_enabled=False
        ),
        _own_saved_tensors(),
    ):
        yield


def _own_saved_tensors() -> AbstractContextManager[None]:
    """Hides the hooks on saved tensors; where hooks are forbidden there are none to hide."""
    if not _saved_tensors_hooks_is_enabled():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_same, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def sides(case: Case) -> dict[Kind, Callable[[], None]]:
    """A call computes a step of each kind: forward, and in training all gradients."""
    spec, given = case.spec, Tensors.of(case)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    kinds: dict[Kind, Callable[[], Tensor]] = {
        "fused": lambda: fused(spec, given),
        "plain": lambda: plain(spec, given),
    }
    with computing(case):
        upstream = torch.ones_like(plain(spec, given)) / 7

    def step(forward: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            out = forward().contiguous(memory_format=layout)
            if case.training:
                torch.autograd.grad(out, given.leaves(), upstream)

        return run

    return {kind: step(forward) for kind, forward in kinds.items()}


def measure(case: Case) -> dict[Kind, list[float]]:
    """Seconds of a call of each kind, sampled in turns; about `BUDGET_S` in all."""
    wait = (lambda: torch.cuda.synchronize(case.device)) if case.device.type == "cuda" else _nothing

    def timed(run: Callable[[], None], calls: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        return (time.perf_counter() - start) / calls

    with computing(case):
        runs = sides(case)
        for run in runs.values():
            run()
        shortest = min(timed(run, 1) for run in runs.values())
        calls = max(1, round(_SHORTEST_S / shortest))
        seconds: dict[Kind, list[float]] = {kind: [] for kind in runs}
        end = time.perf_counter() + BUDGET_S
        for turn in range(MOST):
            if turn >= FEWEST and time.perf_counter() > end:
                break
            order = list(runs) if turn % 2 == 0 else list(reversed(runs))
            for kind in order:
                seconds[kind].append(timed(runs[kind], calls))
    return seconds


def _nothing() -> None: ...
