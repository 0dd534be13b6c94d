"""The frozen network that is imitated: evaluated first, never trained, wrapped or saved.

The teacher is its own compiled unit with its own normalisation, resolution and class order. On a
GPU it works one batch ahead on a side stream (`fastkd.training.ahead`).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.compute.compiling import compile_unit
from fastkd.compute.precision import Precision
from fastkd.config.section import Normalization
from fastkd.errors import UserError
from fastkd.models.rewrite.fuse import fuse
from fastkd.models.taps import Tapped, ZooNetwork

__all__ = ["MEAN_LOGITS", "Teacher", "freeze"]

MEAN_LOGITS = "mean_logits"
"""A tap of every teacher: the mean of the logits over all teachers, of one teacher its logits."""


def freeze(model: nn.Module) -> nn.Module:
    """Evaluation mode, no parameter gradients; in place."""
    return model.eval().requires_grad_(False)


class Teacher:
    """Callable: views -> its tensors by need.

    Args:
        model: any nn.Module that maps [N, 3, H, W] to logits [N, C].
        taps: per view the taps that the loss terms ask for.
        precision: autocast of its forward pass.
        data_normalization: (mean, std) in 0..1 with which the views were normalised.
        normalization: the teacher's own; None where it is that of the data.
        resolution: side in pixels the teacher wants; None keeps that of the views.
        class_map: for every class of the data the teacher's output; None where the orders agree.
        fold_batch_norm: fold it into the convolutions of a teacher of which only the logits are
            wanted, in a copy: the same logits within rounding, in less time. `model` is then that
            copy. A network that cannot be copied or traced is used as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Mapping[str, tuple[str, ...]],
        *,
        precision: Precision,
        device: torch.device,
        data_normalization: Normalization,
        normalization: Normalization | None = None,
        resolution: int | None = None,
        class_map: tuple[int, ...] | None = None,
        layout: torch.memory_format = torch.channels_last,
        compiled: bool = False,
        fullgraph: bool = True,
        fold_batch_norm: bool = True,
    ) -> None:
        self.taps = {
            view: tuple(dict.fromkeys(("logits", *wanted))) for view, wanted in taps.items()
        }
        every = dict.fromkeys(tap for wanted in self.taps.values() for tap in wanted)
        every.pop(MEAN_LOGITS, None)
        # A tapped one keeps every layer where the taps expect it.
        given = freeze(model)
        model = _folded(given) if fold_batch_norm and set(every) <= {"logits"} else given
        self.folded = model is not given
        if self.folded:
            _hold_in(model, precision.dtype)
        self.model = model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        self.unit = _TeacherUnit(
            self.model,
            tuple(every) or ("logits",),
            precision,
            _renormalization(data_normalization, normalization),
            resolution,
            class_map,
        ).to(device)
        self.forward = compile_unit(self.unit, enabled=compiled, fullgraph=fullgraph)

    def __call__(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors keyed `view/teacher/tap`, without gradient."""
        out: dict[str, Tensor] = {}
        rows = len(views["x"])
        # no_grad, not inference_mode: inference tensors cannot enter a differentiated loss.
        with torch.no_grad():
            for view, taps in self.taps.items():
                features = _with_mean(self._in_pieces(views[view], rows))
                out |= {f"{view}/teacher/{tap}": features[tap] for tap in taps}
        return out

    def _in_pieces(self, images_NCHW: Tensor, rows: int) -> dict[str, Tensor]:
        """All taps; on a CPU the pool of a pick passes in batches as large as x.

        Twice as large ones fall out of its caches (benchmarks/bench_pick.py with ResNet-50), and
        would be compiled once more.
        """
        if images_NCHW.device.type != "cpu" or len(images_NCHW) == rows:
            return self.forward(images_NCHW)
        pieces = [self.forward(piece_NCHW) for piece_NCHW in images_NCHW.split(rows)]
        return {tap: torch.cat([piece[tap] for piece in pieces]) for tap in pieces[0]}

    def features(self, images_NCHW: Tensor) -> dict[str, Tensor]:
        """All taps that are wanted of any view, uncompiled."""
        with torch.no_grad():
            return _with_mean(self.unit(images_NCHW))

    def logits(self, images_NCHW: Tensor) -> Tensor:
        """Logits [N, C] in the class order of the data, uncompiled; for the evaluation."""
        return self.features(images_NCHW)["logits"]

    def stages(self, features: Tensor, after: str, taps: Iterable[str]) -> dict[str, Tensor]:
        """The layers after tap `after` up to the last of `taps`, with gradient to the features.

        Only where `has_stages`.
        """
        assert isinstance(self.model, ZooNetwork)
        return self.unit.in_class_order(self.model.forward_from(features, after, taps))

    @property
    def has_stages(self) -> bool:
        """Whether the network can be run in part: one of the zoo, its batch norm not folded."""
        return isinstance(self.model, ZooNetwork) and not self.folded


def _with_mean(features: dict[str, Tensor]) -> dict[str, Tensor]:
    return features | {MEAN_LOGITS: features["logits"]}


def _folded(model: nn.Module) -> nn.Module:
    try:
        fused: Any = fuse(model)
    except UserError:
        return model
    return fused if fused.rewrite_report.changed else model


def _hold_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the weights the type to which autocast would round them anew at every step.

    Only in layers that are exactly torch's own: what a subclass does with its weights is unknown.
    """
    for module in model.modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            module.to(dtype)


class _TeacherUnit(nn.Module):
    """The compiled part: renormalise, resize, forward, reorder classes."""

    def __init__(
        self,
        model: nn.Module,
        taps: tuple[str, ...],
        precision: Precision,
        scale_shift: tuple[list[float], list[float]] | None,
        resolution: int | None,
        class_map: tuple[int, ...] | None,
    ) -> None:
        super().__init__()
        self.tapped = Tapped(model, taps)
        self.precision = precision
        self.resolution = resolution
        self.renormalize = scale_shift is not None
        scale, shift = scale_shift or ([1.0] * 3, [0.0] * 3)
        self.scale: Tensor
        self.shift: Tensor
        self.order: Tensor | None
        self.register_buffer("scale", torch.tensor(scale).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(1, 3, 1, 1), persistent=False)
        order = None if class_map is None else torch.tensor(class_map)
        self.register_buffer("order", order, persistent=False)

    def forward(self, images_NCHW: Tensor) -> dict[str, Tensor]:
        if self.renormalize:
            moved_NCHW = torch.addcmul(self.shift, images_NCHW, self.scale)
            images_NCHW = moved_NCHW.to(images_NCHW.dtype)
        if self.resolution is not None:
            side = (self.resolution, self.resolution)
            # In fp32: torch has no antialiased bf16 resize on a CPU.
            resized_NCHW = F.interpolate(
                images_NCHW.float(), side, mode="bilinear", antialias=True, align_corners=False
            )
            images_NCHW = resized_NCHW.to(images_NCHW.dtype)
        # Of its own type, which need not be that of the run.
        with self.precision.autocast():
            features = self.tapped(images_NCHW.to(self.precision.dtype))
        return self.in_class_order(features)

    def in_class_order(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """With the logits, where there are any, in the class order of the data."""
        if self.order is not None and "logits" in features:
            features = features | {"logits": features["logits"][:, self.order]}
        return features


def _renormalization(
    data: Normalization, teacher: Normalization | None
) -> tuple[list[float], list[float]] | None:
    """(x - m_d)/s_d -> (x - m_t)/s_t as one scale and shift per channel; None if they agree."""
    if teacher is None or teacher == data:
        return None
    (mean_d, std_d), (mean_t, std_t) = data, teacher
    scale = [sd / st for sd, st in zip(std_d, std_t, strict=True)]
    shift = [(md - mt) / st for md, mt, st in zip(mean_d, mean_t, std_t, strict=True)]
    return scale, shift
