"""Builds a Trainer from networks, losses and loaders: the assembly between data and loop.

Used by `fastkd.runs.stages` (recipes) and `fastkd.api` (people with their own networks and
loaders).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastkd.augment.config import PickConfig
from fastkd.augment.pick import Pick
from fastkd.augment.views import ViewMaker
from fastkd.compute.compiling import (
    CompileChoice,
    CompileReason,
    compile_unit,
    compiler_works,
    drop_unusable_cache_folder,
    worth_compiling,
)
from fastkd.compute.placement import Placement
from fastkd.compute.wrapping import wrap_ddp
from fastkd.data.facts import Facts
from fastkd.errors import UserError
from fastkd.losses.base.needs import LOGITS, Need
from fastkd.losses.base.term import BindContext, LossTerm
from fastkd.models.card import card_of, sign
from fastkd.models.counting.count import cost
from fastkd.models.head import has_frozen_backbone
from fastkd.output.console import Console
from fastkd.teachers.cache.cached import Answering
from fastkd.teachers.cache.opening import AnswerCache, HeadParts
from fastkd.teachers.ensemble import Ensemble, bind_teacher, check_ensemble_needs
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.parts import copy_of_head, last_norm, taps_into_head
from fastkd.teachers.teacher import Teacher
from fastkd.teachers.teaching import Teaching
from fastkd.training.answers import look_at_training, notes_on
from fastkd.training.config import OptimConfig
from fastkd.training.ema import EMA
from fastkd.training.fallback import Fallback
from fastkd.training.guard import Guard
from fastkd.training.matching import (
    check_classes,
    check_exports,
    check_labels,
    refuse_unknown_taps,
    shapes_of_needs,
)
from fastkd.training.optim import build_optimizer, spare_norms
from fastkd.training.progress import Plan
from fastkd.training.recording import Recorded, StepClock, build_recorder
from fastkd.training.schedules import Schedule
from fastkd.training.settings import Output, TrainData, TrainingSettings
from fastkd.training.step import DistillStep, needed_taps
from fastkd.training.trainer import Trainer
from fastkd.training.trial import Trial, try_step
from fastkd.training.update import Update

__all__ = ["build_trainer", "decide_compile"]


T = TypeVar("T", bound=nn.Module)


def build_trainer(
    plan: Plan,
    *,
    student: nn.Module,
    teaching: Teaching,
    terms: Sequence[LossTerm],
    data: TrainData,
    settings: TrainingSettings,
    placement: Placement,
    output: Output,
) -> Trainer:
    """Connect everything; UserError if student, teachers and losses do not fit."""
    facts, world = data.facts, placement.world
    engine = _engine(plan, student, teaching, terms, data, settings, placement, output.console)
    if note := check_exports(terms, averaged=bool(settings.ema)):
        output.console.note(note)
    student = _placed(student, settings, engine)
    if (card := card_of(student)) and card.data:
        # What it knew before is not what it learns now.
        sign(student, replace(card, data=None, unlearned=()))
    # Copied before any hook is placed on the student.
    ema = EMA(student, settings.ema) if settings.ema else None

    remedies = data.remedies
    probe = engine.probe(facts, 2)
    bound = _bound_teacher(teaching.nets, student, terms, facts, engine)
    parts = _teacher_parts(teaching.nets, bound, facts, world.device)
    teacher: Answering | None = bound
    if teaching.cache and needed_taps(terms, "teacher"):
        teacher = _answered_from(teaching.cache, bound, parts, terms, probe, facts, engine)
        parts = parts or _kept_parts(teaching.cache, terms)
    shapes, taught = shapes_of_needs(student, teacher, terms, probe, placement.precision, remedies)
    smallest = _smallest(settings.sizes, facts, plan.epochs)
    for shown in smallest:
        # Networks that take no smaller images are refused; connectors keep the full shapes.
        images = engine.probe(shown, 2)
        shapes_of_needs(student, teacher, terms, images, placement.precision, remedies)
    shapes |= {need: (facts.num_classes,) for t in terms for need in t.needs if need.net == "mixed"}
    check_labels(
        terms, facts.label_kind, mixed=bool(settings.mixing), picked=settings.pick is not None
    )
    check_classes(terms, shapes, facts, remedies.one_class)
    if facts.label_size is not None:
        dense = {need: shape[0] for need, shape in shapes.items() if need.tap in LOGITS}
        shapes |= {need: (classes, *facts.label_size) for need, classes in dense.items()}
    _bind_terms(terms, shapes, facts, parts)

    step = DistillStep(
        student,
        terms,
        placement.precision,
        label_kind=facts.label_kind,
        labelled=facts.labelled,
    )
    step = step.to(world.device)
    views = _view_maker(plan, settings, step, facts, engine, joins=data.loader.is_planned)
    loader = views.opened(data.loader)
    pick = _picker(settings.pick, student, engine) if settings.pick else None
    for shown in (facts, *smallest):
        try_step(
            step,
            Trial(
                teacher=teacher,
                facts=shown,
                probe=partial(engine.probe, shown),
                batch_rows=loader.batch_rows,
                accumulate=plan.accumulate,
                pick=pick,
                pool=settings.pool,
                world=world,
                remedies=remedies,
                mixed=bool(settings.mixing),
            ),
        )
    seen = look_at_training(student, taught, probe, placement.precision, ranks=world.size)
    for note in notes_on(seen, student, bound, terms, probe, placement.precision):
        output.console.note(note)
    optimizer = _optimizer(student, terms, settings.optim, world.device)
    banks = [f"terms.{number}.{bank}" for number, term in enumerate(terms) for bank in term.banks]
    # Gradients of a first micro-batch would be in memory that the second one's graph reuses.
    cuda_graphs = world.device.type == "cuda" and plan.accumulate == 1
    runner = wrap_ddp(
        engine.compile(step, cuda_graphs=cuda_graphs),
        world,
        ignore_buffers=banks,
        may_idle=seen.may_idle,
    )
    guard = Guard(
        step,
        optimizer,
        max_skips=settings.max_skips,
        world_size=world.size,
        ignore_buffers=banks,
    )
    decisions = engine.decisions()
    recorder = build_recorder(
        output.record,
        Recorded(
            plan=plan,
            step=step,
            compiled=engine.compiled,
            teaching=teaching,
            facts=facts,
            views=views,
            pick=settings.pick,
            placement=placement,
            layout=engine.layout,
            steps=loader.steps_per_epoch,
        ),
    )
    update = Update(
        plan=plan,
        world=world,
        runner=runner,
        step=step,
        pick=None if pick is None else engine.compile(pick),
        pool=settings.pool,
        optimizer=optimizer,
        schedule=Schedule.from_config(
            settings.optim, epochs=plan.epochs, steps_per_epoch=loader.steps_per_epoch
        ),
        scaler=placement.precision.scaler(),
        clip_norm=settings.optim.clip_norm,
        guard=guard,
        ema=ema,
        fallback=Fallback(
            decisions,
            compiled=engine.compiled or teaching.compiled,
            reason=engine.reason,
            say=output.console.note,
        ),
        clock=recorder.clock if recorder else StepClock(world.device),
    )
    return Trainer(
        plan=plan,
        placement=placement,
        decisions=decisions,
        loader=loader,
        val_loader=data.val_loader,
        views=views,
        teacher=teacher,
        student=student,
        update=update,
        folder=output.folder,
        console=output.console,
        on_epoch=output.on_epoch,
        recorder=recorder,
    )


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
class _Engine:
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


def _engine(
    plan: Plan,
    student: nn.Module,
    teaching: Teaching,
    terms: Sequence[LossTerm],
    data: TrainData,
    settings: TrainingSettings,
    placement: Placement,
    console: Console,
) -> _Engine:
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
    return _Engine(placement, placement.layout(student), compiled, settings.fullgraph, reason)


def _placed(student: nn.Module, settings: TrainingSettings, engine: _Engine) -> nn.Module:
    """The student on its device, in its layout, with synchronised batch norm if requested."""
    if settings.sync_bn and engine.device.type == "cpu":
        raise UserError("sync_bn=true needs GPUs: torch synchronises batch norm over NCCL only")
    if settings.sync_bn and engine.placement.world.size > 1:
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    student.to(device=engine.device, memory_format=engine.layout)  # type: ignore[call-overload]
    return student


def _bound_teacher(
    teachers: tuple[LoadedNet, ...],
    student: nn.Module,
    terms: Sequence[LossTerm],
    facts: Facts,
    engine: _Engine,
) -> Teacher | Ensemble | None:
    """The teachers as one that answers on the views; None if no loss needs an answer."""
    check_ensemble_needs(teachers, terms)
    nets = {"student": student} | ({"teacher": teachers[0].model} if teachers else {})
    refuse_unknown_taps(terms, nets)
    if not teachers or not needed_taps(terms, "teacher"):
        return None
    return _bound(teachers, terms, facts, engine)


def _bound(
    teachers: Sequence[LoadedNet], terms: Sequence[LossTerm], facts: Facts, engine: _Engine
) -> Teacher | Ensemble:
    return bind_teacher(
        teachers,
        needed_taps(terms, "teacher"),
        engine.placement,
        data_normalization=facts.normalization,
        layout=engine.layout,
        compiled=engine.compiled,
        fullgraph=engine.fullgraph,
    )


def _answered_from(
    cache: AnswerCache,
    bound: Teacher | Ensemble | None,
    parts: Mapping[str, Any],
    terms: Sequence[LossTerm],
    probe: Tensor,
    facts: Facts,
    engine: _Engine,
) -> Answering:
    """The teacher that answers from a cache, which keeps its classifier where a loss takes it."""
    head: nn.Linear | None = parts.get("teacher_head")
    takes = any(term.uses_head for term in terms)
    return cache.around(
        bound,
        needed_taps(terms, "teacher"),
        probe,
        bind=lambda nets: _bound(nets, terms, facts, engine),
        parts=HeadParts(head, parts["teacher_pooled"]()) if head is not None and takes else None,
    )


def _kept_parts(cache: AnswerCache, terms: Sequence[LossTerm]) -> dict[str, Any]:
    """The parts of a teacher that a cache keeps, for `BindContext`."""
    head, pooled = cache.head(), cache.known.pooled
    if head is None or pooled is None:
        if takers := [term.name for term in terms if term.uses_head]:
            raise UserError(
                f"losses.{takers[0]} takes over the teacher's classifier, and the run that made "
                f"teacher.cache={cache.folder} did not: name another folder"
            )
        return {}
    return {"teacher_head": head, "teacher_pooled": lambda: pooled}


def _teacher_parts(
    teachers: tuple[LoadedNet, ...],
    bound: Teacher | Ensemble | None,
    facts: Facts,
    device: torch.device,
) -> dict[str, Any]:
    """The parts of a teacher that a loss may use, for `BindContext`.

    Only of a single teacher: several have no stages, head or norm in common.
    """
    if not isinstance(bound, Teacher):
        return {}
    # As it was loaded: the bound one may be folded and stored in the run's type.
    (loaded,) = teachers
    return {
        "teacher_stages": bound.stages if bound.has_stages else None,
        "teacher_head": copy_of_head(loaded.model, loaded.class_map, device),
        "teacher_norm": last_norm(loaded.model),
        "teacher_pooled": lambda: taps_into_head(loaded, facts.image_shape, device),
    }


def _bind_terms(
    terms: Sequence[LossTerm],
    shapes: Mapping[Need, tuple[int, ...]],
    facts: Facts,
    teacher_parts: Mapping[str, Any],
) -> None:
    """Make the losses create their connectors and memory banks."""
    for term in terms:
        term.bind(
            BindContext(
                num_samples=len(facts.labels_N),
                num_classes=facts.num_classes,
                train_labels_N=facts.labels_N,
                shapes={need: shapes[need] for need in term.needs},
                count_pixels=facts.count_pixels,
                **teacher_parts,
            )
        )


def _optimizer(
    student: nn.Module, terms: Sequence[LossTerm], config: OptimConfig, device: torch.device
) -> Optimizer:
    """The optimizer of the student and of the losses' own parameters."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in student.parameters() if p.requires_grad], "lr_scale": 1.0}
    ]
    groups += [group for term in terms for group in term.param_groups()]
    if not config.decay_norms:
        groups = spare_norms(groups, student)
    return build_optimizer(groups, config, device)


def _view_maker(
    plan: Plan,
    settings: TrainingSettings,
    step: DistillStep,
    facts: Facts,
    engine: _Engine,
    *,
    joins: bool,
) -> ViewMaker:
    return ViewMaker(
        settings.xprime if "xprime" in step.views else "none",
        seed=plan.seed if plan.data_seed is None else plan.data_seed,
        placement=engine.placement,
        layout=engine.layout,
        pool=settings.pool,
        mixes=step.mixed,
        num_classes=facts.num_classes,
        mixing=settings.mixing,
        sizes=settings.sizes,
        epochs=plan.epochs,
        joined=joins and engine.placement.world.size > 1,
    )


def _smallest(sizes: Sequence[int], facts: Facts, epochs: int) -> tuple[Facts, ...]:
    """The data as the run shows them smallest, if it does; UserError for sizes beyond the own."""
    channels, side, _ = facts.image_shape
    if not sizes:
        return ()
    if len(sizes) > epochs:
        raise UserError(
            f"augment.sizes={','.join(map(str, sizes))} has {len(sizes)} sizes for {epochs} "
            "epochs: the last one would never be shown; give fewer"
        )
    if max(sizes) > side:
        raise UserError(
            f"augment.sizes={','.join(map(str, sizes))}: the images have {side} pixels a side, and "
            f"{max(sizes)} is more; sizes make them smaller in early epochs"
        )
    least = min(sizes)
    return (replace(facts, image_shape=(channels, least, least)),)


def _picker(pick: PickConfig, student: nn.Module, engine: _Engine) -> Pick:
    return Pick(
        student,
        criterion=pick.criterion,
        temperature=pick.temperature,
        images=pick.images,
        share=None if pick.images else pick.share,
        update_statistics=pick.update_statistics,
        precision=engine.placement.precision,
    )
