"""ERFNet teaches its cheap student on real street scenes: mIoU by method and seed, in docs/.

    python benchmarks/segmentation_on_camvid.py --data DIR/camvid --runs runs [--seeds 3] [--write]

The recipes of `fastkd.recipes.camvid`: 240 x 180 pixels, ERFNet-G(N) alone and with each method,
for the same number of epochs on the same images. After the recipes' 20 epochs such a student knows
sky, buildings and road and nothing else, so these runs have 60. Every seed has a teacher of its
own. To resume an interrupted run, give the command again. With --write every finished seed goes
into docs/ and results/ at once, and one that is there is not made again: seeds may be made on
different days.
"""

import json
import shutil
from pathlib import Path

from accuracy_runs import difference, finished, mean_and_std, note, row_line, words, write

from fastkd.compute.machine import environment
from fastkd.compute.ranks import open_world
from fastkd.output.console import Console
from fastkd.output.run_folder import find_finished
from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe
from fastkd.runs.stages import Session

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "segmentation_camvid.json"
PAGE = ROOT / "docs" / "segmentation_camvid.md"
PICTURE = PAGE.with_suffix(".png")
EPOCHS = 60
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
    parser = words(
        __doc__, images="CamVid", writes="and extend docs/ and results/", keys="for every run"
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args()
    given = [f"data.root={options.data}", f"epochs={options.epochs}", *options.keys]
    facts = read_results(options.epochs, options.keys) if options.write else {}
    facts.setdefault("rows", [])
    script = "python benchmarks/segmentation_on_camvid.py"
    facts |= {
        "command": " ".join([f"{script} --seeds {options.seeds}", *options.keys]),
        "epochs": options.epochs,
        "keys": options.keys,
    }
    with open_world("cpu") as world:
        session = Session(world, Console(enabled=True), options.runs)
        for seed in range(options.seeds):
            if any(row["seed"] == seed for row in facts["rows"]):
                continue
            made, picture = rows_of(seed, given, session)
            facts["rows"] += made
            if options.write:
                write(RESULTS, facts)
                PAGE.write_text(table(facts))
                shutil.copyfile(picture, PICTURE)
    print(table(facts))


def read_results(epochs: int, keys: list[str]) -> dict:
    """Seeds that were made before, if they had these epochs and keys."""
    facts = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return facts if (facts.get("epochs"), facts.get("keys")) == (epochs, keys) else {}


def rows_of(seed: int, given: list[str], session: Session) -> tuple[list[dict], Path]:
    """Every method of one seed, by one teacher, and the pictures of `SHOWN`."""
    given = [*given, f"seed={seed}", "eval_epochs=20"]
    lesson = load_recipe("camvid/erfnet", overrides=given)
    teacher = finished(lesson, session)
    weights = folder_of(lesson, session) / "best.safetensors"
    rows, picture = [], Path()
    for method, name in METHODS.items():
        taught = [f"teacher.weights={weights}", "teacher.train=false"] if method != ALONE else []
        recipe = load_recipe(name, overrides=[*given, *QUICKLY, *taught])
        summary = finished(recipe, session)
        row = {
            "method": method,
            "seed": seed,
            "miou": summary["miou_last"],
            "pixel_accuracy": summary["history"][-1]["val_pixel_accuracy"],
            "params": summary["params"],
            "macs": summary["macs"],
            "precision": recipe.precision,
            "teacher": {key: teacher[key] for key in ("miou_best", "params", "macs")},
            "environment": environment(),
        }
        note(rows, row)
        if method == SHOWN:
            picture = folder_of(recipe, session) / "predictions.png"
    return rows, picture


def folder_of(recipe: Recipe, session: Session) -> Path:
    run = find_finished(session.root, recipe.name, recipe.digest())
    assert run is not None
    return run.path


def table(facts: dict) -> str:
    """The page in docs/: mean and spread of every method, and what it gains seed by seed."""
    first = [row for row in facts["rows"] if row["method"] == ALONE]
    alone, teacher = first[0], first[0]["teacher"]
    machines = {
        f"{row['environment']['cpu']['name']}, torch {row['environment']['torch']}": row
        for row in first
    }
    taught_by = ", ".join(format(row["teacher"]["miou_best"], ".2%") for row in first)
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
        f"{'; '.join(machines)}; {alone['precision']}.",
        "",
        "180 training and 60 validation images of CamVid (JPEG, quality 85) at 240 x 180 pixels, "
        f"11 classes, {facts['epochs']} epochs for every network. The teachers, one for each seed, "
        f"are ERFNets ({teacher['params'] / 1e6:.2f} M parameters, {teacher['macs'] / 1e9:.2f} G "
        f"multiply-accumulates an image): mIoU {taught_by}. Every student is an ERFNet-G(N) "
        f"({alone['params'] / 1e6:.2f} M, {alone['macs'] / 1e9:.2f} G) with its own random start; "
        "mIoU of the last epoch. A budget of minutes: published numbers come from hundreds of "
        "epochs at 480 x 360 and more.",
        "",
        "| ERFNet-G(N) | seeds | mIoU | std | minus that alone by seed, points | mean "
        "| standard error |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, reached in found.items():
        cells = [method, str(len(reached)), *mean_and_std(reached)]
        pairs = zip(reached, found[ALONE], strict=True)
        cells += ["", "", ""] if method == ALONE else difference([100 * (a - b) for a, b in pairs])
        lines.append(row_line(cells))
    ending = [
        "",
        f"`predictions.png` of a run with {SHOWN}:",
        "",
        f"![Validation images, labels and predictions]({PICTURE.name})",
    ]
    return "\n".join([*lines, *ending, ""])


if __name__ == "__main__":
    main()
