"""`fastkd train` and `fastkd eval`."""

import argparse
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

import torch

from fastkd.compute.machine import keep_to_quota
from fastkd.compute.precision import resolve_precision
from fastkd.compute.ranks import on_main, open_world
from fastkd.errors import UserError
from fastkd.output.console import Console
from fastkd.output.trackers.opening import check_trackers
from fastkd.recipe.printing import annotated_yaml
from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe
from fastkd.report.labels import named_for_trackers
from fastkd.runs.dry_run import dry_run
from fastkd.runs.evaluate_onnx import evaluate_onnx
from fastkd.runs.evaluate_saved import evaluate_model, evaluate_run
from fastkd.runs.stages import Session, run_recipe
from fastkd.runs.sweep.grid import Choice, check_sweep, combinations
from fastkd.runs.sweep.launchers import open_launcher
from fastkd.runs.sweep.running import rehearse_sweep, run_sweep

__all__ = ["evaluate", "recipe_of", "run_all", "session_of", "settled", "swept", "train"]


def train(options: argparse.Namespace) -> int:
    """Train with a recipe, or print it, try it out, or sweep over it."""
    for flag in ("jobs", "launcher"):
        if getattr(options, flag) and not options.sweep:
            raise UserError(
                f"--{flag} is for the runs of a --sweep; several GPUs for one run: torchrun"
            )
    if options.together and not options.sweep:
        raise UserError("--together is for the runs of a --sweep, which it trains in one process")
    if options.sweep:
        for flag in ("resume", "dry_run", "print_config"):
            if getattr(options, flag) and not (flag == "dry_run" and options.together):
                raise UserError(f"--sweep and --{flag.replace('_', '-')} exclude each other")
        recipes = swept(combinations(options.sweep), options.words, options.config)
        check_sweep(recipes)
        return _rehearse_all(recipes) if options.dry_run else run_all(recipes, options)
    recipe = recipe_of(options.words, config=options.config, resume=options.resume)
    if options.print_config:
        print(annotated_yaml(recipe), end="")
        return 0
    return _run(recipe, options)


def swept(
    choices: Sequence[Choice], words: Sequence[str], config: str | None = None
) -> dict[Choice, Recipe]:
    """The recipe of every choice; one may also name it, `recipe=NAME`."""
    recipes: dict[Choice, Recipe] = {}
    for choice in choices:
        names = [key.partition("=")[2] for key in choice if key.startswith("recipe=")]
        more = [key for key in choice if not key.startswith("recipe=")]
        recipes[choice] = recipe_of(words, config=config, more=more, named=names)
    return recipes


@contextmanager
def session_of(
    recipes: Iterable[Recipe], *, elsewhere: bool = False, verbose: bool = False
) -> Iterator[Session]:
    """What the runs of one process share. They agree in device and deterministic.

    elsewhere: other hosts compute, and this one needs no device for it. verbose: a line per epoch
    on a terminal, too.
    """
    keep_to_quota()
    every = list(recipes)
    if every[0].deterministic:
        # cuBLAS is deterministic only with a fixed workspace, set before its first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    device = "cpu" if elsewhere else every[0].device
    with (
        open_world(device) as world,
        Console(enabled=world.is_main, verbose=verbose) as console,
    ):
        # The other ranks report to nobody, and nobody need be logged in there.
        on_main(world, lambda: check_trackers(n for recipe in every for n in recipe.trackers))
        yield Session(world, console, Path("runs"))


def settled(recipe: Recipe, device: torch.device) -> Recipe:
    """With the precision that is computed in.

    It is saved with the recipe: a run resumed on another machine computes as it did before.
    """
    if recipe.precision == "auto" and device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "precision=auto is decided where the sweep starts, and torch sees no CUDA device here "
            "to ask: say precision=bf16 or precision=fp32"
        )
    precision = resolve_precision(recipe.precision, device).name
    return recipe.model_copy(update={"precision": precision})


def run_all(
    recipes: Mapping[Choice, Recipe],
    options: argparse.Namespace,
    *,
    formats: Sequence[str] = (),
    note: str = "",
) -> int:
    """Run a checked sweep as `--jobs`, `--launcher` and `--together` say.

    Its table is also printed in `formats`. note: printed first.
    """
    text, jobs, choice = options.launcher, options.jobs, next(iter(recipes.values())).device
    for flag in ("jobs", "launcher"):
        if options.together and getattr(options, flag):
            raise UserError(
                f"--together trains the runs in one process and --{flag} {getattr(options, flag)} "
                f"each in its own: leave one of them out"
            )
    with (
        session_of(
            recipes.values(), elsewhere=text is not None, verbose=options.verbose
        ) as session,
        open_launcher(text, jobs, choice, session) as launcher,
    ):
        if note:
            session.console.note(note)
        device = torch.device(launcher.device) if launcher else session.world.device
        every = {choice: settled(recipe, device) for choice, recipe in recipes.items()}
        return run_sweep(
            named_for_trackers(every),
            session,
            launcher=launcher,
            together=options.together,
            formats=formats,
        )


def _rehearse_all(recipes: Mapping[Choice, Recipe]) -> int:
    with session_of(recipes.values()) as session:
        device = session.world.device
        rehearse_sweep({c: settled(recipe, device) for c, recipe in recipes.items()}, session)
    return 0


def _run(recipe: Recipe, options: argparse.Namespace) -> int:
    with session_of([recipe], verbose=options.verbose) as session:
        recipe = settled(recipe, session.world.device)
        if options.dry_run:
            session.console.facts(f"dry run of {recipe.name}", dry_run(recipe, session))
        else:
            run_recipe(recipe, session, resume=options.resume)
    return 0


def evaluate(options: argparse.Namespace) -> None:
    """Evaluate a run folder, a network with weights from a file, or an exported file."""
    if options.what.endswith(".onnx"):
        if options.weights:
            raise UserError(f"{options.what} holds its weights: leave out --weights")
        found = evaluate_onnx(options.what, options.words)
    elif options.weights:
        found = evaluate_model(options.what, options.weights, options.words)
    else:
        found = evaluate_run(options.what, options.words)
    Console(enabled=True).facts(f"evaluation of {options.what}", found)


def recipe_of(
    words: Sequence[str],
    *,
    config: str | Path | None = None,
    resume: str | None = None,
    more: Sequence[str] = (),
    named: Sequence[str] = (),
) -> Recipe:
    """The recipe that the words name, or the file, or the run to resume.

    more: overrides that come last. named: a name from --sweep.
    """
    names = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    if len(names) > 1:
        raise UserError(
            f"one recipe at a time, got {', '.join(names)}; several, in one table: "
            f"fastkd compare {' '.join(names)}"
        )
    if names and named:
        raise UserError(f"--sweep recipe=.. names the recipes: remove {names[0]}")
    names = [*named, *names]
    if names and names[0].endswith((".yaml", ".yml")):
        raise UserError(f"{names[0]} is a file: fastkd train --config {quote(names[0])}")
    if not names and config is None and resume not in (None, "auto"):
        config = Path(resume) / "config.yaml"
        if not config.exists():
            raise UserError(f"{resume} is not a run folder: it has no config.yaml")
    name = names[0] if names else (None if config else "quickstart")
    return load_recipe(name, config=config, overrides=[*overrides, *more])
