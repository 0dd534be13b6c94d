"""Checks that student, teachers, losses and data fit together; a UserError says what does not.

Called by `build_trainer` before anything is trained; `fastkd.training.answers` looks at the values.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.compute.precision import Precision
from fastkd.data.batch import LabelKind
from fastkd.data.facts import Facts
from fastkd.errors import UserError
from fastkd.evaluation.evaluate import evaluating
from fastkd.losses.base.needs import LOGITS, MEAN_LOGITS, MIXED_LOGITS, Need
from fastkd.losses.base.pairs import PairTerm
from fastkd.losses.base.term import LossTerm
from fastkd.models.card import title_of
from fastkd.models.intake import image_dtype, noting_wrong_gradients, refusal
from fastkd.models.taps import Tapped, ZooNetwork, check_taps, logits_of
from fastkd.teachers.cache.cached import Answering
from fastkd.training.settings import Remedies
from fastkd.training.step import needed_taps

__all__ = [
    "check_augmentation",
    "check_classes",
    "check_exports",
    "check_form",
    "check_labels",
    "refuse_unknown_taps",
    "shape_of_logits",
    "shapes_of_needs",
]


def check_exports(terms: Sequence[LossTerm], *, averaged: bool) -> str | None:
    """A note on a loss that gives the student another classifier; UserError with an average."""
    changed = next((t.name for t in terms if type(t).export is not LossTerm.export), None)
    if changed is None:
        return None
    if averaged:
        raise UserError(
            f"ema averages the student, but the loss {changed} appends layers of its own, which "
            "would not be averaged: set ema=null"
        )
    logits = [
        term.name
        for term in terms
        if any((need.net, need.tap) == ("student", "logits") for need in term.needs)
    ]
    if not logits:
        return None
    return (
        f"the loss {changed} gives the student another classifier at the end: its own one, "
        f"which {', '.join(logits)} trains, is not kept (losses.{logits[0]}=null removes that loss)"
    )


def refuse_unknown_taps(terms: Iterable[LossTerm], nets: Mapping[str, nn.Module]) -> None:
    """UserError if a loss uses a tap that its network lacks, often a default one."""
    for term in terms:
        teacher = nets.get("teacher")
        if term.uses_stages and teacher is not None and not isinstance(teacher, ZooNetwork):
            raise UserError(
                f"losses.{term.name} sends the student's features through the teacher's stages, "
                f"which only networks of the zoo expose, and {type(teacher).__name__} is not one: "
                f"use one as teacher, or another loss"
            )
        for need in term.needs:
            if need.net not in nets or need.tap == MEAN_LOGITS:
                continue
            try:
                check_taps((need.tap,), nets[need.net])
            except UserError as error:
                cure = _where_taps_are_named(term, need.net)
                raise UserError(f"the loss {term.name}, of the {need.net}: {error}{cure}") from None


def _where_taps_are_named(term: LossTerm, net: str) -> str:
    """The argument that names the loss's taps of a net, as the end of a sentence."""
    given, cure = signature(type(term)).parameters, ""
    for key in ("pairs", "stages", net):
        if key in given:
            cure = f". Name another by {type(term).__name__}({key}=..), in a recipe "
            cure += f"losses.{term.name}.{key}"
    return cure


def shapes_of_needs(
    student: nn.Module,
    teacher: Answering | None,
    terms: Sequence[LossTerm],
    probe: Tensor,
    precision: Precision,
    remedies: Remedies,
) -> tuple[dict[Need, tuple[int, ...]], frozenset[Need]]:
    """Shape of every need without the batch axis, from one forward pass on a few images; and the
    needs through which the student learns.

    UserError for a network that fails on them, for a term that would teach the student nothing, and
    for a tap without one row per image.
    """
    found: dict[Need, Tensor] = {}
    wanted = needed_taps(terms, "student")
    tapped = Tapped(student, tuple(dict.fromkeys(tap for taps in wanted.values() for tap in taps)))
    features = _shown(student, tapped, probe, precision, remedies)
    tapped.remove()
    for view, taps in wanted.items():
        found |= {Need.of(view, "student", tap): features[tap] for tap in taps}
    for term in terms:
        own = [need for need in term.needs if need.net == "student"]
        if own and not any(found[need].requires_grad for need in own):
            raise UserError(
                f"the loss {term.name} uses {', '.join(own)} of the student, which carries "
                f"no gradient (frozen layers, no_grad or detach before it): it would train "
                f"nothing. Remove it, or let those layers train (requires_grad_)"
            )
    if teacher is not None:
        # Not through its compiled form, which would need an extra compilation for this batch size.
        features = teacher.tried(probe)
        for view, taps in teacher.taps.items():
            known = [tap for tap in taps if tap in features]
            found |= {Need.of(view, "teacher", tap): features[tap] for tap in known}
    for term in terms:
        for need in term.needs:
            if need in found:
                _check_rows(term, need, found[need], len(probe))
    shapes = {need: tuple(tensor.shape[1:]) for need, tensor in found.items()}
    return shapes, frozenset(need for need, tensor in found.items() if tensor.requires_grad)


def _check_rows(term: LossTerm, need: Need, tensor: Tensor, images: int) -> None:
    """UserError for anything but numbers, one row of them per image."""
    if tensor.dim() and len(tensor) == images and tensor.is_floating_point():
        return
    raise UserError(
        f"the loss {term.name} uses {need}, which is {list(tensor.shape)} of {tensor.dtype} for "
        f"{images} images: it needs one row per image, first, of floating-point numbers. Windows "
        f"and sequences whose first axis is the position have none: name a module around them"
        f"{_where_taps_are_named(term, need.net)}"
    )


def _answer(
    student: nn.Module,
    run: Callable[[Tensor], Any],
    images_NCHW: Tensor,
    precision: Precision,
    remedies: Remedies,
) -> Any:
    """What `run` makes of images; UserError if the student fails on them, with what to change."""
    try:
        with precision.autocast():
            return run(images_NCHW)
    except UserError:
        raise
    except Exception as error:
        # Foreign code can fail in any way.
        raise refusal(
            error,
            title=f"{remedies.called} {title_of(student)}",
            model=student,
            run=run,
            images_NCHW=images_NCHW,
            precision=precision,
            remedy=remedies.student,
            trained=True,
        ) from error


def _shown(
    student: nn.Module, tapped: Tapped, probe: Tensor, precision: Precision, remedies: Remedies
) -> dict[str, Tensor]:
    images_NCHW = probe.to(image_dtype(student, precision))
    with (
        torch.enable_grad(),
        evaluating(student),
        noting_wrong_gradients(student, precision) as wrong,
    ):
        features = _answer(student, tapped, images_NCHW, precision, remedies)
    if wrong:
        height, width = probe.shape[2:]
        raise UserError(
            f"{remedies.called} {title_of(student)}: at {height}x{width} pixels its layer "
            f"{wrong[0]} sees a map of 1x1, whose gradient torch computes wrong in bf16 on a CPU: "
            f"{remedies.student.precision}, or give it larger images"
        )
    return features


def check_classes(
    terms: Iterable[LossTerm], shapes: Mapping[Need, tuple[int, ...]], facts: Facts, cure: str
) -> None:
    """UserError if there is nothing to tell apart, or a net's classes differ from the data's, where
    a loss reads them as classes.

    cure: what to do about one class only.

    A loss on pairs of taps takes logits as features like any others and checks the shapes itself.
    """
    num_classes = facts.num_classes
    if num_classes == 1 and facts.label_kind != "multi":
        raise UserError(
            f"there is one class only, so every answer is right and nothing can be learned: {cure}"
        )
    for term in terms if num_classes == 1 else ():
        logits = {need.net for need in term.needs if need.tap in LOGITS}
        if logits == {"student", "teacher"} and not isinstance(term, PairTerm):
            raise UserError(
                f"the loss {term.name} compares the probabilities of classes, and the networks "
                f"give one logit, whose softmax is always 1: leave it out, or give two logits"
            )
    # The student's are evaluated, whatever the losses read.
    read = {need for term in terms if not isinstance(term, PairTerm) for need in term.needs}
    read |= {need for need in shapes if need.net == "student"}
    for need, shape in shapes.items():
        named = need in read and need.tap in LOGITS
        if named:
            check_form(need.net, shape, facts.label_kind, facts.image_shape[1:])
        if named and shape[:1] != (num_classes,):
            net = need.net
            cure = (
                "give another teacher, or in a recipe teacher.class_map, one entry per class"
                if net == "teacher"
                else "build the student with the class count of the data"
            )
            raise UserError(
                f"the {net} gives logits of shape {shape} per image but the data has "
                f"{num_classes} classes: {cure}"
            )


def check_form(net: str, shape: Sequence[int], kind: LabelKind, image_size: Sequence[int]) -> None:
    """UserError for an answer per image where pixels are labelled, or the other way round, and for
    classes that come last.

    shape: of the logits of one image. net: whose they are. image_size: [H, W] of the images.
    """
    if len(shape) == 3 and _fits(shape[:2], image_size) and not _fits(shape[1:], image_size):
        raise UserError(
            f"the {net} gives logits of shape {tuple(shape)} per image, for images of "
            f"{image_size[0]}x{image_size[1]} pixels, so that the classes come last: let it return "
            f"logits.permute(0, 3, 1, 2), [N, classes, H, W]"
        )
    if kind == "pixel" and len(shape) != 3:
        raise UserError(
            f"the {net} gives logits of shape {tuple(shape)} per image, and the data labels "
            f"pixels: give a network for segmentation, whose logits are [N, classes, H, W]"
        )
    if kind != "pixel" and len(shape) == 3:
        raise UserError(
            f"the {net} gives logits of shape {tuple(shape)} per image, one answer per pixel, "
            f"and the data labels whole images: give a classifier, or label maps [N, H, W]"
        )


def _fits(size: Sequence[int], image_size: Sequence[int]) -> bool:
    """Whether a map has the size of the images, or a whole fraction of it."""
    factor = image_size[0] // max(size[0], 1)
    return [side * factor for side in size] == list(image_size)


def shape_of_logits(
    student: nn.Module, images_NCHW: Tensor, precision: Precision, remedies: Remedies
) -> tuple[int, ...]:
    """[C] of a classifier, [C, H, W] of a network that labels pixels."""
    # Two, as in the trial of the step: one is not a batch to every network.
    images_NCHW = images_NCHW[:2].to(image_dtype(student, precision))
    with torch.no_grad(), evaluating(student):
        answer = _answer(student, student, images_NCHW, precision, remedies)
        logits = logits_of(answer)
    if logits.ndim not in (2, 4):
        raise UserError(
            f"the student must return logits [N, classes], or [N, classes, H, W] for segmentation, "
            f"got {list(logits.shape)} for {len(images_NCHW)} images"
        )
    return tuple(logits.shape[1:])


def check_augmentation(kind: LabelKind, *, mixed: bool, picked: bool) -> None:
    """UserError for labels that do not go with a mixed x, or an x' that is picked from a pool.

    That the losses take the labels of a mixed x, the recipe has checked.
    """
    if mixed and kind == "multi":
        raise UserError(
            "augment.mixup and augment.cutmix mix the classes of images that have one each, and "
            "these have several: leave them out"
        )
    if mixed and kind == "pixel":
        raise UserError(
            "augment.mixup and augment.cutmix mix the classes of whole images, and these have one "
            "for every pixel: leave them out"
        )
    if picked and kind == "pixel":
        raise UserError(
            "the pick chooses images by one answer for each, and these have one for every pixel: "
            "leave it out"
        )


def check_labels(terms: Sequence[LossTerm], kind: LabelKind) -> None:
    """UserError for a loss that reads labels of another form.

    A multi-hot row could pass as class probabilities and silently train nonsense.
    """
    for term in terms:
        takes = term.label_kind in (None, kind)
        takes |= kind == "class" and term.takes_classes
        takes |= kind == "pixel" and term.takes_pixels
        if kind == "pixel" and MIXED_LOGITS in term.needs:
            raise UserError(
                f"the loss {term.name} mixes the teacher's answers to whole images "
                f"(xprime_target=mixed_logits), and the data has one class id per pixel: set "
                f"xprime_target=teacher"
            )
        if not takes:
            cures: dict[LabelKind, str] = {
                "multi": "use BinaryCrossEntropy (losses.bce), and KD with ce_weight=0",
                "class": "use CrossEntropy (losses.ce), or give labels as floating 0 and 1",
                "pixel": "use CrossEntropy (losses.ce), KD or CWD",
            }
            wants: dict[LabelKind, str] = {
                "class": "one class id per image, [N]",
                "multi": "labels [N, classes]",
                "pixel": "one class id per pixel, [N, H, W]",
            }
            raise UserError(
                f"the loss {term.name} needs {wants[term.label_kind or kind]}, the data has "
                f"{wants[kind]}: {cures[kind]}"
            )
