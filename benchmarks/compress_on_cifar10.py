"""`fastkd compress` end to end on real CIFAR-10 images, against depth- and width-scaled students.

    python benchmarks/compress_on_cifar10.py --data DIR/cifar10 --runs runs [--seeds 3] [--write]

WRN-40-2, ResNet-18 and timm's mobilenetv2_100, each with a target of half and of a quarter of its
latency in onnxruntime on one thread. Every original is trained once. The search and the choice of a
case are made once; chosen student and baselines are then distilled with `--seeds` seeds. Give the
command again to resume; with --write every finished case goes into the results at once. --keys are
for every training, such as data.train_limit=1000 for a trial.
"""

import argparse
import statistics
from pathlib import Path

from accuracy_runs import mean_and_std, row_line, write

from fastkd.compress.phases import Request, compress
from fastkd.compress.table import RuntimeMeter
from fastkd.compress.target import Target
from fastkd.compute.machine import environment
from fastkd.compute.ranks import open_world
from fastkd.errors import UserError
from fastkd.output.console import Console
from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe
from fastkd.runs.stages import Session, run_recipe

RESULTS = Path(__file__).parent / "results" / "compress_cifar10"
EPOCHS, SHORT_EPOCHS = 30, 3
LESSON = ("data.image_size=32", "augment.crop=pad", "batch_size=128", "precision=fp32")
NETWORKS = {
    "wrn_40_2": (),
    "resnet18": ("student.stem=cifar",),
    "timm:mobilenetv2_100": (),
}
TARGETS = ("latency=0.5x", "latency=0.25x")
NEAR = 1.05
"""A measured latency counts as on target up to this share of it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with CIFAR-10 as JPEG")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--short-epochs", type=int, default=SHORT_EPOCHS)
    parser.add_argument("--keep", type=int, default=8)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--write", action="store_true", help="write results/compress_cifar10.*")
    parser.add_argument("--keys", nargs="*", default=[], help="for every training, for a trial")
    options = parser.parse_args()
    facts = {
        "command": f"python benchmarks/compress_on_cifar10.py --seeds {options.seeds} --epochs "
        f"{options.epochs} --short-epochs {options.short_epochs}",
        "environment": environment(),
        "cases": [],
    }
    with open_world("auto") as world, Console(enabled=True) as console:
        session = Session(world, console, options.runs)
        for network in options.networks:
            keys = (f"data.root={options.data}", *LESSON, *options.keys)
            keys = (*keys, f"epochs={options.epochs}")
            weights = taught(network, keys, session)
            for target in options.targets:
                facts["cases"].append(case(network, target, keys, weights, options, session))
                if options.write:
                    write(RESULTS.with_suffix(".json"), facts)
                    RESULTS.with_suffix(".md").write_text(table(facts))
    print(table(facts))


def original(network: str, keys: tuple[str, ...], runs: Path) -> Recipe:
    """Trains a network on the labels alone, once for all its targets."""
    words = [f"student.name={network}", *NETWORKS[network], *keys]
    words += ["teacher=null", "losses.kd=null", "losses.ce.weight=1"]
    recipe = load_recipe("folder", overrides=words)
    place = runs / "originals" / f"{network.replace(':', '-')}-{recipe.digest()[:8]}"
    return recipe.replace(out=str(place), eval_epochs=recipe.total_epochs)


def taught(network: str, keys: tuple[str, ...], session: Session) -> str:
    """The run folder of a trained original."""
    recipe = original(network, keys, session.root)
    place = str(recipe.out)
    run_recipe(recipe, session, resume="auto" if Path(place).exists() else None)
    return place


def case(
    network: str,
    target: str,
    keys: tuple[str, ...],
    weights: str,
    options: argparse.Namespace,
    session: Session,
) -> dict:
    """One network with one target: what was found, or why nothing could be."""
    request = Request(
        model=network,
        target=Target.parse(target),
        weights=weights,
        keys=(*NETWORKS[network], *keys),
        short_epochs=options.short_epochs,
        keep=options.keep,
        draws=options.draws,
        seeds=options.seeds,
    )
    place = options.runs / f"{network.replace(':', '-')}-{target.replace('=', '-')}"
    try:
        found = compress(request, place, session, RuntimeMeter("ort-cpu", threads=1))
    except UserError as error:
        return {"network": network, "target": target, "refused": str(error)}
    assert found is not None  # of a dry run
    return {"network": network, "target": target, **found}


def table(facts: dict) -> str:
    """Markdown: a table of all networks, and for each case what the measurement says."""
    machine = facts["environment"]
    lines = [
        "# fastkd compress on CIFAR-10",
        "",
        "<!-- written by benchmarks/compress_on_cifar10.py -->",
        "",
        f"`{facts['command']}`",
        "",
        f"{machine['time']}, {machine['cpu']['name']}, torch {machine['torch']}, fastkd "
        f"{machine['fastkd']}; onnxruntime, one thread, one image a call.",
        "",
        "| case | network | seeds | accuracy | std | ms p50 | of the target | difference |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for one in facts["cases"]:
        name = f"{one['network']} {one['target']}"
        if "refused" in one:
            lines.append(f"| {name} | {one['refused']} | | | | | | |")
            continue
        rows = {row["name"]: row for row in one["rows"]}
        lines += [_row(name, row, rows["chosen"], one["limit"]) for row in one["rows"]]
    return "\n".join([*lines, "", _ENDING, ""])


_ENDING = (
    "difference: points of accuracy by which the chosen student is above this network, mean over "
    "the seeds and its standard error, paired by seed. The chosen student was selected among "
    "several on held back training images, after a short distillation with the first seed; the "
    "scaled ones were selected by latency alone, nearest at or below the chosen student's."
)


def _row(case: str, row: dict, chosen: dict, limit: float) -> str:
    values, p50 = row["accuracies"], row["ms"][1]
    met = "" if row["name"] == "original" else f"{p50 / limit:.2f}"
    if row["name"] == "chosen":
        met += " met" if p50 <= limit else " within 5 %" if p50 <= NEAR * limit else " missed"
    cells = [case, row["name"], str(len(values)), *mean_and_std(values)]
    cells += [f"{p50:.3f}", met, _difference(row, chosen)]
    return row_line(cells)


def _difference(row: dict, chosen: dict) -> str:
    if row["name"] == "chosen" or len(row["accuracies"]) != len(chosen["accuracies"]):
        return ""
    pairs = zip(chosen["accuracies"], row["accuracies"], strict=True)
    gains = [100 * (one - other) for one, other in pairs]
    error = f" +- {statistics.stdev(gains) / len(gains) ** 0.5:.2f}" if len(gains) > 1 else ""
    return f"{statistics.mean(gains):+.2f}{error}"


if __name__ == "__main__":
    main()
