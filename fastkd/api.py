"""`fastkd.distill`: the trainer for people with their own networks and loaders.

    result = fastkd.distill(student, teacher, train_loader, val_loader, epochs=10)

Same engine as the recipes; see `distill`.
"""

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastkd.build import Engine, TeacherNet, build_trainer, decide
from fastkd.data.batch import Batch
from fastkd.distributed import World, on_main, open_world
from fastkd.errors import UserError
from fastkd.losses.logits import KD
from fastkd.losses.term import LossTerm
from fastkd.recipe.schema import OptimConfig
from fastkd.report.console import Console
from fastkd.report.run_folder import RunFolder, environment
from fastkd.trainer import Plan
from fastkd.weights import describe

__all__ = ["ForeignLoader", "Result", "distill"]

LoaderItem = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Result:
    """What `distill` returns."""

    student: nn.Module
    """The trained student, last epoch (the averaged one with ema, with what a loss makes of its
    head), in evaluation mode."""
    metrics: dict[str, Any]
    """accuracy_last, accuracy_best, best_epoch, images_per_s, ...; `history`: a row an epoch."""
    run_dir: Path | None
    """Where last.pt and best.safetensors lie; None if nothing was written."""


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    train_loader: Iterable[LoaderItem],
    val_loader: Iterable[LoaderItem],
    *,
    epochs: int,
    losses: Sequence[LossTerm] | None = None,
    optim: OptimConfig | None = None,
    lr: float | None = None,
    xprime: Literal["none", "cutmix", "mixup"] = "none",
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    compile: Literal["auto", "on", "off"] = "auto",
    channels_last: bool = True,
    accumulate: int = 1,
    ema: float | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> Result:
    """Train `student` to imitate `teacher` on batches of your own loaders.

    Args:
        student: any nn.Module, images [N, C, H, W] -> logits [N, classes]; trained in place.
        teacher: likewise, frozen here (evaluation mode, no gradients); None to train on labels.
            It sees exactly the images that the student sees.
        train_loader: yields (images, labels) or (images, labels, sample ids); re-iterated every
            epoch, a sampler's `set_epoch` is called. Sized (`len`).
        val_loader: likewise; every sample once.
        losses: LossTerms; a tap of your own network is a module path, as in
            `AT(pairs={"layer2": "layer2"}, weight=1000)`. Default: KD at T 4, 0.1 CE + 0.9 KL.
        optim: optimizer and schedule; default SGD with momentum 0.9, cosine, lr 0.05.
        lr: replaces that of `optim`.
        out: run folder to write; None writes nothing. resume=True goes on with its last.pt (the
            loader is asked for the batches before the saved step again, and they are thrown away).

    Raises:
        UserError: class counts differ, a tap does not exist, a loss needs ids the loader lacks.
        RunFailed: losses or gradients stayed non-finite.
    """
    _check_loader(train_loader)
    terms = list(losses) if losses is not None else [KD()]
    if teacher is None and any("/teacher/" in need for term in terms for need in term.needs):
        raise UserError("a loss needs a teacher but teacher is None; use losses=[CrossEntropy()]")
    if xprime == "none" and any(
        need.startswith("xprime/") for term in terms for need in term.needs
    ):
        raise UserError("a loss needs the view x': give xprime='cutmix' or xprime='mixup'")
    settings = optim or OptimConfig(schedule="cosine")
    if lr is not None:
        settings = settings.model_copy(update={"lr": lr})
    settings = settings.model_copy(
        update={"milestones": tuple(m * epochs if m < 1 else m for m in settings.milestones)}
    )
    with open_world(device) as world:
        console = Console(enabled=world.is_main and not quiet)
        wants_ids = next((term.name for term in terms if term.uses_index), None)
        train = ForeignLoader(train_loader, world, seed, channels_last, wants_ids)
        val = ForeignLoader(val_loader, world, seed, channels_last)
        first = next(iter(val_loader))
        image_shape = tuple(first[0].shape[1:])
        if len(image_shape) != 3:
            raise UserError(f"images must be [N, C, H, W], got {tuple(first[0].shape)}")
        resolved, compiled = decide(
            precision=precision,
            compile_mode=compile,
            device=world.device,
            student=student.to(world.device),
            teacher=teacher.to(world.device) if teacher is not None else None,
            terms=terms,
            image_shape=image_shape,
            images=train.num_samples * epochs,
        )
        # What the losses draw at first is the same in every call, and on every rank.
        torch.manual_seed(seed)
        trainer = build_trainer(
            Plan(
                stage="distill",
                digest=_digest(
                    [(term.name, term.needs, sorted(term.weights.items())) for term in terms],
                    settings.model_dump(),
                    [(name, tuple(p.shape)) for name, p in student.named_parameters()],
                    (epochs, seed, xprime, accumulate, ema, resolved.name, compiled),
                    train.steps_per_epoch,
                ),
                seed=seed,
                epochs=epochs,
                accumulate=accumulate,
                metadata=describe(student),
            ),
            student=student,
            teacher=TeacherNet(teacher) if teacher is not None else None,
            terms=terms,
            optim=settings,
            engine=Engine(resolved, compiled, channels_last, ema=ema, fullgraph=False),
            loader=train,
            val_loader=val,
            image_shape=image_shape,
            num_classes=_num_classes(student, first[0][:1].to(world.device)),
            train_labels_N=_labels(train_loader, train.num_samples, wants_ids),
            normalization=((0.0,) * 3, (1.0,) * 3),
            xprime=xprime,
            world=world,
            folder=None,
            console=console,
        )
        try:
            folder = trainer.folder = on_main(world, lambda: _folder(out, resume))
            if folder is not None and resume:
                trainer.resume(folder.path / "last.pt")
            metrics = trainer.fit() | {"history": trainer.history}
            on_main(world, lambda: folder.finish(metrics) if folder else None)
        finally:
            trainer.remove_hooks()
        return Result(trainer.kept().eval(), metrics, folder.path if folder else None)


class ForeignLoader:
    """The user's loader in the protocol of the trainer."""

    def __init__(
        self,
        items: Iterable[LoaderItem],
        world: World,
        seed: int,
        channels_last: bool,
        wants_ids: str | None = None,
    ) -> None:
        self.items, self.world, self.device, self.seed = items, world, world.device, seed
        self.wants_ids = wants_ids
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.steps_per_epoch = len(items) if isinstance(items, Sized) else 0
        dataset = getattr(items, "dataset", None)
        self.num_samples = len(dataset) if isinstance(dataset, Sized) else 0
        self._batch_size = 0

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches on the device; those before `start_step` are drawn and thrown away."""
        for part in (self.items, getattr(self.items, "sampler", None)):
            set_epoch = getattr(part, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
        # A shuffling DataLoader draws its order from its own generator or the global one, and the
        # images of a batch from the global one: the same in every replay, wherever it starts.
        seed = (self.seed * 1_000_003 + epoch) & 0x7FFFFFFF
        for part in (self.items, getattr(self.items, "sampler", None)):
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
        torch.manual_seed(seed)
        items = iter(self.items)
        for step in range(self.steps_per_epoch):
            torch.manual_seed(seed << 32 | step)
            item = next(items, None)
            if item is None:
                return
            if step < start_step:
                continue
            images, labels, *ids = item
            if self.wants_ids and not ids:
                raise UserError(
                    f"the loss {self.wants_ids} keeps state per sample: make the training loader "
                    f"yield (images, labels, sample ids)"
                )
            self._batch_size = len(labels)
            index = ids[0] if ids else torch.full((len(labels),), -1)
            images = images.to(self.device, non_blocking=True, memory_format=self.layout)
            yield Batch(images, labels.to(self.device), index.to(self.device))

    def global_size(self, step: int) -> int:
        """Of the batch that was yielded last, over all ranks, which have loaders of their own."""
        return self._batch_size * self.world.size


def _check_loader(loader: Iterable[LoaderItem]) -> None:
    wanted = "a torch DataLoader over a map-style data set"
    try:
        if not isinstance(loader, Sized) or not len(loader):
            raise TypeError
    except TypeError:
        raise UserError(f"train_loader needs a length: {wanted}") from None
    if isinstance(loader, Iterator):
        raise UserError(f"train_loader can be read only once, and an epoch is not enough: {wanted}")


def _folder(out: str | Path | None, resume: bool) -> RunFolder | None:
    if out is None:
        if resume:
            raise UserError("resume=True needs out=, the folder to go on with")
        return None
    if resume:
        return RunFolder.open(Path(out))
    folder = RunFolder.create(Path("runs"), "distill", "", out=Path(out))
    folder.write_json("environment.json", environment())
    return folder


def _digest(*facts: Any) -> str:
    return sha256(repr(facts).encode()).hexdigest()[:16]


def _num_classes(student: nn.Module, image: Tensor) -> int:
    training = student.training
    with torch.no_grad():
        logits = student.eval()(image)
    student.train(training)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise UserError("the student must return logits [N, classes] as one tensor")
    return logits.shape[1]


def _labels(loader: Any, num_samples: int, wants_ids: str | None) -> Tensor:
    """Labels by sample id; only losses that keep state per sample look at them."""
    targets = getattr(getattr(loader, "dataset", None), "targets", None)
    if targets is not None:
        return torch.as_tensor(targets)
    if wants_ids:
        raise UserError(
            f"the loss {wants_ids} needs the label of every training sample: give the loader's "
            f"dataset an attribute `targets`, a list of labels by sample id"
        )
    return torch.zeros(num_samples, dtype=torch.int64)
