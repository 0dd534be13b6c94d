"""Looks at what the networks answer before anything is trained: gradients, skipped taps, softmax.

Called by `build_trainer` after `fastkd.training.matching`, for networks from outside the zoo.
Student and random state are afterwards as they were.
"""

from collections.abc import Iterable, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd.compute.precision import Precision
from fastkd.data.loaders.label_rules import are_distributions
from fastkd.errors import UserError
from fastkd.losses.base.needs import MEAN_LOGITS, Need
from fastkd.losses.base.pairs import PairTerm
from fastkd.losses.base.term import LossTerm
from fastkd.models.head import keep_frozen_still
from fastkd.models.intake import image_dtype, restored_after, to_evaluation
from fastkd.models.taps import Tapped, ZooNetwork
from fastkd.teachers.ensemble import Ensemble
from fastkd.teachers.teacher import Teacher

__all__ = ["TrainingPass", "look_at_training", "notes_on"]

PASSES = 20
"""Passes in training mode until every tap has been seen; the first is enough unless taps skip."""


class TrainingPass(NamedTuple):
    """What the student does in training mode that evaluation does not show."""

    skipped: tuple[str, ...] = ()
    """Taps that did not run in one of the passes."""
    may_idle: bool = False
    """Whether some of its layers may get no gradient in a step: not known of other people's
    networks. False with reentrant checkpoints, which DDP's search for such layers would break."""


def look_at_training(
    student: nn.Module, taught: Set[Need], probe: Tensor, precision: Precision, *, ranks: int = 1
) -> TrainingPass:
    """Passes of the student in training mode; none for its logits alone on one rank.

    taught: the needs of the student that carry a gradient in evaluation mode.

    Raises:
        UserError: one carries none in training, or its module never runs in training; or evaluation
            uses a head that training leaves out.
    """
    if any(getattr(module, "distilled_training", False) for module in student.modules()):
        raise UserError(
            "the student returns two heads in training (distilled_training=True of timm), of which "
            "the losses see the first, and evaluation takes the mean of both: call "
            "student.set_distilled_training(False), which trains that mean"
        )
    learning = {need.tap for need in taught if need.net == "student"}
    taps = ("logits", *sorted(learning - {"logits"}))
    if isinstance(student, ZooNetwork) or (ranks == 1 and len(taps) == 1):
        return TrainingPass()
    images_NCHW = probe.to(image_dtype(student, precision))
    tapped = Tapped(student, taps, may_skip=True)
    seen: dict[str, Tensor] = {}
    skipped: set[str] = set()
    try:
        with restored_after(student), torch.enable_grad(), precision.autocast():
            student.train()
            keep_frozen_still(student)
            for _ in range(PASSES):
                features = tapped(images_NCHW)
                skipped |= set(taps) - set(features)
                seen |= features
                if len(seen) == len(taps):
                    break
    finally:
        tapped.remove()
    for tap in taps:
        if tap not in seen:
            raise UserError(
                f"tap {tap!r} of the student runs in evaluation, but not once in {PASSES} training "
                f"passes: a loss on it would train nothing; tap one that runs"
            )
        if tap in learning and not seen[tap].requires_grad:
            raise UserError(
                f"tap {tap!r} of the student carries no gradient in training mode, so a loss on it "
                f"would train nothing: it is computed under torch.no_grad(), is detached, or lies "
                f"in a reentrant checkpoint (use checkpoint(.., use_reentrant=False), or tap the "
                f"module around the checkpoint)"
            )
    return TrainingPass(
        tuple(tap for tap in taps if tap in skipped), may_idle=not _reentrant(seen.values())
    )


def _reentrant(tensors: Iterable[Tensor]) -> bool:
    """Whether a reentrant checkpoint is on the way back from these tensors."""
    known: set[Any] = set()
    waiting: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in known:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        known.add(node)
        waiting += [following for following, _ in node.next_functions if following is not None]
    return False


def notes_on(
    seen: TrainingPass,
    student: nn.Module,
    teacher: Teacher | Ensemble | None,
    terms: Sequence[LossTerm],
    probe: Tensor,
    precision: Precision,
) -> list[str]:
    """On taps that are skipped at random, and a teacher that ends in a sigmoid or log_softmax.

    Raises:
        UserError: student or teacher ends in a softmax, and a loss takes another of it.
    """
    # A loss on pairs of taps takes logits as features like any others.
    needs = [need for t in terms if not isinstance(t, PairTerm) for need in t.needs]
    read = {need.net for need in needs if need.tap in ("logits", MEAN_LOGITS)}
    if "student" in read and not isinstance(student, ZooNetwork):
        with restored_after(student), torch.no_grad(), precision.autocast():
            to_evaluation(student)
            shown_NCHW = probe.to(image_dtype(student, precision))
            _refuse_softmax("student", Tapped(student)(shown_NCHW)["logits"])
    notes = [
        f"tap {tap!r} of the student is skipped at random in training: a loss on it teaches "
        f"nothing in the steps that skip it"
        for tap in seen.skipped
    ]
    if "teacher" in read and teacher is not None:
        members = teacher.members.values() if isinstance(teacher, Ensemble) else [teacher]
        for member in members:
            if isinstance(member.model, ZooNetwork):
                continue
            logits_NC = member.logits(probe)
            _refuse_softmax("teacher", logits_NC)
            notes += _note(logits_NC)
    return notes


def _refuse_softmax(net: str, logits_NC: Tensor) -> None:
    if logits_NC.dim() < 2 or logits_NC.shape[1] < 2:
        return
    if bool(are_distributions(logits_NC).all()):
        raise UserError(
            f"the {net} returns probabilities (no value is below 0, and each row sums to 1), but "
            f"the losses apply softmax themselves: remove its last softmax, as in "
            f"nn.Sequential(*model[:-1]), or return the logarithm of the probabilities"
        )


def _note(logits_NC: Tensor) -> list[str]:
    if logits_NC.dim() < 2 or logits_NC.shape[1] < 2:
        return []
    if bool((logits_NC <= 0).all() & are_distributions(logits_NC.float().exp()).all()):
        return [
            "the teacher gives log-probabilities: their softmax is that of its logits, so KD is "
            "unchanged; a loss that compares the logits themselves sees them shifted"
        ]
    if bool(((logits_NC >= 0) & (logits_NC <= 1)).all()):
        return [
            "all answers of the teacher lie between 0 and 1, as after a sigmoid, and the losses "
            "take them for raw logits: remove a last sigmoid"
        ]
    return []
