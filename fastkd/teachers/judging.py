"""What the frozen teachers of a call reach on the validation images, before anything is trained.

Flow: `fastkd.api` calls this with the teachers as the step will ask them. Recipes do it in
`fastkd.teachers.loading`, which may also have to train them.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastkd.compute.placement import Placement
from fastkd.data.facts import Facts
from fastkd.evaluation.chance import least_above_chance, share_of_guessing
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
        if shape != (facts.num_classes,):
            answers = "no logits" if shape is None else f"{shape} per image"
            say(
                f"teacher {label}: not evaluated, it gives {answers} and not "
                f"{facts.num_classes} classes"
            )
            continue
        found = evaluate(
            one.logits, val_loader, placement.precision, placement.world, facts.multilabel
        )
        metric = headline(found)
        joint[metric] = found[metric]
        say(f"teacher {label}: {HEADLINES[metric]} {found[metric]:.2%}")
        if placement.world.is_main and found[metric] < least_above_chance(found, facts.num_classes):
            chance = share_of_guessing(found, facts.num_classes)
            warnings.warn(
                f"the teacher {label} is not clearly better than chance ({chance:.2%}) on the "
                f"{found['samples']} validation images: {HEADLINES[metric]} {found[metric]:.2%}. "
                f"Are its weights loaded, are its classes in the order of the loader's, are the "
                f"images normalised as it expects them?",
                stacklevel=5,  # the caller of distill
            )
    return joint | {"members": each} if members else joint


def _answer(
    teacher: Teacher | Ensemble, facts: Facts, placement: Placement
) -> tuple[int, ...] | None:
    """The shape of its logits without the batch; None if it has none, as an encoder."""
    probe = torch.zeros(2, *facts.image_shape, device=placement.device)
    logits = teacher.features(probe).get("logits")
    return None if logits is None else tuple(logits.shape[1:])
