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
from pydantic import ValidationError
from torch import Tensor, nn

from fastkd.augment.config import PickConfig
from fastkd.augment.mix import MixKind
from fastkd.augment.pick import PickCriterion
from fastkd.augment.views import XPRIMES
from fastkd.compute.compiling import CompileChoice
from fastkd.compute.machine import environment
from fastkd.compute.placement import Placement
from fastkd.compute.precision import PrecisionChoice
from fastkd.compute.ranks import DeviceChoice, on_main, open_world
from fastkd.config.mistakes import explain
from fastkd.data.loaders.foreign import (
    LoaderItem,
    check_loader,
    images_per_epoch,
    open_foreign,
    peek,
)
from fastkd.errors import UserError
from fastkd.evaluation.evaluate import evaluating
from fastkd.losses.base.needs import XPRIME_TEACHER_LOGITS
from fastkd.losses.base.term import LossTerm
from fastkd.losses.drop_in import KDLoss
from fastkd.losses.logits import KD
from fastkd.models.card import title_of
from fastkd.models.taps import check_network, remove_taps
from fastkd.output.console import Console
from fastkd.output.occupancy import occupied, tidy
from fastkd.output.run_folder import RunFolder
from fastkd.teachers.loaded import LoadedNet
from fastkd.training.build import Engine, build_trainer, decide
from fastkd.training.config import OptimConfig
from fastkd.training.trainer import Plan

__all__ = ["Result", "distill"]


@dataclass(frozen=True)
class Result:
    """What `distill` returns."""

    student: nn.Module
    """The trained student, last epoch (the averaged one with ema, with what a loss makes of its
    head), in evaluation mode."""
    metrics: dict[str, Any]
    """accuracy_last, accuracy_best (or map_..), best_epoch, images_per_s, ...; `history`: a row an
    epoch."""
    run_dir: Path | None
    """Where last.pt and best.safetensors lie; None if nothing was written."""


def distill(
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
) -> Result:
    """Train `student` to imitate `teacher` on batches of your own loaders.

    Args:
        student: any nn.Module, images [N, C, H, W] -> logits [N, classes]; trained in place, all of
            it in training mode but what `fastkd.models.head.freeze_backbone` froze. Parameters that
            require no gradient stay as they are.
        teacher: likewise, frozen here (evaluation mode, no gradients); None to train on labels.
            It sees exactly the images that the student sees. A list of networks teaches by the
            mean of their probabilities (`fastkd.teachers.ensemble.Ensemble`).
        train_loader: yields (images, labels) or (images, labels, sample ids); re-iterated every
            epoch, a sampler's `set_epoch` is called. Sized (`len`).
        val_loader: likewise; every sample once. Labels are class ids [N], or [N, classes] of 0 and
            1 (-1: unknown) for images with several: then give a loss such as `BinaryCrossEntropy`;
            the metrics have mAP in place of accuracy.
        losses: LossTerms; a tap of your own network is a module path, as in
            `AT(pairs={"layer2": "layer2"}, weight=1000)`. Default: KD at T 4, 0.1 CE + 0.9 KL.
        optim: optimizer and schedule; default SGD with momentum 0.9, cosine, lr 0.05.
        lr: replaces that of `optim`.
        xprime: the second view of every batch, made of it, for losses such as
            `KD(views=("x", "xprime"))`.
        pick: choose x' from a pool of them, by what makes an image hard ("kl" is the paper's) or
            with all of its settings; the metrics then have `pick_ratio`, the mean of it over the
            chosen images divided by that over the pool.
        out: run folder to write; None writes nothing. resume=True goes on with its last.pt, if it
            has one (the loader is asked for the batches before the saved step again, and they are
            thrown away).

    Raises:
        UserError: class counts differ, a tap does not exist, a loss needs ids the loader lacks,
            loaders or arguments that cannot be used.
        RunFailed: losses or gradients stayed non-finite.
    """
    for name, value, choices in (
        ("precision", precision, ("auto", "bf16", "fp16", "fp32")),
        ("compile", compile, ("auto", "on", "off")),
        ("xprime", xprime, XPRIMES),
    ):
        if value not in choices:
            raise UserError(f"distill: {name}={value!r}; choose one of {', '.join(choices)}")
    for name, number in (("epochs", epochs), ("accumulate", accumulate)):
        if not isinstance(number, int) or number < 1:
            raise UserError(f"distill: {name}={number!r}; expected a whole number above 0")
    if ema is not None and not 0 <= ema < 1:
        raise UserError(f"distill: ema={ema!r}; expected a decay from 0 to below 1, or None")
    given: Any = teacher  # a name, too, is a sequence
    several = isinstance(given, nn.ModuleList | Sequence) and not isinstance(given, str)
    teachers: list[Any] = list(given) if several else [] if given is None else [given]
    for name, model in (("student", student), *(("teacher", each) for each in teachers)):
        check_network(f"distill: {name}", model)
    trained = {parameter for parameter in student.parameters() if parameter.requires_grad}
    for each in teachers:
        if each is student or not trained.isdisjoint(each.parameters()):
            what = "are one object" if each is student else "share layers that are to be trained"
            raise UserError(
                f"distill: student and teacher {what}, and the teacher is frozen: give it a copy "
                f"of its own, copy.deepcopy(model)"
            )
    terms = [KD()] if losses is None else _terms(losses)
    needs = {need for term in terms for need in term.needs}
    sees_xprime = any(need.view == "xprime" for need in needs)
    if not teachers and any(need.net == "teacher" for need in needs):
        raise UserError("a loss needs a teacher but teacher is None; use losses=[CrossEntropy()]")
    if xprime == "none" and sees_xprime:
        raise UserError("a loss needs the view x': give xprime='cutmix' or xprime='mixup'")
    picking = _pick_config(pick)
    if picking and XPRIME_TEACHER_LOGITS not in needs:
        raise UserError(
            "pick chooses x' by what the teacher says to it, which no loss looks at: give "
            "xprime='cutmix' and losses=[KD(views=('x', 'xprime'))]"
        )
    if xprime != "none" and not sees_xprime:
        raise UserError(
            f"xprime={xprime!r} would make a view x' that no loss looks at: give "
            f"losses=[KD(views=('x', 'xprime'))], or leave it away"
        )
    settings = optim or OptimConfig(schedule="cosine")
    milestones = tuple(m * epochs if m < 1 else m for m in settings.milestones)
    changes = {"milestones": milestones} | ({} if lr is None else {"lr": lr})
    keys = settings.model_dump() | changes
    try:
        settings = OptimConfig.model_validate(keys)
    except ValidationError as error:
        mistakes = explain(error, OptimConfig, keys, ())
        raise UserError(f"distill: {'; '.join(mistakes)}") from None
    with ExitStack() as stack:
        world = stack.enter_context(open_world(device))
        for name, loader in (("train_loader", train_loader), ("val_loader", val_loader)):
            check_loader(name, loader, world, exact=name == "val_loader")
        # The caller's random numbers go on where they were.
        stack.enter_context(
            torch.random.fork_rng([world.device] if world.device.type == "cuda" else [])
        )
        console = Console(enabled=world.is_main and not quiet)
        wants_ids = next((term.name for term in terms if term.uses_index), None)
        shown = peek(val_loader, world.device, channels_last=channels_last)
        image, label = shown.images_NCHW[:1], shown.labels_N[:1]
        resolved, compiled = decide(
            precision=precision,
            compile_mode=compile,
            device=world.device,
            student=student.to(world.device),
            teachers=[each.to(world.device) for each in teachers],
            terms=terms,
            image_shape=shown.image_shape,
            # Of a loader that has no data set to count: as large batches as those of validation.
            images=images_per_epoch(train_loader, len(shown.labels_N) * world.size) * epochs,
        )
        data = open_foreign(
            train_loader,
            val_loader,
            shown,
            num_classes=_num_classes(student, image, label),
            seed=seed,
            placement=Placement(world, resolved, channels_last),
            wants_ids=wants_ids,
            wants_classes=next(
                (t.name for t in terms if t.label_kind and not t.takes_no_label), None
            ),
        )
        # What the losses draw at first is the same in every call, and on every rank.
        torch.manual_seed(seed)
        # Whatever happens, the networks are the user's and keep none of our hooks.
        stack.callback(remove_taps, student, *teachers)
        trainer = build_trainer(
            Plan(
                stage="distill",
                digest=_digest(
                    [
                        (term.name, term.needs, sorted(term.weights.items()), settings_of(term))
                        for term in terms
                    ],
                    settings.model_dump(),
                    [
                        (name, tuple(p.shape), p.requires_grad)
                        for name, p in student.named_parameters()
                    ],
                    [[tuple(p.shape) for p in each.parameters()] for each in teachers],
                    (epochs, seed, xprime, accumulate, ema, resolved.name, compiled),
                    data.train.steps_per_epoch,
                    *([picking.model_dump()] if picking else []),
                ),
                seed=seed,
                epochs=epochs,
                accumulate=accumulate,
            ),
            student=student,
            teachers=tuple(LoadedNet(each, name=title_of(each)) for each in teachers),
            terms=terms,
            optim=settings,
            engine=Engine(resolved, compiled, channels_last, ema=ema, fullgraph=False),
            loader=data.train,
            val_loader=data.val,
            image_shape=data.facts.image_shape,
            num_classes=data.facts.num_classes,
            multilabel=data.facts.multilabel,
            train_labels_N=data.facts.labels_N,
            normalization=data.facts.normalization,
            xprime=xprime,
            pick=picking,
            world=world,
            folder=None,
            console=console,
        )
        folder = trainer.folder = on_main(world, lambda: _folder(out, resume))
        if folder is not None:
            stack.enter_context(occupied(folder.path, world))
            stack.enter_context(tidy(folder, folder.path.parent, world))
            if resume and on_main(world, (folder.path / "last.pt").exists):
                trainer.resume(folder.path / "last.pt")
        metrics = trainer.fit() | {"history": trainer.history}
        on_main(world, lambda: folder.finish(metrics) if folder else None)
        return Result(trainer.kept().eval(), metrics, folder.path if folder else None)


def _terms(losses: object) -> list[LossTerm]:
    """The losses as they were given; UserError where they are no list of LossTerms."""
    if isinstance(losses, nn.Module | type) or not isinstance(losses, Iterable):
        raise UserError(f"distill: losses={_called(losses)}; expected a list, such as [KD()]")
    terms = list[LossTerm]()
    for term in losses:
        if isinstance(term, KDLoss):
            raise UserError(
                "distill: KDLoss is a function of logits, for a training loop of your own; as one "
                "of losses=[..] the same loss is KD(temperature=.., weight=.., ce_weight=..)"
            )
        if isinstance(term, type) and issubclass(term, LossTerm):
            raise UserError(f"distill: losses=[{term.__name__}] has a class; call it, as in [KD()]")
        if not isinstance(term, LossTerm):
            raise UserError(
                f"distill: losses has {_called(term)}; expected LossTerms, such as KD() or "
                f"AT(pairs=..), or a class of your own derived from fastkd.losses.LossTerm"
            )
        terms.append(term)
    if not terms:
        raise UserError("losses=[] would train nothing: leave it away for KD, or give a loss")
    return terms


def _called(given: object) -> str:
    if isinstance(given, nn.Module):
        return f"{type(given).__name__}(..)"
    return given.__name__ if isinstance(given, type) else repr(given)


def _folder(out: str | Path | None, resume: bool) -> RunFolder | None:
    if out is None:
        if resume:
            raise UserError("resume=True needs out=, the folder to go on with")
        return None
    if resume:
        return RunFolder.open(Path(out))
    if Path(out).is_dir() and any(Path(out).iterdir()):
        raise UserError(
            f"out={out} exists and is not empty: go on with it by resume=True, or choose another "
            f"folder"
        )
    folder = RunFolder.create(Path("runs"), "distill", "", out=Path(out))
    folder.write_json("environment.json", environment())
    return folder


def _pick_config(pick: PickConfig | PickCriterion | None) -> PickConfig | None:
    criteria = get_args(PickCriterion)
    if pick is None or isinstance(pick, PickConfig):
        return pick
    if pick not in criteria:
        raise UserError(
            f"distill: pick={pick!r}; choose one of {', '.join(criteria)}, or give a PickConfig"
        )
    return PickConfig(criterion=pick)


def settings_of(term: LossTerm) -> list[tuple[str, str]]:
    """Its class and what its user set: temperature, form, ...; nothing that changes as it works."""
    plain = (bool, int, float, str, tuple, type(None))
    given = {name: vars(term).get(name) for name in signature(type(term)).parameters}
    found = [(name, repr(value)) for name, value in given.items() if isinstance(value, plain)]
    return [("class", type(term).__qualname__), *found]


def _digest(*facts: Any) -> str:
    return sha256(repr(facts).encode()).hexdigest()[:16]


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
