"""`fastkd.distill`: the trainer for people with their own networks and loaders.

    result = fastkd.distill(student, teacher, train_loader, val_loader, epochs=10)

Same engine as the recipes; see `distill`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastkd.augment.config import PickConfig
from fastkd.augment.mix import MixKind
from fastkd.augment.pick import PickCriterion
from fastkd.augment.views import XPRIMES
from fastkd.compute.compiling import CompileChoice
from fastkd.compute.placement import Placement
from fastkd.compute.precision import PrecisionChoice, resolve_precision
from fastkd.compute.ranks import DeviceChoice, World, on_main, open_world
from fastkd.data.loaders.foreign import (
    LoaderItem,
    check_loader,
    images_per_epoch,
    open_foreign,
    peek,
)
from fastkd.errors import UserError
from fastkd.evaluation.evaluate import evaluating
from fastkd.losses.base.term import LossTerm
from fastkd.models.card import title_of
from fastkd.models.taps import remove_taps
from fastkd.output.console import Console
from fastkd.output.occupancy import occupied, tidy
from fastkd.output.run_folder import RunFolder
from fastkd.report.plots import plot_curves
from fastkd.teachers.judging import judge
from fastkd.teachers.loaded import LoadedNet
from fastkd.training.arguments import (
    check_callback,
    check_choice,
    check_needs,
    check_numbers,
    optim_config,
    pick_config,
    teachers_of,
    terms_of,
)
from fastkd.training.build import build_trainer, decide_compile
from fastkd.training.call_folder import (
    advice,
    choose_folder,
    described,
    open_state,
    settings_of,
)
from fastkd.training.config import OptimConfig
from fastkd.training.progress import Plan
from fastkd.training.result import Result
from fastkd.training.settings import Output, TrainData, TrainingSettings
from fastkd.training.trainer import Trainer

__all__ = ["Result", "distill"]


def distill(  # noqa: PLR0913 - a frozen public signature
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module] | None,
    train_loader: Iterable[LoaderItem],
    val_loader: Iterable[LoaderItem],
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
    on_epoch: Callable[[dict[str, Any]], object] | None = None,
) -> Result:
    """Train `student` to imitate `teacher` on batches of your own loaders.

    The teacher is evaluated first; one that is no better than chance is a warning. Ctrl-C and
    SIGTERM end the run between two steps, the state saved if there is a folder.

    Args:
        student: any nn.Module, images [N, C, H, W] -> logits [N, classes]; trained in place and
            in training mode, except for what `fastkd.models.head.freeze_backbone` froze. Parameters
            that require no gradient stay as they are.
        teacher: a network of the same form, frozen here (evaluation mode, no gradients); None to
            train on labels. It sees exactly the images that the student sees. With a list of
            networks the student imitates the mean of their probabilities
            (`fastkd.teachers.ensemble.Ensemble`).
        train_loader: yields (images, labels) or (images, labels, sample ids); re-iterated every
            epoch, a sampler's `set_epoch` is called. Sized (`len`).
        val_loader: the same, with every sample once. Labels are class ids [N], or [N, classes] of 0
            and 1 (-1: unknown) for images with several labels: then pass a loss such as
            `BinaryCrossEntropy`; the metrics report mAP instead of accuracy.
        losses: LossTerms; a tap of your own network is a module path, as in
            `AT(pairs={"layer2": "layer2"}, weight=1000)`. Default: KD at T 4, 0.1 CE + 0.9 KL.
        optim: optimizer and schedule; default SGD with momentum 0.9, cosine, lr 0.05.
        lr: overrides the learning rate of `optim`.
        xprime: the second view of every batch, made from it, for losses such as
            `KD(views=("x", "xprime"))`.
        pick: choose x' from a pool by how hard the images are: the name of a criterion ("kl" is
            the paper's), or a config with all settings. The metrics then have `pick_ratio`: mean
            hardness of the chosen images divided by the mean over the pool.
        out: run folder to write: weights of the last and the best epoch, metrics, curves.png. None
            writes nothing; then both networks are in the result all the same.
        resume: with `out`, whatever is there: a new folder is started, an interrupted run goes on
            (batches before the saved step are drawn again and discarded), a finished one gives its
            result. Fit for a script that a scheduler starts again.
        quiet: print nothing. Otherwise a terminal has one line that moves within the epoch, other
            outputs one line per epoch and a few within long ones.
        on_epoch: called after every epoch with its row of metrics (`epoch`, `train_loss`,
            `val_accuracy`, ..), on rank 0, when the epoch is saved. What it raises ends the run;
            what it returns is ignored.

    Returns:
        `Result`: `student` as the last epoch left it, `best` as the best one did, `history`,
        `predict(loader)`.

    Raises:
        UserError: class counts differ, a tap does not exist, a loss needs ids the loader lacks,
            loaders or arguments that cannot be used.
        RunFailed: losses or gradients stayed non-finite.
    """
    check_choice("precision", precision, get_args(PrecisionChoice))
    check_choice("compile", compile, get_args(CompileChoice))
    check_choice("xprime", xprime, XPRIMES)
    check_numbers(epochs, accumulate, ema)
    check_callback(on_epoch)
    teachers = teachers_of(student, teacher)
    terms = terms_of(losses)
    picking = pick_config(pick)
    check_needs(terms, has_teacher=bool(teachers), xprime=xprime, picks=picking is not None)
    config = optim_config(optim, epochs, lr)
    with ExitStack() as stack:
        world = stack.enter_context(open_world(device))
        for name, loader in (("train_loader", train_loader), ("val_loader", val_loader)):
            check_loader(name, loader, world, exact=name == "val_loader")
        # Leave the caller's random state untouched.
        devices = [world.device] if world.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices))
        for model in (student, *teachers):
            model.to(world.device)
        placement = Placement(world, resolve_precision(precision, world.device), channels_last)
        data = _data((train_loader, val_loader), student, terms, placement, seed)
        compiled = decide_compile(
            compile,
            student=student,
            teachers=teachers,
            terms=terms,
            image_shape=data.facts.image_shape,
            images=data.images * epochs,
            device_type=world.device.type,
        )
        settings = TrainingSettings(
            optim=config,
            xprime=xprime,
            pick=picking,
            ema=ema,
            # Decided this early because the digest includes the decision.
            compile="on" if compiled else "off",
            fullgraph=False,
        )
        # The losses start from the same random draws in every call and on every rank.
        torch.manual_seed(seed)
        # The networks belong to the user: remove our hooks whatever happens.
        stack.callback(remove_taps, student, *teachers)
        run = (epochs, seed, xprime, accumulate, ema, placement.precision.name, compiled)
        networks_and_losses = _facts_of(student, teachers, terms, config)
        digest = _digest(networks_and_losses, run, data.loader.steps_per_epoch, picking)
        console = Console(enabled=world.is_main and not quiet)
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
            output=Output(console=console, on_epoch=_of_rank_0(on_epoch, world)),
        )
        call = {"digest": digest, **dict(zip(_RUN, run, strict=True))}
        call |= described(student, teachers, terms, data) | {
            "optim": config.model_dump(),
            "pick": picking.model_dump() if picking else None,
        }
        # Made only now: a mistake found above creates no folder and deletes none of the user's.
        folder = trainer.folder = on_main(world, lambda: choose_folder(out, call, resume=resume))
        before = None
        if folder is not None:
            stack.enter_context(occupied(folder.path, world))
            before = on_main(world, folder.summary)
        checkpoint = open_state(folder, call, world, finished=before is not None)
        if folder is not None:
            stack.enter_context(tidy(folder, folder.path.parent, world))
        stack.enter_context(advice(folder))
        taught = (before or {}).get("teacher") or _judged(trainer, teachers, data)
        if checkpoint is not None:
            trainer.resume(checkpoint)
            del checkpoint  # as large as the student and its optimizer
        metrics = trainer.fit() | {"teacher": taught, "history": trainer.history}
        on_main(world, lambda: _finish(folder, trainer, metrics))
        return Result(
            trainer.kept().eval(),
            metrics,
            folder.path if folder else None,
            placement,
            data.facts.multilabel,
            trainer.best_state,
        )


_RUN = ("epochs", "seed", "xprime", "accumulate", "ema", "precision", "compiled")
"""The numbers and choices of a call, by their names in config.yaml."""


def _of_rank_0(
    on_epoch: Callable[[dict[str, Any]], object] | None, world: World
) -> Callable[[dict[str, Any]], object] | None:
    """Rank 0's callback; elsewhere only a sign that there is one, which all ranks must know."""
    wanted = on_main(world, lambda: on_epoch is not None)
    return (on_epoch or (lambda row: None)) if wanted else None


def _judged(
    trainer: Trainer, teachers: Sequence[nn.Module], data: TrainData
) -> dict[str, Any] | None:
    """What the teachers reach, for the metrics; None if no loss asks them."""
    say = trainer.console.note
    if trainer.teacher is None:
        if teachers:
            say("the teacher is not used: none of the losses asks it for anything")
        return None
    name = " + ".join(title_of(model) for model in teachers)
    return judge(trainer.teacher, name, data.val_loader, data.facts, trainer.placement, say=say)


def _finish(folder: RunFolder | None, trainer: Trainer, metrics: Mapping[str, Any]) -> None:
    if folder is not None:
        plot_curves(folder.path / "curves.png", {"student": trainer.history})
        folder.finish(metrics)


def _data(
    loaders: tuple[Iterable[LoaderItem], Iterable[LoaderItem]],
    student: nn.Module,
    terms: Sequence[LossTerm],
    placement: Placement,
    seed: int,
) -> TrainData:
    """The user's loaders for training and validation, and what the losses must know about them."""
    train_items, val_items = loaders
    shown = peek(val_items, placement.device, channels_last=placement.channels_last)
    pair = open_foreign(
        train_items,
        val_items,
        shown,
        num_classes=_num_classes(student, shown.images_NCHW[:1], shown.labels_N[:1]),
        seed=seed,
        placement=placement,
        wants_ids=next((term.name for term in terms if term.uses_index), None),
        wants_classes=next(
            (term.name for term in terms if term.label_kind and not term.takes_no_label), None
        ),
    )
    # A loader without a data set to count: assume the batch size of validation.
    images = images_per_epoch(train_items, len(shown.labels_N) * placement.world.size)
    return TrainData(pair.train, pair.val, pair.facts, images)


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


def _digest(
    facts: tuple[Any, ...], run: tuple[Any, ...], steps_per_epoch: int, pick: PickConfig | None
) -> str:
    """Sixteen hex digits that identify what the arguments of a call decide about its outcome."""
    every = (*facts, run, steps_per_epoch, *([pick.model_dump()] if pick else []))
    return sha256(repr(every).encode()).hexdigest()[:16]


def _num_classes(student: nn.Module, image: Tensor, label: Tensor) -> int:
    with torch.no_grad(), evaluating(student):
        logits = student(image)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise UserError("the student must return logits [N, classes] as one tensor")
    if label.dim() == 2 and label.shape[1] != logits.shape[1]:
        raise UserError(
            f"the labels are [N, {label.shape[1]}], one column per class, but the student gives "
            f"{logits.shape[1]} logits: build it with num_classes={label.shape[1]}. Class ids, one "
            f"per image, are labels [N]"
        )
    return logits.shape[1]
