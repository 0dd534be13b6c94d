"""`fastkd.distill`: the trainer for people with their own networks and loaders.

    result = fastkd.distill(student, teacher, train_loader, val_loader, epochs=10)

Same engine as the recipes; see `distill`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from fastkd.augment.config import PickConfig
from fastkd.augment.mix import MixKind
from fastkd.augment.pick import PickCriterion
from fastkd.augment.views import XPRIMES
from fastkd.compute.compiling import CompileChoice, CompileReason
from fastkd.compute.placement import Placement
from fastkd.compute.precision import PrecisionChoice, resolve_precision
from fastkd.compute.ranks import DeviceChoice, World, on_main, open_world
from fastkd.config.values import dotted
from fastkd.data.loaders.foreign import (
    LoaderItem,
    Shown,
    check_loader,
    images_per_epoch,
    open_foreign,
    peek,
)
from fastkd.data.loaders.label_rules import kind_on_ranks
from fastkd.evaluation.headline import headline
from fastkd.losses.base.term import LossTerm
from fastkd.models.card import title_of
from fastkd.models.intake import Remedy
from fastkd.models.taps import ZooNetwork, remove_taps
from fastkd.models.unwrap import uncompiled
from fastkd.output.console import Console
from fastkd.output.occupancy import occupied, tidy
from fastkd.output.run_folder import RunFolder
from fastkd.output.trackers.opening import check_trackers, tracker_names
from fastkd.output.trackers.sink import TrackerName
from fastkd.report.class_iou import with_class_names
from fastkd.report.plots import draw_curves
from fastkd.storage.checkpoint import Checkpoint
from fastkd.teachers.cache.cached import CachedTeacher
from fastkd.teachers.judging import judge
from fastkd.teachers.teaching import Teaching
from fastkd.training.arguments import (
    check_callback,
    check_choice,
    check_mode,
    check_needs,
    check_numbers,
    check_student,
    label_use,
    loaded_teachers,
    networks_of,
    optim_config,
    pick_config,
    terms_of,
)
from fastkd.training.autocast import settle_precision
from fastkd.training.build import build_trainer
from fastkd.training.call_folder import (
    advice,
    check_state,
    choose_folder,
    describe,
)
from fastkd.training.checkpointing import open_checkpoint
from fastkd.training.config import OptimConfig
from fastkd.training.engine import decide_compile
from fastkd.training.matching import check_form, check_labels, shape_of_logits
from fastkd.training.progress import Plan
from fastkd.training.result import Result
from fastkd.training.settings import Output, Remedies, TrainData, TrainingSettings
from fastkd.training.trainer import Trainer

__all__ = ["Result", "distill"]

REMEDIES = Remedies(
    student=Remedy("resize the images of the loaders to {0}x{0}", "give precision='fp32'"),
    last_batch="give the train_loader drop_last=True, or another batch_size",
    every_batch="give the train_loader a larger batch_size",
    one_class="add images of another class, or give labels [N, 1] of 0 and 1 (BinaryCrossEntropy)",
)


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
    teacher_resolution: int | Sequence[int | None] | None = None,
    on_epoch: Callable[[dict[str, Any]], object] | None = None,
    track: TrackerName | Sequence[TrackerName] = (),
) -> Result:
    """Train `student` to imitate `teacher` on batches of your own loaders.

    The teacher is evaluated first; one that is no better than chance is a warning. Ctrl-C and
    SIGTERM end the run between two steps, the state saved if there is a folder.

    Args:
        student: any nn.Module, images [N, C, H, W] -> logits [N, classes], or for segmentation
            [N, classes, h, w] of any size, or an output of which `fastkd.models.taps.logits_of`
            finds them; trained in place, without its wrappers, and in training mode, except for
            what `fastkd.models.head.freeze_backbone` froze. Parameters that require no gradient
            stay as they are.
        teacher: a network of the same form, frozen here (evaluation mode, no gradients); None to
            train on labels. It sees exactly the images that the student sees, resized to
            `teacher_resolution`. TorchScript, exported and quantised teachers work, as do those in
            fp64, bf16 or fp16, which then compute in that type. With a list of networks the
            student imitates the mean of their probabilities
            (`fastkd.teachers.ensemble.Ensemble`).
        train_loader: yields (images, labels) or (images, labels, sample ids), a mapping with such
            keys, or images alone if no loss reads labels; re-iterated every epoch, a sampler's
            `set_epoch` is called. Sized (`len`). Labels are class ids [N] (-100: none) or rows of
            probabilities [N, classes], one-hot or as MixUp and CutMix make them; or [N, classes] of
            0 and 1 (-1: unknown) for images with several labels: then pass a loss such as
            `BinaryCrossEntropy`; the metrics report mAP instead of accuracy. For segmentation they
            are label maps [N, H, W] of class ids (-100: ignored), in the size of the images or a
            whole fraction of it; the metrics report mIoU.
        val_loader: the same, with every sample once; of a row of probabilities the most probable
            class counts. None, or images alone: nothing is measured, and the last epoch is kept.
        losses: LossTerms; a tap of your own network is a module path, as in
            `AT(pairs={"layer2": "layer2"}, weight=1000)`. Default: KD at T 4, 0.1 CE + 0.9 KL.
        optim: optimizer and schedule; default SGD with momentum 0.9, cosine, lr 0.05.
        lr: overrides the learning rate of `optim`.
        xprime: the second view of every batch, made from it, for losses such as
            `KD(views=("x", "xprime"))`.
        precision: autocast type; auto is bf16 where the device computes in it and the networks run
            in it, else fp32.
        pick: choose x' from a pool by how hard the images are: the name of a criterion ("kl" is
            the paper's), or a config with all settings. The metrics then have `pick_ratio`: mean
            hardness of the chosen images divided by the mean over the pool.
        teacher_resolution: side in pixels to which the images are resized for the teacher
            (bilinear, antialiased); for several teachers also a list, None in it: not resized.
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
        track: trackers that are shown the run as well: "tensorboard", "wandb", "mlflow", "trackio",
            one or a list. Needs `out`, where a resumed run finds its remote run again.

    Returns:
        `Result`: `student` as the last epoch left it, `best` as the best one did, `history`,
        `predict(loader)`.

    Raises:
        UserError: class counts differ, a tap does not exist, a loss needs ids the loader lacks,
            loaders or arguments that cannot be used.
        RunFailed: losses or gradients stayed non-finite.
    """
    check_mode()
    check_choice("precision", precision, get_args(PrecisionChoice))
    check_choice("compile", compile, get_args(CompileChoice))
    check_choice("xprime", xprime, XPRIMES)
    check_numbers(epochs, accumulate, ema)
    check_callback(on_epoch)
    trackers = tracker_names(track, out)
    student, teachers = networks_of(student, teacher)
    loaded = loaded_teachers(teachers, teacher_resolution)
    check_student(student)
    terms = terms_of(losses)
    picking = pick_config(pick)
    check_needs(terms, has_teacher=bool(teachers), xprime=xprime, picks=picking is not None)
    config = optim_config(optim, epochs, lr)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        world = stack.enter_context(open_world(device))
        on_main(world, lambda: check_trackers(trackers))
        check_loader("train_loader", train_loader, world)
        if val_loader is not None:
            check_loader("val_loader", val_loader, world, exact=True)
        stack.enter_context(uncompiled(student, *teachers))
        # Leave the caller's random state untouched.
        devices = [world.device] if world.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices))
        for model in (student, *teachers):
            model.to(world.device)
        console = Console(enabled=world.is_main and not quiet)
        foreign = not all(isinstance(model, ZooNetwork) for model in (student, *teachers))
        settled = resolve_precision(precision, world.device)
        placement = Placement(world, settled, channels_last, foreign)
        shown = peek("train_loader", train_loader, placement)
        if precision == "auto":
            placement = settle_precision(student, loaded, shown, placement, console)
        data = _data((train_loader, val_loader), shown, student, terms, placement, seed)
        pays = decide_compile(
            compile,
            student=student,
            teacher_macs=Teaching(loaded).macs(data.facts.image_shape),
            terms=terms,
            image_shape=data.facts.image_shape,
            images=data.images * epochs,
            device_type=world.device.type,
        )
        began = None
        last = Path(out or "").expanduser() / "last.pt"
        if resume and out is not None and on_main(world, last.exists):
            # First the lock: another process may be continuing this run.
            stack.enter_context(occupied(last.parent, world))
            began = open_checkpoint(last.parent, None, world)
        reason: CompileReason = "checkpoint" if began else "auto" if compile == "auto" else "key"
        settings = TrainingSettings(
            optim=config,
            xprime=xprime,
            pick=picking,
            ema=ema,
            compile=began.state["decisions"]["compile"] if began else "on" if pays else "off",
            compile_reason=reason,
            fullgraph=False,
        )
        # The losses start from the same random draws in every call and on every rank.
        torch.manual_seed(seed)
        # The networks belong to the user: remove our hooks whatever happens.
        stack.callback(remove_taps, student, *teachers)
        run = {
            "epochs": epochs,
            "seed": seed,
            "xprime": xprime,
            "accumulate": accumulate,
            "ema": ema,
            "precision": placement.precision.name,
            "compiled": pays,
        }
        call = describe(run, student, loaded, terms, data, optim=config, pick=picking)
        trainer = build_trainer(
            Plan(
                stage="distill",
                digest=call["digest"],
                seed=seed,
                epochs=epochs,
                accumulate=accumulate,
            ),
            student=student,
            teaching=Teaching(loaded),
            terms=terms,
            data=data,
            settings=settings,
            placement=placement,
            output=Output(console=console, on_epoch=_of_rank_0(on_epoch, world)),
        )
        choose = partial(choose_folder, out, call, resume=resume)
        return _trained(trainer, call, teachers, data, began, choose=choose, trackers=trackers)


def _trained(
    trainer: Trainer,
    call: dict[str, Any],
    teachers: Sequence[nn.Module],
    data: TrainData,
    checkpoint: Checkpoint | None,
    *,
    choose: Callable[[], RunFolder | None],
    trackers: Sequence[TrackerName],
) -> Result:
    """The result of a call that was found to be possible; `call` describes it in config.yaml.

    choose: makes the folder, or finds it.
    """
    world = trainer.world
    with ExitStack() as stack:
        # Made only now: a mistake found before creates no folder and deletes none of the user's.
        folder = trainer.folder = on_main(world, choose)
        before = None
        if folder is not None:
            if checkpoint is None:  # else the folder is ours already
                stack.enter_context(occupied(folder.path, world))
            before = on_main(world, folder.summary)
            if before is None:  # a finished run has been shown
                folder = folder.tracked(trackers, name="distill", config=dotted(call))
                trainer.folder = folder
        check_state(folder, checkpoint, call, world, finished=before is not None)
        if folder is not None:
            stack.enter_context(tidy(folder, folder.path.parent, world))
        stack.enter_context(advice(folder))
        taught = (before or {}).get("teacher") or _judged(trainer, teachers, data)
        if checkpoint is not None:
            trainer.resume(checkpoint)
            checkpoint.state.clear()  # as large as the student and its optimizer
        metrics = with_class_names(trainer.fit())
        metrics |= {"teacher": taught, "history": trainer.history}
        on_main(world, lambda: _finish(folder, trainer, metrics))
    student = trainer.kept()
    student.eval()  # an overridden train() may not return the network
    return Result(
        student,
        metrics,
        folder.path if folder else None,
        trainer.placement,
        data.facts.label_kind,
        trainer.best_state,
    )


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
    if data.val_loader is None:
        return None
    name = " + ".join(title_of(model) for model in teachers)
    assert not isinstance(trainer.teacher, CachedTeacher)  # caches are for recipes
    return judge(trainer.teacher, name, data.val_loader, data.facts, trainer.placement, say=say)


def _finish(folder: RunFolder | None, trainer: Trainer, metrics: Mapping[str, Any]) -> None:
    if folder is not None:
        teacher = metrics.get("teacher") or {}
        reached = teacher.get(headline(teacher))
        drawn = draw_curves(
            folder.path / "curves.png",
            {"student": trainer.history},
            title=folder.path.name,
            teachers={} if reached is None else {"teacher": reached},
        )
        trainer.console.note(drawn)
        rows = [{"run": "teacher", **teacher}] if teacher else []
        folder.finish(metrics, [*rows, {"run": "student", **metrics}])


def _data(
    loaders: tuple[Iterable[LoaderItem], Iterable[LoaderItem] | None],
    shown: Shown,
    student: nn.Module,
    terms: Sequence[LossTerm],
    placement: Placement,
    seed: int,
) -> TrainData:
    """The user's loaders for training and validation, and what the losses must know about them."""
    train_items, val_items = loaders
    use, precision = label_use(terms), placement.precision
    shape = shape_of_logits(student, shown.images_NCHW, precision, REMEDIES)
    num_classes, dense = shape[0], len(shape) == 3
    kind = kind_on_ranks(shown.labels, use, num_classes, placement.world, dense=dense)
    if use.reads and shown.labels is not None:
        check_form("student", shape, kind, shown.images_NCHW.shape[2:])
    if kind != "class":
        check_labels(terms, kind)
    pair = open_foreign(
        train_items,
        val_items,
        shown,
        use,
        kind=kind,
        num_classes=num_classes,
        seed=seed,
        placement=placement,
    )
    # A loader without a data set to count: assume that all batches are like the first.
    images = images_per_epoch(train_items, len(shown.images_NCHW) * placement.world.size)
    return TrainData(pair.train, pair.val, pair.facts, images, REMEDIES)
