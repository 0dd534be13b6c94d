"""What tests and benchmarks share: tolerances earned against float64, poisoned memory, baselines.

A fast version may be at most twice as wrong as plain torch in fp32, both measured against float64;
nobody chooses a tolerance (the rule is flash-attention's, tests/test_flash_attn.py).
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.losses.term import BindContext, LossTerm, TermInputs, TermOutput

__all__ = [
    "assert_as_accurate",
    "bind_pair",
    "bind_term",
    "call_term",
    "captured",
    "eager_attention_loss",
    "eager_hardness",
    "eager_kd_loss",
    "eager_kd_rows",
    "fill_with_sines",
    "fixed_state",
    "gradient_of",
    "hashed_values",
    "interleave",
    "interpret_fma_as_fused",
    "kd_case",
    "no_host_sync",
    "poisoned_empty",
    "rms",
    "shape_id",
    "sines",
    "speedup",
    "step_macs",
    "term_inputs",
]


@torch.no_grad()
def fill_with_sines(module: nn.Module, number: int) -> None:
    """Every parameter, in the order of the module, from `number` on; batch norms near identity."""
    for offset, (name, parameter) in enumerate(module.named_parameters()):
        value = sines(parameter.shape, number + offset, 0.3)
        owner = module.get_submodule(name.rpartition(".")[0])
        is_scale = isinstance(owner, nn.modules.batchnorm._BatchNorm) and name.endswith("weight")
        parameter.copy_(1 + value if is_scale else value)


def bind_term(
    term: LossTerm,
    tensors: Mapping[str, Tensor],
    *,
    num_samples: int = 50,
    num_classes: int = 10,
    **context: Any,
) -> LossTerm:
    """Bind a loss to the shapes of its inputs; the labels of the samples go round the classes."""
    shapes = {need: tuple(tensors[need].shape[1:]) for need in term.needs}
    labels_N = torch.arange(num_samples) % num_classes
    term.bind(BindContext(num_samples, num_classes, labels_N, shapes, **context))
    return term


def term_inputs(
    term: LossTerm,
    tensors: Mapping[str, Tensor],
    labels_N: Tensor | None = None,
    *,
    epoch: float = 0.0,
    rows_of_ranks: tuple[int, ...] = (),
) -> TermInputs:
    """What the step hands a loss in an epoch (from 0); sample ids are the places in the batch."""
    some = tensors[term.needs[0]]
    labels_N = torch.arange(len(some)) % 10 if labels_N is None else labels_N
    schedule = {
        name: torch.tensor(value(epoch), dtype=some.dtype)
        for name, value in term.schedules().items()
    }
    return TermInputs(tensors, labels_N, torch.arange(len(some)), schedule, rows_of_ranks)


def call_term(
    term: LossTerm,
    tensors: Mapping[str, Tensor],
    labels_N: Tensor | None = None,
    *,
    epoch: float = 0.0,
    rows_of_ranks: tuple[int, ...] = (),
) -> TermOutput:
    """What a bound loss makes of `term_inputs`."""
    return term(term_inputs(term, tensors, labels_N, epoch=epoch, rows_of_ranks=rows_of_ranks))


def bind_pair(term: LossTerm, student: Tensor, teacher: Tensor, **context: Any) -> TermInputs:
    """`bind_term` of a loss with one pair of taps; its `term_inputs`."""
    tensors = dict(zip(term.needs, (student, teacher), strict=True))
    return term_inputs(bind_term(term, tensors, **context), tensors)


def rms(x: Tensor) -> float:
    """Root of the mean square, in float64; 0 for an empty tensor."""
    return 0.0 if x.numel() == 0 else x.double().square().mean().sqrt().item()


def assert_as_accurate(
    name: str,
    got: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    factor: float = 2.0,
    floor: float = 0.0,
) -> None:
    """RMS error of `got` against `truth` is at most `factor` times that of `eager`, or `floor`.

    Args:
        name: what is compared, for the message.
        got: result under test; eager: plain torch on fp32 copies of the inputs, in got's dtype.
        truth: the same in float64.
        floor: absolute RMS error that always passes (for instance 1 ulp of the result).

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


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside, torch's uninitialised memory holds NaN (integers: the largest value).

    A kernel that forgets to write an element then shows it. Uses torch's own switch, which fills
    the result of `torch.empty`, `empty_like`, `new_empty` and of resizing.
    """
    switch: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        switch.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    switch.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switch.fill_uninitialized_memory = before[2]


@contextmanager
def no_host_sync(device: torch.device) -> Iterator[None]:
    """Inside, whatever makes the host wait for a CUDA device raises; a CPU has nothing to watch."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def captured(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`run` recorded once as a CUDA graph; calling it replays and returns what `run` returned.

    Its tensors keep their addresses: write new inputs into the old ones. On a CPU: `run` itself.
    """
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):  # what is compiled or allocated once must not be recorded
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run()

    def replay() -> Any:
        graph.replay()
        return held

    return replay


def interpret_fma_as_fused() -> None:
    """Round `tl.fma` once in interpreters of Triton that round twice (3.6), as every chip does."""
    interpreter: Any = import_module("triton.runtime.interpreter")
    if hasattr(interpreter._interpreter, "fma_fp32"):
        return

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        # The product of two fp32 numbers is exact in 64 bits of mantissa.
        a, b, c = (np.asarray(part.data, np.longdouble) for part in (x, y, z))
        return interpreter.TensorHandle((a * b + c).astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma


def hashed_values(shape: Sequence[int], seed: int) -> Tensor:
    """Float64 numbers in [-1, 1) that look random, from integers only: the same everywhere.

    Element i is a multiplicative hash of i + 1 and `seed`, so a stored result of another program on
    these inputs stays valid.
    """
    x = torch.arange(1, math.prod(shape) + 1) * 2654435761 + seed * 40503
    for factor, shift in ((2246822519, 15), (3266489917, 13)):
        x = x & 0xFFFFFFFF
        x = (x ^ (x >> shift)) * factor
    x = x & 0xFFFFFFFF
    return ((x ^ (x >> 16)).double() / 2**31 - 1).reshape(tuple(shape))


def fixed_state(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Weights of a network for comparing two implementations: a state dict of `hashed_values`.

    Scaled so that activations neither vanish nor explode; batch norms differ from the identity.
    The order of `shapes` matters, the names only by their last component.
    """
    state = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        values, kind = hashed_values(shape, seed), name.rpartition(".")[2]
        if kind == "num_batches_tracked":
            state[name] = torch.zeros(tuple(shape), dtype=torch.int64)
        elif len(shape) > 1:
            state[name] = values * math.sqrt(6 / math.prod(shape[1:]))
        elif kind in ("weight", "running_var"):
            state[name] = 0.7 + 0.3 * values
        else:
            state[name] = 0.1 * values
    return state


def kd_case(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    seed: int,
    spread: float = 3.0,
    teachers: int = 1,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Student logits, teachers' logits and labels with classes in dimension 1, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    student = (spread * torch.randn(shape, generator=generator)).to(dtype)
    others = [(spread * torch.randn(shape, generator=generator)).to(dtype) for _ in range(teachers)]
    labels = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
    return student, others, labels


def sines(
    shape: tuple[int, ...], a: int, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """scale * sin(12.9898 (i + 1) + 78.233 a) at row-major index i: the input of the oracles."""
    i = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return (scale * torch.sin(12.9898 * i + 78.233 * a)).view(shape).to(dtype)


def shape_id(shape: tuple[int, ...]) -> str:
    """4x19x256x512: how a shape appears in the name of a test."""
    return "x".join(map(str, shape))


def eager_kd_rows(
    student: Tensor, teachers: list[Tensor], labels: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """(kd, ce) per row of [N, C] logits, as most training loops spell the formula."""
    log_p_s = F.log_softmax(student / temperature, dim=1)
    p_t = torch.stack([F.softmax(t / temperature, dim=1) for t in teachers]).mean(0)
    kd = F.kl_div(log_p_s, p_t, reduction="none").sum(1) * temperature**2
    if labels is None:
        return kd, torch.zeros_like(kd)
    return kd, F.cross_entropy(student, labels, reduction="none")


def eager_kd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    alpha: float = 0.9,
) -> Tensor:
    """The scalar loss, classes in dimension 1: the baseline of the benchmarks."""
    kl = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.softmax(teacher / temperature, dim=1),
        reduction="none",
    )
    kd = kl.sum(1).mean() * temperature**2
    return (1 - alpha) * F.cross_entropy(student, labels) + alpha * kd


def eager_hardness(
    student: Tensor, teacher: Tensor, labels: Tensor, criterion: str, temperature: float = 4.0
) -> Tensor:
    """Scores of [N, C] logits in the functions that training loops use for them."""
    if criterion == "kl":
        log_p_s = F.log_softmax(student / temperature, dim=1)
        p_t = F.softmax(teacher / temperature, dim=1)
        return F.kl_div(log_p_s, p_t, reduction="none").sum(1)
    if criterion in ("teacher_entropy", "student_entropy"):
        log_p = F.log_softmax(teacher if criterion == "teacher_entropy" else student, dim=1)
        return -(log_p.exp() * log_p).sum(1)
    if criterion == "cross_entropy":
        return F.cross_entropy(student, labels, reduction="none")
    assert criterion == "margin"
    is_label = F.one_hot(labels, student.shape[1]).bool()
    return student.masked_fill(is_label, -math.inf).amax(1) - student[is_label]


def gradient_of(loss: Callable[..., Tensor], student: Tensor, *rest: Any) -> Tensor:
    """Gradient of `loss(student, *rest)` at the student."""
    leaf = student.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf, *rest), leaf)[0]


def interleave(sides: dict[str, Callable[[], Any]], pairs: int) -> dict[str, list[float]]:
    """Seconds of each side, taken in turns so that a slow moment of the machine hits all."""
    sync = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    for _ in range(3):
        for run in sides.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(pairs):
        # The order alternates: whoever runs second finds the caches and clocks of the first.
        names = list(sides) if turn % 2 == 0 else list(sides)[::-1]
        for name in names:
            sync()
            start = time.perf_counter()
            sides[name]()
            sync()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def speedup(seconds: dict[str, list[float]], over: str, of: str) -> tuple[float, float]:
    """Median and 10th percentile of the paired ratios time(over) / time(of)."""
    ratios = sorted(a / b for a, b in zip(seconds[over], seconds[of], strict=True))
    return statistics.median(ratios), ratios[len(ratios) // 10]


def eager_attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The scalar attention-transfer loss as most training loops spell it, for maps of one size."""

    def attention(x: Tensor) -> Tensor:
        return F.normalize(x.pow(2).mean(1).flatten(1))

    return (attention(student) - attention(teacher)).pow(2).mean()


def step_macs(student: float, teacher: float, method: str = "kd") -> float:
    """Multiply-accumulates of a training step per image of the batch, from those of the networks.

    A forward pass counts once, the student's backward pass twice. method: "kd", "tlcutmix" (x and
    x'), "pick" (two x' scored by both networks, of which the teacher's answers are used again) or
    "pick_teacher_entropy" (scored by the teacher alone).
    """
    kd = 3 * student + teacher
    return {
        "kd": kd,
        "tlcutmix": 2 * kd,
        "pick": kd + 2 * (student + teacher) + 3 * student,
        "pick_teacher_entropy": kd + 2 * teacher + 3 * student,
    }[method]
