"""ERFNet teaches its cheap student on real street scenes: mIoU by method and seed, in docs/.

    python benchmarks/segmentation_on_camvid.py --data DIR/camvid --runs runs [--seeds 3] [--write]

The recipes of `fastkd.recipes.camvid`: 240 x 180 pixels, ERFNet-G(N) alone and with each method,
for the same number of epochs on the same images; the teacher is trained once, for longer. To resume
an interrupted run, give the command again.
"""

import shutil
from pathlib import Path

from accuracy_runs import difference, finished, mean_and_std, note, row_line, words, write

from fastkd.compute.machine import environment
from fastkd.compute.ranks import open_world
from fastkd.output.console import Console
from fastkd.output.run_folder import find_finished
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
SHOWN = "AT + KD"
"""The method whose pictures are in docs/."""


def main() -> None:
    parser = words(__doc__, images="CamVid", writes="docs/ and results/", keys="for every run")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--teacher-epochs", type=int, default=TEACHER_EPOCHS)
    options = parser.parse_args()
    given = [f"data.root={options.data}", *options.keys]
    rows, pictures = [], None
    with open_world("cpu") as world:
        session = Session(world, Console(enabled=True), options.runs)
        keys = [*given, f"epochs={options.teacher_epochs}", "eval_epochs=10"]
        lesson = load_recipe("camvid/erfnet", overrides=keys)
        teacher = finished(lesson, session)
        weights = folder_of(lesson, session) / "best.safetensors"
        taught = [f"teacher.weights={weights}", "teacher.train=false"]
        for seed in range(options.seeds):
            for method, name in METHODS.items():
                keys = [*given, f"seed={seed}", f"epochs={options.epochs}"]
                keys += [f"eval_epochs={options.epochs}", *(taught if method != ALONE else ())]
                recipe = load_recipe(name, overrides=keys)
                summary = finished(recipe, session)
                row = {
                    "method": method,
                    "seed": seed,
                    "miou": summary["miou_last"],
                    "pixel_accuracy": summary["history"][-1]["val_pixel_accuracy"],
                    "params": summary["params"],
                    "macs": summary["macs"],
                }
                note(rows, row)
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
        write(ROOT / "benchmarks" / "results" / "segmentation_camvid.json", facts)
        (ROOT / "docs" / "segmentation_camvid.md").write_text(text)
        shutil.copyfile(pictures, ROOT / "docs" / "segmentation_camvid.png")


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
        cells += mean_and_std(reached)
        pairs = zip(reached, found[ALONE], strict=True)
        cells += ["", "", ""] if method == ALONE else difference([100 * (a - b) for a, b in pairs])
        lines.append(row_line(cells))
    ending = [
        "",
        f"`predictions.png` of the first run with {SHOWN}:",
        "",
        "![Validation images, labels and predictions](segmentation_camvid.png)",
    ]
    return "\n".join([*lines, *ending, ""])


if __name__ == "__main__":
    main()
