"""One epoch on one process or on two ranks, looked at from inside: `two_ranks.py FILE`.

Writes FILE, a torch.save of what every case left on every rank; tests/training/test_two_ranks.py
starts it.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import tiny
import torch
from alike import same_on_all_ranks
from PIL import Image
from tiny_trainer import Plain, data_of, images, make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fastkd.training.trainer
from fastkd.api import distill
from fastkd.augment.config import PickConfig
from fastkd.compute.ranks import World
from fastkd.data.batch import Batch
from fastkd.data.loaders.plan import BatchPlan
from fastkd.data.loaders.resident import ResidentLoader
from fastkd.data.sources.by_name import open_source
from fastkd.losses.base.term import LossTerm, TermInputs, TermOutput
from fastkd.losses.dist import DIST
from fastkd.losses.logits import KD, CrossEntropy, MixedCE
from fastkd.models import create_model
from fastkd.training.config import OptimConfig
from fastkd.training.settings import TrainingSettings
from fastkd.training.trainer import Trainer


class Poisoned(ResidentLoader):
    """Rank 1 gets a NaN in its second batch."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        for step, batch in enumerate(super().epoch(epoch, start_step)):
            if step == 1 and self.plan.rank == 1:
                batch.images_NCHW[0, 0, 0, 0] = float("nan")
            yield batch


def make(
    world: World,
    student: nn.Module,
    terms: list[LossTerm],
    *,
    num: int = 57,
    kind: type[ResidentLoader] = ResidentLoader,
    lr: float = 0.05,
    plan: Mapping[str, Any] = MappingProxyType({}),
    **settings: Any,
) -> Trainer:
    """A trainer on batches of 16, the last partial; 49 validation images."""
    return make_trainer(
        student,
        terms,
        data=data_of(num, 49, batch_size=16, drop_last=False, world=world, kind=kind),
        settings=TrainingSettings(
            optim=OptimConfig(lr=lr, schedule="constant", clip_norm=100.0),
            compile="off",
            **settings,
        ),
        world=world,
        **plan,
    )


def gradients(
    world: World, *, accumulate: int, target: Literal["teacher", "mixed_logits"] = "teacher"
) -> dict[str, Any]:
    """The gradient that every step applies, with views that mix samples of both ranks."""
    torch.manual_seed(0)
    terms: list[LossTerm] = [KD(views=("x", "xprime"), xprime_target=target)]
    if target == "mixed_logits":
        terms.append(MixedCE())
    plan = {"accumulate": accumulate}
    trainer = make(world, Plain(), terms, xprime="cutmix", plan=plan)
    seen: list[Tensor] = []
    judge = trainer.guard.judge

    def noting(losses: Tensor, grads: Any, clip_norm: float | None = None) -> Tensor:
        ok = judge(losses, grads, clip_norm)
        seen.append(torch.cat([gradient.flatten() for gradient in grads]))
        return ok

    trainer.guard.judge = noting
    trainer.fit()
    return {"gradients": torch.stack(seen), "loss": trainer.history[0]["train_loss"]}


def bad_step(world: World) -> dict[str, Any]:
    """The state around a step that is not finite on rank 1 alone."""
    torch.manual_seed(0)
    student = create_model("resnet8", 10, width=0.5)
    trainer = make(world, student, [KD()], kind=Poisoned, ema=0.9)
    optimize, states = trainer.optimize, []

    def noting(*args: Any) -> None:
        optimize(*args)
        moments = {
            f"moment{number}": state["momentum_buffer"].clone()
            for number, state in enumerate(trainer.optimizer.state.values())
        }
        assert trainer.ema is not None
        average = {f"ema.{key}": value.clone() for key, value in trainer.ema.state_dict().items()}
        states.append(
            {k: v.clone() for k, v in trainer.step.state_dict().items()} | moments | average
        )

    trainer.optimize = noting
    trainer.fit()
    return {
        "states": states,
        "counts": trainer.guard.counts(),
        "skipped": trainer.history[0]["skipped"],
        "same": same_on_all_ranks(trainer.student),
    }


def learning(world: World) -> dict[str, Any]:
    """Long enough to learn something; who evaluated which images."""
    torch.manual_seed(0)
    trainer = make(
        world,
        create_model("resnet8", 10, width=0.5),
        [CrossEntropy()],
        num=160,
        lr=0.1,
        plan={"epochs": 6},
    )
    evaluated: list[int] = []
    epoch = trainer.val_loader.epoch

    def noting(number: int, start_step: int = 0) -> Iterator[Batch]:
        for batch in epoch(number, start_step):
            evaluated.extend(batch.index_N.tolist())
            yield batch

    trainer.val_loader.epoch = noting
    found: list[dict[str, float]] = []
    evaluate = fastkd.training.trainer.evaluate

    def counting(*args: Any) -> dict[str, float]:
        found.append(evaluate(*args))
        return found[-1]

    fastkd.training.trainer.evaluate = counting
    trainer.fit()
    fastkd.training.trainer.evaluate = evaluate
    return {
        "evaluated": evaluated,
        "found": found,
        "same": same_on_all_ranks(trainer.student),
        "state": trainer.student.state_dict(),
    }


def picked(world: World, **options: Any) -> dict[str, Any]:
    """A loss that joins the rows of the ranks, on a view of which each rank keeps a part."""
    torch.manual_seed(0)
    term = DIST(view="xprime")
    seen: list[tuple[tuple[int, ...], int]] = []
    whole = term.forward

    def noting(inputs: TermInputs) -> TermOutput:
        seen.append((inputs.rows_of_ranks, len(inputs.tensors["xprime/student/logits"])))
        return whole(inputs)

    term.forward = noting
    trainer = make(world, Plain(), [CrossEntropy(), term], xprime="cutmix", **options)
    seen.clear()  # of the trial
    trainer.fit()
    return {
        "rows": seen,
        "loss": trainer.history[0]["train_dist"],
        "same": same_on_all_ranks(trainer.student),
    }


def foreign(world: World) -> dict[str, Any]:
    """fastkd.distill with loaders of torch, one per rank, that share the images evenly."""
    whole = images("train", 64)
    pixels_NCHW = torch.from_numpy(whole.images_NHWC).permute(0, 3, 1, 2).float() / 255
    data = TensorDataset(pixels_NCHW, torch.from_numpy(whole.labels_N))
    sampler = DistributedSampler(data, world.size, world.rank, shuffle=False)
    loader = DataLoader(data, batch_size=16 // world.size, sampler=sampler)
    torch.manual_seed(0)
    teacher, student = Plain(), Plain()
    # fp32: in bf16, the default of some processors, rounding hides what this is about.
    result = distill(
        student,
        teacher,
        loader,
        loader,
        epochs=2,
        lr=0.5,
        precision="fp32",
        device="cpu",
        quiet=True,
    )
    return {"state": result.student.state_dict(), "history": result.metrics["history"]}


CASES: dict[str, Callable[[World], dict[str, Any]]] = {
    "gradients": lambda world: gradients(world, accumulate=1),
    # More micro-batches than a rank has images in the partial batch, 5 or 4.
    "gradients, accumulated": lambda world: gradients(world, accumulate=8),
    "gradients, mixed targets": lambda world: gradients(world, accumulate=8, target="mixed_logits"),
    "picked": lambda world: picked(world, pick=PickConfig(pool=2, share=0.25)),
    "picked, accumulated": lambda world: picked(
        world, pick=PickConfig(pool=2, share=0.25), plan={"accumulate": 2}
    ),
    "bad step": bad_step,
    "learning": learning,
    "foreign": foreign,
}


def refused(folder: Path, ranks: int, *words: str) -> dict[str, Any]:
    """Exit codes of a training on the labels alone, what it said, what it left."""
    tiny.prepare(folder)
    alone = ("teacher=null", "losses.kd=null", "losses.ce.weight=1", "augment.xprime=none")

    def job() -> int:
        return tiny.command(folder, "train", "--config", "recipe.yaml", *alone, *words)

    log = folder / "log.txt"
    codes = tiny.forked(*tiny.as_ranks(ranks, job), log=log)
    return {"codes": codes, "log": log.read_text(), "left": (folder / "runs").exists()}


def too_many(folder: Path) -> dict[str, Any]:
    """Three ranks for two images."""
    return refused(folder, 3, "data.train_limit=2", "batch_size=3")


def damaged(folder: Path) -> dict[str, Any]:
    """An image that only the second rank decodes, and cannot."""
    root = folder.with_suffix(".images")
    for split, name, number in itertools.product(("train", "val"), ("cat", "dog"), range(8)):
        place = root / split / name / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(place)
    index = open_source("folder", root)
    plan = BatchPlan(index.name, 16, 4, 0, train=True, drop_last=False, rank=1, world_size=2)
    broken = Path(index.path(int(plan.order(0)[plan.part(0)][0])))
    broken.write_bytes(broken.read_bytes()[:50])
    words = ("data.name=folder", f"data.root={root}", "data.backend=torch", "data.workers=1")
    found = refused(folder, 2, *words, "data.train_limit=null", "batch_size=4")
    return found | {"broken": str(broken)}


if __name__ == "__main__":
    target = Path(sys.argv[1]).absolute()
    found = tiny.in_both_worlds(target, CASES)
    found["too many"] = too_many(target.with_suffix(".many"))
    found["damaged"] = damaged(target.with_suffix(".damaged"))
    torch.save(found, target)
