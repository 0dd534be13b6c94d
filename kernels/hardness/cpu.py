"""`hardness` and `select_hardest` on CPU tensors through the C++ core.

Serves the two ops of this folder under the dispatcher's CPU key. Packed arguments: `HardnessArgs`
and `SelectArgs` in cpu.cpp.
"""

import torch
from torch import Tensor

from fastkd.kernels._library import STORAGE, Arguments, entry_point
from fastkd.kernels.hardness.inputs import KINDS

__all__ = ["hardness", "select_hardest"]

_HARDNESS = Arguments(
    logits="P",
    teacher="P",
    labels="P",
    kind="q",
    temperature="d",
    scores="P",
    rows="q",
    classes="q",
    stride="q",
    teacher_stride="q",
    type="q",
    teacher_type="q",
    threads="q",
)
_SELECT = Arguments(scores="P", index="P", num_nan="P", rows="q", k="q", wide="q")


def hardness(
    logits: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    kind: str,
    temperature: float,
    isa: str | None = None,
) -> Tensor:
    """Scores [N] of logits [N, C]. `isa` picks a clone, for benchmarks and tests."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, classes = logits.shape
    teacher_stride, teacher_dtype = 0, logits.dtype
    if teacher is not None:
        teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
        teacher_stride, teacher_dtype = teacher.stride(0), teacher.dtype
    labels = None if labels is None else labels.contiguous()
    double = torch.float64 in (logits.dtype, teacher_dtype)
    scores = torch.empty(rows, dtype=torch.float64 if double else torch.float32)
    arguments = _HARDNESS.pack(
        logits=logits,
        teacher=teacher,
        labels=labels,
        kind=KINDS.index(kind),
        temperature=temperature,
        scores=scores,
        rows=rows,
        classes=classes,
        stride=logits.stride(0),
        teacher_stride=teacher_stride,
        type=STORAGE[logits.dtype],
        teacher_type=STORAGE[teacher_dtype],
        threads=torch.get_num_threads(),
    )
    if entry_point("hardness", _HARDNESS, isa)(arguments) < 0:
        raise MemoryError(f"hardness: no memory for the scratch of rows of {classes} classes")
    return scores


def select_hardest(scores: Tensor, k: int, isa: str | None = None) -> tuple[Tensor, Tensor]:
    """(index [k], number of NaN scores) of scores [N]."""
    wide = scores.dtype == torch.float64
    scores = (scores if wide else scores.float()).contiguous()
    index, num_nan = torch.empty(k, dtype=torch.int64), torch.empty((), dtype=torch.int64)
    arguments = _SELECT.pack(
        scores=scores,
        index=index,
        num_nan=num_nan,
        rows=scores.numel(),
        k=k,
        wide=wide,
    )
    if entry_point("select_hardest", _SELECT, isa)(arguments) < 0:
        raise MemoryError(f"select_hardest: no memory to sort {scores.numel()} scores")
    return index, num_nan
