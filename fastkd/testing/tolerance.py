"""Tolerances by one rule: at most twice the error of plain torch, both against float64.

The rule is flash-attention's (tests/test_flash_attn.py). The code under test may use any dtype;
plain torch runs on fp32 copies of the same inputs, or under the same autocast.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "assert_as_accurate",
    "assert_loss_as_accurate",
    "assert_mean_as_accurate",
    "luck",
    "rms",
    "ulp",
]


def rms(x: Tensor) -> float:
    """Root of the mean square, in float64; 0 for an empty tensor."""
    return 0.0 if x.numel() == 0 else x.double().square().mean().sqrt().item()


def ulp(x: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """One unit in the last place of values of this size, rounded to `dtype`."""
    return torch.finfo(dtype).eps * rms(x)


def luck(truth: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """The RMS error that no result of a few sums is blamed for: plain torch's may be 0 by luck.

    Sums in fp32 in another order differ by a few units in the last place; what is then stored in
    16 bits is rounded by at most half of one, on average a quarter.
    """
    return 6 * ulp(truth) if dtype == torch.float32 else ulp(truth, dtype) / 4


def assert_as_accurate(
    name: str,
    got: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    factor: float = 2.0,
    floor: float = 0.0,
) -> None:
    """Assert that the RMS error of `got` is at most `factor` times `eager`'s, or at most `floor`.

    Args:
        name: what is compared, for the message.
        got: result under test.
        eager: plain torch on fp32 copies of the inputs, in the dtype of `got`.
        truth: plain torch in float64.
        factor: more than 2 only where the device under test is a simulation.
        floor: absolute RMS error that always passes, for instance `ulp(truth)` for a single number,
            which plain torch may hit exactly by luck, or `luck(truth)` for a few sums.

    Raises:
        AssertionError: naming the worst element, its place and all three values there.
    """
    if got.shape != truth.shape:
        raise AssertionError(f"{name}: shape {list(got.shape)}, expected {list(truth.shape)}")
    if got.numel() == 0:
        return
    error, allowed = got.double() - truth, eager.double() - truth
    if not torch.isfinite(error).all():
        bad = int((~torch.isfinite(error)).sum())
        raise AssertionError(f"{name}: {bad} of {error.numel()} elements are not finite")
    limit = max(factor * rms(allowed), floor)
    if rms(error) > limit:
        worst = int(error.abs().argmax())
        place = [int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape)]
        values = [float(x.flatten()[worst]) for x in (got, eager, truth)]
        raise AssertionError(
            f"{name}: RMS error {rms(error):.3e}, allowed {limit:.3e} (eager has "
            f"{rms(allowed):.3e}). Worst at {place}: got {values[0]!r}, eager {values[1]!r}, "
            f"truth {values[2]!r}"
        )


def assert_loss_as_accurate(
    name: str,
    fast: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    student: Tensor,
    *rest: Tensor,
    factor: float = 2.0,
) -> None:
    """Assert that a scalar loss and its gradient at the student are as accurate as plain torch's.

    `fast(student, *rest)` gets the tensors as they are, `eager` gets them in fp32 and in float64,
    labels as they are. The loss may always be off by one unit in the last place.
    """

    def measured(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, Tensor]:
        leaf = inputs[0].detach().requires_grad_()
        loss = function(leaf, *inputs[1:])
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    def copies(dtype: torch.dtype) -> list[Tensor]:
        return [x.to(dtype) if x.is_floating_point() else x for x in (student, *rest)]

    got, got_grad = measured(fast, student, *rest)
    plain, plain_grad = measured(eager, *copies(torch.float32))
    truth, true_grad = measured(eager, *copies(torch.float64))
    plain_grad = plain_grad.to(student.dtype)
    assert_as_accurate(f"{name}, loss", got, plain, truth, factor=factor, floor=ulp(truth))
    assert_as_accurate(f"{name}, gradient", got_grad, plain_grad, true_grad, factor=factor)


def assert_mean_as_accurate(
    name: str, got: float, eager_N: Tensor, truth_N: Tensor, *, factor: float = 2.0
) -> None:
    """Assert that a mean of N terms is off by at most `factor` times plain torch's RMS term error.

    For a program that reports only its mean loss. The error of a mean is never above the RMS error
    of its terms, and the latter does not depend on how the errors happen to cancel.

    Raises:
        AssertionError: with the error and its limit.
    """
    error = abs(got - truth_N.double().mean().item())
    limit = factor * rms(eager_N.double() - truth_N)
    # "not <=": also where the mean is NaN.
    if not error <= limit:
        raise AssertionError(
            f"{name}: {got!r} is off by {error:.3e}, allowed {limit:.3e}; "
            f"truth {truth_N.double().mean().item()!r}, eager {eager_N.double().mean().item()!r}"
        )
