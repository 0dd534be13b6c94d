"""The cases on which an implementation of the stages of `grouped_pointwise` is tested.

`check_stage(stages, name, case)` compares one stage with reference.py in float64. `stages` is
anything with a function per stage: cpu.py, gpu.py, the ops of torch.ops.fastkd by `dispatched`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import count
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastkd.kernels.grouped_pointwise import reference
from fastkd.kernels.grouped_pointwise.inputs import After, Geometry
from fastkd.kernels.grouped_pointwise.op import STAGES, stage_op

__all__ = ["CASES", "MATRIX", "Case", "check_stage", "crossed", "dispatched", "make_arguments"]

dispatched = SimpleNamespace(**{name: stage_op(name) for name in STAGES})
_EPS = 1e-3
_NEEDS = {"both": (True, True), "input": (True, False), "weights": (False, True)}


@dataclass(frozen=True)
class Case:
    """One call of a stage."""

    num: int = 2
    channels: int = 16
    out: int = 24
    """Channels of the result of a pointwise convolution; the 3x3 one keeps `channels`."""
    height: int = 9
    width: int = 7
    groups: int = 4
    stride: int = 1
    dilation: int = 1
    padding: int | None = None
    dtype: torch.dtype = torch.float32
    weights: torch.dtype | None = None
    """fp32 or `dtype`, which is the default."""
    act: int = 1
    norm: bool = True
    """In front of the stage."""
    after: bool = True
    """Behind the stage: in `pair` norm2, in a backward stage `After`."""
    bias: bool = False
    residual: bool = False
    activate_sum: bool = False
    statistics: bool = True
    needs: str = "both"
    shift: float = 0.0
    """Mean of what is written: a large one costs plain sums of squares their digits."""

    @property
    def geometry(self) -> Geometry:
        padding = self.dilation if self.padding is None else self.padding
        return Geometry(self.stride, padding, self.dilation, self.groups)

    def __str__(self) -> str:
        words = [f"{self.num}x{self.channels}x{self.height}x{self.width}"]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("num", "channels", "height", "width") and value != field.default:
                words.append(f"{field.name}={str(value).removeprefix('torch.')}")
        return "-".join(words)


WIDTHS = (16, 24, 32, 33, 40, 64, 96, 100, 128, 256, 512, 576)
# (stride, dilation, dtype)
WALKS = [
    (1, 1, torch.float32),
    (2, 1, torch.float32),
    (1, 2, torch.bfloat16),
    (2, 2, torch.float32),
    (1, 16, torch.float32),
    (1, 1, torch.bfloat16),
    (2, 1, torch.float16),
]
Walk = TypeVar("Walk")


def crossed(widths: Sequence[int], walks: Sequence[Walk]) -> Iterator[tuple[int, int, int, Walk]]:
    """(a number, channels, groups, walk): every walk of every narrow block.

    A wide one takes a hundred times as long: each takes one walk, in turns.
    """
    turn = count()
    for channels in widths:
        wanted = {1, 2, 4, 8, 16, channels // 16, channels // 4, channels} - {0}
        for groups in sorted(groups for groups in wanted if channels % groups == 0):
            places = range(len(walks)) if channels < 100 else [next(turn) % len(walks)]
            for place in places:
                yield channels + groups + place, channels, groups, walks[place]


def _cases() -> tuple[list[Case], list[Case]]:
    default = [
        Case(),
        Case(channels=32, groups=32, out=16, act=2),
        Case(channels=32, groups=16, stride=2, bias=True),
        Case(channels=33, groups=33, height=5, out=33),
        Case(channels=33, groups=11, height=5, stride=2, out=40, bias=True),
        Case(channels=24, groups=8, act=2, residual=True, num=1),
        Case(channels=40, groups=20, dilation=2, residual=True, activate_sum=True),
        Case(channels=64, groups=4, act=0, norm=False, after=False),
        Case(channels=64, groups=8, width=13, stride=2, dilation=2),
        Case(channels=100, groups=1, out=36, height=4, norm=False, bias=True),
        Case(channels=96, groups=96, height=17, width=19, dilation=16, out=24, num=1),
        Case(channels=576, groups=576, height=3, width=3, out=96),
        Case(channels=16, groups=16, height=1, width=1, num=5),
        Case(channels=16, groups=2, height=3, width=40, padding=0, num=3, act=0),
        Case(channels=48, groups=3, needs="input", statistics=False),
        Case(channels=48, groups=12, needs="weights", bias=True, after=False, statistics=False),
        Case(channels=8, groups=4, out=5),
        Case(channels=32, groups=8, bias=True, shift=300.0),
        Case(channels=32, groups=2, dtype=torch.bfloat16, residual=True),
        Case(channels=48, groups=48, dtype=torch.bfloat16, weights=torch.float32, stride=2),
        Case(channels=33, groups=3, dtype=torch.float16, bias=True, act=2),
    ]
    matrix = [
        Case(
            channels=channels,
            groups=groups,
            stride=stride,
            dilation=dilation,
            dtype=dtype,
            act=1 + index % 2,
            bias=index % 3 == 0,
            residual=index % 2 == 0,
            activate_sum=index % 4 == 0,
            norm=index % 5 != 0,
            after=index % 7 != 0,
            num=1 + 2 * (index % 2),
            height=9 if index % 2 else 7,
            width=13 if index % 2 else 5,
            out=(16, 24, 33, 64, 100)[index % 5],
        )
        for index, channels, groups, (stride, dilation, dtype) in crossed(WIDTHS, WALKS)
    ]
    return default, matrix


CASES, MATRIX = _cases()


class _Maker:
    """Draws the arguments of the stages for a case."""

    def __init__(self, case: Case) -> None:
        self.case, self.generator = case, torch.Generator().manual_seed(0)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator)

    def activations(self, channels: int, height: int, width: int, shift: float = 0.0) -> Tensor:
        x = 1.5 * self.normal(self.case.num, channels, height, width) + shift
        return x.to(self.case.dtype).contiguous(memory_format=torch.channels_last)

    def norm(self, x: Tensor) -> list[Tensor]:
        """Statistics of x; weights of both signs."""
        weight = 0.5 + torch.rand(x.shape[1], generator=self.generator)
        weight[::5] *= -1
        return [*reference.statistics(x), weight, 1 + self.normal(x.shape[1])]

    def weight(self, out: int, inputs: int, size: int) -> Tensor:
        weight = self.normal(out, inputs, size, size) / (inputs * size * size) ** 0.5
        return weight.to(self.case.weights or self.case.dtype)

    def bias(self, out: int) -> Tensor | None:
        if not self.case.bias:
            return None
        return (self.normal(out) + self.case.shift).to(self.case.weights or self.case.dtype)

    def after(self, out: Tensor) -> list[Tensor]:
        mean, var, weight, _ = self.norm(out)
        return [*After(out, mean, var, weight, 0.1 * self.normal(2, out.shape[1]))]


def _off_the_kinks(x: Tensor, norm: list[Tensor], residual: Tensor | None, act: int) -> Tensor:
    """x, with another value where the activation's input is so near 0 or 6 that rounding decides.

    There the gradient jumps, and no two correct implementations need agree.
    """
    if act == 0:
        return x
    mean, var, weight, bias = (
        vector.double()[:, None, None] for vector in norm or [torch.zeros(1), *[torch.ones(1)] * 3]
    )
    scale = weight * (var + (_EPS if norm else 0)).rsqrt()
    bias = bias if norm else 0 * bias
    inputs = (x.double() - mean) * scale + bias
    if residual is not None:
        inputs = inputs + residual.double()
    near = torch.minimum(inputs.abs(), (inputs - 6).abs()) < 1e-3
    moved = torch.where(near, x.double() + 0.25 / scale, x.double())
    return moved.to(x.dtype).contiguous(memory_format=torch.channels_last)


def make_arguments(name: str, case: Case) -> list[Any]:
    """The arguments of a stage in the order of its schema; activations channels-last."""
    make, geometry = _Maker(case), case.geometry
    sizes = geometry.out_size(case.height), geometry.out_size(case.width)
    residual = None
    if case.residual:
        places = (case.out, *sizes) if name == "pair" else (case.channels, case.height, case.width)
        residual = make.activations(*places)
    x = make.activations(
        case.channels, case.height, case.width, case.shift if name == "statistics" else 0.0
    )
    norm = make.norm(x) if case.norm else []
    summed = residual if case.activate_sum and name.startswith("normalise") else None
    x = _off_the_kinks(x, norm, summed, case.act)
    front = [x, norm, _EPS, case.act]
    grouped = [
        make.weight(case.channels, case.channels // case.groups, 3),
        make.bias(case.channels),
    ]
    if name == "statistics":
        return [x]
    if name == "normalise":
        return [*front, residual, case.activate_sum]
    if name == "normalise_backward":
        return [make.activations(*x.shape[1:]), *front, residual, case.activate_sum]
    if name == "denormalise":
        return [make.activations(*x.shape[1:]), make.after(x), _EPS]
    if name == "grouped":
        return [*front, *grouped, *geometry, case.statistics]
    if name == "pointwise":
        weight, bias = make.weight(case.out, case.channels, 1), make.bias(case.out)
        return [*front, weight, bias, case.statistics]
    if name == "pair":
        norm1 = make.norm(make.activations(case.channels, *sizes))
        norm2 = make.norm(make.activations(case.out, *sizes)) if case.after else []
        pointwise = [make.weight(case.out, case.channels, 1), make.bias(case.out)]
        # Statistics are those that a norm behind the stage needs: then it has none of its own.
        statistics = case.statistics and not (case.after or case.residual)
        behind = [norm2, 2 * _EPS, case.act if case.after else 0, residual, statistics]
        return [*front, *grouped, *geometry, norm1, 3 * _EPS, case.act, *pointwise, *behind]
    if name == "grouped_backward":
        out, weight, rest = make.activations(case.channels, *sizes), grouped[0], [*geometry]
    else:
        out = make.activations(case.out, case.height, case.width)
        weight, rest = make.weight(case.out, case.channels, 1), []
    after = make.after(out) if case.after else []
    g = make.activations(*out.shape[1:])
    return [g, after, 2 * _EPS, *front, weight, case.bias, *rest, _NEEDS[case.needs]]


def check_stage(stages: Any, name: str, case: Case) -> None:
    """One stage of an implementation against float64, with twice the error of reference.py.

    Also: it repeats bit for bit, writes to no argument, and returns what op.py says in dtype, shape
    and layout. Statistics are held against those of what the stage itself stored.
    """
    arguments = make_arguments(name, case)
    given = _map(arguments, Tensor.clone)
    got = _several(getattr(stages, name)(*arguments))
    again = _several(getattr(stages, name)(*arguments))
    plain = _several(getattr(reference, name)(*arguments))
    truth = _several(getattr(reference, name)(*_map(arguments, Tensor.double)))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "does not repeat"
    before, now = (_tensors(words) for words in (given, arguments))
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True)), "wrote to an argument"
    for index, (value, about) in enumerate(zip(got, plain, strict=True)):
        what = f"{name}, result {index}"
        assert value.shape == about.shape, f"{what}: {value.shape}, expected {about.shape}"
        assert value.dtype == about.dtype, f"{what}: {value.dtype}, expected {about.dtype}"
        if value.dim() == 4 and index == 0:
            assert value.is_contiguous(memory_format=torch.channels_last), what
    if name == "statistics":
        _check_statistics(arguments[0], *got)
    elif name in ("grouped", "pointwise", "pair"):
        if got[1].numel():
            _check_statistics(*got)
        got, plain, truth = got[:1], plain[:1], truth[:1]
    if name != "statistics":
        for index, values in enumerate(zip(got, plain, truth, strict=True)):
            _check_error(f"{name}, result {index}", case.dtype, *values)


def _check_error(what: str, dtype: torch.dtype, got: Tensor, plain: Tensor, truth: Tensor) -> None:
    if truth.numel() == 0:
        return
    error, allowed = (float((x.double() - truth).square().mean().sqrt()) for x in (got, plain))
    # fp32: the reference may be exact by luck, where sums in another order are not. 16 bits: eager
    # torch rounds activations and their gradients before a product, the reference does not.
    floor = 4 * torch.finfo(dtype).eps if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    bound = 2 * allowed + floor * float(truth.square().mean().sqrt())
    assert error <= bound, f"{what}: RMS error {error:.3g}, reference {allowed:.3g}"


def _check_statistics(stored: Tensor, mean: Tensor, var: Tensor) -> None:
    true_var, true_mean = torch.var_mean(stored.double(), dim=(0, 2, 3), correction=0)
    eps = torch.finfo(torch.float32).eps
    allowed = 8 * eps * true_var.sqrt() + eps * true_mean.abs() + 1e-12
    worst = float(((mean.double() - true_mean).abs() / allowed).max())
    assert worst <= 1, f"mean: {worst:.3g} times what rounding explains"
    # The pivot may be off by a standard deviation; a sum of squares about 0 fails with a shift.
    torch.testing.assert_close(var.double(), true_var, rtol=64 * eps, atol=1e-12)


def _several(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _map(words: Any, function: Any) -> Any:
    if isinstance(words, list):
        return [_map(word, function) for word in words]
    return function(words) if isinstance(words, Tensor) else words


def _tensors(words: list[Any]) -> list[Tensor]:
    return [
        x
        for word in words
        for x in (word if isinstance(word, list) else [word])
        if isinstance(x, Tensor)
    ]
