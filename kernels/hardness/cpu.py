"""`hardness` and `select_hardest` on CPU tensors through the C++ core.

Serves the two ops of this folder under the dispatcher's CPU key. The packed arguments are
`HardnessArgs` and `SelectArgs` in cpu.cpp.
"""

import struct

import torch
from fastkd.kernels._library import STORAGE, entry_point
from fastkd.kernels.hardness.inputs import KINDS
from torch import Tensor

__all__ = ["hardness", "select_hardest"]

_HARDNESS_ARGS = struct.Struct("4Q8qd")
_SELECT_ARGS = struct.Struct("3Q3q")


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
    storage = STORAGE[logits.dtype]
    rows, classes = logits.shape
    second = (0, 0, storage)
    if teacher is not None:
        teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
        second = (teacher.data_ptr(), teacher.stride(0), STORAGE[teacher.dtype])
    labels = None if labels is None else labels.contiguous()
    wide = storage == 3 or second[2] == 3
    scores = torch.empty(rows, dtype=torch.float64 if wide else torch.float32)
    arguments = _HARDNESS_ARGS.pack(
        logits.data_ptr(), second[0], 0 if labels is None else labels.data_ptr(), scores.data_ptr(),
        rows, classes, logits.stride(0), second[1], storage, second[2],
        KINDS.index(kind), torch.get_num_threads(), temperature,
    )  # fmt: skip
    if entry_point("hardness", isa)(arguments) < 0:
        raise MemoryError(f"hardness: no memory for the scratch of rows of {classes} classes")
    return scores


def select_hardest(scores: Tensor, k: int, isa: str | None = None) -> tuple[Tensor, Tensor]:
    """(index [k], number of NaN scores) of scores [N]."""
    wide = scores.dtype == torch.float64
    scores = (scores if wide else scores.float()).contiguous()
    index, num_nan = torch.empty(k, dtype=torch.int64), torch.empty((), dtype=torch.int64)
    arguments = _SELECT_ARGS.pack(
        scores.data_ptr(), index.data_ptr(), num_nan.data_ptr(), scores.numel(), k, wide
    )
    if entry_point("select_hardest", isa)(arguments) < 0:
        raise MemoryError(f"select_hardest: no memory to sort {scores.numel()} scores")
    return index, num_nan
