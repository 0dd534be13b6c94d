"""What the autograd Functions of the ops share: backward passes that the kernels cannot make.

A gradient that is itself differentiated (create_graph=True), or taken for several incoming ones at
once (is_grads_batched=True, as torch.autograd.functional.jacobian(vectorize=True) does), comes from
the op's reference in plain torch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_left_to_torch", "reference_gradients"]


def is_left_to_torch(upstream: Sequence[Tensor | None]) -> bool:
    """Whether a backward pass with these incoming gradients has to be torch's own."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or any(_is_batched(g) for g in upstream if g is not None)


def _is_batched(g: Tensor) -> bool:
    """Whether it stands for several: vmap's, or that of is_grads_batched."""
    functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009 - unknown to type checkers
    return functorch.is_batchedtensor(g) or functorch.is_legacy_batchedtensor(g)


def reference_gradients(
    compute: Callable[[], Sequence[Tensor]],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """Gradients at `inputs` of what `compute` makes of them, differentiable where that is recorded.

    Args:
        compute: the reference; called once, with gradients on.
        inputs: tensors that require grad.
        upstream: an incoming gradient for each result, of its shape or one that expands to it; None
            for results that nobody differentiates.
    """
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        outputs = compute()
    # A loss that was not asked for (no labels, no teacher) depends on nothing.
    both = zip(outputs, upstream, strict=True)
    pairs = [(out, g) for out, g in both if g is not None and out.requires_grad]
    if not pairs:
        return tuple(map(torch.zeros_like, inputs))
    incoming = [g.expand(out.shape).to(out.dtype) for out, g in pairs]
    return torch.autograd.grad([out for out, _ in pairs], inputs, incoming, create_graph=twice)
