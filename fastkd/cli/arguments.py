"""The words and options of the `fastkd` command; `fastkd.cli.commands` runs it.

Those of `train` and its like are in `train_words`, of `export` and `latency` in modules of their
own, the messages for wrong ones in `wrong_words`. Options are few on purpose: everything that
decides a run is a recipe key, spelled key=value.
"""

import argparse
from collections.abc import Sequence

from fastkd import __version__
from fastkd.cli.compress_words import add_compress
from fastkd.cli.export_words import add_export
from fastkd.cli.latency_words import add_latency
from fastkd.cli.parser import Commands, Parser, add_words, positive
from fastkd.cli.report_words import add_report
from fastkd.cli.train_words import add_compare, add_table, add_train
from fastkd.cli.wrong_words import no_option
from fastkd.errors import UserError

__all__ = ["parse", "parsers"]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parsed options, including `command`; UserError names the nearest valid word."""
    parser, commands = parsers()
    if not arguments:
        parser.print_help()
        raise SystemExit(0)
    options, rest = parser.parse_known_args(arguments)
    # argparse accepts a list of words only in one piece: `quickstart --dry-run epochs=1` has two.
    for word in rest:
        if word.startswith("-"):
            raise UserError(no_option(word, arguments, options, commands[options.command]))
        if "words" not in options:
            raise UserError(f"`fastkd {options.command}` takes no further argument, got {word!r}")
        options.words.append(word)
    return options


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command line, and the parser of each command by name."""
    parser = Parser(
        prog="fastkd",
        description="Train small vision networks from large ones: knowledge distillation.",
        epilog="Examples: `fastkd train --help`. What this machine offers: `fastkd doctor`.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastkd {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_train(commands)
    add_compare(commands)
    add_table(commands)
    add_report(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    add_export(commands)
    _add_data(commands)
    _add_cache(commands)
    _add_bench(commands)
    _add_models(commands)
    _add_cheapen(commands)
    add_latency(commands)
    add_compress(commands)
    _add_recipes(commands)
    _add_losses(commands)
    _add_doctor(commands)
    return parser, commands.choices


def _add_evaluate(commands: Commands) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="evaluate a run folder, a network or an ONNX file",
        description="Evaluate RUN, MODEL with --weights, or an exported FILE.onnx, on the "
        "validation images.",
    )
    evaluate.add_argument(
        "what", metavar="RUN | MODEL | FILE.onnx", help="run folder, network name, exported file"
    )
    evaluate.add_argument("--weights", metavar="FILE", help="weights of MODEL")
    add_words(evaluate, "key=value", "recipe keys such as data.name=cifar10 data.root=DATA")


def _add_predict(commands: Commands) -> None:
    predict = commands.add_parser(
        "predict",
        help="what a trained network says about any images",
        description="Predict images of any size with the best weights of RUN. A network that "
        "labels pixels writes a label map (PNG) for each into DIR, a classifier predictions.csv. "
        "A run of fastkd.distill is told how its images were made: data.image_size=32 "
        "data.mean=0.5,0.5,0.5 data.std=0.2,0.2,0.2.",
    )
    predict.add_argument("run", metavar="RUN", help="run folder")
    add_words(predict, "IMAGE | FOLDER", "image files, and folders of which all are taken")
    predict.add_argument("--out", metavar="DIR", required=True, help="where predictions go")


def _add_data(commands: Commands) -> None:
    data = commands.add_parser(
        "data",
        help="check a data set before training, or pack it into a few large files",
        description="check: read every image below DIR as a run would: damaged files, sizes, "
        "classes of very different sizes, equal files in training and validation or under several "
        "labels; exit code 1 if a file cannot be read. pack: write both splits into tar shards "
        "(WebDataset), which data.root takes like the folder.",
    )
    data.add_argument("action", choices=["check", "pack"], metavar="check | pack")
    data.add_argument("root", metavar="DIR", help="folder of the images, as data.root")
    add_words(data, "key=value", "keys of the data such as data.val_share=0.1 or data.name=cub200")
    data.add_argument(
        "--json", action="store_true", help="check: machine-readable, every file listed"
    )
    data.add_argument("--out", metavar="SHARDS", help="pack: the new folder")
    data.add_argument(
        "--shrink",
        metavar="N",
        type=int,
        help="pack: resize pictures whose short side has more than N pixels, as JPEG",
    )
    data.add_argument("--quality", metavar="Q", type=int, help="pack: of those JPEGs, 1 to 95 (90)")


def _add_cache(commands: Commands) -> None:
    cache = commands.add_parser(
        "cache",
        help="ask a recipe's teacher once for all views, for runs that read its answers",
        description="Ask the teacher of a recipe for the views of its epochs and keep the answers "
        "in DIR, which runs name as teacher.cache=DIR. What is there is left out, so the same "
        "command again resumes. With torchrun on any number of processes.",
    )
    add_words(cache, "RECIPE key=value", "recipe name and keys, as for `fastkd train`")
    cache.add_argument("--config", metavar="FILE", help="YAML file with recipe keys")
    cache.add_argument("--out", metavar="DIR", help="the folder; default: the recipe's, or auto")
    cache.add_argument(
        "--epochs", type=positive, metavar="N", help="only of the first N epochs; default: all"
    )


def _add_bench(commands: Commands) -> None:
    bench = commands.add_parser(
        "bench",
        help="images a second of a recipe's loader and step, and what limits them",
        description="Measure on this machine how many images a second the loader of a recipe "
        "yields, how many the training step takes, and how many both together; nothing is written. "
        "A teacher that would be trained first takes part untrained.",
    )
    bench.add_argument("what", choices=["data"], metavar="data")
    add_words(bench, "RECIPE key=value", "recipe name and keys, as for `fastkd train`")
    bench.add_argument(
        "--seconds", type=float, default=10, metavar="S", help="for each of the three (10)"
    )


def _add_models(commands: Commands) -> None:
    models = commands.add_parser("models", help="list networks with parameters and MACs")
    models.add_argument(
        "pattern", nargs="?", default="*", help="shell pattern, e.g. 'resnet*' or 'timm:*b0*'"
    )
    models.add_argument(
        "--input", metavar="CxHxW", help="input shape to count with; default: the network's own"
    )
    models.add_argument("--json", action="store_true", help="machine-readable")


def _add_cheapen(commands: Commands) -> None:
    cheapen = commands.add_parser(
        "cheapen",
        help="show how a cheap block changes a network: parameters, MACs, layers",
        description="Replace 3x3 convolutions by a cheap block, or each by its own, and count "
        "before and after. Train it with student.name=NAME student.block=BLOCK, or the keys that "
        "are printed.",
    )
    cheapen.add_argument("name", metavar="NAME", help="of the zoo, timm:NAME or torchvision:NAME")
    cheapen.add_argument(
        "block",
        metavar="BLOCK",
        help="G:4, G:N:8, G:N, B:2, BG:2:4, BG:2:M:8, BG:2:M or S-2x2; or one for each path or "
        "stage, as student.blocks: '{layer1: G:4, layer3.*: BG:2:M}'; {} for none",
    )
    cheapen.add_argument(
        "--where",
        action="append",
        metavar="PATTERN",
        help="only modules whose path fits, such as 'layer3.*'; repeatable",
    )
    cheapen.add_argument(
        "--depth",
        metavar="N,N,..",
        help="residual blocks that each stage keeps, as student.depth: 5,3,5 or '{stage2: 3}'",
    )
    cheapen.add_argument(
        "--input", metavar="CxHxW", help="input shape to count with; default: the network's own"
    )


def _add_recipes(commands: Commands) -> None:
    recipes = commands.add_parser(
        "recipes",
        help="list the named recipes",
        description="Without arguments an overview; with PATTERN the matching recipes, the papers' "
        "numbers and what they need; with show one recipe in full.",
    )
    add_words(
        recipes,
        "PATTERN | show NAME",
        "part of a name (kdda), shell pattern ('kdda/*/kd'), or the word show and a name",
    )
    recipes.add_argument("--json", action="store_true", help="machine-readable")


def _add_losses(commands: Commands) -> None:
    losses = commands.add_parser(
        "losses",
        help="list the losses of a recipe; formula, source, tests and keys of one",
    )
    losses.add_argument("name", nargs="?", metavar="NAME", help="as in losses.NAME.weight=1")


def _add_doctor(commands: Commands) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="what this machine offers and what is missing",
        description="What this machine offers and what is missing; with --blocks, how fast the "
        "cheap blocks of a network are on it, fused and plain, and which of the two is used.",
    )
    doctor.add_argument(
        "--blocks",
        nargs="*",
        metavar=("NAME", "BLOCK"),
        help="a network and, if wanted, the cheap block to put into it; default: wrn_40_2 G:N",
    )
    doctor.add_argument(
        "--input", metavar="CxHxW", help="with --blocks: input shape; default: the network's own"
    )
    doctor.add_argument(
        "--batch", type=positive, metavar="N", help="with --blocks: images a call; default: 32"
    )
    doctor.add_argument(
        "--precision",
        metavar="auto|bf16|fp16|fp32",
        help="with --blocks: default: auto, bf16 where the device computes in it",
    )
    doctor.add_argument("--json", action="store_true", help="machine-readable")
