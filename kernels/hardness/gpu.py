"""`hardness` and `select_hardest` on CUDA tensors: launch shapes and launches of gpu_kernels.py.

Serves the two ops of this folder under the dispatcher's CUDA key, and CPU tensors under Triton's
interpreter. One launch each; launch shapes are a pure function of shapes.
"""

import math

import torch
import triton
from torch import Tensor

from fastkd.kernels.gpu_kernels import launch
from fastkd.kernels.hardness.gpu_kernels import rank_kernel, score_kernel
from fastkd.kernels.hardness.inputs import KINDS
from fastkd.kernels.hardness.reference import select_hardest_reference
from fastkd.kernels.kd_loss.gpu import plan

__all__ = ["MAX_POOL", "RANK_TILE", "hardness", "select_hardest"]

# Every score is compared with every other: past this many, a sort has less to do.
MAX_POOL = 4096
# Scores that a program places, scores it compares them with at a time, warps.
RANK_TILE = (8, 512, 8)


def hardness(
    logits: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    kind: str,
    temperature: float,
) -> Tensor:
    """Scores [N] of logits [N, C]."""
    rows, classes = logits.shape
    scores = logits.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return scores
    second = logits if teacher is None else teacher
    p = plan(rows, classes, max(logits.stride(1), second.stride(1)))
    launch(
        score_kernel,
        (triton.cdiv(rows, p.block_r),),
        on=logits,
        s_ptr=logits,
        t_ptr=teacher,
        y_ptr=None if labels is None else labels.contiguous(),
        score_ptr=scores,
        num_rows=rows,
        s_strides=logits.stride(),
        t_strides=second.stride(),
        temperature=temperature,
        KIND=KINDS.index(kind),
        CLASSES=classes,
        ALIGN=math.gcd(16, logits.stride(0), second.stride(0)),
        ONE_TILE=classes <= p.block_c,
        BLOCK_R=p.block_r,
        BLOCK_C=p.block_c,
        num_warps=p.warps,
    )
    return scores


def select_hardest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(index [k], number of NaN scores) of scores [N]."""
    rows = scores.numel()
    if rows > MAX_POOL:
        return select_hardest_reference(scores, k)
    index = scores.new_empty(k, dtype=torch.int64)
    num_nan = scores.new_empty((), dtype=torch.int64)
    block_r, block_c, warps = RANK_TILE
    launch(
        rank_kernel,
        (max(1, triton.cdiv(rows, block_r)),),
        on=scores,
        score_ptr=scores.contiguous(),
        index_ptr=index,
        num_nan_ptr=num_nan,
        num_rows=rows,
        k=k,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=warps,
    )
    return index, num_nan
