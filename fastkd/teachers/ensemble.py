"""The teachers of a run: one, or several that answer together. Between `networks` and the step.

`bind_teacher` ties what was loaded to views and taps. Of several the step sees one teacher, whose
probabilities are the mean of theirs (Shen and Savvides 2020, arXiv:2009.08453, equation 1).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastkd.compute.precision import Precision, PrecisionName, resolve_precision
from fastkd.config.section import Normalization
from fastkd.errors import UserError
from fastkd.losses.base.term import LossTerm, Need
from fastkd.teachers.teacher import MEAN_LOGITS, Teacher

__all__ = ["Ensemble", "LoadedNet", "bind_teacher", "check_ensemble_needs"]


@dataclass(frozen=True)
class LoadedNet:
    """A network as it was loaded: a teacher before it is tied to taps and views, or a student."""

    model: nn.Module
    normalization: Normalization | None = None
    resolution: int | None = None
    class_map: tuple[int, ...] | None = None
    name: str = "teacher"
    """For messages."""
    precision: PrecisionName | None = None
    """Its own; None: that of the run."""
    compiled: bool | None = None
    """Likewise."""
    ensemble: tuple["LoadedNet", ...] = ()
    """Further teachers that answer together with this one."""

    @property
    def members(self) -> "tuple[LoadedNet, ...]":
        """This one alone and the further ones."""
        return (replace(self, ensemble=()), *self.ensemble)


def _log_mean_probability(each: Sequence[Tensor]) -> Tensor:
    log_p_KNC = torch.stack([logits_NC.float().log_softmax(1) for logits_NC in each])
    return log_p_KNC.logsumexp(0) - math.log(len(each))


def _mean_logits(each: Sequence[Tensor]) -> Tensor:
    return torch.stack([logits_NC.float() for logits_NC in each]).mean(0)


TAPS = {"logits": _log_mean_probability, MEAN_LOGITS: _mean_logits}
"""All that several networks have in common."""


class Ensemble:
    """Callable: views -> what several teachers say together, by need; stands in for a `Teacher`.

    `logits` is the natural logarithm of the mean over the members of their probabilities at
    temperature 1, fp32 [N, C]: its softmax is that mean. A loss of another temperature T therefore
    softens the mean, softmax(log(mean_k p_k) / T); it does not average softened probabilities.
    `mean_logits` is the mean of the raw logits, which is another distribution.

    All members have the same say. There are no stages and no other taps: whose would they be?
    """

    def __init__(self, members: Mapping[str, Teacher], taps: Mapping[str, tuple[str, ...]]) -> None:
        """members: by name, each giving its logits on the views of `taps`."""
        self.members = dict(members)
        self.taps = {view: tuple(dict.fromkeys(("logits", *own))) for view, own in taps.items()}

    def __call__(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors keyed `view/teacher/tap`, without gradient."""
        out: dict[str, Tensor] = {}
        answers = [member(views) for member in self.members.values()]
        for view, taps in self.taps.items():
            each = [answer[f"{view}/teacher/logits"] for answer in answers]
            out |= {f"{view}/teacher/{tap}": TAPS[tap](each) for tap in taps}
        return out

    def features(self, images_NCHW: Tensor) -> dict[str, Tensor]:
        """Both taps, uncompiled; UserError where the members do not know the same classes."""
        each = [member.logits(images_NCHW) for member in self.members.values()]
        shapes = [tuple(logits_NC.shape[1:]) for logits_NC in each]
        if len(set(shapes)) > 1:
            found = ", ".join(f"{n} {s}" for n, s in zip(self.members, shapes, strict=True))
            raise UserError(
                f"the teachers give logits of different shapes per image ({found}): all need the "
                f"classes of the data, which class_map of a teacher picks out of its own"
            )
        return {tap: of(each) for tap, of in TAPS.items()}

    def logits(self, images_NCHW: Tensor) -> Tensor:
        """[N, C], uncompiled; for the evaluation."""
        return self.features(images_NCHW)["logits"]


def bind_teacher(
    net: LoadedNet,
    taps: Mapping[str, tuple[str, ...]],
    *,
    precision: Precision,
    device: torch.device,
    data_normalization: Normalization,
    layout: torch.memory_format = torch.channels_last,
    compiled: bool = False,
    fullgraph: bool = True,
    fold_batch_norm: bool = True,
) -> Teacher | Ensemble:
    """One teacher or the ensemble; arguments as of `Teacher`, a member's own choices go before."""

    def bind(one: LoadedNet, taps: Mapping[str, tuple[str, ...]]) -> Teacher:
        return Teacher(
            one.model,
            taps,
            precision=resolve_precision(one.precision, device) if one.precision else precision,
            device=device,
            data_normalization=data_normalization,
            normalization=one.normalization,
            resolution=one.resolution,
            class_map=one.class_map,
            layout=layout,
            compiled=compiled if one.compiled is None else one.compiled,
            fullgraph=fullgraph,
            fold_batch_norm=fold_batch_norm,
        )

    if not net.ensemble:
        return bind(net, taps)
    logits = dict.fromkeys(taps, ("logits",))
    # By number too: two may be of one architecture.
    members = {f"{n}: {one.name}": bind(one, logits) for n, one in enumerate(net.members, 1)}
    return Ensemble(members, taps)


def check_ensemble_needs(net: LoadedNet, terms: Iterable[LossTerm]) -> None:
    """UserError where a loss wants of an ensemble what only one network has."""
    if not net.ensemble:
        return
    for term in terms:
        taps = [Need.parse(text).tap for text in term.needs if "/teacher/" in text]
        wanted = next((tap for tap in taps if tap not in TAPS), None)
        if wanted is not None:
            names = ", ".join(one.name for one in net.members)
            raise UserError(
                f"the loss {term.name} asks for {wanted} of the teacher, but there are "
                f"{len(net.members)} teachers ({names}), which only have logits in common: drop "
                f"that loss, or all teachers but one"
            )
