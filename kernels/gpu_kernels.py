"""What the Triton kernels of several ops share: the launch, tiles of logits, one term of KL.

Only the ops' gpu_*.py and gpu.py import it, so that Triton is loaded when a kernel is needed.
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["LN2", "LOG2E", "NEAR_EQUAL", "kl_term", "launch", "tile"]

# Multiply-adds may be fused: what must cancel exactly (equal logits) is written without products.
_OPTIONS = {"enable_fp_fusion": True}


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, **arguments: Any) -> None:
    """Run a kernel on the device of `on`, which need not be the current one.

    `arguments`: the kernel's, by name, and launch options (`num_warps`).
    """
    with torch.cuda.device(on.device) if on.is_cuda else nullcontext():
        kernel[grid](**{**_OPTIONS, **arguments})


# Below this KL (nats, without T^2) the sum is taken again in a form without cancellation.
NEAR_EQUAL = tl.constexpr(0.1)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _phi(u):
    """exp(-u) - 1 + u for |u| <= 1, relative error below 1e-8 before rounding."""
    q = u * -2.7722830964194145e-06 + 2.5354822355438955e-05
    q = q * u + -0.0001984402333619073
    q = q * u + 0.0013885452644899487
    q = q * u + -0.00833331048488617
    q = q * u + 0.04166673496365547
    q = q * u + -0.1666666716337204
    q = q * u + 0.5
    return q * (u * u)


@triton.jit
def kl_term(p, q, u):
    """p * (exp(-u) - 1 + u) with u = log(p / q): one never negative term of KL(p || q)."""
    far = tl.maximum(p * u - (p - q), 0.0)
    term = tl.where(tl.abs(u) < 1.0, p * _phi(u), far)
    # maximum() drops NaN and a class of probability 0 has no logarithm.
    return tl.where(p > 0.0, term, q) + (u - u) * p


@triton.jit
def tile(ptr, o_row, o_col, stride_c, m_tile, m_col):
    """[R, C] logits in fp32, minus infinity beyond the last class."""
    b = tl.load(ptr + o_row[:, None] + o_col[None, :] * stride_c, mask=m_tile, other=0.0)
    return tl.where(m_col[None, :], b.to(tl.float32), float("-inf"))
