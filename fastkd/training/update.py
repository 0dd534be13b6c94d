"""One optimizer step: rates, pick, micro-batches, gradient scaler, verdict, update, EMA, sums.

Flow: `Trainer.prepare` -> [here] -> `Trainer` fetches the sums now and then. A step whose loss or
gradient is not finite changes nothing on any rank. Nothing here reads a number from the device,
except for optimizers that cannot skip a step on their own (`guard`: LAMB, apex) and on a CPU.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastkd.augment.pick import Pick
from fastkd.compute.ranks import World
from fastkd.compute.wrapping import unsynchronised
from fastkd.data.draws import step_seed
from fastkd.losses.base.schedules import scheduled_values
from fastkd.losses.base.term import LossTerm
from fastkd.training.ema import EMA
from fastkd.training.fallback import Fallback
from fastkd.training.guard import Guard
from fastkd.training.optim import set_lr
from fastkd.training.progress import Plan
from fastkd.training.recording.step_clock import StepClock
from fastkd.training.schedules import Schedule
from fastkd.training.step import DistillStep, Prepared, StepOutput

__all__ = ["Update"]

Schedules = dict[str, dict[str, Tensor]]
Commit = Callable[[Tensor], None]


@dataclass(kw_only=True, eq=False)
class Update:
    """Callable: a prepared batch -> updated weights, sums and memory banks."""

    plan: Plan
    world: World

    # What runs.
    step: DistillStep
    """Student and losses as one module."""
    runner: nn.Module
    """The same, compiled and wrapped by DDP."""
    pick: Pick | None
    """Chooses x' from a pool; None uses x' as the views make it."""
    pool: int
    """x' per image of the batch, before the pick."""

    # What updates.
    optimizer: Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    """Scales the loss in fp16; does nothing in other types."""
    clip_norm: float | None
    """Largest global gradient norm."""
    guard: Guard
    """Judges the step, and undoes a bad one."""
    ema: EMA | None
    fallback: Fallback
    """Computes losses and gradients, eagerly if they do not compile."""
    clock: StepClock
    """Times the parts of some steps, if they are recorded."""

    # What follows from these.
    terms: list[LossTerm] = field(init=False)
    """The losses, for their schedules and memory banks."""
    trained: list[nn.Parameter] = field(init=False)
    """All parameters of the optimizer."""
    metric_names: tuple[str, ...] = field(init=False)
    """What `totals_M` sums."""
    totals_M: Tensor = field(init=False)
    """fp64 sums over the good steps of this rank since they were last zeroed."""

    def __post_init__(self) -> None:
        self.terms = [term for term in self.step.terms if isinstance(term, LossTerm)]
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        picked = () if self.pick is None else ("pick_ratio",)
        self.metric_names = (*self.step.metric_names, *picked)
        num = len(self.metric_names)
        self.totals_M = torch.zeros(num, dtype=torch.float64, device=self.world.device)

    def __call__(self, prepared: Prepared, epoch: int, step: int) -> None:
        """Do step `step` of `epoch`, both from 0; a bad one changes nothing."""
        self.clock.turn(step)
        done = epoch * self.schedule.steps_per_epoch + step
        set_lr(self.optimizer, self.schedule.lr_factor(done), self.schedule.momentum(done))
        schedules = self.scheduled(epoch + step / self.schedule.steps_per_epoch)

        def compute() -> tuple[Tensor, list[Tensor], list[Commit]]:
            torch.manual_seed(step_seed(self.plan.seed, epoch, step, self.world.rank))
            self.guard.before_step()
            return self._computed(prepared, schedules)

        loss, sums, commits = self.fallback.run(compute, self._undo)
        with self.clock.part("optimizer"):
            ok = self._update(loss)
            for sums_M in sums:
                self.totals_M += torch.where(ok, sums_M, 0.0)
            for commit in commits:
                commit(ok)
            if self.ema:
                self.ema.update(ok)
            self.optimizer.zero_grad(set_to_none=True)

    def _computed(
        self, prepared: Prepared, schedules: Schedules
    ) -> tuple[Tensor, list[Tensor], list[Commit]]:
        """Loss, sums and what the losses want to write; the gradients are in the parameters."""
        # The same number of micro-batches on every rank, or terms and batch norms that gather over
        # the ranks would wait forever; a partial batch, or a pick, may have fewer images than that.
        most = prepared.global_size // self.world.size
        pick_ratio: list[Tensor] = []
        if self.pick is not None:  # compiled, it has no truth value
            with self.clock.part("pick"):
                prepared, ratio, chosen = self._picked(prepared, self.pick)
            most = min(most, *chosen)
            pick_ratio = [ratio.view(1)]

        loss = torch.zeros((), device=self.world.device)
        sums: list[Tensor] = []
        commits: list[Commit] = []
        micros = list(prepared.split(min(self.plan.accumulate, most)))
        for number, micro in enumerate(micros, 1):
            # DDP adds up the gradients over the ranks in the last backward pass only.
            last = number == len(micros)
            with nullcontext() if last else unsynchronised(self.runner):
                out, part = self._backward(micro, schedules)
            loss = loss + part
            num = len(micro.batch.labels_N)
            # Copies: a captured graph writes its next outputs over these.
            metrics = [out.metrics_M, *(num * ratio for ratio in pick_ratio)]
            sums.append(torch.cat(metrics).double())
            commits += self._commits(out, micro.batch.index_N)
        return loss, sums, commits

    def _undo(self) -> None:
        """Forget a computation that failed half-way."""
        self.guard.undo_step()
        self.optimizer.zero_grad(set_to_none=True)

    def scheduled(self, epoch: float) -> Schedules:
        """Values of the losses' own schedules at an epoch of this run, a fraction within one."""
        return scheduled_values(self.terms, epoch / self.plan.epoch_factor, self.world.device)

    def _picked(self, prepared: Prepared, pick: Pick) -> tuple[Prepared, Tensor, tuple[int, ...]]:
        """The batch with the chosen x', their hardness over the pool's, and their number on each
        rank.

        Done here and not with the views: the student scores with its weights of this step.
        """
        picked = pick(prepared.views["xprime"], prepared.targets["xprime/teacher/logits"])
        pools = [num * self.pool for num in prepared.rows_of_ranks["x"]]
        chosen = tuple(pick.num_chosen(num) for num in pools)
        return prepared.chosen("xprime", picked.index_K, chosen), picked.ratio, chosen

    def _backward(self, micro: Prepared, schedules: Schedules) -> tuple[StepOutput, Tensor]:
        """Gradients of a micro-batch; its share of the loss, detached."""
        # DDP takes the plain mean over the ranks; unequal parts need the weighted one.
        share = len(micro.batch.labels_N) * self.world.size / micro.global_size
        with self.clock.part("forward"):
            out: StepOutput = self.runner(
                micro.views,
                micro.batch.labels_N,
                micro.batch.index_N,
                micro.targets,
                schedules,
                micro.rows_of_ranks,
            )
        part = out.loss * share
        with self.clock.part("backward"):
            self.scaler.scale(part).backward()
        return out, part.detach()

    def _commits(self, out: StepOutput, index_N: Tensor) -> list[Commit]:
        """What the losses want to write once the step is known to be good."""
        return [
            partial(
                term.commit,
                {key: value.clone() for key, value in out.carry[term.name].items()},
                index_N,
            )
            for term in self.terms
            if term.name in out.carry
        ]

    def _update(self, loss: Tensor) -> Tensor:
        """Step the optimizer if loss and gradients are finite; whether they were, on the device."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self.trained if p.grad is not None]
        ok = self.guard.judge(loss, grads, self.clip_norm)
        self.guard.apply(ok)
        if self.scaler.is_enabled():
            self.scaler.update()
        return ok
