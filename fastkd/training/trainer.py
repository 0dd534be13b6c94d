"""The training loop: batches -> step -> update -> metrics -> checkpoint.

It owns nothing that it can be handed; `fastkd.training.build` makes the parts. Within an epoch's
steps the
host waits for the device in `_fetch` only, apart from the ranks' vote on a stop beside it (on CPUs
in every step), saves in mid-epoch (`save_steps`) and optimizers that cannot skip a bad step on the
device (guard.py: LAMB, apex). Between epochs `_end_epoch` and `save` wait.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median_high
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.augment.pick import Pick
from fastkd.augment.views import ViewMaker
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World, all_reduce_sum, split_evenly, sync_buffers, unsynchronised
from fastkd.data.batch import TrainLoader
from fastkd.data.draws import step_seed
from fastkd.errors import Interrupted
from fastkd.evaluation.evaluate import EvalLoader, evaluate, evaluating
from fastkd.evaluation.headline import headline, of_epoch
from fastkd.losses.base.schedules import scheduled_values
from fastkd.losses.base.term import LossTerm
from fastkd.output.console import Console
from fastkd.output.run_folder import RunFolder
from fastkd.storage.checkpoint import load_checkpoint, save_checkpoint
from fastkd.storage.weights import save_weights
from fastkd.training.ahead import run_ahead
from fastkd.training.ema import EMA
from fastkd.training.guard import Guard
from fastkd.training.interrupt import StopSignal
from fastkd.training.optim import set_lr
from fastkd.training.schedules import Schedule
from fastkd.training.step import DistillStep, Prepared, StepOutput

__all__ = ["Plan", "Progress", "Trainer"]

LOG_STEPS = {"cpu": 10, "cuda": 50}  # a fetch lets the queue of a GPU run empty


@dataclass(frozen=True)
class Plan:
    """What the loop itself needs of a recipe."""

    stage: str
    digest: str
    seed: int
    epochs: int
    accumulate: int = 1
    clip_norm: float | None = None
    save_steps: int | None = None
    eval_epochs: int = 1
    epoch_factor: float = 1.0
    """What the recipe multiplied its epochs with; the losses' schedules are stretched likewise."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Goes into best.safetensors."""
    decisions: dict[str, Any] = field(default_factory=dict)
    """What `auto` came to (precision, compile); a resumed run repeats it."""


@dataclass
class Progress:
    """Where a run stands, `best` in the headline metric; saved with every checkpoint."""

    epoch: int = 0
    step: int = 0
    """Steps done in this epoch."""
    best: float = -1.0
    best_epoch: int = 0
    rows: int = 0
    """Metric rows written so far; later ones are cut at resume."""
    epoch_s: float = 0.0
    wait_s: float = 0.0


class Trainer:
    """One student, trained once."""

    def __init__(
        self,
        plan: Plan,
        *,
        step: DistillStep,
        runner: nn.Module,
        student: nn.Module,
        teacher: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None,
        loader: TrainLoader,
        val_loader: EvalLoader,
        views: ViewMaker,
        pick: Pick | None = None,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        precision: Precision,
        guard: Guard,
        ema: EMA | None,
        world: World,
        folder: RunFolder | None,
        console: Console,
    ) -> None:
        self.plan, self.step, self.runner, self.student = plan, step, runner, student
        self.teacher, self.loader, self.val_loader, self.views = teacher, loader, val_loader, views
        self.pick = pick
        self.optimizer, self.schedule, self.precision = optimizer, schedule, precision
        self.guard, self.ema, self.world = guard, ema, world
        self.folder, self.console = folder, console
        self.scaler = precision.scaler()
        self.terms = [term for term in step.terms if isinstance(term, LossTerm)]
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        self.metric_names = (*step.metric_names, *(("pick_ratio",) if pick is not None else ()))
        self.totals_M = torch.zeros(len(self.metric_names), device=world.device).double()
        self.progress = Progress()
        self.history: list[dict[str, Any]] = []

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch; the summary of the run.

        Interrupted after Ctrl-C, SIGTERM or a closed terminal (state saved), RunFailed after too
        many bad steps, or where not one was good.
        """
        self.console.stage(self.plan.stage)
        with StopSignal() as stop:
            while self.progress.epoch < self.plan.epochs:
                self._train_epoch(self.progress.epoch, stop)
                self._end_epoch()
                # Also after the last epoch: other stages of a recipe may follow this one.
                if stop.agreed(self.world):
                    self._interrupt(stop)
        return self.summary()

    def _train_epoch(self, epoch: int, stop: StopSignal) -> None:
        progress, steps = self.progress, self.loader.steps_per_epoch
        self.runner.train()
        clock, every = time.perf_counter(), LOG_STEPS[self.world.device.type]
        for prepared in run_ahead(self.prepare(epoch), self.world.device):
            self.optimize(prepared, epoch, progress.step)
            progress.step += 1
            fetching = progress.step % every == 0 or progress.step == steps
            if fetching:
                self._fetch()
            # After the fetch: until then a GPU may still be at work on these steps.
            now = time.perf_counter()
            progress.epoch_s += now - clock
            clock = now
            # Asking the other ranks would make a GPU wait: there only where it waits anyway.
            asking = fetching or self.world.size == 1 or self.world.device.type == "cpu"
            if asking and stop.agreed(self.world) and progress.step < steps:
                self._interrupt(stop)
            due = self.plan.save_steps and progress.step % self.plan.save_steps == 0
            if due and progress.step < steps:
                self.save()

    def prepare(self, epoch: int) -> Iterator[Prepared]:
        """Batches with views and teacher; only the loader and the views count as data wait."""
        step = self.progress.step
        batches = self.loader.epoch(epoch, step)
        while True:
            clock = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            views = self.views(batch, epoch, step)
            self.progress.wait_s += time.perf_counter() - clock
            teacher = self.teacher(views) if self.teacher else {}
            num = self.loader.global_size(step)
            rows_of_ranks = split_evenly(num, self.world.size)
            teacher |= self.views.mixed(batch, teacher, epoch, step, rows_of_ranks)
            yield Prepared(batch, views, teacher, num, dict.fromkeys(views, rows_of_ranks))
            step += 1

    def optimize(self, prepared: Prepared, epoch: int, step: int) -> None:
        """One optimizer step; a bad one changes nothing."""
        done = epoch * self.loader.steps_per_epoch + step
        set_lr(self.optimizer, self.schedule.lr_factor(done), self.schedule.momentum(done))
        torch.manual_seed(step_seed(self.plan.seed, epoch, step, self.world.rank))
        schedule = self._scheduled(epoch + step / self.loader.steps_per_epoch)
        self.guard.before_step()
        done_M: list[Tensor] = []
        commits: list[Callable[[Tensor], None]] = []
        loss = torch.zeros((), device=self.world.device)
        rows, ratio = prepared.global_size // self.world.size, list[Tensor]()
        if self.pick is not None:  # compiled, it has no truth value
            # Here and not with the views: the student scores with its weights of this step.
            picked = self.pick(prepared.views["xprime"], prepared.teacher["xprime/teacher/logits"])
            pools = [num * self.views.pool for num in prepared.rows_of_ranks["x"]]
            chosen = tuple(self.pick.num_chosen(num) for num in pools)
            prepared = prepared.chosen("xprime", picked.index_K, chosen)
            rows, ratio = min(rows, *chosen), [picked.ratio]
        # As many on every rank, or terms and batch norms that gather over the ranks would wait for
        # ever; a partial batch, or what is picked, may be fewer images than the recipe wants
        # micro-batches.
        micros = list(prepared.split(min(self.plan.accumulate, rows)))
        for number, micro in enumerate(micros, 1):
            share = len(micro.batch.labels_N) * self.world.size / micro.global_size
            with nullcontext() if number == len(micros) else unsynchronised(self.runner):
                out: StepOutput = self.runner(
                    micro.views,
                    micro.batch.labels_N,
                    micro.batch.index_N,
                    micro.teacher,
                    schedule,
                    micro.rows_of_ranks,
                )
                scaled = out.loss * share
                self.scaler.scale(scaled).backward()
            loss = loss + scaled.detach()
            # Copies: a captured graph writes its next outputs over these.
            metrics = [out.metrics_M, *(len(micro.batch.labels_N) * r.view(1) for r in ratio)]
            done_M.append(torch.cat(metrics).double())
            commits += self._commits(out, micro.batch.index_N)
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self.trained if p.grad is not None]
        ok = self.guard.judge(loss, grads, self.plan.clip_norm)
        self.guard.apply(ok)
        if self.scaler.is_enabled():
            self.scaler.update()
        for metrics_M in done_M:
            self.totals_M += torch.where(ok, metrics_M, 0.0)
        for commit in commits:
            commit(ok)
        if self.ema:
            self.ema.update(ok)
        self.optimizer.zero_grad(set_to_none=True)

    def _commits(self, out: StepOutput, index_N: Tensor) -> list[Callable[[Tensor], None]]:
        """What the terms want to write once the step is known to be good."""
        return [
            partial(
                term.commit,
                {key: value.clone() for key, value in out.carry[term.name].items()},
                index_N,
            )
            for term in self.terms
            if term.name in out.carry
        ]

    def _scheduled(self, epoch: float) -> dict[str, dict[str, Tensor]]:
        return scheduled_values(self.terms, epoch / self.plan.epoch_factor, self.world.device)

    def _fetch(self) -> None:
        """Waits for the device, now and then within an epoch: counters, then running means."""
        self.guard.check()
        values = dict(zip(self.metric_names, self.totals_M.tolist(), strict=True))
        images = values["images"]
        done = images * self.world.size / max(self.progress.epoch_s, 1e-9)
        self.console.progress(
            epoch=self.progress.epoch,
            epochs=self.plan.epochs,
            step=self.progress.step,
            steps=self.loader.steps_per_epoch,
            images_per_s=done,
            data_wait=self.progress.wait_s / max(self.progress.epoch_s, 1e-9),
            loss=values["loss"] / (images or torch.nan),
        )

    def _end_epoch(self) -> None:
        """Evaluate, keep the best, write one row, save."""
        progress = self.progress
        if self.world.size > 1:
            all_reduce_sum(self.totals_M)
            # DDP hands out rank 0's batch statistics before each step; evaluation wants them too.
            sync_buffers(self.student)
            for term in self.terms:
                sync_buffers(term, ignore=term.banks)
            if self.ema:
                sync_buffers(self.ema.module)
        values = dict(zip(self.metric_names, self.totals_M.tolist(), strict=True))
        images = values.pop("images")
        _, skipped = self.guard.counts()
        row: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            **{f"train_{name}": value / (images or torch.nan) for name, value in values.items()},
            "images_per_s": images / max(progress.epoch_s, 1e-9),
            "data_wait": progress.wait_s / max(progress.epoch_s, 1e-9),
            "seconds": progress.epoch_s,
            "skipped": skipped,
        }
        if "train_correct" in row:
            row["train_accuracy"] = row.pop("train_correct")
        if self.pick is not None:
            row["pick_ratio"] = row.pop("train_pick_ratio")
        last = progress.epoch + 1 == self.plan.epochs
        # Images of bad steps do not count.
        if last and not any(one["images_per_s"] for one in (*self.history, row)):
            raise self.guard.never_good()
        better = False
        if last or (progress.epoch + 1) % self.plan.eval_epochs == 0:
            kept, multilabel = self.kept(), self.step.multilabel
            with evaluating(kept):
                found = evaluate(kept, self.val_loader, self.precision, self.world, multilabel)
            row |= of_epoch(found)
            better = (value := found[headline(found)]) > progress.best
            if better:
                progress.best, progress.best_epoch = value, row["epoch"]
        self.history.append(row)
        if better:
            self._keep_best(row)
        progress.epoch, progress.step, progress.rows = progress.epoch + 1, 0, progress.rows + 1
        progress.epoch_s = progress.wait_s = 0.0
        self.totals_M.zero_()
        # The row first: a kill in between leaves one row too many, which a resumed run cuts.
        if self.folder and self.world.is_main:
            self.folder.append_metrics(row)
        self.save()
        self.console.epoch(row, self.plan.epochs)

    def _keep_best(self, row: dict[str, Any]) -> None:
        if not self.folder or not self.world.is_main:
            return
        facts = {"epoch": str(row["epoch"]), headline(row): f"{self.progress.best:.6f}"}
        save_weights(self.folder.path / "best.safetensors", self.kept(), self.plan.metadata | facts)

    def kept(self) -> nn.Module:
        """What is evaluated and kept: the student or its average, as the terms export it."""
        kept = self.ema.module if self.ema else self.student
        for term in self.terms:
            kept = term.export(kept)
        return kept

    def summary(self) -> dict[str, Any]:
        """Last and best headline metric and the rates of the run; for summary.json."""
        metric = headline(self.history[-1])
        return {
            "epochs": self.plan.epochs,
            f"{metric}_last": self.history[-1][f"val_{metric}"],
            f"{metric}_best": self.progress.best,
            "best_epoch": self.progress.best_epoch,
            "images_per_s": median_high(row["images_per_s"] for row in self.history),
            "data_wait": median_high(row["data_wait"] for row in self.history),
            "train_seconds": sum(row["seconds"] for row in self.history),
            "skipped_steps": self.history[-1]["skipped"],
        }

    def save(self) -> None:
        """Write last.pt on rank 0; the others only add their share of the running sums."""
        self.guard.check()
        totals_M = self.totals_M.clone()
        if self.world.size > 1:
            all_reduce_sum(totals_M)
        if not self.folder or not self.world.is_main:
            return
        save_checkpoint(
            self.folder.path / "last.pt",
            {
                "digest": self.plan.digest,
                "decisions": self.plan.decisions,
                "progress": asdict(self.progress),
                "student": self.student.state_dict(),
                "terms": {term.name: term.state_dict() for term in self.terms},
                "optimizer": self.optimizer.state_dict(),
                "guard": self.guard.state_dict(),
                "scaler": self.scaler.state_dict(),
                "ema": self.ema.state_dict() if self.ema else None,
                "totals": totals_M,
                "history": self.history,
            },
        )

    def resume(self, path: Path) -> None:
        """Continue from a last.pt; every rank reads it."""
        state = load_checkpoint(path, self.plan.digest)
        self.student.load_state_dict(state["student"])
        for term in self.terms:
            term.load_state_dict(state["terms"][term.name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.guard.load_state_dict(state["guard"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        # Saved as sums over the ranks; each rank takes its share up again.
        self.totals_M.copy_(state["totals"] / self.world.size)
        self.progress = Progress(**state["progress"])
        self.history = list(state["history"])
        if self.folder and self.world.is_main:
            self.folder.cut_metrics(self.progress.rows)
        if self.progress.epoch == self.plan.epochs:
            self.console.note(f"resumed {self.plan.stage} after its last epoch, {self.plan.epochs}")
            return
        self.console.note(
            f"resumed {self.plan.stage} at epoch {self.progress.epoch + 1} of {self.plan.epochs}, "
            f"step {self.progress.step} of {self.loader.steps_per_epoch}"
        )

    def _interrupt(self, stop: StopSignal) -> None:
        self.save()
        where = f"at epoch {self.progress.epoch + 1}, step {self.progress.step}"
        if self.progress.epoch == self.plan.epochs:
            where = "after the last epoch"
        kept = "the state is saved" if self.folder else "nothing was saved, there is no run folder"
        raise Interrupted(f"{self.plan.stage} stopped {where}; {kept}.", stop.code or 130)
