"""What it costs to show the same views again: KD on real CIFAR-10 with `augment.cycle`, by seed.

    python benchmarks/cycle_on_cifar10.py --data DIR/cifar10 --runs runs [--seeds 3] [--write]

Images, networks, batches and teacher are those of the row `resnet20, KD` of `cifar10_methods.py`.
Its 10 epochs would end before most cycles do, so these runs have 60: every view of the longest
cycle is then shown twice. Cycles that a run of `--epochs` would not complete are left out. The
teacher answers every view once, for all cycles of a seed (`teacher.cache`). To resume an
interrupted run, give the command again. With --write every finished seed goes into the results at
once, and one that is there is not made again: seeds may be made on different days, each by a
teacher that was trained then.
"""

import json
from pathlib import Path

from accuracy_runs import difference, finished, mean_and_std, note, row_line, words, write
from cifar10_methods import METHODS, lesson, taught

from fastkd.compute.machine import environment
from fastkd.compute.ranks import open_world
from fastkd.output.console import Console
from fastkd.runs.stages import Session

RESULTS = Path(__file__).parent / "results" / "cycle_cifar10"
NAME = "resnet20, KD"
EPOCHS = 60
CYCLES = (None, 30, 10, 5)
"""None: every epoch has views of its own."""


def main() -> None:
    parser = words(
        __doc__,
        images="CIFAR-10",
        writes="and extend results/cycle_cifar10.*",
        keys="for every run, for a trial",
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args()
    given = [f"data.root={options.data}", *options.keys]
    facts = read_results(options.epochs, options.keys) if options.write else {}
    facts.setdefault("rows", [])
    facts |= {
        "command": " ".join(
            [
                f"python benchmarks/cycle_on_cifar10.py --seeds {options.seeds} "
                f"--epochs {options.epochs}",
                *options.keys,
            ]
        ),
        "epochs": options.epochs,
        "keys": options.keys,
    }
    with open_world("cpu") as world:
        session = Session(world, Console(enabled=True), options.runs)
        for seed in range(options.seeds):
            if any(row["seed"] == seed for row in facts["rows"]):
                continue
            facts["rows"] += rows_of(seed, given, options.epochs, session)
            if options.write:
                write(RESULTS.with_suffix(".json"), facts)
                RESULTS.with_suffix(".md").write_text(table(facts))
    print(table(facts))


def read_results(epochs: int, keys: list[str]) -> dict:
    """Seeds that were made before, if they had these epochs and keys."""
    file = RESULTS.with_suffix(".json")
    facts = json.loads(file.read_text()) if file.exists() else {}
    return facts if (facts.get("epochs"), facts.get("keys")) == (epochs, keys) else {}


def rows_of(seed: int, given: list[str], epochs: int, session: Session) -> list[dict]:
    """Every cycle of one seed, by one teacher."""
    method = METHODS[NAME]
    teacher = taught(method.teacher, given, session)
    # All cycles of a seed show the same first views, so they share the teacher's answers.
    given = [*given, f"teacher.weights={teacher['weights']}", "teacher.cache=auto"]
    rows = []
    for cycle in shorter_than(epochs):
        shown = "null" if cycle is None else cycle
        keys = [*given, f"seed={seed}", f"augment.cycle={shown}"]
        summary = finished(lesson(method, *keys, epochs=epochs), session)
        row = {
            "cycle": cycle,
            "seed": seed,
            "accuracy": summary["accuracy_last"],
            "images_per_s": summary["history"][-1]["images_per_s"],
            "teacher": teacher["accuracy_last"],
            "environment": environment(),
        }
        note(rows, row)
    return rows


def seeds(facts: dict) -> list[int]:
    return sorted({row["seed"] for row in facts["rows"]})


def shorter_than(epochs: int) -> list[int | None]:
    """The cycles after which a run of these epochs shows something again, and none."""
    return [cycle for cycle in CYCLES if cycle is None or cycle < epochs]


def table(facts: dict) -> str:
    """Mean and spread of every cycle, and what it gains over none, seed by seed."""
    first = [next(row for row in facts["rows"] if row["seed"] == seed) for seed in seeds(facts)]
    taught_by = ", ".join(format(one["teacher"], ".2%") for one in first)
    machines = {one["environment"]["cpu"]["name"]: one["environment"]["torch"] for one in first}
    lines = [
        "# KD on CIFAR-10 with the same views again",
        "",
        f"- command: {facts['command']}",
        f"- cpu, torch: {'; '.join(f'{cpu}, {torch}' for cpu, torch in machines.items())}",
        f"- {NAME} of docs/cifar10_methods.md: 5,000 training images, here {facts['epochs']} "
        f"epochs, accuracy of the last one on 10,000 test images; teacher "
        f"{taught_by} (seed by seed)",
        "- cycle: after so many epochs the views come again; std: the sample standard deviation "
        "over the seeds",
        "",
        "| cycle | seeds | accuracy | std | minus that of no cycle by seed, points | mean "
        "| standard error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    found = {
        cycle: [row["accuracy"] for row in facts["rows"] if row["cycle"] == cycle]
        for cycle in shorter_than(facts["epochs"])
    }
    for cycle, reached in found.items():
        cells = [str(cycle or "none"), str(len(reached))]
        cells += mean_and_std(reached)
        if cycle is None:
            cells += ["", "", ""]
        else:
            pairs = zip(reached, found[None], strict=True)
            cells += difference([100 * (one - none) for one, none in pairs])
        lines.append(row_line(cells))
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
