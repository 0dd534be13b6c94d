"""How a training computes: device, memory layout, type, and what is compiled.

Flow: `fastkd.training.build` makes an `Engine` first, and asks it to compile what it builds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastkd.compute.compiling import (
    CompileChoice,
    CompileReason,
    compile_unit,
    compiler_works,
    drop_unusable_cache_folder,
    worth_compiling,
)
from fastkd.compute.placement import Placement
from fastkd.data.facts import Facts
from fastkd.errors import UserError
from fastkd.losses.base.term import LossTerm
from fastkd.models.counting.count import cost
from fastkd.models.head import has_frozen_backbone
from fastkd.output.console import Console
from fastkd.teachers.teaching import Teaching
from fastkd.training.progress import Plan
from fastkd.training.settings import TrainData, TrainingSettings
from fastkd.training.step import needed_taps

__all__ = ["Engine", "decide_compile", "engine_for", "placed"]

T = TypeVar("T", bound=nn.Module)


def decide_compile(
    mode: CompileChoice,
    *,
    student: nn.Module,
    teacher_macs: Sequence[float | None],
    terms: Sequence[LossTerm],
    image_shape: tuple[int, int, int],
    images: int,
    device_type: str,
) -> bool:
    """Whether to compile; `auto` from the recipe and the kind of device alone (nothing is timed).

    teacher_macs: of each teacher per image; None: not known. images: training images over the whole
    run. Where a network cannot be counted, `auto` is eager.
    """
    macs = 0.0
    if mode == "auto":
        of_student = cost(student, image_shape)
        if of_student is None or None in teacher_macs:
            return False
        # There is no backward pass through a frozen backbone.
        passes = 1.0 if has_frozen_backbone(student) else 3.0
        macs += passes * of_student.macs * len(needed_taps(terms, "student"))
        views = len(needed_taps(terms, "teacher"))
        macs += sum(one for one in teacher_macs if one) * views
    return worth_compiling(mode, macs_per_image=macs, images=images, device_type=device_type)


@dataclass(frozen=True)
class Engine:
    """How a run computes, with all choices made."""

    placement: Placement
    layout: torch.memory_format
    """Memory layout of the student, and therefore of all images and teachers."""
    compiled: bool
    fullgraph: bool
    reason: CompileReason
    """Who wants what is compiled to be compiled."""

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        return self.placement.device

    def compile(self, unit: T, *, cuda_graphs: bool = False) -> T:
        """The unit, compiled or unchanged."""
        return compile_unit(
            unit, enabled=self.compiled, fullgraph=self.fullgraph, cuda_graphs=cuda_graphs
        )

    def probe(self, facts: Facts, rows: int) -> Tensor:
        """Images of noise, the same in every call."""
        noise = torch.Generator().manual_seed(0)
        images_NCHW = torch.randn(rows, *facts.image_shape, generator=noise)
        return images_NCHW.to(self.device, self.placement.dtype, memory_format=self.layout)

    def decisions(self) -> dict[str, str]:
        """What a resumed run must repeat to give the same bits."""
        compile = "on" if self.compiled else "off"
        return {"precision": self.placement.precision.name, "compile": compile}


def engine_for(
    plan: Plan,
    student: nn.Module,
    teaching: Teaching,
    terms: Sequence[LossTerm],
    data: TrainData,
    settings: TrainingSettings,
    placement: Placement,
    console: Console,
) -> Engine:
    """All choices made; the console is told where the compiler does not work."""
    compiled = decide_compile(
        settings.compile,
        student=student,
        teacher_macs=teaching.macs(data.facts.image_shape),
        terms=terms,
        image_shape=data.facts.image_shape,
        images=data.images * plan.epochs,
        device_type=placement.device.type,
    )
    drop_unusable_cache_folder()
    reason = "auto" if settings.compile == "auto" else settings.compile_reason
    if compiled:
        compiled = compiler_works(placement.world, reason, console.note)
    elif teaching.compiled:
        reason = "key"
        compiler_works(placement.world, reason, console.note, key="teacher.compile")
    return Engine(placement, placement.layout(student), compiled, settings.fullgraph, reason)


def placed(student: nn.Module, settings: TrainingSettings, engine: Engine) -> nn.Module:
    """The student on its device, in its layout, with synchronised batch norm if requested."""
    if settings.sync_bn and engine.device.type == "cpu":
        raise UserError("sync_bn=true needs GPUs: torch synchronises batch norm over NCCL only")
    if settings.sync_bn and engine.placement.world.size > 1:
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    student.to(device=engine.device, memory_format=engine.layout)  # type: ignore[call-overload]
    return student
