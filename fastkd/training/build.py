"""Builds a Trainer from networks, losses and loaders: the assembly between data and loop.

Used by `fastkd.runs.stages` (recipes) and `fastkd.api` (people with their own networks and
loaders).
"""

from collections.abc import Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from fastkd.augment.config import PickConfig
from fastkd.augment.pick import Pick
from fastkd.augment.views import ViewMaker
from fastkd.compute.placement import Placement
from fastkd.compute.wrapping import wrap_ddp
from fastkd.data.facts import Facts
from fastkd.errors import UserError
from fastkd.losses.base.needs import LOGITS, Need
from fastkd.losses.base.term import LossTerm
from fastkd.models.card import card_of, sign
from fastkd.teachers.cache.cached import Answering
from fastkd.teachers.ensemble import Ensemble
from fastkd.teachers.teacher import Teacher
from fastkd.teachers.teaching import Teaching
from fastkd.training.answers import look_at_training, notes_on
from fastkd.training.binding import (
    answered_from,
    bind_terms,
    bound_teacher,
    kept_parts,
    teacher_parts,
)
from fastkd.training.config import OptimConfig
from fastkd.training.ema import EMA
from fastkd.training.engine import Engine, engine_for, placed
from fastkd.training.fallback import Fallback
from fastkd.training.guard import Guard
from fastkd.training.matching import (
    check_augmentation,
    check_classes,
    check_exports,
    check_labels,
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

__all__ = ["build_trainer"]


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
    engine = engine_for(plan, student, teaching, terms, data, settings, placement, output.console)
    if note := check_exports(terms, averaged=bool(settings.ema)):
        output.console.note(note)
    student = placed(student, settings, engine)
    if (card := card_of(student)) and card.data:
        # What it knew before is not what it learns now.
        sign(student, replace(card, data=None, unlearned=()))
    # Copied before any hook is placed on the student.
    ema = EMA(student, settings.ema) if settings.ema else None

    made = _connected(plan, student, teaching, terms, data, settings, engine)
    step, teacher = made.step, made.teacher
    views = _view_maker(plan, settings, step, facts, engine, joins=data.loader.is_planned)
    loader = views.opened(data.loader)
    pick = _picker(settings.pick, student, engine) if settings.pick else None
    for shown in made.shown:
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
                remedies=data.remedies,
                mixed=bool(settings.mixing),
            ),
        )
    probe, precision = engine.probe(facts, 2), placement.precision
    seen = look_at_training(student, made.taught, probe, precision, ranks=world.size)
    for note in notes_on(seen, student, made.bound, terms, probe, precision):
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


class _Connected(NamedTuple):
    """A step whose networks and losses fit each other and the data."""

    step: DistillStep
    teacher: Answering | None
    """What answers: the bound teacher, or a cache around it or in its place."""
    bound: Teacher | Ensemble | None
    taught: Set[Need]
    """The needs of the student that carry a gradient in evaluation mode."""
    shown: tuple[Facts, ...]
    """The data at every size for which the step must work."""


def _connected(
    plan: Plan,
    student: nn.Module,
    teaching: Teaching,
    terms: Sequence[LossTerm],
    data: TrainData,
    settings: TrainingSettings,
    engine: Engine,
) -> _Connected:
    """Bind teacher and losses; UserError if they do not fit."""
    facts, remedies = data.facts, data.remedies
    precision, device = engine.placement.precision, engine.device
    probe = engine.probe(facts, 2)
    bound = bound_teacher(teaching.nets, student, terms, facts, engine)
    parts = teacher_parts(teaching.nets, bound, facts, device)
    teacher: Answering | None = bound
    if teaching.cache and needed_taps(terms, "teacher"):
        teacher = answered_from(teaching.cache, bound, parts, terms, probe, facts, engine)
        parts = parts or kept_parts(teaching.cache, terms)
    shapes, taught = shapes_of_needs(student, teacher, terms, probe, precision, remedies)
    smallest = _smallest(settings.sizes, facts, plan.epochs)
    for shown in smallest:
        # Networks that take no smaller images are refused; connectors keep the full shapes.
        shapes_of_needs(student, teacher, terms, engine.probe(shown, 2), precision, remedies)
    shapes |= {need: (facts.num_classes,) for t in terms for need in t.needs if need.net == "mixed"}
    check_augmentation(
        facts.label_kind, mixed=bool(settings.mixing), picked=settings.pick is not None
    )
    check_labels(terms, facts.label_kind)
    check_classes(terms, shapes, facts, remedies.one_class)
    if facts.label_size is not None:
        dense = {need: shape[0] for need, shape in shapes.items() if need.tap in LOGITS}
        shapes |= {need: (classes, *facts.label_size) for need, classes in dense.items()}
    bind_terms(terms, shapes, facts, parts)
    step = DistillStep(
        student, terms, precision, label_kind=facts.label_kind, labelled=facts.labelled
    )
    return _Connected(step.to(device), teacher, bound, taught, (facts, *smallest))


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
    engine: Engine,
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


def _picker(pick: PickConfig, student: nn.Module, engine: Engine) -> Pick:
    return Pick(
        student,
        criterion=pick.criterion,
        temperature=pick.temperature,
        images=pick.images,
        share=None if pick.images else pick.share,
        update_statistics=pick.update_statistics,
        precision=engine.placement.precision,
    )
