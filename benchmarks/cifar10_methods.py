"""Methods side by side on real CIFAR-10 images, small enough for a CPU: one table in docs/.

    python benchmarks/cifar10_methods.py --data DIR/cifar10 --runs runs [--seeds 3] [--write]

Every student sees the same 5,000 training images for 10 epochs, with its recipe's schedules shrunk
to them; its teacher was trained once, on all 50,000, for 3. To resume an interrupted run, give the
command again. Rows are in the order of `METHODS`, never ranked: the table says whose spread lies
apart from the same student trained alone.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

from accuracy_runs import finished, mean_and_std, note, row_line, spread, words, write

from fastkd.compute.machine import environment
from fastkd.compute.ranks import open_world
from fastkd.output.console import Console
from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe
from fastkd.runs.stages import Session

ROOT = Path(__file__).parents[1]
EPOCHS, TEACHER_EPOCHS = 10, 3
LESSON = ("data.train_limit=5000", "batch_size=64")
# Stages 2 to 4 at a quarter of the width, and ImageNet's stem without its pooling: as in the
# paper's text, at a quarter of the cost of the recipes' stem.
QUARTER = ("student.width=0.25", "student.stem=imagenet-nopool")
PAIR = "cifar10/resnet56--resnet20"
PLAIN = "alignkd/cifar10/resnet18--plain18"

TEACHERS = {
    "resnet56": ("cifar10/resnet56", ()),
    "resnet18 x0.25": ("alignkd/cifar10/resnet18/scratch", QUARTER),
}


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    recipe: str
    keys: tuple[str, ...] = ()
    teacher: str | None = None
    """One of `TEACHERS`."""
    alone: str | None = None
    """The row it is compared with; None for a student that is trained alone."""


ALONE, PLAIN_ALONE = "resnet20, alone", "plain18 x0.25, alone"


def resnet20(loss: str, *keys: str) -> Method:
    """A ResNet-20 taught by the ResNet-56."""
    return Method(f"{PAIR}/{loss}", keys, teacher="resnet56", alone=ALONE)


METHODS = {
    ALONE: Method("cifar10/resnet20"),
    "resnet20, KD": resnet20("kd"),
    "resnet20, KD + TLCutMix": resnet20("tlcutmix"),
    "resnet20, KD + TLCutMix + pick": resnet20("tlcutmix", "augment.pick.criterion=kl"),
    "resnet20, AT": resnet20("at"),
    "resnet20, DKD": resnet20("dkd"),
    # The recipe's 16,384 negatives are more than 5,000 images have of other classes.
    "resnet20, CRD": resnet20("crd", "losses.crd.negatives=4096"),
    "resnet20-G(4), AT": resnet20("at", "student.block=G:4"),
    PLAIN_ALONE: Method("alignkd/cifar10/plain18/scratch", QUARTER),
    "plain18 x0.25, AlignKD": Method(
        f"{PLAIN}/alignkd",
        (*QUARTER, "teacher.width=0.25", "teacher.stem=imagenet-nopool"),
        teacher="resnet18 x0.25",
        alone=PLAIN_ALONE,
    ),
}


def main() -> None:
    parser = words(
        __doc__, images="CIFAR-10", writes="docs/ and results/", keys="for every run, for a trial"
    )
    options = parser.parse_args()
    given = [f"data.root={options.data}", *options.keys]
    rows = []
    with open_world("cpu") as world:
        session = Session(world, Console(enabled=True), options.runs)
        teachers: dict[str, dict] = {}
        for seed in range(options.seeds):
            for name, method in METHODS.items():
                keys = [f"seed={seed}", *given]
                if method.teacher is not None:
                    if method.teacher not in teachers:
                        teachers[method.teacher] = taught(method.teacher, given, session)
                    keys.append(f"teacher.weights={teachers[method.teacher]['weights']}")
                summary = finished(lesson(method, *keys), session)
                row = {
                    "method": name,
                    "seed": seed,
                    "accuracy": summary["accuracy_last"],
                    "images_per_s": summary["history"][-1]["images_per_s"],
                    "params": summary["params"],
                    "macs": summary["macs"],
                }
                note(rows, row)
    facts = {
        "command": f"python benchmarks/cifar10_methods.py --seeds {options.seeds}",
        "teachers": {name: summary["accuracy_last"] for name, summary in teachers.items()},
        "environment": environment(),
        "rows": rows,
    }
    text = table(facts)
    print(text)
    if options.write:
        write(ROOT / "benchmarks" / "results" / "cifar10_methods.json", facts)
        (ROOT / "docs" / "cifar10_methods.md").write_text(text)


def lesson(method: Method, *keys: str, epochs: int = EPOCHS) -> Recipe:
    """The recipe of a row in these epochs, its schedules shrunk to them; evaluated at their end."""
    shrunk = f"epoch_factor={epochs / load_recipe(method.recipe).epochs:.12g}"
    overrides = [*LESSON, shrunk, f"eval_epochs={epochs}", *method.keys, *keys]
    return load_recipe(method.recipe, overrides=overrides)


def taught(name: str, given: list[str], session: Session) -> dict:
    """The summary of a teacher of `TEACHERS`, with the path of its weights."""
    base, keys = TEACHERS[name]
    recipe = load_recipe(
        base, overrides=[f"epochs={TEACHER_EPOCHS}", "batch_size=64", *keys, *given]
    )
    summary = finished(recipe, session)
    (folder,) = (session.root / recipe.name).glob(f"*-{recipe.digest()[:8]}")
    return summary | {"weights": folder / "best.safetensors"}


def table(facts: dict) -> str:
    """The page in docs/: mean and spread of every method, in the order of `METHODS`."""
    found = {
        name: [row["accuracy"] for row in facts["rows"] if row["method"] == name]
        for name in METHODS
    }
    machine = facts["environment"]
    lessons = ", ".join(f"{name} {accuracy:.2%}" for name, accuracy in facts["teachers"].items())
    lines = [
        "# Methods on CIFAR-10, small enough for a CPU",
        "",
        "<!-- written by benchmarks/cifar10_methods.py, raw rows in "
        "benchmarks/results/cifar10_methods.json -->",
        "",
        f"`{facts['command']}`",
        "",
        f"{machine['time']}, {machine['cpu']['name']}, {machine['threads']} threads, torch "
        f"{machine['torch']}, fastkd {machine['fastkd']}.",
        "",
        f"Every student sees the same 5,000 training images (JPEG, quality 75) for {EPOCHS} epochs "
        "of batches of 64, each method with the keys of its recipe and its schedules shrunk to "
        "them; accuracy of the last epoch on the 10,000 test images. The teachers saw all 50,000 "
        f"for {TEACHER_EPOCHS} epochs: {lessons}. `x0.25` are ResNet-18 and the plain CNN with "
        "stages 2 to 4 at a quarter of the width and ImageNet's stem less its pooling; CRD takes "
        "4,096 negatives, which 5,000 images allow. This is a small "
        "fraction of the published budgets: it shows that every method learns here, not which one "
        "is best there.",
        "",
        "| student, method | seeds | accuracy | std | against the student alone | gain per seed |",
        "|---|---|---|---|---|---|",
    ]
    for name, method in METHODS.items():
        lines.append(_row(name, found[name], found[method.alone] if method.alone else None))
    return "\n".join([*lines, "", _ENDING, ""])


_ENDING = (
    "std is the sample standard deviation over the seeds. *above* and *below*: mean plus or minus "
    "std does not meet that of the same student trained alone; *overlap*: it does, and nothing is "
    "said of the order. Nothing is said of the order of two methods whose spreads overlap."
)


def _row(name: str, values: list[float], base: list[float] | None) -> str:
    mean, std = statistics.mean(values), spread(values)
    cells = [name, str(len(values)), *mean_and_std(values)]
    if base is None:
        cells += ["", ""]
    else:
        apart = abs(mean - statistics.mean(base)) > std + spread(base)
        above = mean > statistics.mean(base)
        cells.append("overlap" if not apart else "above" if above else "below")
        cells.append(" ".join(f"{100 * (v - b):+.2f}" for v, b in zip(values, base, strict=False)))
    return row_line(cells)


if __name__ == "__main__":
    main()
