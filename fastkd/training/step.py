"""Batch -> named losses: the unit that is compiled, wrapped by DDP and captured.

Shape suffixes: N samples, C classes. The step runs the student once per view (views are never
concatenated: that would change its batch statistics), calls every term, and is the one place
where weights are applied. Nothing here asks the host for a number.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastkd.compute.collectives import split_evenly
from fastkd.compute.precision import Precision
from fastkd.data.batch import NO_LABEL, Batch, LabelKind
from fastkd.errors import UserError
from fastkd.losses.base.needs import LOGITS, STUDENT_LOGITS, Need
from fastkd.losses.base.pairs import PairTerm
from fastkd.losses.base.term import LossTerm, TermInputs, check_names
from fastkd.models.dense import logits_at
from fastkd.models.head import keep_frozen_still
from fastkd.models.intake import image_dtype
from fastkd.models.taps import Tapped

__all__ = ["DistillStep", "Prepared", "StepOutput", "needed_taps", "refuse_skips"]

_ANSWER = str(STUDENT_LOGITS)


class Prepared(NamedTuple):
    """A batch with its views and their targets, ready for the step."""

    batch: Batch
    views: dict[str, Tensor]
    """Images [N, 3, H, W] by name of the view."""
    targets: dict[str, Tensor]
    """Tensors that do not depend on the student, by need: the teacher's answers, and labels and
    logits of the images that x' is mixed from, `xprime/mixed/..`."""
    global_size: int
    """Images of the whole batch, all ranks together."""
    rows_of_ranks: dict[str, tuple[int, ...]]
    """For each view of this (micro-)batch, the number of rows on each rank."""

    def chosen(self, view: str, index_K: Tensor, rows_of_ranks: tuple[int, ...]) -> "Prepared":
        """The same batch with these rows of one view and of its targets.

        rows_of_ranks: how many are chosen on each rank.
        """
        return self._replace(
            rows_of_ranks=self.rows_of_ranks | {view: rows_of_ranks},
            views=self.views | {view: self.views[view][index_K]},
            targets={
                need: tensor[index_K] if Need(need).view == view else tensor
                for need, tensor in self.targets.items()
            },
        )

    def split(self, parts: int) -> "Iterator[Prepared]":
        """Exactly `parts` micro-batches, their sizes differing by at most one."""
        if parts == 1:
            yield self
            return

        def share(tensor: Tensor, part: int) -> Tensor:
            # Each by its own length: a view chosen from a pool may have another one.
            return tensor.split(split_evenly(len(tensor), parts))[part]

        for part in range(parts):
            yield Prepared(
                Batch(
                    images_NCHW=share(self.batch.images_NCHW, part),
                    labels_N=share(self.batch.labels_N, part),
                    index_N=share(self.batch.index_N, part),
                ),
                {name: share(view, part) for name, view in self.views.items()},
                {need: share(tensor, part) for need, tensor in self.targets.items()},
                self.global_size,
                {
                    name: tuple(split_evenly(num, parts)[part] for num in rows)
                    for name, rows in self.rows_of_ranks.items()
                },
            )


class StepOutput(NamedTuple):
    """What one forward pass of the step gives."""

    loss: Tensor
    """0-dim, fp32, with gradient: the weighted sum over all parts."""
    metrics_M: Tensor
    """Detached fp32 vector in the order of `DistillStep.metric_names`: sums over the batch, the
    parts times `images`. Images labelled -100 count in `images` but never in `correct`: each
    batch is weighted by its images, not by its labels. A part whose tap did not run counts as 0."""
    carry: dict[str, dict[str, Tensor]]
    """Per term, the input of its `commit`."""


def needed_taps(terms: Iterable[LossTerm], net: str) -> dict[str, tuple[str, ...]]:
    """Taps per view that the terms need from a net; x first; for the student always with logits."""
    wanted: dict[str, list[str]] = {}
    needs = [need for term in terms for need in term.needs]
    for need in sorted((need for need in needs if need.net == net), key=lambda need: need.view):
        taps = wanted.setdefault(need.view, ["logits"] if net == "student" else [])
        if need.tap not in taps:
            taps.append(need.tap)
    if net == "student" and not wanted:
        wanted["x"] = ["logits"]
    return {view: tuple(taps) for view, taps in wanted.items()}


def refuse_skips(term: LossTerm, ranks: int) -> None:
    """UserError for a tap that was skipped at random by a loss that other ranks may wait for."""
    alone = isinstance(term, PairTerm) and not term.banks and not getattr(term, "gather", False)
    if ranks > 1 and not alone:
        raise UserError(
            f"the loss {term.name} uses a tap that is skipped at random in training, and the "
            f"{ranks} processes skip it in different steps: tap the module around it, or set its "
            f"drop rate to 0"
        )


def _view_joined(term: LossTerm) -> str:
    """The view whose number of rows on every rank is passed to the term: its only one, else x."""
    views = {need.view for need in term.needs}
    return views.pop() if len(views) == 1 else "x"


class DistillStep(nn.Module):
    """Student and terms as one module: its parameters are exactly those that are trained."""

    def __init__(
        self,
        student: nn.Module,
        terms: Iterable[LossTerm],
        precision: Precision,
        *,
        label_kind: LabelKind = "class",
        labelled: bool = True,
    ) -> None:
        """label_kind, labelled: as in `fastkd.data.facts.Facts`."""
        super().__init__()
        self.label_kind: LabelKind = label_kind
        self.terms = nn.ModuleList(terms)
        check_names(self._terms())
        self.precision = precision
        self.image_dtype = image_dtype(student, precision)
        self.views = needed_taps(self._terms(), "student")
        # As plain str, here and below: torch.compile traces look-ups by it.
        self.student_keys = {
            view: {tap: str(Need.of(view, "student", tap)) for tap in taps}
            for view, taps in self.views.items()
        }
        taps = dict.fromkeys(tap for wanted in self.views.values() for tap in wanted)
        self.student = Tapped(student, tuple(taps), may_skip=True)
        needs = [need for term in self._terms() for need in term.needs]
        self.trains_head = any((need.net, need.tap) == ("student", "logits") for need in needs)
        self.mixed = sorted({need.tap for need in needs if need.net == "mixed"})
        # Logits, which are brought to the size of the label maps.
        self.dense = tuple(
            dict.fromkeys(
                [keys["logits"] for keys in self.student_keys.values()]
                + [str(need) for need in needs if need.tap in LOGITS]
            )
        )
        self.term_keys = {term.name: tuple(map(str, term.needs)) for term in self._terms()}
        self.taps_of = {
            term.name: tuple(str(need) for need in term.needs if need.net == "student")
            for term in self._terms()
        }
        self.joins = {term.name: _view_joined(term) for term in self._terms()}
        self.part_names = [part for term in self._terms() for part in term.weights]
        # If no loss shows x to the student, it is not shown for the accuracy either: its batch
        # norms would see it. mAP, for several labels, is not a sum over batches.
        self.counts = "x" in self.views and labelled and label_kind != "multi"
        counted = ("correct",) if self.counts else ()
        self.metric_names = ("images", "loss", *self.part_names, *counted)

    def train(self, mode: bool = True) -> "DistillStep":
        """Training mode for everything except the frozen part of the student."""
        super().train(mode)
        keep_frozen_still(self.student.model)
        return self

    def _terms(self) -> Iterable[LossTerm]:
        return (term for term in self.terms if isinstance(term, LossTerm))

    def forward(
        self,
        views: Mapping[str, Tensor],
        labels_N: Tensor,
        index_N: Tensor,
        targets: Mapping[str, Tensor],
        schedule: Mapping[str, Mapping[str, Tensor]],
        rows_of_ranks: Mapping[str, tuple[int, ...]] | None = None,
    ) -> StepOutput:
        """Arguments as in `Prepared`; schedule: values by term and name."""
        tensors: dict[str, Tensor] = dict(targets)
        with self.precision.autocast():
            for view, keys in self.student_keys.items():
                features = self.student(views[view].to(self.image_dtype))
                tensors.update({keys[tap]: features[tap] for tap in keys if tap in features})

        if self.label_kind == "pixel":
            size = (labels_N.shape[1], labels_N.shape[2])
            tensors |= {key: logits_at(tensors[key], size) for key in self.dense if key in tensors}

        total = torch.zeros((), device=labels_N.device)
        values: dict[str, Tensor] = {}
        carry: dict[str, dict[str, Tensor]] = {}
        logits_NC = tensors[next(iter(self.student_keys.values()))["logits"]]
        answer_NC = tensors.get(_ANSWER)
        for term in self._terms():
            rows = rows_of_ranks.get(self.joins[term.name], ()) if rows_of_ranks else ()
            if any(need not in tensors for need in self.taps_of[term.name]):
                refuse_skips(term, len(rows))
                values |= dict.fromkeys(term.weights, total.new_zeros(()))
                continue
            wanted = {need: tensors[need] for need in self.term_keys[term.name]}
            scheduled = schedule.get(term.name, {})
            output = term(TermInputs(wanted, labels_N, index_N, scheduled, rows))
            for part, weight in term.weights.items():
                total = total + weight * output.parts[part]
                values[part] = output.parts[part]
            if output.logits_NC is not None and answer_NC is not None:
                answer_NC = output.logits_NC
            if output.carry:
                carry[term.name] = {key: value.detach() for key, value in output.carry.items()}

        if not self.trains_head or not total.requires_grad:
            # DDP waits for a gradient of every parameter; a head without a loss gets zero.
            total = total + 0.0 * logits_NC.float().sum()
        images = labels_N.shape[0]
        means = [total, *(values[part] for part in self.part_names)]
        counts = torch.full((), float(images), device=labels_N.device)
        metrics = [counts, *(m.detach().float() * images for m in means)]
        if self.counts and answer_NC is not None:
            metrics.append(self._right(answer_NC.detach(), labels_N))
        return StepOutput(total, torch.stack(metrics), carry)

    def _right(self, logits_NC: Tensor, labels_N: Tensor) -> Tensor:
        """How many images are classified right, 0-dim fp32; each counts with its share of right
        pixels where these are labelled."""
        classes_N = labels_N.argmax(1) if labels_N.is_floating_point() else labels_N
        right = (logits_NC.argmax(1) == classes_N).sum()
        if self.label_kind == "pixel":
            return right * (len(labels_N) / (labels_N != NO_LABEL).sum().clamp_min(1))
        return right.float()
