"""The teachers of a run, one or several that answer together, bound to what the step needs.

`bind_teacher` connects loaded networks to views and taps. Several appear to the step as one
teacher, whose probabilities are the mean of theirs (Shen and Savvides 2020, arXiv:2009.08453,
equation 1).
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fastkd.compute.placement import Placement
from fastkd.config.section import Normalization
from fastkd.errors import UserError
from fastkd.losses.base.needs import MEAN_LOGITS, Need
from fastkd.losses.base.term import LossTerm
from fastkd.models.dense import logits_at
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.teacher import Teacher

__all__ = ["Ensemble", "LoadedNet", "bind_teacher", "check_ensemble_needs"]


def _log_mean_probability(each: Sequence[Tensor]) -> Tensor:
    log_p_KNC = torch.stack([logits_NC.float().log_softmax(1) for logits_NC in each])
    return log_p_KNC.logsumexp(0) - math.log(len(each))


def _mean_logits(each: Sequence[Tensor]) -> Tensor:
    return torch.stack([logits_NC.float() for logits_NC in each]).mean(0)


def _at_one_size(each: Sequence[Tensor]) -> list[Tensor]:
    """Answers of every pixel at the size of the largest map, by `logits_at`; others as they are."""
    if each[0].dim() != 4:
        return list(each)
    rows, columns = zip(*((logits.shape[2], logits.shape[3]) for logits in each), strict=True)
    return [logits_at(logits, (max(rows), max(columns))) for logits in each]


TAPS = {"logits": _log_mean_probability, MEAN_LOGITS: _mean_logits}
"""The taps that several networks have in common."""


class Ensemble:
    """Callable: views -> the joint answer of several teachers, by need; replaces a `Teacher`.

    `logits` is the natural logarithm of the mean over the members of their probabilities at
    temperature 1, fp32 [N, C]: its softmax is that mean. A loss of another temperature T therefore
    softens the mean, softmax(log(mean_k p_k) / T); it does not average softened probabilities.
    `mean_logits` is the mean of the raw logits, which is another distribution. Answers of every
    pixel, [N, C, H, W], are first brought to the size of the largest.

    All members have equal weight. There are no stages and no other taps: they belong to no one
    network.
    """

    def __init__(self, members: Mapping[str, Teacher], taps: Mapping[str, tuple[str, ...]]) -> None:
        """members: by name, each returning its logits on the views of `taps`."""
        self.members = dict(members)
        self.taps = {view: tuple(dict.fromkeys(("logits", *own))) for view, own in taps.items()}

    def __call__(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors keyed `view/teacher/tap`, without gradient."""
        out: dict[str, Tensor] = {}
        answers = [member(views) for member in self.members.values()]
        for view, taps in self.taps.items():
            each = _at_one_size(
                [answer[str(Need.of(view, "teacher", "logits"))] for answer in answers]
            )
            out |= {str(Need.of(view, "teacher", tap)): TAPS[tap](each) for tap in taps}
        return out

    def features(self, images_NCHW: Tensor) -> dict[str, Tensor]:
        """Both taps, uncompiled; UserError if the members do not have the same classes."""
        each = [member.logits(images_NCHW) for member in self.members.values()]
        if len({logits.dim() for logits in each}) == 1:
            each = _at_one_size(each)
        shapes = [tuple(logits_NC.shape[1:]) for logits_NC in each]
        if len(set(shapes)) > 1:
            found = ", ".join(f"{n} {s}" for n, s in zip(self.members, shapes, strict=True))
            raise UserError(
                f"the teachers give logits of different shapes per image ({found}): all need the "
                f"classes of the data; a teacher's class_map selects them from its own"
            )
        return {tap: of(each) for tap, of in TAPS.items()}

    def tried(self, images_NCHW: Tensor) -> dict[str, Tensor]:
        """`features` of a few images, the first that the networks are shown; see `Teacher`."""
        for member in self.members.values():
            member.tried(images_NCHW)
        return self.features(images_NCHW)

    def logits(self, images_NCHW: Tensor) -> Tensor:
        """Logits [N, C], uncompiled; for the evaluation."""
        return self.features(images_NCHW)["logits"]


def bind_teacher(
    nets: Sequence[LoadedNet],
    taps: Mapping[str, tuple[str, ...]],
    placement: Placement,
    *,
    data_normalization: Normalization,
    layout: torch.memory_format | None = None,
    compiled: bool = False,
    fullgraph: bool = True,
    fold_batch_norm: bool = True,
) -> Teacher | Ensemble:
    """One teacher, or the ensemble of several; arguments as of `Teacher`.

    Bound in the same way as before, it is the same object, as long as somebody uses that.
    """
    asked = tuple((view, tuple(sorted(own))) for view, own in taps.items())
    inputs = placement, data_normalization, layout
    how = (*map(id, nets), asked, inputs, compiled, fullgraph, fold_batch_norm)
    if (known := nets[0].bound.get(how)) is not None:
        return known

    def bind(net: LoadedNet, taps: Mapping[str, tuple[str, ...]]) -> Teacher:
        return Teacher(
            net,
            taps,
            placement,
            data_normalization=data_normalization,
            layout=layout,
            compiled=compiled,
            fullgraph=fullgraph,
            fold_batch_norm=fold_batch_norm,
        )

    if len(nets) == 1:
        return nets[0].bound.setdefault(how, bind(nets[0], taps))
    logits = dict.fromkeys(taps, ("logits",))
    # By number too: two may have the same architecture.
    members = {f"{n}: {net.name}": bind(net, logits) for n, net in enumerate(nets, 1)}
    return nets[0].bound.setdefault(how, Ensemble(members, taps))


def check_ensemble_needs(nets: Sequence[LoadedNet], terms: Iterable[LossTerm]) -> None:
    """UserError if a loss needs something from several teachers that only one network has."""
    if len(nets) < 2:
        return
    for term in terms:
        taps = [need.tap for need in term.needs if need.net == "teacher"]
        wanted = next((tap for tap in taps if tap not in TAPS), None)
        if wanted is not None:
            names = ", ".join(net.name for net in nets)
            raise UserError(
                f"the loss {term.name} needs {wanted} of the teacher, but there are "
                f"{len(nets)} teachers ({names}), which only have logits in common: drop "
                f"that loss, or all teachers but one"
            )
