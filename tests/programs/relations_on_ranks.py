"""Losses that compare samples, on one process and on two ranks: `relations_on_ranks.py FILE`.

Writes FILE, {"one": [..], "two": [.., ..]} of what every case left on every rank;
tests/losses/test_relations_on_ranks.py starts it and judges.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tiny
import torch
from alike import same_on_all_ranks
from torch import Tensor
from two_ranks import Plain, Poisoned, make

from fastkd.compute.ranks import World
from fastkd.compute.wrapping import wrap_ddp
from fastkd.data.batch import Batch
from fastkd.data.loaders.resident import ResidentLoader
from fastkd.losses import CC, CRD, PKT, RKD, SP, LossTerm
from fastkd.training.trainer import Trainer

PAIR = {"conv2": "pooled"}


class FixedCRD(CRD):
    """Every row gets the first negatives in the order of the ids, on however many ranks."""

    def draw_negatives(self, labels_N: Tensor) -> Tensor:
        """As `CRD`, but the same in every call."""
        other_NM = self.labels_M != labels_N[:, None]
        return other_NM.int().argsort(dim=1, descending=True, stable=True)[:, : self.negatives]


class Repeating(ResidentLoader):
    """The last sample of every global batch has the id of the first one, as after padding."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        for step, batch in enumerate(super().epoch(epoch, start_step), start_step):
            if self.plan.rank == self.plan.world_size - 1:
                batch.index_N[-1] = int(self.plan.order(epoch)[step * self.plan.batch_size])
            yield batch


class InMicroOrder(ResidentLoader):
    """In one process rows come in the order in which two micro-batches of two ranks join them."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        for batch in super().epoch(epoch, start_step):
            ranks = torch.arange(len(batch.labels_N)).tensor_split(2)
            micros = zip(*(rows.tensor_split(2) for rows in ranks), strict=True)
            order = torch.cat([rows for micro in micros for rows in micro])
            alone = self.plan.world_size == 1
            if alone:
                rows = (batch.images_NCHW, batch.labels_N, batch.index_N)
                batch = Batch(*(tensor[order] for tensor in rows), global_size=batch.global_size)
            yield batch


RELATIONS: dict[str, Callable[[bool], LossTerm]] = {
    "sp": lambda gather: SP(PAIR, gather=gather),
    "pkt": lambda gather: PKT(PAIR, gather=gather),
    "cc": lambda gather: CC(PAIR, dim=8, gather=gather),
    "rkd": lambda gather: RKD(PAIR, gather=gather),
}


def crd() -> CRD:
    return FixedCRD(PAIR, dim=8, negatives=20)


def train(trainer: Trainer) -> dict[str, Any]:
    """The gradient that every step applied, of student and term, and what is left."""
    seen: list[Tensor] = []
    judge = trainer.guard.judge

    def noting(losses: Tensor, grads: Any, clip_norm: float | None = None) -> Tensor:
        ok = judge(losses, grads, clip_norm)
        seen.append(torch.cat([gradient.flatten() for gradient in grads]))
        return ok

    trainer.guard.judge = noting
    trainer.fit()
    return {
        "gradients": torch.stack(seen),
        "loss": trainer.history[0]["train_loss"],
        "state": trainer.terms[0].state_dict(),
        "same": same_on_all_ranks(trainer.step),
    }


def trained(world: World, term: LossTerm, **options: Any) -> dict[str, Any]:
    """One epoch without batch norm; batches of 16, 16, 16 and 9, that is 5 and 4 on two ranks."""
    torch.manual_seed(0)
    return train(make(world, Plain(), [term], lr=1e-3, **options))


def compiled(world: World) -> dict[str, Any]:
    """A relation and CRD in one graph, with the exchange between the ranks in it."""
    torch.manual_seed(0)
    trainer = make(world, Plain(), [crd(), PKT(PAIR)], num=48, lr=1e-3)
    torch.compiler.reset()
    unit = torch.compile(trainer.step, backend="aot_eager", fullgraph=True, dynamic=False)
    banks = [f"terms.0.{bank}" for bank in CRD.banks]
    trainer.update.runner = wrap_ddp(unit, world, ignore_buffers=banks)
    return train(trainer)


def eager(world: World) -> dict[str, Any]:
    """The same without compiler."""
    torch.manual_seed(0)
    return train(make(world, Plain(), [crd(), PKT(PAIR)], num=48, lr=1e-3))


def poisoned(world: World) -> dict[str, Any]:
    """The banks before and after a step that is not finite on rank 1 alone."""
    torch.manual_seed(0)
    trainer = make(world, Plain(), [crd()], kind=Poisoned, lr=1e-3)
    optimize, states = trainer.optimize, []

    def noting(*args: Any) -> None:
        optimize(*args)
        states.append({key: value.clone() for key, value in trainer.step.state_dict().items()})

    trainer.optimize = noting
    trainer.fit()
    return {"states": states, "same": same_on_all_ranks(trainer.step)}


CASES: dict[str, Callable[[World], dict[str, Any]]] = {
    **{
        f"{name}, joined": lambda world, term=term: trained(world, term(True))
        for name, term in RELATIONS.items()
    },
    # Two micro-batches in one process are the two ranks' own rows.
    **{
        f"{name}, apart": lambda world, term=term: trained(
            world, term(False), plan={"accumulate": 2 // world.size}
        )
        for name, term in RELATIONS.items()
    },
    "cc, joined, accumulated": lambda world: trained(
        world, CC(PAIR, dim=8), plan={"accumulate": 2}, kind=InMicroOrder
    ),
    "crd": lambda world: trained(world, crd()),
    "crd, repeated ids": lambda world: trained(world, crd(), kind=Repeating, num=48),
    "crd, poisoned": poisoned,
    "compiled": compiled,
    "eager": eager,
}


if __name__ == "__main__":
    target = Path(sys.argv[1]).absolute()
    torch.save(tiny.in_both_worlds(target, CASES), target)
