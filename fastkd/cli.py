"""The `fastkd` command. The only argparse of the package, and the only place that exits.

Options are few on purpose: everything that decides a run is a recipe key, spelled key=value.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastkd.errors import FastKDError, UserError

__all__ = ["main"]

TRAIN_HELP = """
examples:
  fastkd train                                     handwritten digits, nothing to download
  fastkd train cifar10/resnet56--resnet20/kd data.root=DATA epochs=30 teacher.epochs=30
  fastkd train --resume auto                       go on where the last quickstart stopped
  fastkd train --config my.yaml optim.lr=0.1       a file with the same keys, then overrides
  torchrun --nproc-per-node=8 -m fastkd.train RECIPE ...

keys are dotted (optim.lr=0.1); a comma makes a list (optim.milestones=150,180,210).
`fastkd train RECIPE --print-config` shows every key with its value.
exit codes: 0 done, 1 failed run, 2 wrong request, 130 Ctrl-C and 143 SIGTERM (after a save).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    try:
        options = _parser().parse_args(arguments)
        return options.run(options) or 0
    except FastKDError as error:
        # Under torchrun every rank raises the same error; one of them says it.
        if os.environ.get("RANK", "0") == "0":
            print(f"fastkd: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `fastkd models | head`: the reader has gone, which is not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastkd",
        description="Train small vision networks from large ones: knowledge distillation in PyTorch.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train",
        help="train a student by a recipe",
        description="Train a student by a recipe; without arguments, the quickstart.",
        epilog=TRAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE | key=value",
        help="a named recipe, then overrides of its keys",
    )
    train.add_argument("--config", metavar="FILE", help="YAML file with recipe keys")
    train.add_argument(
        "--resume",
        metavar="auto|RUN",
        help="go on with a run folder, or with the newest unfinished one of this recipe",
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, make two steps, print what a run would take",
    )
    train.add_argument("--print-config", action="store_true", help="print the resolved recipe")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "eval",
        help="evaluate a run folder or a network",
        description="Evaluate RUN, or MODEL with --weights, on the validation images.",
    )
    evaluate.add_argument("what", metavar="RUN | MODEL", help="run folder, or network name")
    evaluate.add_argument("--weights", metavar="FILE", help="weights of MODEL")
    evaluate.add_argument(
        "keys",
        nargs="*",
        metavar="key=value",
        help="recipe keys such as data.name=cifar10 data.root=DATA",
    )
    evaluate.set_defaults(run=_eval)

    models = commands.add_parser("models", help="list networks with parameters and MACs")
    models.add_argument(
        "pattern", nargs="?", default="*", help="shell pattern, e.g. 'resnet*' or 'timm:*b0*'"
    )
    models.add_argument("--input", default="3x32x32", metavar="CxHxW", help="input of the count")
    models.add_argument("--json", action="store_true", help="machine-readable")
    models.set_defaults(run=_models)

    recipes = commands.add_parser("recipes", help="list the named recipes")
    recipes.add_argument("pattern", nargs="?", default="*", help="shell pattern, e.g. '*tlcutmix*'")
    recipes.set_defaults(run=_recipes)

    doctor = commands.add_parser("doctor", help="what this machine offers and what is missing")
    doctor.add_argument("--json", action="store_true", help="machine-readable")
    doctor.set_defaults(run=_doctor)
    return parser


def _recipe_of(options: argparse.Namespace, default: str | None) -> Any:
    from fastkd.recipe.loading import load_recipe

    names = [word for word in options.words if "=" not in word]
    overrides = [word for word in options.words if "=" in word]
    if len(names) > 1:
        raise UserError(f"one recipe at a time, got {', '.join(names)}")
    name = names[0] if names else (None if options.config else default)
    return load_recipe(name, config=options.config, overrides=overrides)


def _train(options: argparse.Namespace) -> None:
    if options.resume not in (None, "auto") and not options.words and not options.config:
        config = Path(options.resume) / "config.yaml"
        if not config.exists():
            raise UserError(f"{options.resume} is not a run folder: it has no config.yaml")
        options.config = str(config)
    recipe = _recipe_of(options, default="quickstart")
    if options.print_config:
        from fastkd.recipe.loading import recipe_to_yaml

        print(recipe_to_yaml(recipe), end="")
        return
    import torch

    from fastkd.distributed import open_world
    from fastkd.report.console import Console
    from fastkd.run import Session, dry_run, run_recipe

    if recipe.deterministic:
        torch.use_deterministic_algorithms(True)
    with open_world(recipe.device) as world, Console(enabled=world.is_main) as console:
        session = Session(world, console, Path("runs"))
        if options.dry_run:
            found = dry_run(recipe, session)
            session.console.facts(f"dry run of {recipe.name}", found)
        else:
            run_recipe(recipe, session, resume=options.resume)


def _eval(options: argparse.Namespace) -> None:
    from fastkd.evaluate_saved import evaluate_model, evaluate_run
    from fastkd.report.console import Console

    if options.weights:
        found = evaluate_model(options.what, options.weights, options.keys)
    else:
        found = evaluate_run(options.what, options.keys)
    Console(enabled=True).facts(f"evaluation of {options.what}", found)


def _models(options: argparse.Namespace) -> None:
    from fastkd.models import count, create_model, list_models
    from fastkd.models.taps import available_taps

    try:
        shape = tuple(int(side) for side in options.input.split("x"))
        channels, height, width = shape
    except ValueError:
        raise UserError(f"--input is CxHxW such as 3x32x32, got {options.input!r}") from None
    names = list_models(options.pattern)
    if not names:
        raise UserError(f"no network matches {options.pattern!r}; try 'resnet*' or 'timm:resnet*'")
    rows = []
    for name in names:
        model = create_model(name, None if ":" in name else 100)
        size = count(model, (channels, height, width))
        taps = [] if ":" in name else list(available_taps(model))
        rows.append({"name": name, "params": size.params, "macs": size.macs, "taps": taps})
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(
        f"{'network':<34}{'parameters':>14}{'MACs':>16}   at {options.input}, zoo with 100 classes"
    )
    for row in rows:
        print(f"{row['name']:<34}{row['params']:>14,}{row['macs']:>16,}")
    print("taps of the zoo: stem, stage1, stage2, .. (each also as stageN:preact), pooled, logits")


def _recipes(options: argparse.Namespace) -> None:
    import fnmatch

    from fastkd.recipes import all_recipes

    found = {n: make for n, make in all_recipes().items() if fnmatch.fnmatch(n, options.pattern)}
    if not found:
        raise UserError(f"no recipe matches {options.pattern!r}; `fastkd recipes` lists all")
    width = max(map(len, found))
    for name, make in found.items():
        print(f"{name:<{width}}  {make().description}")


def _doctor(options: argparse.Namespace) -> None:
    from fastkd.doctor import run_doctor

    found = run_doctor(json=options.json)
    print(json.dumps(found, indent=1) if options.json else found)
