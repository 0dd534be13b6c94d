"""ERFNet teaches its cheap student on real street scenes: mIoU by method and seed, in docs/.

    python benchmarks/segmentation_on_camvid.py --data DIR/camvid --runs runs [--seeds 3] [--write]

The recipes of `fastkd.recipes.camvid`: 240 x 180 pixels, ERFNet-G(N) alone and with each method,
for the same number of epochs on the same images; the teacher is trained once, for longer. To resume
an interrupted run, give the command again.
"""

import argparse
import json
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path

from cifar10_methods import difference, finished, spread

from fastkd.compute.machine import environment
from fastkd.compute.ranks import open_world
from fastkd.output.console import Console
from fastkd.output.run_folder import find_finished
from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe
from fastkd.runs.stages import Session

ROOT = Path(__file__).parents[1]
EPOCHS, TEACHER_EPOCHS = 20, 60
ALONE = "alone"
METHODS = {
    ALONE: "camvid/erfnet-G:N",
    "AT": "camvid/erfnet--erfnet-G:N/at",
    "KD": "camvid/erfnet--erfnet-G:N/kd",
    "AT + KD": "camvid/erfnet--erfnet-G:N/at+kd",
    "CWD": "camvid/erfnet--erfnet-G:N/cwd",
}
# For speed alone: the blocks are the same.
QUICKLY = ("student.kernels=fused", "compile=on")
SHOWN = "AT + KD"
"""The method whose pictures are in docs/."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with CamVid")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--teacher-epochs", type=int, default=TEACHER_EPOCHS)
    parser.add_argument("--write", action="store_true", help="write docs/ and results/")
    parser.add_argument("keys", nargs="*", metavar="key=value", help="for every run")
    options = parser.parse_args()
    given = [f"data.root={options.data}", *options.keys]
    rows, pictures = [], None
    with open_world("cpu") as world:
        session = Session(world, Console(enabled=True), options.runs)
        words = [*given, f"epochs={options.teacher_epochs}", "eval_epochs=10"]
        lesson = load_recipe("camvid/erfnet", overrides=words)
        teacher = finished(lesson, session)
        weights = folder_of(lesson, session) / "best.safetensors"
        for seed, method, recipe in lessons(given, weights, options.epochs, options.seeds):
            summary = finished(recipe, session)
            row = {
                "method": method,
                "seed": seed,
                "miou": summary["miou_last"],
                "pixel_accuracy": summary["history"][-1]["val_pixel_accuracy"],
                "params": summary["params"],
                "macs": summary["macs"],
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
            if (method, seed) == (SHOWN, 0):
                pictures = folder_of(recipe, session) / "predictions.png"
    facts = {
        "command": " ".join(
            [f"python benchmarks/segmentation_on_camvid.py --seeds {options.seeds}", *options.keys]
        ),
        "precision": recipe.precision,
        "epochs": options.epochs,
        "teacher_epochs": options.teacher_epochs,
        "teacher": {key: teacher[key] for key in ("miou_best", "params", "macs")},
        "environment": environment(),
        "rows": rows,
    }
    text = table(facts)
    print(text)
    if options.write and pictures is not None:
        results = ROOT / "benchmarks" / "results" / "segmentation_camvid.json"
        results.write_text(json.dumps(facts, indent=1) + "\n")
        (ROOT / "docs" / "segmentation_camvid.md").write_text(text)
        shutil.copyfile(pictures, ROOT / "docs" / "segmentation_camvid.png")


def lessons(
    given: list[str], weights: Path, epochs: int, seeds: int
) -> Iterator[tuple[int, str, Recipe]]:
    """Seed, method and recipe of every student; `weights`: the teacher's."""
    taught = [f"teacher.weights={weights}", "teacher.train=false"]
    for seed in range(seeds):
        for method, name in METHODS.items():
            keys = [*given, *QUICKLY, f"seed={seed}", f"epochs={epochs}", f"eval_epochs={epochs}"]
            keys += taught if method != ALONE else []
            yield seed, method, load_recipe(name, overrides=keys)


def folder_of(recipe, session: Session) -> Path:
    run = find_finished(session.root, recipe.name, recipe.digest())
    assert run is not None
    return run.path


def table(facts: dict) -> str:
    """The page in docs/: mean and spread of every method, and what it gains seed by seed."""
    machine, teacher, alone = facts["environment"], facts["teacher"], facts["rows"][0]
    found = {
        method: [row["miou"] for row in facts["rows"] if row["method"] == method]
        for method in METHODS
    }
    lines = [
        "# Segmentation of CamVid, small enough for two CPU cores",
        "",
        "<!-- written by benchmarks/segmentation_on_camvid.py, raw rows in "
        "benchmarks/results/segmentation_camvid.json -->",
        "",
        f"`{facts['command']}`",
        "",
        f"{machine['time']}, {machine['cpu']['name']}, {machine['threads']} threads, torch "
        f"{machine['torch']}, fastkd {machine['fastkd']}, {facts['precision']}.",
        "",
        "180 training and 60 validation images of CamVid (JPEG, quality 85) at 240 x 180 pixels, "
        "11 classes. The teacher, an ERFNet "
        f"({teacher['params'] / 1e6:.2f} M parameters, {teacher['macs'] / 1e9:.2f} G "
        f"multiply-accumulates an image), was trained for {facts['teacher_epochs']} epochs: mIoU "
        f"{teacher['miou_best']:.2%}. Every student, an ERFNet-G(N) ({alone['params'] / 1e6:.2f} "
        f"M, {alone['macs'] / 1e9:.2f} G), sees the same images for {facts['epochs']} epochs from "
        "its own random start; mIoU of the last epoch. A budget of minutes: published numbers come "
        "from hundreds of epochs at 480 x 360 and more.",
        "",
        "| ERFNet-G(N) | seeds | mIoU | std | minus that alone by seed, points | mean "
        "| standard error |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, reached in found.items():
        cells = [method, str(len(reached))]
        cells += [f"{statistics.mean(reached):.2%}", f"{spread(reached):.2%}"]
        pairs = zip(reached, found[ALONE], strict=True)
        cells += ["", "", ""] if method == ALONE else difference([100 * (a - b) for a, b in pairs])
        lines.append("| " + " | ".join(cells) + " |")
    ending = [
        "",
        f"`predictions.png` of the first run with {SHOWN}:",
        "",
        "![Validation images, labels and predictions](segmentation_camvid.png)",
    ]
    return "\n".join([*lines, *ending, ""])


if __name__ == "__main__":
    main()
