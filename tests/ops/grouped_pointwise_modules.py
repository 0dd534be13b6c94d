"""Blocks of plain torch modules, and the same through `grouped_pointwise`."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.kernels import Activation, Norm, grouped_pointwise
from fastkd.kernels.grouped_pointwise.inputs import Geometry

__all__ = ["FORMS", "Block", "Form", "Fused", "Shape", "described"]


@dataclass(frozen=True)
class Form:
    """Which parts a block has; activations are the words of `Activation`."""

    expand: bool = False
    before: Activation | None = None
    norm: Activation = "relu"
    after: Activation | None = None
    residual: bool = False
    activate_sum: bool = False
    bias: bool = False


FORMS = {
    "plain": Form(),
    "moonshine": Form(after="relu"),
    "inverted": Form(expand=True, before="relu6", norm="relu6", after="none", residual=True),
    "preact": Form(before="relu", residual=True, bias=True),
    "sum": Form(after="relu6", residual=True, activate_sum=True, bias=True),
    "linear": Form(norm="none", after="relu", residual=True),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a block and its input."""

    form: str = "moonshine"
    channels: int = 16
    groups: int = 4
    out: int = 24
    stride: int = 1
    dilation: int = 1
    height: int = 7
    width: int = 5
    num: int = 3

    def __str__(self) -> str:
        words = [self.form, f"{self.num}x{self.channels}x{self.height}x{self.width}"]
        words.append(f"g{self.groups}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("out", "stride", "dilation") and value != field.default:
                words.append(f"{field.name}{value}")
        return "-".join(words)


class Block(nn.Module):
    """[1x1] [norm] 3x3 norm 1x1 [norm] [+ residual] of plain modules.

    Weights of norms have both signs, their biases put the kinks of the activations among the data.
    `how` is handed to `grouped_pointwise` by `fused`.
    """

    def __init__(self, shape: Shape, form: Form | None = None, **how: Any) -> None:
        super().__init__()
        form, channels = form or FORMS[shape.form], shape.channels
        self.shape, self.form, self.how = shape, form, how
        self.inputs = max(1, channels // 6) if form.expand else channels
        self.expand = nn.Conv2d(self.inputs, channels, 1, bias=form.bias) if form.expand else None
        self.before = nn.BatchNorm2d(channels) if form.before else None
        self.grouped = nn.Conv2d(
            channels,
            channels,
            3,
            shape.stride,
            shape.dilation,
            shape.dilation,
            shape.groups,
            form.bias,
        )
        self.norm = nn.BatchNorm2d(channels, momentum=0.3)
        self.pointwise = nn.Conv2d(channels, shape.out, 1, bias=form.bias)
        self.after = nn.BatchNorm2d(shape.out, eps=1e-3) if form.after else None
        for norm in self.norms():
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0.5, 0.5)
            with torch.no_grad():
                norm.weight[::5] *= -1
                norm.running_mean.normal_(0, 0.1)
                norm.running_var.uniform_(0.5, 1.5)

    def norms(self) -> list[nn.BatchNorm2d]:
        return [x for x in (self.before, self.norm, self.after) if x is not None]

    def draw(self, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        """(x, residual), fp32."""
        generator = torch.Generator().manual_seed(seed)
        shape = self.shape
        size = (shape.num, self.inputs, shape.height, shape.width)
        x = torch.randn(size, generator=generator)
        if not self.form.residual:
            return x, None
        geometry = Geometry(shape.stride, shape.dilation, shape.dilation, shape.groups)
        places = map(geometry.out_size, (shape.height, shape.width))
        return x, torch.randn(shape.num, shape.out, *places, generator=generator)

    def _convolved(self, x: Tensor, seen: list[tuple[str, Tensor]] | None = None) -> Tensor:
        x = x if self.expand is None else self.expand(x)
        if self.before is not None:
            x = _act(self.before(x), self.form.before, seen)
        return self.pointwise(_act(self.norm(self.grouped(x)), self.form.norm, seen))

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        seen: list[tuple[str, Tensor]] | None = None,
    ) -> Tensor:
        """`seen` collects what the activations read."""
        x = self._convolved(x, seen)
        x = x if self.after is None else self.after(x)
        if residual is not None and self.form.activate_sum:
            x = x + residual
        x = x if self.after is None else _act(x, self.form.after, seen)
        return x if residual is None or self.form.activate_sum else x + residual

    def fused(self, x: Tensor, residual: Tensor | None = None, **how: Any) -> Tensor:
        shape, form = self.shape, self.form
        words = {
            "norm": described(self.norm, form.norm),
            "groups": shape.groups,
            "stride": shape.stride,
            "dilation": shape.dilation,
            "grouped_bias": self.grouped.bias,
            "pointwise_bias": self.pointwise.bias,
            "before": described(self.before, form.before),
            "after": described(self.after, form.after),
            "residual": residual,
            "activate_sum": form.activate_sum,
        }
        if self.expand is not None:
            words |= {"expand_weight": self.expand.weight, "expand_bias": self.expand.bias}
        words |= self.how | how
        return grouped_pointwise(x, self.grouped.weight, self.pointwise.weight, **words)


class Fused(nn.Module):
    """A block whose forward is the op."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.block.fused(x, residual)


def described(norm: nn.BatchNorm2d | None, activation: Activation | None, **how: Any) -> Any:
    """A batch norm as the op takes it."""
    if norm is None:
        return None
    words = {
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
        "training": norm.training,
        "momentum": norm.momentum,
        "eps": norm.eps,
        "activation": activation,
    }
    return Norm(norm.weight, norm.bias, **(words | how))


def _act(x: Tensor, name: Activation | None, seen: list[tuple[str, Tensor]] | None) -> Tensor:
    if name in (None, "none"):
        return x
    if seen is not None:
        seen.append((str(name), x.detach()))
    return torch.relu(x) if name == "relu" else nn.functional.relu6(x)
