"""One chain of a network's own modules, computed by the op or by the modules themselves.

Every parameter, buffer and setting is read from the modules at each call, so the chain follows
whatever is done to them: other weights, frozen batch norms, a changed momentum.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.kernels.grouped_pointwise import Activation, Norm, grouped_pointwise
from fastkd.models.fused.choice import has_kernel, kind_for
from fastkd.models.planner import BlockSpec, KernelChoice

__all__ = ["Link", "ModuleChain"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(eq=False)
class Link:
    """A batch norm and the activation behind it."""

    norm: nn.Module | None
    """None: nothing is normalised, the activation sees the convolution's output."""
    activation: Activation


@dataclass(eq=False, kw_only=True)
class ModuleChain:
    """[1x1 -> norm] or [norm] -> grouped 3x3 -> norm -> 1x1 [-> norm] [+ residual]."""

    expand: nn.Conv2d | None
    before: Link | None
    grouped: nn.Conv2d
    norm: Link
    pointwise: nn.Conv2d
    after: Link | None
    residual: bool
    activate_sum: bool
    """The activation of `after` acts on the sum with the residual."""
    branch: Sequence[Callable[[Tensor], Tensor]]
    """What the network calls, up to the residual."""
    behind: Callable[[Tensor], Tensor] | None
    """The activation of the sum."""
    choice: KernelChoice
    spec: BlockSpec = field(init=False)
    facts: tuple[Any, ...] = field(init=False)
    """The fields of `spec`: constants of a compiled graph."""
    geometries: list[tuple[Any, ...]] = field(init=False)
    """Of its convolutions, as they were when it was found."""

    def __post_init__(self) -> None:
        conv = self.grouped
        self.geometries = self._geometries()
        self.spec = BlockSpec(
            in_channels=(self.expand or conv).in_channels,
            out_channels=self.pointwise.out_channels,
            groups=conv.groups,
            expand=None if self.expand is None else conv.in_channels,
            before=None if self.before is None else self.before.activation,
            activation=self.norm.activation,
            after=None if self.after is None else self.after.activation,
            stride=conv.stride[0],
            padding=int(conv.padding[0]),
            dilation=conv.dilation[0],
            residual=self.residual,
            activate_sum=self.activate_sum,
            biases=any(
                one is not None and one.bias is not None
                for one in (self.expand, conv, self.pointwise)
            ),
        )
        self.facts = astuple(self.spec)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [N, C, H, W] and residual [N, out, H', W'] -> [N, out, H', W'].

        Raises:
            UserError: fused, with statistics that come from all ranks, and this rank has no image.
        """
        if self.choice == "plain":
            return self.plain(x, residual)
        if self._is_synchronised():
            # Ranks that choose apart would wait for each other in other collectives.
            if self.choice == "auto":
                return self.plain(x, residual)
            if x.numel() == 0:
                raise UserError(
                    f"kernels=fused with SyncBatchNorm got {list(x.shape)}, which is run by plain "
                    "modules, while other ranks run the op and wait; expected images on every "
                    "rank. Drop the last batch, or use kernels=plain"
                )
        if not self._fits(x, residual):
            return self.plain(x, residual)
        if self.choice == "fused":
            return self.fused(x, residual)
        nhwc = x.is_contiguous(memory_format=torch.channels_last)
        training = torch.is_grad_enabled() and self._is_trained(x, residual)
        live = any(norm.training or norm.running_mean is None for norm in self._norms())
        kind = kind_for(self.facts, tuple(x.shape), _dtype(x), x.device, training, live, nhwc)
        return self.fused(x, residual) if kind == "fused" else self.plain(x, residual)

    def plain(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """As the network itself computes it."""
        for layer in self.branch:
            x = layer(x)
        if residual is not None:
            x = x + residual
        return x if self.behind is None else self.behind(x)

    def fused(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The same by the op."""
        expand, conv, last = self.expand, self.grouped, self.pointwise
        before = None if self.before is None else _values(self.before, conv, x)
        out = grouped_pointwise(
            x,
            conv.weight,
            last.weight,
            norm=_values(self.norm, conv, x),
            grouped_bias=conv.bias,
            pointwise_bias=last.bias,
            expand_weight=None if expand is None else expand.weight,
            expand_bias=None if expand is None else expand.bias,
            before=before,
            after=None if self.after is None else _values(self.after, last, x),
            residual=residual,
            **self.spec.settings,
        )
        # A convolution of torch is channels-last if its input or weight is; views rely on it.
        read = [x, *(one.weight for one in (expand, conv, last) if one is not None)]
        nhwc = any(map(_is_channels_last, read))
        layout = torch.channels_last if nhwc else torch.contiguous_format
        return out.contiguous(memory_format=layout)

    def _geometries(self) -> list[tuple[Any, ...]]:
        convs = (self.expand, self.grouped, self.pointwise)
        return [
            (one.stride, one.padding, one.dilation, one.groups, one.padding_mode)
            for one in convs
            if one is not None
        ]

    def _is_synchronised(self) -> bool:
        """Whether a norm takes its statistics from all ranks."""
        return any(_gather_of(norm) is not None for norm in self._norms())

    def _norms(self) -> list[Any]:
        links = (self.before, self.norm, self.after)
        return [one.norm for one in links if one is not None and one.norm is not None]

    def _is_trained(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether anything in it wants a gradient."""
        convs = (self.expand, self.grouped, self.pointwise)
        layers = [*(one for one in convs if one is not None), *self._norms()]
        tensors = [x, residual, *(one for layer in layers for one in (layer.weight, layer.bias))]
        return any(one is not None and one.requires_grad for one in tensors)

    def _fits(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether the op takes these tensors and does with them what the modules would do."""
        weight, conv = self.grouped.weight, self.grouped
        if x.dim() != 4 or x.numel() == 0 or not has_kernel(x.device.type):
            return False
        dtype, cast = _dtype(x), torch.is_autocast_enabled(x.device.type)
        if dtype not in _DTYPES or weight.device != x.device:
            return False
        if not cast and any(one.weight.dtype != dtype for one in (conv, self.pointwise)):
            return False
        if self._geometries() != self.geometries:
            return False
        links = [one for one in (self.before, self.norm, self.after) if one is not None]
        if any(_is_off_gpu(one.norm, x) for one in links):
            return False
        spec, geometry = self.spec, self.spec.geometry
        height, width = geometry.out_size(x.shape[2]), geometry.out_size(x.shape[3])
        if x.shape[1] != spec.in_channels or min(height, width) < 1:
            return False
        # A sum of two types has the wider one, a sum of two shapes is repeated: left to torch.
        out = (x.shape[0], spec.out_channels, height, width)
        return residual is None or (residual.dtype == dtype and tuple(residual.shape) == out)


def _dtype(x: Tensor) -> torch.dtype:
    """That a convolution of x computes in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _is_channels_last(x: Tensor) -> bool:
    """What torch takes for it: of height and width 1 the strides decide, one channel is NCHW."""
    num, channels, height, width = x.stride()
    rows, images = width * x.shape[3], height * x.shape[2]
    ordered = width >= channels * x.shape[1] and height >= rows and num >= images != channels
    return ordered and x.shape[1] > 1


def _is_off_gpu(norm: nn.Module | None, x: Tensor) -> bool:
    """Whether torch refuses it: it synchronises statistics on GPUs only."""
    return isinstance(norm, nn.SyncBatchNorm) and norm.training and not x.is_cuda


def _values(link: Link, conv: nn.Conv2d, x: Tensor) -> Norm:
    """What `nn.BatchNorm2d.forward` hands to F.batch_norm, counting the batch as it does."""
    norm: Any = link.norm
    if norm is None:
        zeros = x.new_zeros(conv.out_channels, dtype=torch.float32)
        ones = torch.ones_like(zeros)
        return Norm(None, None, zeros, ones, False, 0.0, 0.0, link.activation)
    tracked = not norm.training or norm.track_running_stats
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    return Norm(
        norm.weight,
        norm.bias,
        norm.running_mean if tracked else None,
        norm.running_var if tracked else None,
        norm.training or norm.running_mean is None,
        momentum,
        norm.eps,
        link.activation,
        _gather_of(norm),
    )


def _gather_of(norm: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """How its statistics come from all ranks; None if they are this rank's own."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training or not dist.is_initialized():
        return None
    group = norm.process_group or dist.group.WORLD
    size = dist.get_world_size(group)
    return None if size == 1 else partial(_gathered, group=group, size=size)


def _gathered(vector_K: Tensor, *, group: Any, size: int) -> Tensor:
    """[ranks, K]."""
    out_RK = vector_K.new_empty(size, len(vector_K))
    dist.all_gather_into_tensor(out_RK, vector_K, group=group)
    return out_RK
