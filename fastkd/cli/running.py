"""`fastkd train` and `fastkd eval`."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from fastkd.errors import UserError
from fastkd.recipe.printing import annotated_yaml
from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe
from fastkd.runs.sweep.grid import check_sweep, combinations

__all__ = ["evaluate", "train"]


def train(options: argparse.Namespace) -> int:
    """Train with a recipe, or print it, try it out, or sweep over it."""
    if options.jobs > 1 and not options.sweep:
        raise UserError("--jobs is for the runs of a --sweep; several GPUs for one run: torchrun")
    if options.sweep:
        for flag in ("resume", "dry_run", "print_config"):
            if getattr(options, flag):
                raise UserError(f"--sweep and --{flag.replace('_', '-')} exclude each other")
        recipes = {chosen: _recipe_of(options, chosen) for chosen in combinations(options.sweep)}
        check_sweep(recipes)
    else:
        recipes = {(): _recipe_of(options)}
    # A sweep changes neither the following settings nor the device.
    recipe = next(iter(recipes.values()))
    if options.print_config:
        print(annotated_yaml(recipe), end="")
        return 0
    return _run(recipes, options)


def _run(recipes: dict[tuple[str, ...], Recipe], options: argparse.Namespace) -> int:
    import torch

    from fastkd.compute.machine import keep_to_quota
    from fastkd.compute.precision import resolve_precision
    from fastkd.compute.ranks import open_world
    from fastkd.output.console import Console
    from fastkd.output.events import check_tensorboard
    from fastkd.runs.dry_run import dry_run
    from fastkd.runs.stages import Session, run_recipe
    from fastkd.runs.sweep.running import run_sweep

    keep_to_quota()
    recipe = next(iter(recipes.values()))
    if recipe.tensorboard:
        check_tensorboard()
    if recipe.deterministic:
        # cuBLAS is deterministic only with a fixed workspace, set before its first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with open_world(recipe.device) as world, Console(enabled=world.is_main) as console:
        session = Session(world, console, Path("runs"))
        # Saved with the recipe: a run resumed on another machine computes as it did before.
        settled = {
            chosen: one.model_copy(
                update={"precision": resolve_precision(one.precision, world.device).name}
            )
            for chosen, one in recipes.items()
        }
        if options.sweep:
            return run_sweep(settled, session, jobs=options.jobs)
        (recipe,) = settled.values()
        if options.dry_run:
            console.facts(f"dry run of {recipe.name}", dry_run(recipe, session))
        else:
            run_recipe(recipe, session, resume=options.resume)
    return 0


def evaluate(options: argparse.Namespace) -> None:
    """Evaluate a run folder, or a network with weights from a file."""
    from fastkd.output.console import Console
    from fastkd.runs.evaluate_saved import evaluate_model, evaluate_run

    if options.weights:
        found = evaluate_model(options.what, options.weights, options.words)
    else:
        found = evaluate_run(options.what, options.words)
    Console(enabled=True).facts(f"evaluation of {options.what}", found)


def _recipe_of(options: argparse.Namespace, more: Sequence[str] = ()) -> Recipe:
    """The recipe that the words name; the overrides `more` come last."""
    names = [word for word in options.words if "=" not in word]
    overrides = [word for word in options.words if "=" in word]
    if len(names) > 1:
        raise UserError(f"one recipe at a time, got {', '.join(names)}")
    if names and names[0].endswith((".yaml", ".yml")):
        raise UserError(f"{names[0]} is a file: fastkd train --config {quote(names[0])}")
    config = options.config
    if not names and config is None and options.resume not in (None, "auto"):
        config = Path(options.resume) / "config.yaml"
        if not config.exists():
            raise UserError(f"{options.resume} is not a run folder: it has no config.yaml")
    name = names[0] if names else (None if config else "quickstart")
    return load_recipe(name, config=config, overrides=[*overrides, *more])
