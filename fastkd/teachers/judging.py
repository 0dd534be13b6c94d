"""What the frozen teachers of a call reach on the validation images, before anything is trained.

Flow: `fastkd.api` calls this with the teachers as the step will ask them. Recipes do it in
`fastkd.teachers.loading`, which may also have to train them.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd.compute.collectives import all_reduce_sum
from fastkd.compute.placement import Placement
from fastkd.compute.ranks import World
from fastkd.data.batch import Batch
from fastkd.data.facts import Facts
from fastkd.evaluation.chance import chance_of, class_counts
from fastkd.evaluation.confusion import reached
from fastkd.evaluation.evaluate import EvalLoader, evaluate
from fastkd.evaluation.headline import HEADLINES, headline
from fastkd.teachers.ensemble import Ensemble
from fastkd.teachers.teacher import Teacher

__all__ = ["judge"]


def judge(
    teacher: Teacher | Ensemble,
    name: str,
    val_loader: EvalLoader,
    facts: Facts,
    placement: Placement,
    *,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Name and headline metric of a teacher; of several also each one's, in `members`.

    say: shows a sentence to the user. A teacher that is no better than chance is a warning, which
    also reaches those who want no output.
    """
    members: Mapping[str, Teacher] = teacher.members if isinstance(teacher, Ensemble) else {}
    each = list[dict[str, Any]]()
    joint: dict[str, Any] = {}
    asked = {**members, f"{name}, together" if members else name: teacher}
    for label, one in asked.items():
        joint = {"name": label}
        if isinstance(one, Teacher):
            each.append(joint)
        shape = _answer(one, facts, placement)
        dense = facts.label_kind == "pixel"
        if shape is None or shape[:1] != (facts.num_classes,) or len(shape) != (3 if dense else 1):
            answers = "no logits" if shape is None else f"{shape} per image"
            say(
                f"teacher {label}: not evaluated, it gives {answers} and not "
                f"{facts.num_classes} classes"
            )
            continue
        watched = _Counted(val_loader, torch.zeros(facts.num_classes, dtype=torch.int64))
        found = evaluate(
            one.logits, watched, placement.precision, placement.world, facts.label_kind
        )
        chance = chance_of(watched.over_ranks(placement.world), found)
        metric = headline(found)
        joint |= reached(found, facts.classes)
        say(f"teacher {label}: {HEADLINES[metric]} {found[metric]:.2%}")
        if placement.world.is_main and not chance.beaten_by(found[metric]):
            warnings.warn(
                f"the teacher {label} is not clearly better than chance ({chance.accuracy:.2%}) on "
                f"the {found['samples']} validation images: {HEADLINES[metric]} "
                f"{found[metric]:.2%}. Are its weights loaded, are its classes in the order of the "
                f"loader's, are the images normalised as it expects them?",
                stacklevel=5,  # the caller of distill
            )
    return joint | {"members": each} if members else joint


@dataclass
class _Counted:
    """The validation images, whose labels are counted as they come: they may be read only once."""

    loader: EvalLoader
    counts_C: Tensor

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        for batch in self.loader.epoch(epoch, start_step):
            self.counts_C += class_counts(batch.labels_N, len(self.counts_C))
            yield batch

    def over_ranks(self, world: World) -> Tensor:
        """Images of each class on all ranks, all of which must call this."""
        if world.size > 1:
            counts_C = self.counts_C.to(world.device)
            all_reduce_sum(counts_C)
            return counts_C.cpu()
        return self.counts_C


def _answer(
    teacher: Teacher | Ensemble, facts: Facts, placement: Placement
) -> tuple[int, ...] | None:
    """The shape of its logits without the batch; None if it has none, as an encoder."""
    probe = torch.zeros(2, *facts.image_shape, device=placement.device)
    logits = teacher.features(probe).get("logits")
    return None if logits is None else tuple(logits.shape[1:])
