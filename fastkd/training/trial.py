"""One step on a few images of noise before anything is trained: what fails, fails here.

`build_trainer` calls `try_step` with the step that it made, not yet compiled; nothing of the step
changes. Some mistakes show only in a step in training mode with a micro-batch as small as the run
will have: batch norm on a single value, an auxiliary head that wants larger images, what a kernel
refuses. `errors_as_sentences` is for the rest, which no trial can foresee.
"""

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastkd.augment.pick import Pick
from fastkd.compute.ranks import World
from fastkd.data.facts import Facts
from fastkd.errors import FastKDError, UserError
from fastkd.losses.base.schedules import scheduled_values
from fastkd.losses.base.term import LossTerm
from fastkd.models.card import title_of
from fastkd.models.intake import refusal, restored_after
from fastkd.printable import first_line
from fastkd.teachers.cache.cached import Answering
from fastkd.teachers.ensemble import Ensemble
from fastkd.teachers.teacher import Teacher, usable
from fastkd.training.settings import Remedies
from fastkd.training.step import DistillStep

__all__ = ["Trial", "errors_as_sentences", "try_step"]

_ONE_VALUE = re.compile(r"Expected more than 1 (value|spatial element)[^\n]*")


class Rows(NamedTuple):
    """Images by view."""

    x: int
    xprime: int


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a step is tried with."""

    teacher: Answering | None
    facts: Facts
    probe: Callable[[int], Tensor]
    """That many images of noise, as the views come."""
    batch_rows: tuple[int, ...]
    """As of the loader."""
    accumulate: int
    pick: Pick | None
    pool: int
    world: World
    remedies: Remedies
    mixed: bool
    """Whether labels of classes come as rows of probabilities."""

    def micro_rows(self) -> list[Rows]:
        """Images of x and x' in the smallest micro-batch of each kind of batch; two if unknown."""
        found = []
        for rows in self.batch_rows:
            chosen = rows if self.pick is None else max(1, self.pick.num_chosen(rows * self.pool))
            parts = min(self.accumulate, rows, chosen)
            found.append(Rows(rows // parts, chosen // parts))
        return found or [Rows(2, 2)]


def try_step(step: DistillStep, trial: Trial) -> None:
    """Run the step forward on noise; UserError if it fails, with what to change."""
    terms = [term for term in step.terms if isinstance(term, LossTerm)]
    banks = [f"terms.{number}.{bank}" for number, term in enumerate(terms) for bank in term.banks]
    micro = trial.micro_rows()
    with restored_after(step, but=banks):
        step.train()
        error = _failure(step, terms, trial, Rows(2, 2))
        if error is not None and max(micro) > (2, 2):
            # A loss of the user's own may need more images than two.
            error = _failure(step, terms, trial, max(micro))
        if error is not None:
            raise _sentence(step, trial, error) from error
        least = min(micro, key=min)
        error = _failure(step, terms, trial, least) if min(least) == 1 else None
    if error is not None:
        raise _of_one_image(step, trial, micro, error) from error


def _failure(
    step: DistillStep, terms: list[LossTerm], trial: Trial, rows: Rows
) -> Exception | None:
    """What a forward pass on so many images raises; a UserError passes."""
    try:
        _forward(step, terms, trial, rows)
    except FastKDError:
        raise
    except Exception as error:
        # Foreign code can fail in any way.
        return error
    return None


def _forward(step: DistillStep, terms: list[LossTerm], trial: Trial, rows: Rows) -> None:
    device, facts, world = trial.world.device, trial.facts, trial.world
    sizes = rows._asdict()
    images_NCHW = trial.probe(max(rows))
    taps = trial.teacher.taps if trial.teacher else {}
    views = {view: images_NCHW[: sizes[view]] for view in {**step.views, **taps}}
    targets: dict[str, Tensor] = {}
    for need in {need: None for term in terms for need in term.needs}:
        if need.net == "mixed":
            targets[str(need)] = torch.full(
                (sizes[need.view], facts.num_classes), 0.5, device=device
            )
    if trial.teacher:
        for view, wanted in taps.items():
            features = trial.teacher.features(views[view])
            known = [tap for tap in wanted if tap in features]
            targets |= {f"{view}/teacher/{tap}": usable(features[tap]) for tap in known}
    index_N = torch.zeros(rows.x, dtype=torch.int64, device=device)
    labels_N = index_N
    if facts.label_size is not None:
        labels_N = torch.zeros(rows.x, *facts.label_size, dtype=torch.int64, device=device)
    elif facts.label_kind == "multi" or trial.mixed:
        labels_N = torch.zeros(rows.x, facts.num_classes, device=device)
    schedules = scheduled_values(terms, 0.0, device)
    rows_of_ranks = {view: (len(images),) * world.size for view, images in views.items()}
    with torch.enable_grad():
        step(views, labels_N, index_N, targets, schedules, rows_of_ranks)


def _sentence(step: DistillStep, trial: Trial, error: Exception) -> UserError:
    owner = _owner(error)
    if isinstance(owner, LossTerm):
        return UserError(f"the loss {owner.name}: {first_line(error)}")
    student = step.student.model
    if isinstance(owner, Teacher | Ensemble):
        return UserError(f"the teacher fails on two images: {first_line(error)}")
    return refusal(
        error,
        title=f"{trial.remedies.called} {title_of(student)}, in training,",
        model=student,
        run=step.student,
        images_NCHW=trial.probe(2).to(step.image_dtype),
        precision=step.precision,
        remedy=trial.remedies.student,
        trained=True,
    )


def _of_one_image(
    step: DistillStep, trial: Trial, micro: list[Rows], error: Exception
) -> UserError:
    owner = _owner(error)
    who = f"{trial.remedies.called} {title_of(step.student.model)}"
    if isinstance(owner, LossTerm):
        who = f"the loss {owner.name}"
    elif isinstance(owner, Teacher | Ensemble):
        who = "the teacher"
    every = min(micro[0]) == 1
    which = "every batch" if every else "the last batch of an epoch"
    if trial.accumulate > 1:
        which = f"with accumulate={trial.accumulate} a micro-batch of {which}"
    where = " on a process" if trial.world.size > 1 else ""
    cure = trial.remedies.every_batch if every else trial.remedies.last_batch
    if min(micro, key=min).x > 1:
        which, cure, every = f"x' of {which}", "let the pick choose more images", True
    if every and trial.accumulate > 1:
        cure += ", or a smaller accumulate"
    return UserError(
        f"{which} has one image only{where}, and {who} cannot be trained on one "
        f"({first_line(error)}): {cure}"
    )


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """What torch says of a batch of one image, and kernels of their arguments, as a UserError."""
    try:
        yield
    except FastKDError:
        raise
    except Exception as error:
        found = _ONE_VALUE.search(str(error))
        if found:
            raise UserError(
                f"a batch of one image cannot be trained on ({found[0]}): leave out the last, "
                f"smaller batch (data.drop_last=true in a recipe, drop_last=True of a DataLoader), "
                f"or choose another batch size"
            ) from error
        if not isinstance(error, ValueError) or not _from_kernels(error):
            raise
        owner = _owner(error)
        which = f"the loss {owner.name}: " if isinstance(owner, LossTerm) else ""
        raise UserError(f"{which}{error}") from error


def _owner(error: Exception) -> nn.Module | Teacher | Ensemble | None:
    """The loss or teacher in whose call an error arose; the innermost."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        owner = frame.f_locals.get("self")
        if isinstance(owner, LossTerm | Teacher | Ensemble):
            return owner
    return None


def _from_kernels(error: Exception) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("fastkd.kernels")
