"""Runs that are killed or stopped at a chosen place and resumed: `killed_runs.py DIR NAME...`.

Writes DIR/found.json: for each named scenario what the kill and the resumed run left, and in what
it differs from an uninterrupted run. The tests that start it judge.
"""

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import proof_term
import tiny
import torch

import fastkd.output.run_folder
import fastkd.training.trainer
from fastkd.output.run_folder import RunFolder
from fastkd.testing.label_maps import write_pairs
from fastkd.training.trainer import Trainer

# More of everything that has state: averaged weights, Adam's moments, micro-batches, a momentum
# that is scheduled.
RICH = (
    "ema=0.9",
    "accumulate=2",
    "optim.name=adamw",
    "optim.lr=0.003",
    "optim.schedule=onecycle",
    "optim.clip_norm=1.0",
    "losses.kd.label_smoothing=0.1",
)
PICKED = ("augment.pick.criterion=kl", "augment.pick.images=16")
SECOND_VIEWS = (*PICKED, "augment.xprime=randaugment", "losses.mixed_ce.weight=1")
# A teacher, two baselines and the student, 4 steps each.
STAGED = ("teacher.train=true", "teacher.weights=null", "baseline.lrs=0.05,0.1", "epochs=1")
COMPILED = ("compile=on", "epochs=1", "augment.xprime=none", "losses.kd.views=x")
# One graph of the student alone: the least that inductor can be asked for.
COMPILED_SMALL = (
    "compile=on",
    "epochs=1",
    "data.drop_last=true",
    "augment.xprime=none",
    "teacher=null",
    "losses.kd=null",
    "losses.ce.weight=1",
)
# 57 images: the last batch has 9, that is 5 and 4 on two ranks.
UNEVEN = ("data.train_limit=57",)
# No loss on the logits: the student's head gets no gradient.
HEADLESS = (
    "losses.kd=null",
    "losses.at.weight=100",
    "losses.at.pairs.stage2=stage2",
    "augment.xprime=none",
    "epochs=1",
)
PROOF = (*UNEVEN, "losses.proof.weight=2", "losses.kd.views=x", "accumulate=4", "ema=0.9")
CRD = (*UNEVEN, "losses.crd.weight=0.8", "losses.crd.negatives=20", "losses.crd.dim=8")
# Two teachers of unlike size, normalisation and resolution, the losses of MEAL V2, no labels.
MEAL_V2 = (
    *UNEVEN,
    "teacher.ensemble.0.name=wrn_10_1",
    "teacher.ensemble.0.weights=../other.safetensors",
    "teacher.ensemble.0.mean=0.5,0.5,0.5",
    "teacher.ensemble.0.std=0.25,0.25,0.25",
    "teacher.ensemble.0.resolution=12",
    "teacher.ensemble.0.min_accuracy=0",
    "losses.kd=null",
    "losses.soft_ce.weight=1",
    "losses.discriminator.weight=1",
    "augment.xprime=none",
    "optim.weight_decay=0.01",
    "optim.decay_norms=false",
)
# Two views, a pool that the student scores in every step, and banks.
CRD_PICKED = (*CRD, "augment.pick.criterion=kl", "augment.pick.share=0.5")
# The teacher's stages on the student's features, a schedule of its own.
JOINTRD = (
    *UNEVEN,
    "losses.kd=null",
    "augment.xprime=none",
    "losses.ce.weight=1",
    "losses.jointrd.weight=1",
    "losses.jointrd.stages=stage1,stage2,stage3",
    "losses.jointrd.eta_epochs=2",
)

# Whatever is random about x.
MIXED_X = (
    *UNEVEN,
    "losses.kd.views=x",
    "augment.xprime=none",
    "augment.policy=trivial",
    "augment.erasing=0.5",
    "augment.repeats=3",
    "augment.mixup=0.3",
    "augment.cutmix=1",
    "augment.mix_share=0.8",
    "augment.sizes=6,8",
)

# Label maps, and every network in two stages: 6 trainings of 3 steps.
TWO_STAGES = (
    "data={name: pairs, root: ../pairs, image_size: 16, drop_last: false}",
    "batch_size=4",
    "epochs=1",
    "encoder.label_stride=8",
    "student={name: erfnet, block: G:N}",
    "teacher={name: erfnet, train: true, min_accuracy: 0}",
    "baseline.lrs=0.001",
    "optim={name: adam, lr: 0.001, schedule: poly}",
    "augment.xprime=none",
    "losses.kd=null",
    "losses.ce.weight=1",
    "losses.at={weight: 600, pairs: {stage1: stage1, stage5: stage5}}",
)

# The third epoch shows the first one again.
CYCLED = (*RICH, *SECOND_VIEWS, "augment.cycle=2", "epochs=3")


def before_step(number: int) -> None:
    """Die before optimizer step `number` of the run, when the one before it has been saved."""
    tiny.at_call(Trainer, "optimize", number, lambda *_: tiny.die())


def before_save(number: int) -> None:
    """Die when step `number` of the run is done but not yet saved."""
    tiny.at_call(Trainer, "save", number, lambda *_: tiny.die())


def inside_save(number: int) -> None:
    """Die in the middle of writing last.pt for the `number`-th time."""
    original = torch.save

    def half(state: Any, file: Any) -> None:
        original(state, "whole.pt")
        written = Path("whole.pt").read_bytes()
        file.write(written[: len(written) // 2])
        file.flush()
        tiny.die()

    tiny.at_call(torch, "save", number, half)


def before_rename(number: int) -> None:
    """Die when a file is written, but not yet in its place, for the `number`-th time."""
    tiny.at_call(os, "replace", number, lambda *_: tiny.die())


def before_best() -> None:
    """Die before the first best.safetensors."""
    tiny.at_call(fastkd.training.trainer, "save_weights", 0, lambda *_: tiny.die())


def inside_row() -> None:
    """Die in the middle of the second row of metrics.jsonl."""

    def torn(folder: RunFolder, row: Any) -> None:
        with (folder.path / "metrics.jsonl").open("a") as file:
            file.write('{"epoch": 2, "lr"')
        tiny.die()

    tiny.at_call(RunFolder, "append_metrics", 1, torn)


def before_config() -> None:
    """Die with an empty run folder."""
    tiny.at_call(RunFolder, "write_text", 0, lambda *_: tiny.die())


def before_summary() -> None:
    """Die when everything is done except saying so."""
    tiny.at_call(RunFolder, "write_csv", 0, lambda *_: tiny.die())


def stopped_in_step(number: int, which: signal.Signals, only_rank: str | None = None) -> None:
    """No death: Ctrl-C, a batch system's SIGTERM or a closed terminal is told during a step."""

    def ask(*_: Any) -> None:
        # A closing terminal and its shell both tell.
        for _ in range(2 if which == signal.SIGHUP else 1):
            os.kill(os.getpid(), which)

    if which == signal.SIGHUP:
        # Whoever started the tests may have used nohup.
        signal.signal(which, signal.SIG_DFL)
    if only_rank in (None, os.environ.get("RANK")):
        tiny.at_call(Trainer, "optimize", number, ask)


def see_no_checkpoint() -> None:
    """What another host may see of a shared folder: whether to go on is for rank 0 to decide."""
    original = Path.exists

    def exists(path: Path, **options: Any) -> bool:
        return path.name != "last.pt" and original(path, **options)

    Path.exists = exists


@dataclass(frozen=True)
class Scenario:
    """A run that dies, once or more often, and is resumed each time."""

    words: tuple[str, ...]
    """Overrides of tiny.RECIPE."""
    deaths: tuple[Callable[[], None], ...]
    """Each prepares one process, or all ranks of it, to die at its place."""
    ranks: int = 1


SCENARIOS: dict[str, Scenario] = {
    **{
        f"two stages, before step {step}": Scenario(TWO_STAGES, (partial(before_step, step),))
        for step in (1, 4, 7, 10, 14, 17)
    },
    "two stages, twice": Scenario(TWO_STAGES, (partial(before_step, 13), partial(before_step, 3))),
    "two stages on two ranks, before step 16": Scenario(TWO_STAGES, (partial(before_step, 16),), 2),
    **{f"before step {step}": Scenario((), (partial(before_step, step),)) for step in range(5)},
    **{f"before save {step}": Scenario((), (partial(before_save, step),)) for step in (0, 3)},
    **{f"inside save {step}": Scenario((), (partial(inside_save, step),)) for step in (0, 2, 3)},
    **{f"before rename {num}": Scenario((), (partial(before_rename, num),)) for num in (2, 3, 7)},
    "before best": Scenario((), (before_best,)),
    "inside row": Scenario((), (inside_row,)),
    "before config": Scenario((), (before_config,)),
    "before summary": Scenario((), (before_summary,)),
    "twice": Scenario((), (partial(before_step, 2), partial(before_step, 3))),
    "every second step": Scenario(("save_steps=2",), (partial(before_step, 7),)),
    "every epoch": Scenario(("save_steps=null",), (partial(before_step, 6),)),
    **{
        f"rich, before step {step}": Scenario(RICH, (partial(before_step, step),))
        for step in (1, 3, 6)
    },
    "rich, inside save 2": Scenario(RICH, (partial(inside_save, 2),)),
    "cycled, before step 9": Scenario(CYCLED, (partial(before_step, 9),)),
    "picked, before step 3": Scenario(PICKED, (partial(before_step, 3),)),
    **{
        f"staged, before step {step}": Scenario(STAGED, (partial(before_step, step),))
        for step in (2, 6, 9, 15)
    },
    **{
        f"compiled, before step {step}": Scenario(COMPILED, (partial(before_step, step),))
        for step in (1, 2, 3)
    },
    "compiled, inside save 1": Scenario(COMPILED, (partial(inside_save, 1),)),
    "compiled student": Scenario(COMPILED_SMALL, (partial(before_step, 2),)),
    **{
        f"two ranks, before step {step}": Scenario(UNEVEN, (partial(before_step, step),), 2)
        for step in (3, 6)
    },
    "headless on two ranks": Scenario(HEADLESS, (), 2),
    "picked on two ranks, before step 6": Scenario(
        (*UNEVEN, *PICKED), (partial(before_step, 6),), 2
    ),
    "second views on two ranks, before step 6": Scenario(
        (*UNEVEN, *SECOND_VIEWS), (partial(before_step, 6),), 2
    ),
    "two ranks, inside save 2": Scenario(UNEVEN, (partial(inside_save, 2),), 2),
    **{
        f"stopped by {which.name} in step {step}": Scenario(
            ("save_steps=null",), (partial(stopped_in_step, step, which),)
        )
        for step, which in (
            (1, signal.SIGINT),
            (3, signal.SIGINT),
            (5, signal.SIGHUP),
            (6, signal.SIGTERM),
        )
    },
    "stopped in the teacher's last step": Scenario(
        STAGED, (partial(stopped_in_step, 3, signal.SIGINT),)
    ),
    "two ranks, stopped in step 1": Scenario(
        UNEVEN, (partial(stopped_in_step, 1, signal.SIGTERM, only_rank="1"),), 2
    ),
    "two ranks, stopped in step 3": Scenario(
        UNEVEN, (partial(stopped_in_step, 3, signal.SIGINT),), 2
    ),
    **{
        f"proof, before step {step}": Scenario(PROOF, (partial(before_step, step),))
        for step in (2, 5)
    },
    "proof, inside save 3": Scenario(PROOF, (partial(inside_save, 3),)),
    **{
        f"proof on two ranks, before step {step}": Scenario(PROOF, (partial(before_step, step),), 2)
        for step in (3, 5)
    },
    "crd on two ranks, before step 5": Scenario(CRD, (partial(before_step, 5),), 2),
    "meal_v2 on two ranks, before step 5": Scenario(MEAL_V2, (partial(before_step, 5),), 2),
    "crd, tlcutmix and pick on two ranks": Scenario(CRD_PICKED, (partial(before_step, 5),), 2),
    "mixed x": Scenario(MIXED_X, (partial(before_step, 5),)),
    "mixed x on two ranks": Scenario(MIXED_X, (partial(before_step, 5),), 2),
    "jointrd on two ranks": Scenario(JOINTRD, (partial(before_step, 6),), 2),
}


def run(
    folder: Path, words: tuple[str, ...], die: Callable[[], None] | None, number: int, ranks: int
) -> list[int]:
    """One process of a scenario, or a group of ranks, killed or not; exit codes."""

    def job() -> int:
        rank = os.environ.get("RANK", "0")
        proof_term.register()
        if rank != "0":
            see_no_checkpoint()
        tiny.at_call(Trainer, "summary", 0, partial(_note_state, folder / f"state-{rank}.json"))
        if die is not None:
            die()
        arguments = ["train", "--config", "recipe.yaml", *words]
        if number:
            arguments = advised(folder / f"log{number - 1}.txt") or [*arguments, "--resume", "auto"]
        return tiny.command(folder, *arguments, fetches=f"fetches{number}-{rank}.jsonl")

    jobs = tiny.as_ranks(ranks, job) if ranks > 1 else [job]
    return tiny.forked(*jobs, log=folder / f"log{number}.txt")


def advised(log: Path) -> list[str]:
    """The command that a stopped run gave to its user, without its first word; else nothing."""
    found = re.search(r"Resume it with: fastkd (.*)", log.read_text())
    return found[1].split() if found else []


def _note_state(target: Path, trainer: Trainer) -> None:
    target.write_text(json.dumps(tiny.digests(trainer.step.state_dict())))


def uninterrupted(base: Path, words: tuple[str, ...], ranks: int) -> dict[str, Any]:
    """Facts of the run that nobody kills."""
    folder = tiny.prepare(base / f"whole-{len(list(base.iterdir()))}")
    if any(run(folder, words, None, 0, ranks)):
        raise SystemExit((folder / "log0.txt").read_text())
    return tiny.facts(only_run(folder))


def only_run(folder: Path) -> Path:
    """The run folder below a working folder; there must be one only."""
    (found,) = (folder / "runs" / tiny.RECIPE["name"]).iterdir()
    return found


def kill_and_resume(base: Path, name: str, whole: dict[str, Any]) -> dict[str, Any]:
    """What is left of a scenario, and in what it differs from the uninterrupted run."""
    scenario = SCENARIOS[name]
    folder = tiny.prepare(base / name.replace(" ", "-"))
    codes = [
        run(folder, scenario.words, die, number, scenario.ranks)
        for number, die in enumerate((*scenario.deaths, None))
    ]
    last = len(codes) - 1
    logs = [(folder / f"log{number}.txt").read_text() for number in range(len(codes))]
    if any(codes[-1]):
        return {"codes": codes, "log": logs[-1]}
    fetches = [folder / f"fetches{last}-{rank}.jsonl" for rank in range(scenario.ranks)]
    states = [folder / f"state-{rank}.json" for rank in range(scenario.ranks)]
    run_folder = only_run(folder)
    return {
        "codes": codes,
        "log": logs[-1],
        "first_log": logs[0],
        "fetched": [[json.loads(line) for line in f.read_text().splitlines()] for f in fetches],
        "states": [json.loads(state.read_text()) for state in states],
        "different": tiny.different(whole, tiny.facts(run_folder)),
        "files": sorted(file.name for file in run_folder.iterdir()),
    }


def main(base: Path, names: list[str]) -> None:
    """Run the named scenarios and write what was found."""
    base.mkdir(parents=True, exist_ok=True)
    if any(SCENARIOS[name].words == TWO_STAGES for name in names):
        write_pairs(base / "pairs")
    wholes: dict[Any, dict[str, Any]] = {}
    found = {}
    for name in names:
        scenario = SCENARIOS[name]
        words = tuple(word for word in scenario.words if not word.startswith("save_steps"))
        key = (words, scenario.ranks)
        if key not in wholes:
            wholes[key] = uninterrupted(base, *key)
        found[name] = kill_and_resume(base, name, wholes[key])
    (base / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2:])
