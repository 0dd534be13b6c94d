"""What the `fastkd` command does, and with which exit code; its words are in
`fastkd.cli.arguments`."""

import argparse
import atexit
import errno
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from fastkd.cli.arguments import parse
from fastkd.errors import FastKDError, UserError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. One of several ranks ends its process after an error."""
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = COMMANDS[options.command](options) or 0
        sys.stdout.flush()
        return code
    except FastKDError as error:
        _complain(str(error), every_rank=not error.shared)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _leave(error.exit_code)
        return error.exit_code
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # `fastkd models | head`: the reader has gone, which is not an error.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _complain(f"no space left on the disk: {error.filename or 'a file'} could not be written")
        return 1
    except KeyboardInterrupt:
        _complain("stopped")
        return 130


def _leave(code: int) -> NoReturn:
    """End this rank: as Python takes gloo apart after an error, a rank aborts now and then."""
    atexit._run_exitfuncs()  # loaders send their workers home
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: Any
) -> None:
    """Those of fastkd itself in a plain sentence, others as Python shows them."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        _complain(f"note: {message}")
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))


def _complain(text: str, *, every_rank: bool = False) -> None:
    if every_rank or os.environ.get("RANK", "0") == "0":
        print(f"fastkd: {text}", file=sys.stderr)


def _recipe_of(options: argparse.Namespace, more: Sequence[str] = ()) -> Any:
    """The recipe that the words name, `more` overrides last."""
    from fastkd.recipes.loading import load_recipe

    names = [word for word in options.words if "=" not in word]
    overrides = [word for word in options.words if "=" in word]
    if len(names) > 1:
        raise UserError(f"one recipe at a time, got {', '.join(names)}")
    if names and names[0].endswith((".yaml", ".yml")):
        raise UserError(f"{names[0]} is a file: fastkd train --config {names[0]}")
    config = options.config
    if not names and config is None and options.resume not in (None, "auto"):
        config = Path(options.resume) / "config.yaml"
        if not config.exists():
            raise UserError(f"{options.resume} is not a run folder: it has no config.yaml")
    name = names[0] if names else (None if config else "quickstart")
    return load_recipe(name, config=config, overrides=[*overrides, *more])


def _train(options: argparse.Namespace) -> int:
    if options.jobs > 1 and not options.sweep:
        raise UserError("--jobs is for the runs of a --sweep; several GPUs for one run: torchrun")
    if options.sweep:
        from fastkd.runs.sweep.sweep import check_sweep, combinations

        for flag in ("resume", "dry_run", "print_config"):
            if getattr(options, flag):
                raise UserError(f"--sweep and --{flag.replace('_', '-')} exclude each other")
        sweep = {chosen: _recipe_of(options, chosen) for chosen in combinations(options.sweep)}
        check_sweep(sweep)
        recipe = next(iter(sweep.values()))
    else:
        sweep, recipe = {}, _recipe_of(options)
    if options.print_config:
        from fastkd.recipe.printing import annotated_yaml

        print(annotated_yaml(recipe), end="")
        return 0
    if recipe.tensorboard:
        from fastkd.output.events import check_tensorboard

        check_tensorboard()
    import torch

    from fastkd.compute.precision import resolve_precision
    from fastkd.compute.ranks import open_world
    from fastkd.output.console import Console
    from fastkd.recipe.schema import Recipe
    from fastkd.runs.stages import Session, run_recipe

    if recipe.deterministic:
        # cuBLAS repeats its results only with a fixed workspace, chosen before its first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with open_world(recipe.device) as world, Console(enabled=world.is_main) as console:
        session = Session(world, console, Path("runs"))

        def settled(recipe: Recipe) -> Recipe:
            # Into the saved recipe: a run that goes on elsewhere computes as it began.
            name = resolve_precision(recipe.precision, world.device).name
            return recipe.replace(precision=name)

        if sweep:
            from fastkd.runs.sweep.sweep import run_sweep

            settled_sweep = {key: settled(one) for key, one in sweep.items()}
            return run_sweep(settled_sweep, session, jobs=options.jobs)
        recipe = settled(recipe)
        if options.dry_run:
            from fastkd.runs.dry_run import dry_run

            found = dry_run(recipe, session)
            session.console.facts(f"dry run of {recipe.name}", found)
        else:
            run_recipe(recipe, session, resume=options.resume)
    return 0


def _eval(options: argparse.Namespace) -> None:
    from fastkd.output.console import Console
    from fastkd.runs.evaluate_saved import evaluate_model, evaluate_run

    if options.weights:
        found = evaluate_model(options.what, options.weights, options.words)
    else:
        found = evaluate_run(options.what, options.words)
    Console(enabled=True).facts(f"evaluation of {options.what}", found)


def _models(options: argparse.Namespace) -> None:
    from fastkd.models import list_models

    shape = _shape(options.input) if options.input else None
    names = list_models(options.pattern)
    if not names:
        raise UserError(f"no network matches {options.pattern!r}; try 'resnet*' or 'timm:resnet*'")
    rows = (_model_row(name, shape) for name in names)
    if options.json:
        print(json.dumps(list(rows), indent=1))
        return
    print(f"{'network':<34}{'parameters':>14}{'MACs':>16}{'input':>12}{'classes':>9}  taps")
    for row in rows:
        macs = f"{row['macs']:,}" if row["macs"] is not None else "other input"
        line = f"{row['name']:<34}{row['params']:>14,}{macs:>16}{row['input']:>12}"
        print(f"{line}{row['classes']:>9}  {_short_taps(row['taps'])}", flush=True)
    if ":" not in options.pattern:
        print("each stage also before its last activation: stage1:preact")


def _short_taps(taps: Sequence[str]) -> str:
    """`stem stage1-3 pooled logits`, of the networks of the zoo."""
    stages = [tap for tap in taps if re.fullmatch(r"stage\d", tap)]
    if not stages:
        return "module paths"
    runs = {stages[0]: f"{stages[0]}-{stages[-1][-1]}"}
    return " ".join(runs.get(tap, tap) for tap in taps if "stage" not in tap or tap in runs)


def _model_row(name: str, wanted: tuple[int, ...] | None) -> dict[str, Any]:
    """Size and cost of one network, which is built without memory for its weights."""
    import torch

    from fastkd.models import count, create_model
    from fastkd.models.taps import available_taps

    with torch.device("meta"):
        model: Any = create_model(name, None if ":" in name else 100)
    shape = wanted or _own_shape(name, model)
    row = {
        "name": name,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "macs": None,
        "training_bytes": None,
        "inference_bytes": None,
        "input": "x".join(map(str, shape)),
        "classes": model.num_classes,
        "taps": [] if ":" in name else list(available_taps(model)),
    }
    try:
        size = count(model, shape)
        row |= {key: getattr(size, key) for key in ("macs", "training_bytes", "inference_bytes")}
    except (RuntimeError, ValueError, AssertionError):
        # Some networks take certain image sizes only and say so in these ways.
        if wanted is None:
            raise
    return row


def _own_shape(name: str, model: Any) -> tuple[int, int, int]:
    own = {"zoo": (3, 32, 32), "torchvision": (3, 224, 224)}.get(name.rpartition(":")[0] or "zoo")
    return own or model.pretrained_cfg["input_size"]


def _cheapen(options: argparse.Namespace) -> None:
    import torch

    from fastkd.models import cheapen, count, create_model

    with torch.device("meta"):
        model = create_model(options.name, None if ":" in options.name else 100)
        cheap: Any = cheapen(model, options.block, where=options.where)
    shape = _shape(options.input) if options.input else _own_shape(options.name, model)
    before, after = count(model, shape), count(cheap, shape)
    print(f"{options.name} at {'x'.join(map(str, shape))}")
    print(f"  {'':<12}{'before':>16}{'after':>16}{'share':>9}")
    for what, one, other in (
        ("parameters", before.params, after.params),
        ("MACs", before.macs, after.macs),
    ):
        print(f"  {what:<12}{one:>16,}{other:>16,}{other / one:>9.1%}")
    print(cheap.rewrite_report)


def _shape(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise UserError(f"--input={text}: expected CxHxW such as 3x32x32")
    return int(match[1]), int(match[2]), int(match[3])


def _recipes(options: argparse.Namespace) -> None:
    from fastkd.recipes import listing
    from fastkd.recipes.catalogue import find_entry

    words: list[str] = options.words
    if words[:1] == ["show"]:
        if len(words) != 2:
            raise UserError("expected one name: fastkd recipes show NAME")
        entries = [find_entry(words[1])]
        lines = listing.details(entries[0])
    elif len(words) > 1:
        raise UserError(f"one pattern at a time, in quotes for the shell; got {' '.join(words)}")
    elif words or options.json:
        entries = listing.matching(*words or ["*"])
        lines = listing.listing(entries)
    else:
        entries, lines = [], listing.overview()
    if options.json:
        print(json.dumps(listing.as_data(entries), indent=1))
        return
    for line in lines:
        print(line)


def _losses(options: argparse.Namespace) -> None:
    from fastkd.losses.base.catalogue import catalogue, entry_of
    from fastkd.losses.base.registry import ALIASES, plain

    if options.name is None:
        for entry in catalogue():
            print(f"{entry.name:<15}{entry.summary}")
        return
    name = plain(options.name.removeprefix("losses."))
    means = ALIASES.get(name, (name,))
    try:
        entries = [entry_of(one.partition(".")[0]) for one in means]
    except ValueError as error:
        raise UserError(str(error)) from None
    if name in ALIASES:
        print(f"{name} is {' and '.join(f'losses.{one}' for one in means)}\n")
    for entry in entries:
        print(f"fastkd.losses.{entry.term.__name__}\n\n{entry.text}\n")
        for key in entry.keys:
            meaning = " ".join(key.meaning.split())
            print(f"losses.{entry.name}.{key.name}={key.default}  # {meaning}")


def _doctor(options: argparse.Namespace) -> None:
    from fastkd.cli.doctor import run_doctor

    found = run_doctor(json=options.json)
    print(json.dumps(found, indent=1) if options.json else found)


COMMANDS = {
    "train": _train,
    "eval": _eval,
    "models": _models,
    "cheapen": _cheapen,
    "recipes": _recipes,
    "losses": _losses,
    "doctor": _doctor,
}
