"""`hardness` and `select_hardest` as torch sees them: schemas, fakes, and what implements them.

The ops have leading underscores. Their results carry no gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.kernels._library import LIBRARY, Impl, attach, choose_for, is_plain_cpu
from fastkd.kernels.hardness import cpu
from fastkd.kernels.hardness.reference import hardness_reference, select_hardest_reference

__all__ = ["implementation"]

_REFERENCES = {"hardness": hardness_reference, "select_hardest": select_hardest_reference}
_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(
    "_hardness(Tensor logits, Tensor? teacher, Tensor? labels, str kind, float temperature) "
    "-> Tensor",
    tags=_TAGS,
)
LIBRARY.define("_select_hardest(Tensor scores, SymInt k) -> (Tensor, Tensor)", tags=_TAGS)


def implementation(op: str, tensors: Sequence[Tensor], impl: Impl | None) -> Callable[..., Any]:
    """The function that scores (or selects) these tensors; it takes the op's arguments."""
    picked = choose_for(op, tensors, impl)
    if picked == "reference":
        return _REFERENCES[op]
    if picked == "cpp" and is_plain_cpu(tensors):
        return getattr(cpu, op)
    if impl == "triton":
        # The launcher itself: CPU tensors reach it under Triton's interpreter.
        from fastkd.kernels.hardness import gpu

        return getattr(gpu, op)
    return getattr(torch.ops.fastkd, f"_{op}").default


@torch.library.register_fake("fastkd::_hardness", lib=LIBRARY)
def _hardness_fake(logits, teacher, labels, kind, temperature):
    double = any(x is not None and x.dtype == torch.float64 for x in (logits, teacher))
    return logits.new_empty(logits.shape[0], dtype=torch.float64 if double else torch.float32)


@torch.library.register_fake("fastkd::_select_hardest", lib=LIBRARY)
def _select_hardest_fake(scores, k):
    return scores.new_empty(k, dtype=torch.int64), scores.new_empty((), dtype=torch.int64)


for _op in ("hardness", "select_hardest"):
    # Nothing is recorded for a backward pass: the results carry no gradient.
    LIBRARY.impl(f"_{_op}", torch.library.fallthrough_kernel, "Autograd")
    attach(_op, "hardness", {_op: f"_{_op}"})
