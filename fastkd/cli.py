"""The `fastkd` command. The only argparse of the package, and the only place that exits.

Options are few on purpose: everything that decides a run is a recipe key, spelled key=value.
"""

import argparse
import difflib
import errno
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastkd import __version__
from fastkd.errors import FastKDError, UserError

__all__ = ["main"]

TRAIN_HELP = """
examples:
  fastkd train                                  handwritten digits, no download
  fastkd train cifar10/resnet56--resnet20/kd data.root=DATA epochs=30
  fastkd train --config my.yaml optim.lr=0.1    a file with keys, then overrides
  fastkd train --resume auto                    go on with the last quickstart
  fastkd train --sweep 'optim.lr=0.05;0.1' --sweep 'seed=0;1'    four runs
  torchrun --nproc-per-node=8 -m fastkd.train RECIPE ...         eight processes

keys are dotted (optim.lr=0.1); a comma makes a list (optim.milestones=150,180).
`fastkd train RECIPE --print-config` shows every key, its value and its meaning.
exit codes: 0 done, 1 failed run, 2 wrong request; after saving, 130 for Ctrl-C
and 143 for SIGTERM.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    try:
        options = _parse(sys.argv[1:] if arguments is None else arguments)
        code = options.run(options) or 0
        sys.stdout.flush()
        return code
    except FastKDError as error:
        _complain(str(error))
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


def _complain(text: str) -> None:
    # Under torchrun every rank comes to the same end; one of them says it.
    if os.environ.get("RANK", "0") == "0":
        print(f"fastkd: {text}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are one sentence, with the nearest valid word."""

    def error(self, message: str) -> NoReturn:
        match = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if match:
            word, commands = match[1], match[2].replace("'", "").split(", ")
            message = f"there is no command {word!r}{_near(word, commands)}"
        raise UserError(f"{message}{_see(message, self.prog)}")


def _near(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else f": choose {', '.join(words)}"


def _see(message: str, command: str) -> str:
    return f"{'' if message.endswith('?') else '.'} See `{command} --help`"


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser, commands = _parsers()
    if not arguments:
        parser.print_help()
        raise SystemExit(0)
    options, rest = parser.parse_known_args(arguments)
    # argparse takes a list of words only in one piece: `quickstart --dry-run epochs=1` has two.
    for word in rest:
        if word.startswith("-"):
            known = [flag for flag in commands[options.command]._option_string_actions]
            command = f"fastkd {options.command}"
            hint = _near(word.partition("=")[0], [flag for flag in known if len(flag) > 2])
            message = f"there is no option {word}{hint}"
            raise UserError(f"{message}{_see(message, command)}")
        if "words" not in options:
            raise UserError(f"`fastkd {options.command}` takes no further word, got {word!r}")
        options.words.append(word)
    return options


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        prog="fastkd",
        description="Train small vision networks from large ones: knowledge distillation.",
        epilog="Examples: `fastkd train --help`. What this machine offers: `fastkd doctor`.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastkd {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train",
        help="train a student by a recipe",
        description="Train a student by a recipe; without arguments, the quickstart.",
        epilog=TRAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    train.add_argument(
        "words",
        nargs="*",
        default=[],
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
    train.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="'key=a;b;c'",
        help="one run for each value, then a table; repeat it for all combinations",
    )
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "eval",
        help="evaluate a run folder or a network",
        description="Evaluate RUN, or MODEL with --weights, on the validation images.",
    )
    evaluate.add_argument("what", metavar="RUN | MODEL", help="run folder, or network name")
    evaluate.add_argument("--weights", metavar="FILE", help="weights of MODEL")
    evaluate.add_argument(
        "words",
        nargs="*",
        default=[],
        metavar="key=value",
        help="recipe keys such as data.name=cifar10 data.root=DATA",
    )
    evaluate.set_defaults(run=_eval)

    models = commands.add_parser("models", help="list networks with parameters and MACs")
    models.add_argument(
        "pattern", nargs="?", default="*", help="shell pattern, e.g. 'resnet*' or 'timm:*b0*'"
    )
    models.add_argument(
        "--input", metavar="CxHxW", help="input of the count; by default the network's own"
    )
    models.add_argument("--json", action="store_true", help="machine-readable")
    models.set_defaults(run=_models)

    cheapen = commands.add_parser(
        "cheapen",
        help="what a cheap block makes of a network: parameters, MACs, layers",
        description="Replace 3x3 convolutions by a cheap block and count before and after. "
        "Train it with student.name=NAME student.block=BLOCK.",
    )
    cheapen.add_argument("name", metavar="NAME", help="of the zoo, timm:NAME or torchvision:NAME")
    cheapen.add_argument(
        "block", metavar="BLOCK", help="G:4, G:N:8, G:N, B:2, BG:2:4, BG:2:M:8, BG:2:M or S-2x2"
    )
    cheapen.add_argument(
        "--where",
        action="append",
        metavar="PATTERN",
        help="only modules whose path fits, such as 'layer3.*'; repeatable",
    )
    cheapen.add_argument(
        "--input", metavar="CxHxW", help="input of the count; by default the network's own"
    )
    cheapen.set_defaults(run=_cheapen)

    recipes = commands.add_parser(
        "recipes",
        help="list the named recipes",
        description="Without a word an overview; those that match PATTERN with the papers' "
        "numbers and what they need; one recipe in full.",
    )
    recipes.add_argument(
        "words",
        nargs="*",
        default=[],
        metavar="PATTERN | show NAME",
        help="shell pattern, e.g. 'kdda/*/kd', or the word show and a name",
    )
    recipes.add_argument("--json", action="store_true", help="machine-readable")
    recipes.set_defaults(run=_recipes)

    doctor = commands.add_parser("doctor", help="what this machine offers and what is missing")
    doctor.add_argument("--json", action="store_true", help="machine-readable")
    doctor.set_defaults(run=_doctor)
    return parser, commands.choices


def _recipe_of(options: argparse.Namespace, more: Sequence[str] = ()) -> Any:
    """The recipe that the words name, `more` overrides last."""
    from fastkd.recipe.loading import load_recipe

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
    if options.sweep:
        from fastkd.sweep import check_sweep, combinations

        for flag in ("resume", "dry_run", "print_config"):
            if getattr(options, flag):
                raise UserError(f"--sweep and --{flag.replace('_', '-')} exclude each other")
        sweep = {chosen: _recipe_of(options, chosen) for chosen in combinations(options.sweep)}
        check_sweep(sweep)
        recipe = next(iter(sweep.values()))
    else:
        sweep, recipe = {}, _recipe_of(options)
    if options.print_config:
        from fastkd.recipe.loading import annotated_yaml

        print(annotated_yaml(recipe), end="")
        return 0
    if recipe.tensorboard:
        from fastkd.report.events import check_tensorboard

        check_tensorboard()
    import torch

    from fastkd.distributed import open_world
    from fastkd.precision import resolve_precision
    from fastkd.recipe.schema import Recipe
    from fastkd.report.console import Console
    from fastkd.run import Session, dry_run, run_recipe

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
            from fastkd.sweep import run_sweep

            return run_sweep({key: settled(one) for key, one in sweep.items()}, session)
        recipe = settled(recipe)
        if options.dry_run:
            found = dry_run(recipe, session)
            session.console.facts(f"dry run of {recipe.name}", found)
        else:
            run_recipe(recipe, session, resume=options.resume)
    return 0


def _eval(options: argparse.Namespace) -> None:
    from fastkd.evaluate_saved import evaluate_model, evaluate_run
    from fastkd.report.console import Console

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
    except (RuntimeError, ValueError, AssertionError, UserError):
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
    from fastkd.recipes import find_entry, listing

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


def _doctor(options: argparse.Namespace) -> None:
    from fastkd.doctor import run_doctor

    found = run_doctor(json=options.json)
    print(json.dumps(found, indent=1) if options.json else found)
