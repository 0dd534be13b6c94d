"""Does distillation help in the quickstart? Paired over seeds, raw rows and verdict to results/.

    python benchmarks/quickstart_seeds.py --seeds 5 [key=value ...]

Every seed trains its own teacher, the student alone at three learning rates (the best one counts,
chosen on the very images it is judged on, which favours it) and the distilled student at one.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from fastkd.compute.machine import environment
from fastkd.compute.ranks import open_world
from fastkd.output.console import Console
from fastkd.recipes.loading import load_recipe
from fastkd.runs.stages import Session, run_recipe

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--write", metavar="NAME", help="write results/NAME.json and .md")
    parser.add_argument("keys", nargs="*", metavar="key=value")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as root, open_world("cpu") as world:
        session = Session(world, Console(enabled=False), Path(root))
        for seed in range(options.seeds):
            recipe = load_recipe("quickstart", overrides=[*options.keys, f"seed={seed}"])
            start = time.perf_counter()
            summary = run_recipe(recipe, session)
            row = {
                "seed": seed,
                "teacher": summary["teacher"]["accuracy"],
                **{
                    f"alone_lr{run['lr']:g}": run["accuracy_last"] for run in summary["alone_tried"]
                },
                "alone": summary["alone"]["accuracy_last"],
                "distilled": summary["accuracy_last"],
                "seconds": time.perf_counter() - start,
            }
            row["gain"] = row["distilled"] - row["alone"]
            rows.append(row)
            print({key: round(value, 4) for key, value in row.items()}, flush=True)
    gains = [row["gain"] for row in rows]
    mean = statistics.mean(gains)
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    print(f"paired gain {mean:+.2%}, standard error {error:.2%}, {mean / error:.1f} errors")
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        command = f"python benchmarks/quickstart_seeds.py --seeds {options.seeds}"
        facts = {"command": " ".join([command, *options.keys]), "gain": mean, "error": error}
        content = facts | {"rows": rows, "environment": environment()}
        (RESULTS / f"{options.write}.json").write_text(json.dumps(content, indent=1) + "\n")
        (RESULTS / f"{options.write}.md").write_text(_markdown(facts, rows, content["environment"]))


def _markdown(facts: dict, rows: list[dict], machine: dict) -> str:
    keys = [key for key in rows[0] if key != "seconds"]
    lines = [
        "# Quickstart, paired over seeds",
        "",
        f"`{facts['command']}`",
        "",
        f"{machine['time']}, {machine['cpu']['name']}, {machine['threads']} threads, "
        f"torch {machine['torch']}, fastkd {machine['fastkd']}. Accuracy of the last epoch on the "
        "1,497 validation images.",
        "",
        "| " + " | ".join(keys) + " |",
        "|" + "---|" * len(keys),
    ]
    for row in rows:
        cells = [str(row[key]) if key == "seed" else f"{row[key]:.2%}" for key in keys]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Paired gain of the distilled student over the student alone at its best rate: "
        f"**{facts['gain']:+.2%}**, standard error {facts['error']:.2%} "
        f"({facts['gain'] / facts['error']:.1f} standard errors).",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
