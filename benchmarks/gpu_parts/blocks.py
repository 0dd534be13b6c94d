"""`grouped_pointwise` on a GPU: a block against the same modules in eager mode and compiled.

3x3 (groups) -> batch norm -> ReLU -> 1x1 -> batch norm [-> ReLU], channels-last. Eager and compiled
(max-autotune) sides are the plain modules. A case is checked against float64 before it is timed.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from gpu_parts.clock import Sides
from gpu_parts.record import Job
from torch import Tensor, nn

from fastkd.kernels import Norm, grouped_pointwise
from fastkd.testing import assert_as_accurate, luck

__all__ = ["cases"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a block and its input."""

    batch: int
    channels: int
    out: int
    side: int
    groups: int
    stride: int = 1
    inverted: bool = False
    """As in MobileNetV2: ReLU6, and no activation behind the last norm."""

    def __str__(self) -> str:
        words = f"{self.batch}x{self.channels}->{self.out} {self.side}x{self.side} g{self.groups}"
        return words + (f" stride {self.stride}" if self.stride > 1 else "")


# WRN-40-2 at 32 px, ResNet-34 and MobileNetV2 at 224 px.
SHAPES = [
    Shape(128, 32, 32, 32, 16),
    Shape(128, 32, 32, 32, 32),
    Shape(128, 64, 64, 16, 16),
    Shape(128, 128, 128, 8, 16),
    Shape(128, 32, 64, 32, 16, stride=2),
    Shape(1024, 64, 64, 16, 16),
    Shape(128, 64, 64, 56, 16),
    Shape(128, 128, 128, 28, 16),
    Shape(128, 128, 128, 28, 4),
    Shape(128, 256, 256, 14, 16),
    Shape(128, 256, 256, 14, 4),
    Shape(128, 512, 512, 7, 16),
    Shape(128, 64, 128, 56, 16, stride=2),
    Shape(128, 96, 24, 112, 96, stride=2, inverted=True),
    Shape(128, 144, 24, 56, 144, inverted=True),
    Shape(128, 192, 32, 28, 192, inverted=True),
    Shape(128, 384, 64, 14, 384, inverted=True),
    Shape(128, 576, 96, 14, 576, inverted=True),
    Shape(128, 576, 160, 14, 576, stride=2, inverted=True),
]
SMALL = [Shape(2, 16, 16, 4, 4), Shape(2, 12, 8, 5, 12, stride=2, inverted=True)]


class Plain(nn.Module):
    """The block of plain modules."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        channels, self.shape = shape.channels, shape
        self.grouped = nn.Conv2d(
            channels, channels, 3, shape.stride, 1, groups=shape.groups, bias=False
        )
        self.norm = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, shape.out, 1, bias=False)
        self.after = nn.BatchNorm2d(shape.out)
        self.between = nn.ReLU6() if shape.inverted else nn.ReLU()
        self.last = nn.Identity() if shape.inverted else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """The chain."""
        x = self.between(self.norm(self.grouped(x)))
        return self.last(self.after(self.pointwise(x)))


def fused(block: Plain, job: Job) -> Callable[[Tensor], Tensor]:
    """The same parameters through the op."""

    def norm_of(module: nn.BatchNorm2d, activation: str) -> Norm:
        return Norm(
            module.weight,
            module.bias,
            module.running_mean,
            module.running_var,
            training=module.training,
            activation=activation,  # type: ignore[arg-type]
        )

    def run(x: Tensor) -> Tensor:
        return grouped_pointwise(
            x,
            block.grouped.weight,
            block.pointwise.weight,
            norm=norm_of(block.norm, "relu6" if block.shape.inverted else "relu"),
            after=norm_of(block.after, "none" if block.shape.inverted else "relu"),
            groups=block.shape.groups,
            stride=block.shape.stride,
            padding=1,
            impl=job.impl,
        )

    return run


def cases(job: Job, dtype: torch.dtype) -> Iterator[tuple[str, str, Sides, int]]:
    """Op, name, checked sides, bytes that have to move; training first."""
    for shape in SMALL if job.rehearse else SHAPES:
        for op in ("block", "block inference"):
            name = f"{op} {shape} {str(dtype).removeprefix('torch.')}"
            with job.record.case(name):
                yield op, name, *sides_of(job, shape, dtype, op == "block")


def sides_of(job: Job, shape: Shape, dtype: torch.dtype, train: bool) -> tuple[Sides, int]:
    """The three sides, and the bytes of the fused passes over input, middle and output."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    # The convolutions' weights are of the activations' dtype, as under autocast; norms stay fp32.
    block = Plain(shape).to(job.device).to(memory_format=torch.channels_last).train(train)  # type: ignore[call-overload]
    for convolution in (block.grouped, block.pointwise):
        convolution.to(dtype)
    size = (shape.batch, shape.channels, shape.side, shape.side)
    x = torch.randn(size, device=job.device).to(dtype, memory_format=torch.channels_last)
    mode = None if job.rehearse else "max-autotune-no-cudagraphs"
    runs = {
        "eager": block,
        "compile": torch.compile(block, dynamic=False, mode=mode),
        "fastkd": fused(block, job),
    }
    with torch.no_grad():
        upstream = torch.randn_like(block(x))
    timed = {name: call(run, block, x, upstream, train) for name, run in runs.items()}
    check(job, block, x, upstream, train)
    out = upstream.numel()
    middle = out // shape.out * shape.channels
    # Training: x, y, z forward (x 1, y 2, z 3), backward g and y, z again, dy written and read.
    elements = 3 * x.numel() + 8 * middle + 5 * out if train else x.numel() + out
    return timed, elements * x.element_size()


def call(
    run: Callable[[Tensor], Tensor], block: Plain, x: Tensor, upstream: Tensor, train: bool
) -> Callable[[], object]:
    """Forward and backward pass, or the forward pass alone."""
    if not train:
        return lambda: run(x)
    leaf = x.detach().requires_grad_()
    inputs = [leaf, *block.parameters()]
    return lambda: torch.autograd.grad(run(leaf), inputs, upstream)


def check(job: Job, block: Plain, x: Tensor, upstream: Tensor, train: bool) -> None:
    """Outputs and gradients of the op against float64, with those of eager modules beside."""
    exact = copy.deepcopy(block).double()
    places = [(block, x, upstream, block), (exact, x.double(), upstream.double(), exact)]
    places.append((block, x, upstream, fused(block, job)))  # type: ignore[arg-type]
    results = []
    for module, values, gradient, run in places:
        leaf = values.detach().requires_grad_(train)
        with torch.set_grad_enabled(train):
            out = run(leaf)
            leaves = [leaf, *module.parameters()]
            grads = torch.autograd.grad(out, leaves, gradient) if train else ()
        results.append([out.detach(), *grads])
    names = ["output", "input", *(name for name, _ in block.named_parameters())]
    for name, eager, truth, ours in zip(names, *results, strict=False):
        floor = luck(truth, x.dtype)
        assert_as_accurate(f"{block.shape}, {name}", ours, eager, truth, floor=floor)
