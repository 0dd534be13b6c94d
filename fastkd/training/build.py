"""Makes a Trainer out of networks, loaders and recipe sections: the assembly between data and loop.

Used by `fastkd.runs.stages` (recipes) and `fastkd.api` (people with their own networks and
loaders).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.augment.config import PickConfig
from fastkd.augment.pick import Pick
from fastkd.augment.views import ViewMaker, XPrime
from fastkd.compute.compiling import compile_unit, worth_compiling
from fastkd.compute.layout import memory_format
from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision, resolve_precision
from fastkd.compute.ranks import World
from fastkd.compute.wrapping import wrap_ddp
from fastkd.config.section import Normalization
from fastkd.data.batch import TrainLoader
from fastkd.errors import UserError
from fastkd.evaluation.evaluate import EvalLoader, evaluating
from fastkd.losses.base.needs import Need
from fastkd.losses.base.term import BindContext, LossTerm
from fastkd.models.counting.count import count
from fastkd.models.head import has_frozen_backbone
from fastkd.models.taps import Tapped
from fastkd.output.console import Console
from fastkd.output.run_folder import RunFolder
from fastkd.teachers.ensemble import Ensemble, bind_teacher, check_ensemble_needs
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.parts import copy_of_head, last_norm, taps_into_head
from fastkd.teachers.teacher import Teacher
from fastkd.training.config import OptimConfig
from fastkd.training.ema import EMA
from fastkd.training.guard import Guard
from fastkd.training.optim import build_optimizer, spare_norms
from fastkd.training.schedules import Schedule
from fastkd.training.step import DistillStep, needed_taps, refuse_unknown_taps
from fastkd.training.trainer import Plan, Trainer

__all__ = ["Engine", "build_trainer", "decide"]


@dataclass(frozen=True)
class Engine:
    """How a run computes: precision, layout, compiler. `auto` has been decided."""

    precision: Precision
    compiled: bool
    channels_last: bool = True
    sync_bn: bool = False
    ema: float | None = None
    max_skips: int = 10
    fullgraph: bool = True
    """False lets somebody else's network break the graph."""

    def decisions(self) -> dict[str, Any]:
        """What a resumed run must repeat to give the same bits."""
        return {"precision": self.precision.name, "compile": "on" if self.compiled else "off"}


def decide(
    *,
    precision: str,
    compile_mode: str,
    device: torch.device,
    student: nn.Module,
    teachers: Sequence[nn.Module],
    terms: Sequence[LossTerm],
    image_shape: tuple[int, int, int],
    images: int,
) -> tuple[Precision, bool]:
    """Resolve `auto` from the recipe and the kind of device alone (nothing is timed).

    images: training images over the whole run.
    """
    macs = 0.0
    if compile_mode == "auto":
        # Nothing goes back through a frozen backbone.
        passes = 1.0 if has_frozen_backbone(student) else 3.0
        macs += passes * count(student, image_shape).macs * len(needed_taps(terms, "student"))
        views = len(needed_taps(terms, "teacher"))
        macs += sum(count(teacher, image_shape).macs for teacher in teachers) * views
    compiled = worth_compiling(
        compile_mode, macs_per_image=macs, images=images, device_type=device.type
    )
    return resolve_precision(precision, device), compiled


def build_trainer(
    plan: Plan,
    *,
    student: nn.Module,
    teachers: tuple[LoadedNet, ...],
    terms: Sequence[LossTerm],
    optim: OptimConfig,
    engine: Engine,
    loader: TrainLoader,
    val_loader: EvalLoader,
    image_shape: tuple[int, int, int],
    num_classes: int,
    train_labels_N: Tensor,
    multilabel: bool = False,
    normalization: Normalization,
    xprime: XPrime,
    pick: PickConfig | None = None,
    world: World,
    folder: RunFolder | None,
    console: Console,
) -> Trainer:
    """Tie everything together; UserError where student, teacher and losses do not fit."""
    device, precision = world.device, engine.precision
    changed = next((t.name for t in terms if type(t).export is not LossTerm.export), None)
    if engine.ema and changed:
        raise UserError(
            f"ema averages the student, but the loss {changed} keeps layers of its own behind it, "
            "which would not be averaged: set ema=null"
        )
    logits = [
        t.name
        for t in terms
        if any((need.net, need.tap) == ("student", "logits") for need in t.needs)
    ]
    if changed and logits:
        console.note(
            f"the loss {changed} gives the student another classifier in the end: that of its own, "
            f"which {', '.join(logits)} trains, is not kept (losses.{logits[0]}=null leaves it out)"
        )
    layout = memory_format(engine.channels_last, device, student)
    if engine.sync_bn and device.type == "cpu":
        raise UserError("sync_bn=true needs GPUs: torch synchronises batch norm over NCCL only")
    if engine.sync_bn and world.size > 1:
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    student = student.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    probe = torch.zeros(2, *image_shape, device=device).to(precision.dtype, memory_format=layout)
    # Copied before any hook is placed on the student.
    ema = EMA(student, engine.ema) if engine.ema else None

    bound_teacher = None
    check_ensemble_needs(teachers, terms)
    nets = {"student": student} | ({"teacher": teachers[0].model} if teachers else {})
    refuse_unknown_taps(terms, nets)
    if teachers and needed_taps(terms, "teacher"):
        bound_teacher = bind_teacher(
            teachers,
            needed_taps(terms, "teacher"),
            Placement(world, precision, engine.channels_last),
            data_normalization=normalization,
            layout=layout,
            compiled=engine.compiled,
            fullgraph=engine.fullgraph,
        )
    shapes = _shapes(student, bound_teacher, terms, probe, precision)
    shapes |= {need: (num_classes,) for t in terms for need in t.needs if need.net == "mixed"}
    _check_classes(shapes, num_classes)
    _check_labels(terms, multilabel)
    # One network has stages, a head and a last norm; several have no such thing in common.
    alone = bound_teacher if isinstance(bound_teacher, Teacher) else None
    stages = alone.stages if alone and alone.has_stages else None
    # Of the network as it was loaded: the bound one may be folded, and held in the type of the run.
    loaded = teachers[0] if alone else None
    head = copy_of_head(loaded.model, loaded.class_map, device) if loaded else None
    norm = last_norm(loaded.model) if loaded else None
    pooled = partial(taps_into_head, loaded, image_shape, device) if loaded else None
    for term in terms:
        term.bind(
            BindContext(
                num_samples=len(train_labels_N),
                num_classes=num_classes,
                train_labels_N=train_labels_N,
                shapes={need: shapes[need] for need in term.needs},
                teacher_stages=stages,
                teacher_head=head,
                teacher_norm=norm,
                teacher_pooled=pooled,
            )
        )
    step = DistillStep(student, terms, precision, multilabel=multilabel).to(device)
    views = ViewMaker(
        xprime if "xprime" in step.views else "none",
        seed=plan.seed,
        placement=Placement(world, precision, engine.channels_last),
        layout=layout,
        pool=pick.pool if pick else 1,
        mixes=step.mixed,
        num_classes=num_classes,
    )
    loader = views.opened(loader)
    banks = [f"terms.{number}.{bank}" for number, term in enumerate(terms) for bank in term.banks]
    compiled = compile_unit(
        step,
        enabled=engine.compiled,
        fullgraph=engine.fullgraph,
        # Gradients of a first micro-batch would lie in memory that the second one's graph reuses.
        cuda_graphs=device.type == "cuda" and plan.accumulate == 1,
    )
    runner = wrap_ddp(compiled, world, ignore_buffers=banks)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in student.parameters() if p.requires_grad], "lr_scale": 1.0}
    ]
    groups += [group for term in terms for group in term.param_groups()]
    optimizer = build_optimizer(
        groups if optim.decay_norms else spare_norms(groups, student),
        name=optim.name,
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        impl=optim.impl,
        device=device,
    )
    schedule = Schedule(
        kind=optim.schedule,
        epochs=plan.epochs,
        steps_per_epoch=loader.steps_per_epoch,
        milestones=optim.milestones,
        gamma=optim.gamma,
        warmup_epochs=optim.warmup_epochs,
    )
    return Trainer(
        replace(plan, clip_norm=optim.clip_norm, decisions=engine.decisions()),
        step=step,
        runner=runner,
        student=student,
        teacher=bound_teacher,
        loader=loader,
        val_loader=val_loader,
        pick=_picker(pick, student, engine) if pick else None,
        views=views,
        optimizer=optimizer,
        schedule=schedule,
        precision=precision,
        guard=Guard(
            step,
            optimizer,
            max_skips=engine.max_skips,
            world_size=world.size,
            ignore_buffers=banks,
        ),
        ema=ema,
        world=world,
        folder=folder,
        console=console,
    )


def _picker(pick: PickConfig, student: nn.Module, engine: Engine) -> Pick:
    unit = Pick(
        student,
        criterion=pick.criterion,
        temperature=pick.temperature,
        images=pick.images,
        share=None if pick.images else pick.share,
        update_statistics=pick.update_statistics,
        precision=engine.precision,
    )
    return compile_unit(unit, enabled=engine.compiled, fullgraph=engine.fullgraph)


def _shapes(
    student: nn.Module,
    teacher: Teacher | Ensemble | None,
    terms: Sequence[LossTerm],
    probe: Tensor,
    precision: Precision,
) -> dict[Need, tuple[int, ...]]:
    """Shape of every need without the batch axis, from one forward pass on zeros.

    UserError for a term that would teach the student nothing.
    """
    found: dict[Need, Tensor] = {}
    wanted = needed_taps(terms, "student")
    tapped = Tapped(student, tuple(dict.fromkeys(tap for taps in wanted.values() for tap in taps)))
    with torch.enable_grad(), evaluating(student), precision.autocast():
        features = tapped(probe)
    tapped.remove()
    for view, taps in wanted.items():
        found |= {Need.of(view, "student", tap): features[tap] for tap in taps}
    for term in terms:
        own = [need for need in term.needs if need.net == "student"]
        if own and not any(found[need].requires_grad for need in own):
            raise UserError(
                f"the loss {term.name} looks at {', '.join(own)} of the student, where only frozen "
                f"layers come before: it would teach nothing. Take it away, or let those layers "
                f"train (requires_grad_)"
            )
    if teacher is not None:
        # Not through its compiled form, which this batch size would only cost a compilation.
        features = teacher.features(probe)
        for view, taps in teacher.taps.items():
            found |= {Need.of(view, "teacher", tap): features[tap] for tap in taps}
    return {need: tuple(tensor.shape[1:]) for need, tensor in found.items()}


def _check_classes(shapes: Mapping[Need, tuple[int, ...]], num_classes: int) -> None:
    for need, shape in shapes.items():
        if need.tap == "logits" and shape != (num_classes,):
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


def _check_labels(terms: Sequence[LossTerm], multilabel: bool) -> None:
    """A multi-hot row would pass for probabilities of classes, and silently teach nonsense."""
    kind = "multi" if multilabel else "class"
    for term in terms:
        if term.label_kind not in (None, kind):
            cure = (
                "use BinaryCrossEntropy (losses.bce), and KD with ce_weight=0"
                if multilabel
                else "use CrossEntropy (losses.ce), or give labels as floating 0 and 1"
            )
            wants = {"class": "one class id per image, [N]", "multi": "labels [N, classes]"}
            raise UserError(
                f"the loss {term.name} wants {wants[term.label_kind or kind]}, the data has "
                f"{wants[kind]}: {cure}"
            )
