"""The frozen network that is imitated: evaluated first, never trained, wrapped or saved.

The teacher is its own compiled unit with its own normalisation, resolution and class order. On a
GPU it runs one batch ahead on a side stream (`fastkd.training.ahead`).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.compute.compiling import compile_unit
from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision, resolve_precision
from fastkd.config.section import Normalization
from fastkd.errors import UserError
from fastkd.losses.base.needs import MEAN_LOGITS, Need
from fastkd.models.card import card_of
from fastkd.models.intake import (
    image_dtype,
    is_compiled_ahead,
    is_quantised,
    own_dtype,
    refusal,
    to_evaluation,
)
from fastkd.models.rewrite.fuse import fuse
from fastkd.models.taps import Tapped, ZooNetwork
from fastkd.teachers.loaded import LoadedNet

__all__ = ["Teacher", "freeze", "usable"]


def freeze(model: nn.Module) -> nn.Module:
    """Evaluation mode, no parameter gradients; in place."""
    for parameter in model.parameters():
        # Scripted modules have no requires_grad_, and their copies no leaves.
        parameter.requires_grad_(False) if parameter.is_leaf else parameter.detach_()
    to_evaluation(model)
    return model


class Teacher:
    """Callable: views -> its tensors by need.

    Args:
        net: a network that maps [N, 3, H, W] to logits [N, C], and the inputs it expects. Its own
            precision and compile switch override the run's.
        taps: per view, the taps that the loss terms need.
        placement: device, autocast type and memory layout of the run.
        data_normalization: (mean, std) in 0..1 with which the views were normalised.
        layout: memory layout of the views; by default the one for this network.
        fold_batch_norm: if only the teacher's logits are needed, fold it into the convolutions, in
            a copy: the same logits within rounding, in less time. `model` is then that copy. A
            network that cannot be copied or traced is used unchanged.
    """

    def __init__(
        self,
        net: LoadedNet,
        taps: Mapping[str, tuple[str, ...]],
        placement: Placement,
        *,
        data_normalization: Normalization,
        layout: torch.memory_format | None = None,
        compiled: bool = False,
        fullgraph: bool = True,
        fold_batch_norm: bool = True,
    ) -> None:
        device = placement.device
        precision, dtype = _computed_in(net, placement)
        if layout is None:
            layout = placement.layout(net.model)
        self.taps = {
            view: tuple(dict.fromkeys(("logits", *wanted))) for view, wanted in taps.items()
        }
        every = dict.fromkeys(tap for wanted in taps.values() for tap in wanted)
        if MEAN_LOGITS in every:
            every = {"logits": None} | every
            del every[MEAN_LOGITS]
        # A tapped network keeps every layer where the taps expect it.
        given = freeze(net.model)
        # Of other types than fp32 the products would be rounded.
        fold_batch_norm = fold_batch_norm and own_dtype(given) == torch.float32
        model = _folded(given) if fold_batch_norm and set(every) <= {"logits"} else given
        self.folded = model is not given
        if self.folded and card_of(given) is not None:
            _hold_in(model, precision.dtype)
        self.net = net
        model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        self.model = model
        self.unit = _TeacherUnit(
            self.model,
            tuple(every) or ("logits",),
            precision,
            dtype,
            _renormalization(data_normalization, net.normalization),
            net.resolution,
            net.class_map,
        ).to(device)
        self.forward = compile_unit(
            self.unit,
            enabled=compiled if net.compiled is None else net.compiled,
            fullgraph=fullgraph,
        )

    def __call__(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors keyed `view/teacher/tap`, without gradient."""
        out: dict[str, Tensor] = {}
        rows = len(views["x"])
        # no_grad, not inference_mode: inference tensors cannot enter a differentiated loss.
        with torch.no_grad():
            for view, taps in self.taps.items():
                features = _with_mean(self._in_pieces(views[view], rows))
                # An encoder has no logits, and no loss has asked for them.
                found = {tap: features[tap] for tap in taps if tap in features}
                out |= {str(Need.of(view, "teacher", tap)): usable(found[tap]) for tap in found}
        return out

    def _in_pieces(self, images_NCHW: Tensor, rows: int) -> dict[str, Tensor]:
        """All taps; on a CPU the pool of a pick is processed in batches as large as x.

        Batches twice as large exceed its caches (benchmarks/bench_pick.py with ResNet-50) and would
        need another compilation.
        """
        if images_NCHW.device.type != "cpu" or len(images_NCHW) == rows:
            return self.forward(images_NCHW)
        pieces = [self.forward(piece_NCHW) for piece_NCHW in images_NCHW.split(rows)]
        return {tap: torch.cat([piece[tap] for piece in pieces]) for tap in pieces[0]}

    def features(self, images_NCHW: Tensor) -> dict[str, Tensor]:
        """All taps needed on any view, uncompiled."""
        with torch.no_grad():
            return _with_mean(self.unit(images_NCHW))

    def tried(self, images_NCHW: Tensor, *, called: str = "the teacher") -> dict[str, Tensor]:
        """`features` of a few images, the first that the network is shown.

        UserError if it fails on them, with what to change; the message names it as `called`.
        """
        features = self._tried(images_NCHW, called)
        if is_compiled_ahead(self.model):
            # It may also be made for one number of images.
            self._tried(images_NCHW[:1].repeat(3, 1, 1, 1), called)
            if "logits" in features:
                self._check_mode(images_NCHW, features["logits"])
        return features

    def _tried(self, images_NCHW: Tensor, called: str) -> dict[str, Tensor]:
        try:
            return self.features(images_NCHW)
        except UserError:
            raise
        except Exception as error:
            # Foreign code can fail in any way.
            raise refusal(
                error,
                title=f"{called} {self.net.name}",
                model=self.model,
                run=self.unit.tapped,
                images_NCHW=self.unit.shown(images_NCHW),
                precision=self.unit.precision,
                remedy=self.net.remedy,
            ) from error

    def _check_mode(self, images_NCHW: Tensor, logits_NC: Tensor) -> None:
        """UserError for a program that was made in training mode, which nothing can leave.

        Such a one draws dropout masks, or mixes the images of a batch in its batch norms.
        """
        others_NCHW = torch.cat([images_NCHW[:1], 1.0 - images_NCHW[1:]])
        first_C, again_C = logits_NC[0].float(), self.logits(others_NCHW)[0].float()
        if (again_C - first_C).norm() > 0.02 * first_C.norm():
            raise UserError(
                f"the teacher {self.net.name} was traced or exported in training mode: its answer "
                f"to an image depends on the rest of the batch, or on chance. Trace or export "
                f"model.eval()"
            )

    def logits(self, images_NCHW: Tensor) -> Tensor:
        """Logits [N, C] in the class order of the data, uncompiled; for the evaluation."""
        return self.features(images_NCHW)["logits"]

    def stages(self, features: Tensor, after: str, taps: Iterable[str]) -> dict[str, Tensor]:
        """The layers after tap `after` up to the last of `taps`, with gradient to the features.

        Only if `has_stages`.
        """
        assert isinstance(self.model, ZooNetwork)
        return self.unit.in_class_order(self.model.forward_from(features, after, taps))

    @property
    def has_stages(self) -> bool:
        """Whether the network can be run in part: from the zoo, with its batch norm not folded."""
        return isinstance(self.model, ZooNetwork) and not self.folded


def _computed_in(net: LoadedNet, placement: Placement) -> tuple[Precision, torch.dtype]:
    """Autocast type of a teacher's forward pass, and the type of its images.

    A network that was built in another type than fp32 computes in that one, a quantised one in
    fp32 around its own layers: autocast knows neither.
    """
    precision = placement.precision
    if net.precision is not None:
        precision = resolve_precision(net.precision, placement.device)
    plain = Precision("fp32", placement.device.type)
    if is_quantised(net.model):
        return plain, torch.float32
    own = own_dtype(net.model)
    if own not in (None, torch.float32):
        return plain, own
    return precision, image_dtype(net.model, precision)


def _with_mean(features: dict[str, Tensor]) -> dict[str, Tensor]:
    return features | ({MEAN_LOGITS: features["logits"]} if "logits" in features else {})


def usable(tensor: Tensor) -> Tensor:
    """A copy, if the teacher runs itself in inference mode, whose tensors no gradient may meet."""
    return tensor.clone() if tensor.is_inference() else tensor


def _folded(model: nn.Module) -> nn.Module:
    try:
        fused = fuse(model)
    except UserError:
        return model
    card = card_of(fused)
    return fused if card and card.report and card.report.changed else model


def _hold_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the weights in the type to which autocast would round them in every step.

    Only in torch's own layer classes: what a subclass does with its weights is unknown.
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
        dtype: torch.dtype,
        scale_shift: tuple[list[float], list[float]] | None,
        resolution: int | None,
        class_map: tuple[int, ...] | None,
    ) -> None:
        super().__init__()
        self.tapped = Tapped(model, taps)
        self.precision = precision
        self.dtype = dtype
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
        shown_NCHW = self.shown(images_NCHW)
        # In its own type, which may differ from the run's.
        with self.precision.autocast():
            features = self.tapped(shown_NCHW)
        if self.dtype == torch.float64:  # the losses compute in fp32
            features = {tap: tensor.float() for tap, tensor in features.items()}
        return self.in_class_order(features)

    def shown(self, images_NCHW: Tensor) -> Tensor:
        """The images as the network sees them."""
        if self.renormalize:
            moved_NCHW = torch.addcmul(self.shift, images_NCHW, self.scale)
            images_NCHW = moved_NCHW.to(images_NCHW.dtype)
        if self.resolution is not None:
            side = (self.resolution, self.resolution)
            # In fp32: torch has no antialiased bf16 resize on CPUs.
            resized_NCHW = F.interpolate(
                images_NCHW.float(), side, mode="bilinear", antialias=True, align_corners=False
            )
            images_NCHW = resized_NCHW.to(images_NCHW.dtype)
        return images_NCHW.to(self.dtype)

    def in_class_order(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same values, with any logits in the class order of the data."""
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
