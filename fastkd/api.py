"""`fastkd.distill`: the trainer for people with their own networks and loaders.

    result = fastkd.distill(student, teacher, train_loader, val_loader, epochs=10)

Same engine as the recipes; see `distill`.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from inspect import signature
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastkd.augment.config import PickConfig
from fastkd.augment.mix import MixKind
from fastkd.augment.pick import PickCriterion
from fastkd.augment.views import XPRIMES
from fastkd.compute.compiling import CompileChoice, CompileReason, CompileSwitch
from fastkd.compute.machine import environment
from fastkd.compute.placement import Placement
from fastkd.compute.precision import PrecisionChoice, resolve_precision
from fastkd.compute.ranks import DeviceChoice, on_main, open_world
from fastkd.data.loaders.foreign import (
    LoaderItem,
    check_loader,
    images_per_epoch,
    open_foreign,
    peek,
)
from fastkd.data.loaders.label_rules import first_kind
from fastkd.errors import UserError
from fastkd.evaluation.evaluate import evaluating
from fastkd.losses.base.term import LossTerm
from fastkd.models.card import title_of
from fastkd.models.taps import logits_of, remove_taps
from fastkd.models.unwrap import uncompiled, unwrapped
from fastkd.output.console import Console
from fastkd.output.occupancy import occupied, tidy
from fastkd.output.run_folder import RunFolder
from fastkd.storage.checkpoint import Checkpoint
from fastkd.teachers.loaded import LoadedNet
from fastkd.training.arguments import (
    check_choice,
    check_needs,
    check_numbers,
    label_use,
    optim_config,
    pick_config,
    teachers_of,
    terms_of,
)
from fastkd.training.build import build_trainer, decide_compile
from fastkd.training.checkpointing import open_checkpoint
from fastkd.training.config import OptimConfig
from fastkd.training.matching import check_labels
from fastkd.training.progress import Plan
from fastkd.training.settings import Output, TrainData, TrainingSettings

__all__ = ["Result", "distill"]


@dataclass(frozen=True)
class Result:
    """What `distill` returns."""

    student: nn.Module
    """The student after the last epoch, in evaluation mode: its average with ema, and with the head
    that a loss gave it."""
    metrics: dict[str, Any]
    """accuracy_last, accuracy_best (or map_..), best_epoch, images_per_s, ...; `history`: one row
    per epoch."""
    run_dir: Path | None
    """Folder of last.pt and best.safetensors; None if nothing was written."""


def distill(  # noqa: PLR0913 - a frozen public signature
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module] | None,
    train_loader: Iterable[LoaderItem],
    val_loader: Iterable[LoaderItem] | None,
    *,
    epochs: int,
    losses: Sequence[LossTerm] | None = None,
    optim: OptimConfig | None = None,
    lr: float | None = None,
    xprime: Literal["none", MixKind] = "none",
    pick: PickConfig | PickCriterion | None = None,
    precision: PrecisionChoice = "auto",
    compile: CompileChoice = "auto",
    channels_last: bool = True,
    accumulate: int = 1,
    ema: float | None = None,
    device: DeviceChoice = "auto",
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> Result:
    """Train `student` to imitate `teacher` on batches of your own loaders.

    Args:
        student: any nn.Module, images [N, C, H, W] -> logits [N, classes], or an output of which
            `fastkd.models.taps.logits_of` finds them; trained in place, without its wrappers, and
            in training mode, except for what `fastkd.models.head.freeze_backbone` froze. Parameters
            that require no gradient stay as they are.
        teacher: a network of the same form, frozen here (evaluation mode, no gradients); None to
            train on labels. It sees exactly the images that the student sees. With a list of
            networks the student imitates the mean of their probabilities
            (`fastkd.teachers.ensemble.Ensemble`).
        train_loader: yields (images, labels) or (images, labels, sample ids), a mapping with such
            keys, or images alone if no loss reads labels; re-iterated every epoch, a sampler's
            `set_epoch` is called. Sized (`len`). Labels are class ids [N] (-100: none) or rows of
            probabilities [N, classes], one-hot or as MixUp and CutMix make them; or [N, classes] of
            0 and 1 (-1: unknown) for images with several labels: then pass a loss such as
            `BinaryCrossEntropy`; the metrics report mAP instead of accuracy.
        val_loader: the same, with every sample once; of a row of probabilities the most probable
            class counts. None, or images alone: nothing is measured, and the last epoch is kept.
        losses: LossTerms; a tap of your own network is a module path, as in
            `AT(pairs={"layer2": "layer2"}, weight=1000)`. Default: KD at T 4, 0.1 CE + 0.9 KL.
        optim: optimizer and schedule; default SGD with momentum 0.9, cosine, lr 0.05.
        lr: overrides the learning rate of `optim`.
        xprime: the second view of every batch, made from it, for losses such as
            `KD(views=("x", "xprime"))`.
        pick: choose x' from a pool by how hard the images are: the name of a criterion ("kl" is
            the paper's), or a config with all settings. The metrics then have `pick_ratio`: mean
            hardness of the chosen images divided by the mean over the pool.
            out: run folder to write; None writes nothing. resume=True continues from its last.pt,
            if there is one (batches before the saved step are drawn again and discarded).

    Raises:
        UserError: class counts differ, a tap does not exist, a loss needs ids the loader lacks,
            loaders or arguments that cannot be used.
        RunFailed: losses or gradients stayed non-finite.
    """
    check_choice("precision", precision, get_args(PrecisionChoice))
    check_choice("compile", compile, get_args(CompileChoice))
    check_choice("xprime", xprime, XPRIMES)
    check_numbers(epochs, accumulate, ema)
    teachers = teachers_of(student, teacher)
    student = unwrapped(student)
    terms = terms_of(losses)
    picking = pick_config(pick)
    check_needs(terms, has_teacher=bool(teachers), xprime=xprime, picks=picking is not None)
    config = optim_config(optim, epochs, lr)
    with ExitStack() as stack:
        world = stack.enter_context(open_world(device))
        check_loader("train_loader", train_loader, world)
        if val_loader is not None:
            check_loader("val_loader", val_loader, world, exact=True)
        stack.enter_context(uncompiled(student, *teachers))
        # Leave the caller's random state untouched.
        devices = [world.device] if world.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices))
        for model in (student, *teachers):
            model.to(world.device)
        placement = Placement(world, resolve_precision(precision, world.device), channels_last)
        console = Console(enabled=world.is_main and not quiet)
        data = _data((train_loader, val_loader), student, terms, placement, seed)
        pays = decide_compile(
            compile,
            student=student,
            teachers=teachers,
            terms=terms,
            image_shape=data.facts.image_shape,
            images=data.images * epochs,
            device_type=world.device.type,
        )
        began: CompileSwitch | None = on_main(world, lambda: _compile_of(out)) if resume else None
        reason: CompileReason = "checkpoint" if began else "auto" if compile == "auto" else "key"
        settings = TrainingSettings(
            optim=config,
            xprime=xprime,
            pick=picking,
            ema=ema,
            compile=began or ("on" if pays else "off"),
            compile_reason=reason,
            fullgraph=False,
        )
        # The losses start from the same random draws in every call and on every rank.
        torch.manual_seed(seed)
        # The networks belong to the user: remove our hooks whatever happens.
        stack.callback(remove_taps, student, *teachers)
        digest = _digest(
            _facts_of(student, teachers, terms, config),
            (epochs, seed, xprime, accumulate, ema, placement.precision.name, pays),
            data.loader.steps_per_epoch,
            picking,
        )
        trainer = build_trainer(
            Plan(
                stage="distill",
                digest=digest,
                seed=seed,
                epochs=epochs,
                accumulate=accumulate,
            ),
            student=student,
            teachers=tuple(LoadedNet(model, name=title_of(model)) for model in teachers),
            terms=terms,
            data=data,
            settings=settings,
            placement=placement,
            output=Output(console=console),
        )
        # Made only now: a mistake found above creates no folder and deletes none of the user's.
        folder = trainer.folder = on_main(world, lambda: _folder(out, resume))
        if folder is not None:
            stack.enter_context(occupied(folder.path, world))
            stack.enter_context(tidy(folder, folder.path.parent, world))
            if resume and (checkpoint := open_checkpoint(folder, digest, world)):
                trainer.resume(checkpoint)
                del checkpoint  # as large as the student and its optimizer
        metrics = trainer.fit() | {"history": trainer.history}
        on_main(world, lambda: folder.finish(metrics) if folder else None)
        return Result(trainer.kept().eval(), metrics, folder.path if folder else None)


def _data(
    loaders: tuple[Iterable[LoaderItem], Iterable[LoaderItem] | None],
    student: nn.Module,
    terms: Sequence[LossTerm],
    placement: Placement,
    seed: int,
) -> TrainData:
    """The user's loaders for training and validation, and what the losses must know about them."""
    train_items, val_items = loaders
    shown = peek("train_loader", train_items, placement)
    use, num_classes = label_use(terms), _num_classes(student, shown.images_NCHW[:1])
    if first_kind(shown.labels, use, num_classes) == "multi":
        check_labels(terms, multilabel=True)
    pair = open_foreign(
        train_items,
        val_items,
        shown,
        use,
        num_classes=num_classes,
        seed=seed,
        placement=placement,
    )
    # A loader without a data set to count: assume that all batches are like the first.
    images = images_per_epoch(train_items, len(shown.images_NCHW) * placement.world.size)
    return TrainData(pair.train, pair.val, pair.facts, images)


def _compile_of(out: str | Path | None) -> CompileSwitch | None:
    """What the run in this folder came to when it began; None if it has no checkpoint yet."""
    last = Path(out) / "last.pt" if out is not None else None
    if last is None or not last.exists():
        return None
    return Checkpoint.open(last).state["decisions"]["compile"]


def _folder(out: str | Path | None, resume: bool) -> RunFolder | None:
    if out is None:
        if resume:
            raise UserError("resume=True needs out=, the folder to resume")
        return None
    if resume:
        return RunFolder.open(Path(out))
    if Path(out).is_dir() and any(Path(out).iterdir()):
        raise UserError(
            f"out={out} exists and is not empty: continue it with resume=True, or choose another "
            f"folder"
        )
    folder = RunFolder.create(Path("runs"), "distill", "", out=Path(out))
    folder.write_json("environment.json", environment())
    return folder


def _facts_of(
    student: nn.Module,
    teachers: Sequence[nn.Module],
    terms: Sequence[LossTerm],
    config: OptimConfig,
) -> tuple[Any, ...]:
    """What enters the digest about losses, optimizer and networks."""
    return (
        [
            (
                term.name,
                tuple(map(str, term.needs)),
                sorted(term.weights.items()),
                settings_of(term),
            )
            for term in terms
        ],
        config.model_dump(),
        [(name, tuple(p.shape), p.requires_grad) for name, p in student.named_parameters()],
        [[tuple(p.shape) for p in each.parameters()] for each in teachers],
    )


def settings_of(term: LossTerm) -> list[tuple[str, str]]:
    """Its class and its settings: temperature, form, ...; nothing that changes during training."""
    plain = (bool, int, float, str, tuple, type(None))
    given = {name: vars(term).get(name) for name in signature(type(term)).parameters}
    found = [(name, repr(value)) for name, value in given.items() if isinstance(value, plain)]
    return [("class", type(term).__qualname__), *found]


def _digest(
    facts: tuple[Any, ...], run: tuple[Any, ...], steps_per_epoch: int, pick: PickConfig | None
) -> str:
    """Sixteen hex digits that identify what the arguments of a call decide about its outcome."""
    every = (*facts, run, steps_per_epoch, *([pick.model_dump()] if pick else []))
    return sha256(repr(every).encode()).hexdigest()[:16]


def _num_classes(student: nn.Module, image: Tensor) -> int:
    # Cast as in training, whatever the loader yields.
    dtypes = (p.dtype for p in student.parameters() if p.is_floating_point())
    with torch.no_grad(), evaluating(student):
        logits = logits_of(student(image.to(next(dtypes, torch.float32))))
    if logits.ndim != 2:
        raise UserError(
            f"the student must return logits [N, classes], got {list(logits.shape)} for one image"
        )
    return logits.shape[1]
