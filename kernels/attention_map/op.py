"""`attention_map` as torch sees it: schemas, shapes without data, gradients, what implements them.

The ops have leading underscores and no autograd of their own: the two Functions below bring it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from fastkd.kernels._autograd import is_left_to_torch, reference_gradients
from fastkd.kernels._library import LIBRARY, Impl, attach, choose_for
from fastkd.kernels.attention_map.reference import energy_reference, loss_of_maps

__all__ = ["Energy", "Loss", "backend"]

# The powers of the paper (its F_sum, F_sum^2, F_sum^4), which need multiplications only.
_KERNEL_POWERS = (1, 2, 4)

_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define("_attention_energy(Tensor features, int power, int[2] window) -> Tensor", tags=_TAGS)
LIBRARY.define(
    "_attention_energy_grad(Tensor features, Tensor coefficients, Tensor? upstream, int power, "
    "int[2] window) -> Tensor",
    tags=_TAGS,
)
LIBRARY.define(
    "_attention_loss(Tensor student, Tensor teacher, int power, int[2] student_window, "
    "int[2] teacher_window, float eps, bool distance) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def backend(op: str, features: Sequence[Tensor], p: float, impl: Impl | None) -> Impl:
    """The implementation that runs on these features with exponent p; `op` is for messages."""
    picked = choose_for("attention_map", features, impl)
    if picked == "reference" or p in _KERNEL_POWERS:
        return picked
    if impl is not None:
        raise ValueError(
            f"{op}: impl={impl!r} has p = {_KERNEL_POWERS}, not {p}; use impl=None or 'reference'"
        )
    return "reference"


class Energy(torch.autograd.Function):
    """Mean over channels of |x|^power, the map before its normalisation: [N, pixels].

    Backward is one more pass over the features.
    """

    @staticmethod
    @override
    def forward(
        ctx: Any, features_NCHW: Tensor, power: int, window: tuple[int, int], triton: bool
    ) -> Tensor:
        ctx.power, ctx.window, ctx.triton = power, window, triton
        ctx.save_for_backward(features_NCHW)
        return _op("energy", triton)(features_NCHW, power, window)

    @staticmethod
    @override
    def backward(ctx: Any, *upstream_NP: Tensor) -> tuple[Tensor | None, ...]:
        (features_NCHW,) = ctx.saved_tensors
        if is_left_to_torch(upstream_NP):
            size = _size(features_NCHW, ctx.window)
            (grad,) = reference_gradients(
                lambda: [energy_reference(features_NCHW, ctx.power, size)],
                [features_NCHW],
                upstream_NP,
            )
        else:
            grad = _op("energy_grad", ctx.triton)(
                features_NCHW, upstream_NP[0], None, ctx.power, ctx.window
            )
        return grad, None, None, None


class Loss(torch.autograd.Function):
    """The loss between the maps of student and teacher; a gradient for the student only.

    Keeps the student's features, as any loss on them does, and two numbers per pixel. Backward is
    one more pass over the student's features.
    """

    @staticmethod
    @override
    def forward(
        ctx: Any,
        student_NCHW: Tensor,
        teacher_NCHW: Tensor,
        power: int,
        student_window: tuple[int, int],
        teacher_window: tuple[int, int],
        eps: float,
        distance: bool,
        triton: bool,
    ) -> Tensor:
        ctx.power, ctx.window, ctx.triton = power, student_window, triton
        ctx.eps, ctx.distance = eps, distance
        loss, coefficients_NP, teacher_NP = _op("loss", triton)(
            student_NCHW, teacher_NCHW, power, student_window, teacher_window, eps, distance
        )
        ctx.save_for_backward(student_NCHW, coefficients_NP, teacher_NP)
        return loss

    @staticmethod
    @override
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        student_NCHW, coefficients_NP, teacher_NP = ctx.saved_tensors
        if is_left_to_torch(upstream):

            def compute() -> list[Tensor]:
                size = _size(student_NCHW, ctx.window)
                energy_NP = energy_reference(student_NCHW, ctx.power, size)
                # Where the maps are equal the gradient is 0; a unit in the last place between the
                # kernel's energy and this one would give the distance a slope.
                equal_N1 = (coefficients_NP == 0).all(1, keepdim=True)
                energy_NP = torch.where(equal_N1, teacher_NP, energy_NP)
                maps = [F.normalize(x, dim=1, eps=ctx.eps) for x in (energy_NP, teacher_NP)]
                return [loss_of_maps(maps[0], maps[1], ctx.distance)]

            (grad,) = reference_gradients(compute, [student_NCHW], upstream)
        else:
            grad = _op("energy_grad", ctx.triton)(
                student_NCHW, coefficients_NP, upstream[0], ctx.power, ctx.window
            )
        return grad, None, None, None, None, None, None, None


def _size(features_NCHW: Tensor, window: tuple[int, int]) -> tuple[int, int]:
    return features_NCHW.shape[2] // window[0], features_NCHW.shape[3] // window[1]


def _op(name: str, triton: bool) -> Any:
    """The op, or on CPU tensors with impl="triton" the kernel launcher itself (the interpreter)."""
    if triton:
        from fastkd.kernels.attention_map import gpu

        return getattr(gpu, name)
    return getattr(torch.ops.fastkd, f"_attention_{name}").default


@torch.library.register_fake("fastkd::_attention_energy", lib=LIBRARY)
def _energy_fake(features, power, window):
    num, _, height, width = features.shape
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    return features.new_empty(num, height * width // math.prod(window), dtype=wide)


@torch.library.register_fake("fastkd::_attention_energy_grad", lib=LIBRARY)
def _energy_grad_fake(features, coefficients, upstream, power, window):
    return torch.empty_like(features)


@torch.library.register_fake("fastkd::_attention_loss", lib=LIBRARY)
def _loss_fake(student, teacher, power, student_window, teacher_window, eps, distance):
    student_NP = _energy_fake(student, power, student_window)
    return student_NP.new_empty(()), student_NP, torch.empty_like(student_NP)


_NAMES = ("energy", "energy_grad", "loss")
attach("attention_map", "attention_map", {name: f"_attention_{name}" for name in _NAMES})
