"""The training loop: batches -> step -> update -> metrics -> checkpoint.

All its parts are passed in; `fastkd.training.build` makes them. `Trainer.end_epoch` evaluates,
decides whether this epoch is the best, and saves. The host waits for the device

    in `_fetch`, every `LOG_STEPS` steps and at the end of an epoch
    when the ranks vote on a stop: on GPUs only after a fetch, on CPUs in every step
    in saves within an epoch (`Plan.save_steps`)
    in every step of an optimizer that cannot skip a bad one on the device (guard: LAMB, apex)
    between epochs, to evaluate and to save

and nowhere else. Several runs may take turns, a step each: `Trainer.training` stops between steps.
"""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastkd.augment.views import ViewMaker
from fastkd.compute.collectives import all_reduce_sum, split_evenly
from fastkd.compute.placement import Placement
from fastkd.compute.ranks import World
from fastkd.data.batch import Batch, TrainLoader
from fastkd.errors import Interrupted
from fastkd.evaluation.evaluate import EvalLoader, evaluate, evaluating
from fastkd.evaluation.headline import headline, of_epoch
from fastkd.losses.base.term import LossTerm
from fastkd.models.planner import CHOOSER
from fastkd.output.console import Console
from fastkd.output.run_folder import RunFolder
from fastkd.storage.checkpoint import Checkpoint
from fastkd.storage.weights import save_weights
from fastkd.teachers.cache.cached import Answering, CachedTeacher, answers
from fastkd.training.ahead import run_ahead
from fastkd.training.checkpointing import (
    Rows,
    SavedPart,
    SumsOverRanks,
    TermStates,
    restore,
    states_of,
    write,
)
from fastkd.training.ema import EMA
from fastkd.training.epoch_end import keep_scores, summary_of, sync_statistics, tell, training_row
from fastkd.training.fallback import Fallback
from fastkd.training.guard import Guard
from fastkd.training.interrupt import StopSignal
from fastkd.training.progress import Plan, Position, Progress
from fastkd.training.recording.recorder import Recorder
from fastkd.training.step import DistillStep, Prepared
from fastkd.training.trial import errors_as_sentences
from fastkd.training.turns import to_its_end
from fastkd.training.unread import Unread
from fastkd.training.update import Update

__all__ = ["Trainer"]

LOG_STEPS = {"cpu": 10, "cuda": 50}  # a fetch drains the queue of a GPU


@dataclass(kw_only=True, eq=False)
class Trainer:
    """One student, trained once."""

    plan: Plan
    placement: Placement
    decisions: dict[str, str]
    """What `auto` resolved to (precision, compile); a resumed run repeats it."""

    # Batches.
    loader: TrainLoader
    val_loader: EvalLoader | None
    """None without labels to evaluate on: the last epoch is then kept as the best."""
    views: ViewMaker
    """Makes x' of a batch."""
    teacher: Answering | None
    """Answers before the step; None if no loss needs it."""
    shared: Callable[["Trainer", int], Iterator[Prepared]] | None = None
    """Batches of an epoch that are prepared for several trainers at once; None: this one's own."""

    # The step.
    student: nn.Module
    """The network itself, neither compiled nor wrapped."""
    update: Update
    """A prepared batch -> updated weights."""

    # Results.
    folder: RunFolder | None
    """None writes nothing; rank 0 alone writes."""
    console: Console
    on_epoch: Callable[[dict[str, Any]], object] | None = None
    """Called on rank 0 at the end of every epoch, with a copy of its row; None on every rank if
    rank 0 has none."""
    recorder: Recorder | None = None
    """Keeps in the folder what figures are drawn from."""
    progress: Progress = field(default_factory=Progress)
    history: list[dict[str, Any]] = field(default_factory=list)
    """One row per epoch, as in metrics.jsonl."""
    scores: list[dict[str, Any]] = field(default_factory=list)
    """Where pixels are labelled, what `keep_scores` keeps of the best epoch and the last."""
    unread: Unread = field(default_factory=Unread)
    """Images that could not be read."""
    best_state: dict[str, Any] | None = None
    """State dict of the best epoch's network, on the CPU, if there is no folder to keep it in."""

    @property
    def world(self) -> World:
        """The ranks of the run."""
        return self.placement.world

    # Parts of `update` that the loop also evaluates, saves or reports.

    @property
    def step(self) -> DistillStep:
        """Student and losses as one module."""
        return self.update.step

    @property
    def runner(self) -> nn.Module:
        """Student and losses as they run: compiled, wrapped by DDP."""
        return self.update.runner

    @property
    def terms(self) -> list[LossTerm]:
        """The losses, with their connectors and memory banks."""
        return self.update.terms

    @property
    def optimizer(self) -> Optimizer:
        """What applies the gradients."""
        return self.update.optimizer

    @property
    def guard(self) -> Guard:
        """Counts bad steps."""
        return self.update.guard

    @property
    def fallback(self) -> Fallback:
        """Runs the compiled parts, eagerly if they do not compile."""
        return self.update.fallback

    @property
    def ema(self) -> EMA | None:
        """Average of the student."""
        return self.update.ema

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What `totals_M` sums."""
        return self.update.metric_names

    @property
    def totals_M(self) -> Tensor:
        """fp64 sums over the epoch's good steps on this rank, in the order of `metric_names`."""
        return self.update.totals_M

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch; the summary of the run.

        Interrupted after Ctrl-C, SIGTERM or a closed terminal (state saved), RunFailed after too
        many bad steps, or if not one step was good.
        """
        return to_its_end(self.training())

    def training(self, stop: StopSignal | None = None) -> Generator[Position, None, dict[str, Any]]:
        """`fit`, step by step: yields where the run is, before its first step and after each one.

        stop: already receives signals, for several runs; None: its own.
        """
        self.console.stage(self.plan.stage)
        if self.val_loader is None:
            self.console.note(
                "there are no validation labels: no accuracy is measured, and the last epoch is "
                "kept as the best"
            )
        if self.folder and self.world.is_main:
            for said in self.folder.begin_tracking(self.history):
                self.console.note(said)
        kept = closing(self.teacher) if isinstance(self.teacher, CachedTeacher) else nullcontext()
        signals = nullcontext(stop) if stop else StopSignal()
        with signals as asked, kept, errors_as_sentences():
            if self.recorder and self.progress.position == (0, 0):
                self.recorder.before_training(self._written())
            while self.progress.epoch < self.plan.epochs:
                yield from self._train_epoch(self.progress.epoch, asked)
                self.end_epoch()
                yield self.progress.position
                # Also after the last epoch: other stages of a recipe may follow this one.
                if asked.agreed(self.world):
                    self._interrupt(asked)
        return self.summary()

    def _train_epoch(self, epoch: int, stop: StopSignal) -> Iterator[Position]:
        progress, steps = self.progress, self.loader.steps_per_epoch
        device = self.world.device
        yield progress.position
        self.runner.train()
        clock = time.perf_counter()
        for prepared in run_ahead(self.prepare(epoch), device):
            self.optimize(prepared, epoch, progress.step)
            progress.step += 1
            fetching = progress.step % LOG_STEPS[device.type] == 0 or progress.step == steps
            if fetching:
                self._fetch()
            # After the fetch: until then a GPU may still be computing. Others take turns meanwhile.
            now = time.perf_counter()
            progress.epoch_s += now - clock
            clock = now
            yield progress.position
            # Asking the other ranks would make a GPU wait, so ask only when it waits anyway.
            asking = fetching or self.world.size == 1 or device.type == "cpu"
            if asking and stop.agreed(self.world) and progress.step < steps:
                self._interrupt(stop)
            saving = self.plan.save_steps and progress.step % self.plan.save_steps == 0
            if saving and progress.step < steps:
                self.save()

    def prepare(self, epoch: int) -> Iterator[Prepared]:
        """Batches with views and targets; only the loader counts as data wait."""
        step, shown = self.progress.step, self.plan.shown_epoch(epoch)
        if isinstance(self.teacher, CachedTeacher):
            # What was written is read, should the same views come again.
            self.teacher.close()
        if self.shared is not None:
            yield from self.shared(self, shown)
            return
        batches = self.loader.epoch(shown, step)
        while True:
            clock = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.received(batch, time.perf_counter() - clock)
            yield self.prepared(batch, shown, step)
            step += 1

    def received(self, batch: Batch, wait_s: float) -> None:
        """Count what a batch lacks, and how long it was waited for."""
        self.unread.count(batch.unread)
        self.progress.wait_s += wait_s

    def prepared(self, batch: Batch, epoch: int, step: int) -> Prepared:
        """A batch of the loader with its views and targets. epoch: whose views are shown."""
        clock = self.update.clock
        clock.turn(step)
        with clock.part("views"):
            # Not a wait for data: ranks exchange images there.
            batch = self.views.mixed(batch, epoch, step)
            views = self.views(batch, epoch, step)
        with nullcontext() if self.teacher is None else clock.part("teacher"):
            targets = self.fallback.run(partial(answers, self.teacher, views, epoch, step))
        targets |= self.views.xprime_targets(batch, targets, epoch, step)
        # The step needs the views, not what they were made from.
        batch = batch._replace(second_NCHW=None)
        rows_of_ranks = dict.fromkeys(views, split_evenly(batch.global_size, self.world.size))
        return Prepared(batch, views, targets, batch.global_size, rows_of_ranks)

    def optimize(self, prepared: Prepared, epoch: int, step: int) -> None:
        """One optimizer step; a bad one changes nothing."""
        if self.recorder:
            self.recorder.before_update(prepared, step)
        self.update(prepared, epoch, step)

    def compile_one_step(self) -> None:
        """One step, to find what fails in it; the trainer and its student are then spoilt."""
        self.runner.train()
        for prepared in islice(self.prepare(0), 1):
            self.optimize(prepared, 0, 0)

    def end_epoch(self) -> None:
        """Evaluate, keep the best, write one row, save."""
        plan, progress = self.plan, self.progress
        if self.world.size > 1:
            all_reduce_sum(self.totals_M)
            sync_statistics(self.student, self.ema.module if self.ema else None, self.terms)
        sums = dict(zip(self.metric_names, self.totals_M.tolist(), strict=True))
        lr = self.optimizer.param_groups[0]["lr"]
        row = training_row(
            sums,
            progress,
            lr=lr,
            skipped=self.guard.counts()[1],
            unread=self.unread.end_epoch(self.world, self.console),
        )
        last = row["epoch"] == plan.epochs
        # Images of bad steps do not count.
        if last and not any(one["images_per_s"] for one in (*self.history, row)):
            raise self.guard.never_good()
        better = self.val_loader is None
        if better:
            progress.best_epoch = row["epoch"]
        elif last or row["epoch"] % plan.eval_epochs == 0:
            found = self._evaluate()
            row |= of_epoch(found)
            metric = found[headline(found)]
            better = metric > progress.best
            if better:
                progress.best, progress.best_epoch = metric, row["epoch"]
            keep_scores(self.scores, found, row["epoch"], better=better)
        self.history.append(row)
        if better:
            self._keep_best(row)
        folder = self._written()
        # These rows first: a kill in between leaves an extra one, which a resumed run removes.
        if self.recorder:
            self.recorder.end_epoch(progress, folder)
        progress.next_epoch()
        self.totals_M.zero_()
        if folder:
            folder.append_metrics(row)
        self.save()
        self.console.epoch(row, plan.epochs)
        tell(self.on_epoch, row, self.world, saved=self.folder is not None)

    def _written(self) -> RunFolder | None:
        """The folder, on the rank that writes there."""
        return self.folder if self.world.is_main else None

    def _evaluate(self) -> dict[str, Any]:
        assert self.val_loader is not None
        precision = self.placement.precision
        with evaluating(self.kept()) as kept:
            return evaluate(kept, self.val_loader, precision, self.world, self.step.label_kind)

    def kept(self) -> nn.Module:
        """The network to evaluate and keep: the student or its average, as the terms export it."""
        kept = self.ema.module if self.ema else self.student
        for term in self.terms:
            kept = term.export(kept)
        return kept

    def _keep_best(self, row: dict[str, Any]) -> None:
        kept = self.kept()
        if not self.folder:
            self.best_state = {
                key: value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value
                for key, value in kept.state_dict().items()
            }
        elif self.world.is_main:
            # The module: for a network that no name can rebuild, whose weights these are.
            facts = {"epoch": str(row["epoch"]), "module": type(kept).__qualname__}
            if self.val_loader is not None:
                facts[headline(row)] = f"{self.progress.best:.6f}"
            save_weights(self.folder.path / "best.safetensors", kept, self.plan.metadata | facts)

    def summary(self) -> dict[str, Any]:
        """Last and best headline metric and the rates of the run; for summary.json."""
        return summary_of(self.plan, self.progress, self.history, self.scores)

    def saved_parts(self) -> dict[str, SavedPart | None]:
        """Everything that `last.pt` saves and a resumed run restores, by its key there."""
        return {
            "progress": self.progress,
            "student": self.student,
            "terms": TermStates(self.terms),
            "optimizer": self.optimizer,
            "guard": self.guard,
            "scaler": self.update.scaler,
            "ema": self.ema,
            "totals": SumsOverRanks(self.totals_M, self.world),
            "history": Rows(self.history),
            "scores": Rows(self.scores) if self.step.label_kind == "pixel" else None,
        }

    def save(self) -> None:
        """Write last.pt on rank 0; the others only add their share of the running sums."""
        self.guard.check()
        states = states_of(self.saved_parts())
        if folder := self._written():
            decisions = self.decisions | {"kernels": CHOOSER.export()}
            write(folder.path / "last.pt", self.plan.digest, decisions, states)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a last.pt, which every rank has read."""
        plan, progress = self.plan, self.progress
        restore(checkpoint, plan.digest, self.saved_parts())
        if folder := self._written():
            folder.set_metrics(self.history)
            folder.cut_records(progress.epoch)
        if progress.epoch == plan.epochs:
            self.console.note(f"resumed {plan.stage} after its last epoch, {plan.epochs}")
            return
        self.console.note(
            f"resumed {plan.stage} at epoch {progress.epoch + 1} of {plan.epochs}, "
            f"step {progress.step} of {self.loader.steps_per_epoch}"
        )

    def _fetch(self) -> None:
        """Wait for the device: counters of bad steps, then running means for the screen."""
        self.guard.check()
        progress = self.progress
        sums = dict(zip(self.metric_names, self.totals_M.tolist(), strict=True))
        seconds = max(progress.epoch_s, 1e-9)
        self.console.progress(
            epoch=progress.epoch,
            epochs=self.plan.epochs,
            step=progress.step,
            steps=self.loader.steps_per_epoch,
            images_per_s=sums["images"] * self.world.size / seconds,
            data_wait=min(progress.wait_s / seconds, 1.0),
            loss=sums["loss"] / (sums["images"] or torch.nan),
        )

    def _interrupt(self, stop: StopSignal) -> None:
        self.save()
        where = f"at epoch {self.progress.epoch + 1}, step {self.progress.step}"
        if self.progress.epoch == self.plan.epochs:
            where = "after the last epoch"
        kept = "the state is saved" if self.folder else "nothing was saved, there is no run folder"
        raise Interrupted(f"{self.plan.stage} stopped {where}; {kept}.", stop.code or 130)
