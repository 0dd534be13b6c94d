"""Runs that are killed with SIGKILL at a chosen place and resumed: `killed_runs.py DIR NAME...`.

Writes DIR/found.json: for each named scenario what the kill and the resumed run left, and in what
it differs from an uninterrupted run. tests/test_resume.py starts it and judges.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch

import fastkd.report.run_folder
import fastkd.trainer
from fastkd.report.run_folder import RunFolder
from fastkd.trainer import Trainer

# More of everything that has state: averaged weights, Adam's moments, micro-batches, a momentum
# that is scheduled.
RICH = (
    *("ema=0.9", "accumulate=2", "optim.name=adamw", "optim.lr=0.003", "optim.schedule=onecycle"),
    *("optim.clip_norm=1.0", "losses.kd.label_smoothing=0.1"),
)
COMPILED = ("compile=on", "epochs=1", "augment.xprime=none", "losses.kd.views=x")


def before_step(number: int) -> None:
    """Die before optimizer step `number` of the run, when the one before it has been saved."""
    tiny.at_call(Trainer, "_optimize", number, lambda *_: tiny.die())


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
    tiny.at_call(fastkd.trainer, "save_weights", 0, lambda *_: tiny.die())


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
    """Die when everything is done but for saying so."""
    tiny.at_call(RunFolder, "write_csv", 0, lambda *_: tiny.die())


# name -> (overrides, places to die, one after the other)
SCENARIOS: dict[str, tuple[tuple[str, ...], tuple[Callable[[], None], ...]]] = {
    **{f"before step {step}": ((), (partial(before_step, step),)) for step in range(8)},
    **{f"before save {step}": ((), (partial(before_save, step),)) for step in (0, 3, 5)},
    **{f"inside save {step}": ((), (partial(inside_save, step),)) for step in (0, 2, 3)},
    **{f"before rename {number}": ((), (partial(before_rename, number),)) for number in (2, 6)},
    "before best": ((), (before_best,)),
    "inside row": ((), (inside_row,)),
    "before config": ((), (before_config,)),
    "before summary": ((), (before_summary,)),
    "twice": ((), (partial(before_step, 2), partial(before_step, 3))),
    "every third step": (("save_steps=3",), (partial(before_step, 6),)),
    "every epoch": (("save_steps=null",), (partial(before_step, 6),)),
    **{
        f"rich, before step {step}": (RICH, (partial(before_step, step),))
        for step in (1, 3, 4, 6)
    },
    "rich, inside save 2": (RICH, (partial(inside_save, 2),)),
    **{
        f"compiled, before step {step}": (COMPILED, (partial(before_step, step),))
        for step in (1, 2, 3)
    },
    "compiled, inside save 1": (COMPILED, (partial(inside_save, 1),)),
}


def run(folder: Path, words: tuple[str, ...], die: Callable[[], None] | None, number: int) -> int:
    """One process of a scenario, killed or not."""

    def job() -> int:
        if die is not None:
            die()
        resume = ("--resume", "auto") if number else ()
        return tiny.train(folder, *resume, *words, fetches=f"fetches{number}.jsonl")

    return tiny.forked(job, log=folder / f"log{number}.txt")[0]


def uninterrupted(base: Path, words: tuple[str, ...]) -> dict[str, Any]:
    """Facts of the run that nobody kills."""
    folder = tiny.prepare(base / f"whole-{len(list(base.iterdir()))}")
    code = run(folder, words, None, 0)
    if code:
        raise SystemExit((folder / "log0.txt").read_text())
    return tiny.facts(only_run(folder))


def only_run(folder: Path) -> Path:
    """The run folder below a working folder; there must be one only."""
    (found,) = (folder / "runs" / tiny.RECIPE["name"]).iterdir()
    return found


def scenario(base: Path, name: str, whole: dict[str, Any]) -> dict[str, Any]:
    """Kill and resume; what is left."""
    words, deaths = SCENARIOS[name]
    folder = tiny.prepare(base / name.replace(" ", "-"))
    codes = [run(folder, words, die, number) for number, die in enumerate((*deaths, None))]
    fetched = [
        [json.loads(line) for line in (folder / f"fetches{number}.jsonl").read_text().splitlines()]
        for number in range(len(codes))
        if (folder / f"fetches{number}.jsonl").exists()
    ]
    last_log = (folder / f"log{len(codes) - 1}.txt").read_text()
    if codes[-1]:
        return {"codes": codes, "log": last_log}
    run_folder = only_run(folder)
    return {
        "codes": codes,
        "log": last_log,
        "fetched": fetched,
        "different": tiny.different(whole, tiny.facts(run_folder)),
        "files": sorted(file.name for file in run_folder.iterdir()),
    }


def main(base: Path, names: list[str]) -> None:
    """Run the named scenarios and write what was found."""
    base.mkdir(parents=True, exist_ok=True)
    wholes: dict[tuple[str, ...], dict[str, Any]] = {}
    found = {}
    for name in names:
        words = tuple(word for word in SCENARIOS[name][0] if not word.startswith("save_steps"))
        if words not in wholes:
            wholes[words] = uninterrupted(base, words)
        found[name] = scenario(base, name, wholes[words])
    (base / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2:])
