"""The chain of stages with its gradient: what calls the ops of op.py, in which order.

Forward, each convolution returns the statistics of what it wrote, which the norm in front of the
next one needs. Backward runs through the same stages in reverse: each is told by `After` how to
form the gradient at its output. The derivation is in README.md.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from fastkd.kernels._autograd import is_left_to_torch, reference_gradients
from fastkd.kernels._library import is_exporting, is_plain_cpu
from fastkd.kernels.grouped_pointwise.chain import (
    TENSORS,
    Chain,
    Stage,
    chain_of,
    without_running,
)
from fastkd.kernels.grouped_pointwise.inputs import After, Norm, Normalised, activation_code
from fastkd.kernels.grouped_pointwise.memory import channels_last
from fastkd.kernels.grouped_pointwise.op import stage_op
from fastkd.kernels.grouped_pointwise.reference import grouped_pointwise_reference, update_running

__all__ = ["Source", "block"]

Source = Literal["ops", "triton", "reference"]
"""Which functions are the stages: the ops, gpu.py itself (the interpreter), or reference.py."""

_NO_NORM = ([], 0.0, 0)


def block(
    x_NCHW: Tensor, chain: Chain, residual: Tensor | None, *, recompute: bool, source: Source
) -> Tensor:
    """The chain on channels-last inputs, differentiable: [N, CO, H', W'].

    Updates the running statistics of norms that train. `recompute`: keep the grouped convolution's
    input and not its output for the backward pass.
    """
    tensors = [x_NCHW, residual, *chain.tensors()]
    # An exported program is for inference, though its parameters require grad while it is traced.
    recorded = torch.is_grad_enabled() and not is_exporting()
    if recorded and any(t is not None and t.requires_grad for t in tensors):
        # The sum with a residual that no norm precedes is torch's own: nothing could be fused.
        summed = residual if chain.after is None else None
        tensors[1] = residual if summed is None else None
        out, *moments = _Block.apply(chain.constants(), recompute, source, *tensors)
        out = out if summed is None else out + summed
    else:
        out, known = _without_gradient(_runner(source, tensors), x_NCHW, chain, residual)
        moments = _moments(known)
    trained = [norm for norm in chain.norms if norm is not None and norm.training]
    for place, norm in enumerate(trained):
        update_running(norm, moments[2 * place], moments[2 * place + 1])
    return out


class _Known(NamedTuple):
    """A norm as the stages take it, with what its derivative needs."""

    vectors: Normalised
    eps: float
    act: int
    count: int | Tensor
    """Values a channel behind the statistics, of all ranks; 0: they are not the batch's."""

    @property
    def arguments(self) -> tuple[list[Tensor], float, int]:
        return list(self.vectors), self.eps, self.act


_Run = Callable[[str], Callable[..., Any]]


def _runner(source: Source, tensors: Sequence[Tensor | None]) -> _Run:
    """The function of a stage, by its name; `tensors` are those that it will see."""
    if source == "triton":
        from fastkd.kernels.grouped_pointwise import gpu as stages
    elif source == "reference":
        from fastkd.kernels.grouped_pointwise import reference as stages
    elif is_plain_cpu([t for t in tensors if t is not None]):
        # The dispatcher takes as long as a small image.
        from fastkd.kernels.grouped_pointwise import cpu as stages
    else:
        return stage_op
    return partial(getattr, stages)


def _forward(
    run: _Run, x: Tensor, chain: Chain, residual: Tensor | None
) -> tuple[Tensor, list[Tensor], list[_Known | None]]:
    """(out, the input of each stage and of the last norm, each norm with its statistics)."""
    norms, values, known, counted = chain.norms, [x], [], None
    for stage, behind in zip(chain.stages, norms[1:], strict=True):
        known.append(_measured(run, stage.norm, values[-1], counted))
        y, *counted = _convolve(run, stage, values[-1], known[-1], _trains(behind))
        values.append(y)
    known.append(_measured(run, chain.after, values[-1], counted))
    if known[-1] is None:
        return values[-1], values, known
    out = run("normalise")(values[-1], *known[-1].arguments, residual, chain.activate_sum)
    return out, values, known


def _without_gradient(
    run: _Run, x: Tensor, chain: Chain, residual: Tensor | None
) -> tuple[Tensor, list[_Known | None]]:
    """The forward pass that keeps nothing; (out, norms).

    Where the norm between the last two convolutions knows its statistics in advance, these are one
    stage, which takes up the norm and the sum behind it too.
    """
    *head, grouped, pointwise = chain.stages
    after = chain.after
    if _trains(pointwise.norm):
        out, _, known = _forward(run, x, chain, residual)
        return (out + residual if after is None and residual is not None else out), known
    counted, known = None, []
    for stage, behind in zip(head, chain.norms[1:], strict=False):
        known.append(_measured(run, stage.norm, x, counted))
        x, *counted = _convolve(run, stage, x, known[-1], _trains(behind))
    known += [_measured(run, grouped.norm, x, counted), _measured(run, pointwise.norm, x, None)]
    folded = not _trains(after) and (residual is None or not chain.activate_sum)
    last = _measured(run, after, x, None) if folded else None
    out, *counted = run("pair")(
        x,
        *_arguments(known[-2]),
        *_convolution(grouped),
        *_arguments(known[-1]),
        *_convolution(pointwise),
        *_arguments(last),
        residual if folded else None,
        _trains(after),
    )
    if not folded:
        last = _measured(run, after, out, counted)
        out = run("normalise")(out, *_arguments(last), residual, chain.activate_sum)
    return out, [*known, last]


class _Block(torch.autograd.Function):
    """The chain as one node of the graph. Returns the output, then mean and unbiased variance of
    each norm that trains.

    Keeps the input of every stage as it was stored, never normalised.
    """

    @staticmethod
    @override
    def forward(
        ctx: Any, constants: tuple[Any, ...], recompute: bool, source: Source, *tensors: Any
    ) -> tuple[Tensor, ...]:
        x, residual, *flat = tensors
        chain = chain_of(constants, flat)
        out, values, known = _forward(_runner(source, tensors), x, chain, residual)
        moments = _moments(known)
        ctx.mark_non_differentiable(*moments)
        ctx.constants, ctx.recompute, ctx.source = constants, recompute, source
        ctx.counts = [0 if one is None else one.count for one in known]
        ctx.num_values = len(values)
        kept: list[Tensor | None] = [*values]
        if chain.after is None:
            kept[-1] = None  # It is the output, which nothing here needs.
        if recompute:
            kept[-2] = None
        # Statistics of batches are kept, running ones of norms that train are not: they change.
        batches = [
            vector
            for one in known
            for vector in (one.vectors[:2] if one is not None and _is_batch(one) else (None, None))
        ]
        summed = residual if chain.activate_sum else None
        ctx.save_for_backward(*kept, summed, *without_running(flat, constants), *batches)
        return out, *moments

    @staticmethod
    @override
    def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        num, saved = ctx.num_values, ctx.saved_tensors
        values, (residual, *rest) = list(saved[:num]), saved[num:]
        links = len(ctx.constants[0])
        flat, batches = rest[: TENSORS * links], rest[TENSORS * links :]
        needs = ctx.needs_input_grad[3:]
        chain = chain_of(ctx.constants, flat)
        if is_left_to_torch(upstream[:1]):
            inputs = [values[0], residual, *flat]
            grads = _gradients_by_reference(ctx.constants, inputs, needs, upstream[0])
        else:
            known = _remembered(chain, batches, ctx.counts)
            g = channels_last(upstream[0])
            run = _runner(ctx.source, [g, *saved])
            grads = _gradients(run, chain, values, known, residual, g, needs)
        return None, None, None, *grads


def _gradients(
    run: _Run,
    chain: Chain,
    values: list[Tensor],
    known: list[_Known | None],
    residual: Tensor | None,
    g: Tensor,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of (x, residual, then TENSORS of each stage and of the last norm)."""
    grads: list[Tensor | None] = [None] * len(needs)
    after, after_eps = [], 0.0
    if known[-1] is not None:
        grads[1] = g if needs[1] else None
        arguments = (*known[-1].arguments, residual, chain.activate_sum)
        g, sums = run("normalise_backward")(g, values[-1], *arguments)
        if chain.activate_sum and needs[1]:
            grads[1] = g
        first = 2 + TENSORS * len(chain.stages)
        _of_norm(grads, first + 2, sums, chain.after, needs)
        after, after_eps = _after(values[-1], known[-1], sums, chain.after), known[-1].eps
    for place in reversed(range(len(chain.stages))):
        stage, first = chain.stages[place], 2 + TENSORS * place
        # What is in front of this stage: x, earlier stages, and the norm that it reads through.
        in_front = needs[0] or any(needs[2:first]) or any(needs[first + 2 : first + 4])
        weights = needs[first] or needs[first + 1]
        if not (in_front or weights):
            break
        if values[place] is None:
            before = chain.stages[place - 1]
            values[place] = _convolve(run, before, values[place - 1], known[place - 1], False)[0]
        weight, bias, *geometry = _convolution(stage)
        g, sums, weight_grad, bias_grad = run(f"{stage.kind}_backward")(
            g,
            after,
            after_eps,
            values[place],
            *_arguments(known[place]),
            weight,
            bias is not None,
            *geometry,
            [in_front, weights],
        )
        if needs[first]:
            grads[first] = weight_grad.to(stage.weight.dtype)
        if stage.bias is not None and needs[first + 1]:
            grads[first + 1] = bias_grad.to(stage.bias.dtype)
        after, after_eps, norm = [], 0.0, known[place]
        if norm is not None and in_front:
            _of_norm(grads, first + 2, sums, stage.norm, needs)
            if place or needs[0]:
                after, after_eps = _after(values[place], norm, sums, stage.norm), norm.eps
    if needs[0]:
        grads[0] = run("denormalise")(g, after, after_eps) if after else g
    return grads


def _gradients_by_reference(
    constants: tuple[Any, ...],
    inputs: list[Tensor | None],
    needs: tuple[bool, ...],
    g: Tensor,
) -> list[Tensor | None]:
    """The same gradients by torch's own, which can be differentiated and mapped.

    `inputs`: x, residual, `Chain.tensors()`.
    """
    # Views of their own: one tensor may be two of the inputs, or be computed from another.
    with torch.enable_grad():
        views: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
    wanted = [place for place, need in enumerate(needs) if need and views[place] is not None]
    x, residual, *flat = views
    found = reference_gradients(
        lambda: [grouped_pointwise_reference(x, chain_of(constants, flat), residual, update=False)],
        [views[place] for place in wanted],
        [g],
    )
    grads: list[Tensor | None] = [None] * len(needs)
    for place, grad in zip(wanted, found, strict=True):
        grads[place] = grad
    if needs[1] and residual is None:
        grads[1] = g  # It was added behind everything else, and was not kept.
    return grads


def _trains(norm: Norm | None) -> bool:
    return norm is not None and norm.training


def _convolution(stage: Stage) -> tuple[Any, ...]:
    """The arguments that describe a convolution, as all stages take them."""
    bias = None if stage.bias is None else stage.bias.contiguous()
    return stage.weight.contiguous(), bias, *(stage.geometry or ())


def _arguments(known: _Known | None) -> tuple[list[Tensor], float, int]:
    return _NO_NORM if known is None else known.arguments


def _convolve(
    run: _Run, stage: Stage, x: Tensor, known: _Known | None, statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return run(stage.kind)(x, *_arguments(known), *_convolution(stage), statistics)


def _measured(
    run: _Run, norm: Norm | None, x: Tensor, counted: list[Tensor] | None
) -> _Known | None:
    """The norm of x, whose mean and variance are `counted` if the stage in front counted them."""
    if norm is None:
        return None
    if not norm.training:
        return _known(norm, norm.running_mean, norm.running_var, 0)
    mean, var = counted or run("statistics")(x)
    count = x.numel() // x.shape[1]
    if norm.gather is None:
        return _known(norm, mean, var, count)
    # Chan, Golub & LeVeque 1983, over all ranks at once and in their order.
    ranks = norm.gather(torch.cat([mean.new_full((1,), count), mean, var * count])).double()
    counts, means, squares = ranks.split([1, len(mean), len(mean)], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    var = (squares + counts * (means - mean).square()).sum(0) / total
    return _known(norm, mean, var, total.float())


def _known(norm: Norm, mean: Any, var: Any, count: int | Tensor) -> _Known:
    mean, var = _vector(mean), _vector(var)
    weight = torch.ones_like(mean) if norm.weight is None else _vector(norm.weight)
    bias = torch.zeros_like(mean) if norm.bias is None else _vector(norm.bias)
    return _Known(
        Normalised(mean, var, weight, bias), norm.eps, activation_code(norm.activation), count
    )


def _vector(values: Tensor) -> Tensor:
    """As the stages read it: a buffer may be a column of another, or one number expanded."""
    return values.float().contiguous()


def _is_batch(known: _Known) -> bool:
    return isinstance(known.count, Tensor) or known.count != 0


def _remembered(
    chain: Chain, batches: list[Tensor | None], counts: list[int | Tensor]
) -> list[_Known | None]:
    """The norms of the forward pass."""
    known: list[_Known | None] = []
    for place, norm in enumerate(chain.norms):
        mean, var = batches[2 * place : 2 * place + 2]
        if norm is None:
            known.append(None)
        elif norm.training:
            known.append(_known(norm, mean, var, counts[place]))
        else:
            known.append(_known(norm, norm.running_mean, norm.running_var, 0))
    return known


def _moments(known: list[_Known | None]) -> list[Tensor]:
    """Mean and unbiased variance of each norm that trains, one after the other."""
    moments = []
    for one in known:
        if one is not None and _is_batch(one):
            mean, var = one.vectors.mean, one.vectors.var
            # New tensors: what a Function returns must not be what it keeps.
            moments += [mean.clone(), var * (one.count / (one.count - 1))]
    return moments


def _after(out: Tensor, known: _Known, sums: Tensor, norm: Norm | None) -> list[Tensor]:
    """`After` of a stage that wrote `out`, behind which `sums` were found."""
    mean, var, weight, _ = known.vectors
    if not _is_batch(known):
        return [*After(out, mean, var, weight, torch.zeros_like(sums))]
    if norm is not None and norm.gather is not None:
        sums = norm.gather(sums.flatten()).sum(0).view_as(sums)
    return [*After(out, mean, var, weight, sums / known.count)]


def _of_norm(
    grads: list[Tensor | None], first: int, sums: Tensor, norm: Norm | None, needs: tuple[bool, ...]
) -> None:
    """Enter the gradients of a norm's weight and bias, which lie at `first`: its sums."""
    assert norm is not None
    for place, vector, found in ((first, norm.weight, sums[1]), (first + 1, norm.bias, sums[0])):
        if vector is not None and needs[place]:
            grads[place] = found.to(vector.dtype)
