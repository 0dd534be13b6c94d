"""What precision=auto comes to: fp32 where a network of the user's fails under autocast."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from fastkd.compute.collectives import first_of_ranks
from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision, resolve_precision
from fastkd.data.loaders.readable import Shown
from fastkd.models.card import title_of
from fastkd.models.intake import fails_under_autocast, wrong_in_bf16
from fastkd.output.console import Console
from fastkd.teachers.loaded import LoadedNet

__all__ = ["settle_precision"]


def settle_precision(
    student: nn.Module,
    teachers: Sequence[LoadedNet],
    shown: Shown,
    placement: Placement,
    console: Console,
) -> Placement:
    """The placement, in fp32 if a network fails under autocast on any rank, which is said."""
    here = _wants_fp32(student, teachers, shown, placement.precision)
    why = first_of_ranks(here, placement.world)
    if why is None:
        return placement
    console.note(f"precision=auto is fp32 here: under autocast {why}")
    return replace(placement, precision=resolve_precision("fp32", placement.device))


def _wants_fp32(
    student: nn.Module, teachers: Sequence[LoadedNet], shown: Shown, precision: Precision
) -> str | None:
    """Which network fails under autocast, and how; None if none does."""
    few_NCHW = shown.images_NCHW[:2]
    for called, model, shape in (
        ("the student", student, shown.image_shape),
        *(("the teacher", one.model, one.image_shape(shown.image_shape)) for one in teachers),
    ):
        images_NCHW = few_NCHW
        if shape != shown.image_shape:
            images_NCHW = few_NCHW.new_zeros(len(few_NCHW), *shape)
        if why := fails_under_autocast(model, images_NCHW, precision):
            return f"{called} {title_of(model)} fails ({why})"
    if layer := wrong_in_bf16(student, few_NCHW, precision):
        return f"torch gets the gradient of the student's {layer} wrong, which sees a map of 1x1"
    return None
