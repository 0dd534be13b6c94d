"""Whether bf16 costs accuracy: the same runs in fp32 and in bf16, seed by seed, on real CIFAR-10.

    python benchmarks/precision_on_cifar10.py --data DIR/cifar10 --runs runs [--seeds 3] [--write]

Students, data and schedules are those of `cifar10_methods.py`; both precisions share one teacher.
To resume an interrupted run, give the command again.
"""

import argparse
import json
import statistics
from pathlib import Path

from cifar10_methods import EPOCHS, LESSON, METHODS, finished, taught

from fastkd.compute.machine import environment
from fastkd.compute.ranks import open_world
from fastkd.output.console import Console
from fastkd.recipes.loading import load_recipe
from fastkd.runs.stages import Session

RESULTS = Path(__file__).parent / "results"
NAMES = ("resnet20, alone", "resnet20, KD", "resnet20, AT")
PRECISIONS = ("fp32", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with CIFAR-10")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write results/precision_cifar10.*")
    options = parser.parse_args()
    given = [f"data.root={options.data}"]
    rows = []
    with open_world("cpu") as world:
        session = Session(world, Console(enabled=True), options.runs)
        teacher = taught("resnet56", [*given, "precision=fp32"], session)
        for seed in range(options.seeds):
            for name in NAMES:
                method = METHODS[name]
                shrunk = f"epoch_factor={EPOCHS / load_recipe(method.recipe).epochs:.12g}"
                keys = [*LESSON, shrunk, f"seed={seed}", *method.keys, *given]
                if method.teacher is not None:
                    keys.append(f"teacher.weights={teacher['weights']}")
                for precision in PRECISIONS:
                    recipe = load_recipe(method.recipe, overrides=[*keys, f"precision={precision}"])
                    accuracy = finished(recipe, session)["accuracy_last"]
                    rows.append(
                        {"method": name, "seed": seed, "precision": precision, "accuracy": accuracy}
                    )
                    print(json.dumps(rows[-1]), flush=True)
    facts = {
        "command": f"python benchmarks/precision_on_cifar10.py --seeds {options.seeds}",
        "teacher": teacher["accuracy_last"],
        "environment": environment(),
        "rows": rows,
    }
    text = table(facts)
    print(text)
    if options.write:
        (RESULTS / "precision_cifar10.json").write_text(json.dumps(facts, indent=1) + "\n")
        (RESULTS / "precision_cifar10.md").write_text(text)


def table(facts: dict) -> str:
    """Mean and spread of every method in both precisions, and the paired difference."""
    machine = facts["environment"]
    lines = [
        "# bf16 against fp32 on CIFAR-10",
        "",
        f"- command: {facts['command']}",
        f"- date: {machine['time']}; cpu: {machine['cpu']['name']}; torch: {machine['torch']}",
        f"- 5,000 training images, {EPOCHS} epochs, accuracy of the last epoch on 10,000 test "
        f"images; teacher resnet56 {facts['teacher']:.2%}, trained in fp32",
        "",
        "| method | fp32 | bf16 | bf16 - fp32 by seed, points | mean | standard error |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    every = []
    for name in NAMES:
        found = {
            precision: [
                row["accuracy"]
                for row in facts["rows"]
                if row["method"] == name and row["precision"] == precision
            ]
            for precision in PRECISIONS
        }
        gains = [100 * (b - f) for f, b in zip(found["fp32"], found["bf16"], strict=True)]
        every += gains
        means = [f"{statistics.mean(found[precision]):.2%}" for precision in PRECISIONS]
        lines.append("| " + " | ".join([name, *means, *_difference(gains)]) + " |")
    lines.append("| " + " | ".join(["all", "", "", *_difference(every)]) + " |")
    return "\n".join([*lines, ""])


def _difference(gains: list[float]) -> list[str]:
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    each = " ".join(f"{gain:+.2f}" for gain in gains)
    return [each, f"{statistics.mean(gains):+.2f}", f"{error:.2f}"]


if __name__ == "__main__":
    main()
