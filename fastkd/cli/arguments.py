"""The words and options of the `fastkd` command, and the error messages for wrong ones.

The only argparse of the package; `fastkd.cli.commands` runs the command. Options are few
on purpose: everything that decides a run is a recipe key, spelled key=value.
"""

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import NoReturn, TypeAlias

from fastkd import __version__
from fastkd.cli.export_words import add_export
from fastkd.cli.latency_words import add_latency
from fastkd.errors import UserError
from fastkd.printable import shown

__all__ = ["parse", "parsers"]

TRAIN_HELP = """
examples:
  fastkd train                                  handwritten digits, no download
  fastkd train cifar10/resnet56--resnet20/kd data.root=DATA epochs=30
  fastkd train --config my.yaml optim.lr=0.1    a file with keys, then overrides
  fastkd train --resume auto                    resume the last quickstart
  fastkd train --sweep 'optim.lr=0.05;0.1' --sweep 'seed=0;1'    four runs
  fastkd train --sweep 'recipe=cifar10/resnet56--resnet20/kd;quickstart'
  fastkd train --sweep 'optim.lr=0.05;0.1' --together    one teacher for both
  fastkd train --sweep 'seed=0;1;2' --launcher submitit:partition=gpu   on SLURM
  torchrun --nproc-per-node=8 -m fastkd.train RECIPE ...         eight processes

keys are dotted (optim.lr=0.1); a comma makes a list (optim.milestones=150,180).
A path or a name is taken as it stands (data.root=/d/set #2, in quotes for the
shell); a semicolon inside a value of --sweep is written twice.
`fastkd train RECIPE --print-config` shows every key, its value and its meaning.
exit codes: 0 done, 1 failed run, 2 wrong request; after saving, 130 for Ctrl-C,
143 for SIGTERM and 129 for a closed terminal. torchrun ends with its own code,
1 whenever a process of it failed.
"""


COMPARE_HELP = """
examples:
  fastkd compare cifar10/resnet56--resnet20/{kd,at,dkd} --seeds 3 data.root=DATA
  fastkd compare quickstart --sweep 'student.block=S;G:4' --seeds 5 --latex

Each run is paired with the student alone, trained with the same seed and keys but
without teacher; what several runs share is trained once. Name its learning rates
with baseline.lrs=0.05,0.1 (the best counts); baseline.lrs= leaves it out.
Give all methods one teacher with teacher.seed=0, or teacher.weights=RUN.
Finished runs are not repeated: the same command again resumes, or only prints.
"""


class _Parser(argparse.ArgumentParser):
    """argparse with one-sentence errors that name the nearest valid word."""

    def error(self, message: str) -> NoReturn:
        match = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL)
        if match:
            word, commands = match[1], match[2].replace("'", "").split(", ")
            message = f"there is no command '{word}'{_near(word, commands)}"
        raise UserError(f"{message}{_see(message, self.prog)}")


_Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"


def _positive(text: str) -> int:
    if not re.fullmatch("0*[1-9][0-9]{0,4}", text):
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected a whole number above 0")
    return int(text)


def _near(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else f": choose {', '.join(words)}"


def _see(message: str, command: str) -> str:
    return f"{'' if message.endswith('?') else '.'} See `{command} --help`"


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
            raise UserError(_no_option(word, arguments, options, commands[options.command]))
        if "words" not in options:
            raise UserError(f"`fastkd {options.command}` takes no further argument, got {word!r}")
        options.words.append(word)
    return options


def _no_option(
    word: str,
    arguments: Sequence[str],
    options: argparse.Namespace,
    parser: argparse.ArgumentParser,
) -> str:
    """What is wrong with an option that does not exist, and what to write instead."""
    flag, _, value = word.partition("=")
    says = f"there is no option {shown(flag)}"
    command = f"fastkd {options.command}"
    if "words" in options and options.command not in ("recipes", "predict"):
        following = [*arguments[arguments.index(word) + 1 :], ""][0]
        if not value and "=" not in following and not following.startswith("-"):
            value = following
        if keys := _keys(flag, value):
            return f"{says}; what decides a run is a key, without dashes: {keys}"
    if word.endswith("\r"):
        says += ": a script with the line ends of Windows puts \\r behind its last word"
        return f"{says}. See `{command} --help`"
    known = [known for known in parser._option_string_actions if len(known) > 2]
    message = f"{says}{_near(flag, known)}"
    return f"{message}{_see(message, command)}"


def _keys(flag: str, value: str) -> str:
    """`--batch-size 64` -> `batch_size=64`; empty if no key ends in this word."""
    from fastkd.config.mistakes import nearest_keys
    from fastkd.recipe.overrides import type_of
    from fastkd.recipe.printing import valid_keys

    name = flag.strip("-").replace("-", "_")
    known = valid_keys(("kd", "ce"))
    keys = [name] if name in known else nearest_keys(name, known)[:2]
    # What a value looks like, if none was given.
    examples = {int: "3", float: "0.1", bool: "true"}
    return " or ".join(f"{key}={value or examples.get(type_of(key), '..')}" for key in keys)


def parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of the whole command line, and the parser of each command by name."""
    parser = _Parser(
        prog="fastkd",
        description="Train small vision networks from large ones: knowledge distillation.",
        epilog="Examples: `fastkd train --help`. What this machine offers: `fastkd doctor`.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastkd {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_compare(commands)
    _add_table(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    add_export(commands)
    _add_data(commands)
    _add_cache(commands)
    _add_bench(commands)
    _add_models(commands)
    _add_cheapen(commands)
    add_latency(commands)
    _add_recipes(commands)
    _add_losses(commands)
    _add_doctor(commands)
    return parser, commands.choices


def _add_words(parser: argparse.ArgumentParser, metavar: str, text: str) -> None:
    """The words behind a command, of which `parse` also takes those between its options."""
    parser.add_argument("words", nargs="*", default=[], metavar=metavar, help=text)


def _add_train(commands: _Commands) -> None:
    train = commands.add_parser(
        "train",
        help="train a student by a recipe",
        description="Train a student by a recipe; without arguments, the quickstart.",
        epilog=TRAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_words(train, "RECIPE | key=value", "a named recipe, then overrides of its keys")
    train.add_argument("--config", metavar="FILE", help="YAML file with recipe keys")
    train.add_argument(
        "--resume",
        metavar="auto|RUN",
        help="resume RUN, or with auto the newest unfinished run of this recipe",
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, make two steps, print what a run would take",
    )
    train.add_argument("--print-config", action="store_true", help="print the resolved recipe")
    _add_verbose(train)
    _add_sweep(train)


def _add_verbose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="on a terminal also a line per epoch, as logs have it",
    )


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="'key=a;b;c'",
        help="one run for each value, then a table; repeat it for all combinations",
    )
    parser.add_argument(
        "--jobs",
        type=_positive,
        metavar="N",
        help="run N runs of a sweep in parallel, each on its own GPU or a share of the CPU",
    )
    parser.add_argument(
        "--launcher",
        metavar="ray[:ADDRESS]|submitit[:k=v,..]",
        help="give the runs of a sweep to the hosts of a Ray cluster or to SLURM, all or N at a "
        "time; start it in a folder that all hosts share",
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="train runs that share teacher, data and views in one process: one pass of the "
        "teacher for all of them",
    )


def _add_formats(parser: argparse.ArgumentParser) -> None:
    for title in ("LaTeX", "Markdown"):
        parser.add_argument(
            f"--{title.lower()}",
            dest="formats",
            action="append_const",
            const=title.lower(),
            default=[],
            help=f"print the table as {title}",
        )


def _add_compare(commands: _Commands) -> None:
    compare = commands.add_parser(
        "compare",
        help="train several recipes with the same seeds, and each student alone",
        description="Train every RECIPE with every seed, and the students alone; then one table\n"
        "with the mean over the seeds and the gain over the student alone.",
        epilog=COMPARE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_words(compare, "RECIPE | key=value", "named recipes, then overrides for all of them")
    compare.add_argument(
        "--seeds",
        type=_positive,
        metavar="N",
        help="seeds 0 to N-1 for each; default: the recipe's own seed",
    )
    _add_verbose(compare)
    _add_sweep(compare)
    _add_formats(compare)


def _add_table(commands: _Commands) -> None:
    table = commands.add_parser(
        "table",
        help="one table of finished runs",
        description="A table of finished runs, with what differs among them as their names.",
    )
    _add_words(table, "RUN", "folder of a run")
    _add_formats(table)


def _add_evaluate(commands: _Commands) -> None:
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
    _add_words(evaluate, "key=value", "recipe keys such as data.name=cifar10 data.root=DATA")


def _add_predict(commands: _Commands) -> None:
    predict = commands.add_parser(
        "predict",
        help="what a trained network says about any images",
        description="Predict images of any size with the best weights of RUN. A network that "
        "labels pixels writes a label map (PNG) for each into DIR, a classifier predictions.csv.",
    )
    predict.add_argument("run", metavar="RUN", help="run folder")
    _add_words(predict, "IMAGE | FOLDER", "image files, and folders of which all are taken")
    predict.add_argument("--out", metavar="DIR", required=True, help="where predictions go")


def _add_data(commands: _Commands) -> None:
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
    _add_words(data, "key=value", "keys of the data such as data.val_share=0.1 or data.name=cub200")
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


def _add_cache(commands: _Commands) -> None:
    cache = commands.add_parser(
        "cache",
        help="ask a recipe's teacher once for all views, for runs that read its answers",
        description="Ask the teacher of a recipe for the views of its epochs and keep the answers "
        "in DIR, which runs name as teacher.cache=DIR. What is there is left out, so the same "
        "command again resumes. With torchrun on any number of processes.",
    )
    _add_words(cache, "RECIPE key=value", "recipe name and keys, as for `fastkd train`")
    cache.add_argument("--config", metavar="FILE", help="YAML file with recipe keys")
    cache.add_argument("--out", metavar="DIR", help="the folder; default: the recipe's, or auto")
    cache.add_argument(
        "--epochs", type=_positive, metavar="N", help="only of the first N epochs; default: all"
    )


def _add_bench(commands: _Commands) -> None:
    bench = commands.add_parser(
        "bench",
        help="images a second of a recipe's loader and step, and what limits them",
        description="Measure on this machine how many images a second the loader of a recipe "
        "yields, how many the training step takes, and how many both together; nothing is written. "
        "A teacher that would be trained first takes part untrained.",
    )
    bench.add_argument("what", choices=["data"], metavar="data")
    _add_words(bench, "RECIPE key=value", "recipe name and keys, as for `fastkd train`")
    bench.add_argument(
        "--seconds", type=float, default=10, metavar="S", help="for each of the three (10)"
    )


def _add_models(commands: _Commands) -> None:
    models = commands.add_parser("models", help="list networks with parameters and MACs")
    models.add_argument(
        "pattern", nargs="?", default="*", help="shell pattern, e.g. 'resnet*' or 'timm:*b0*'"
    )
    models.add_argument(
        "--input", metavar="CxHxW", help="input shape to count with; default: the network's own"
    )
    models.add_argument("--json", action="store_true", help="machine-readable")


def _add_cheapen(commands: _Commands) -> None:
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


def _add_recipes(commands: _Commands) -> None:
    recipes = commands.add_parser(
        "recipes",
        help="list the named recipes",
        description="Without arguments an overview; with PATTERN the matching recipes, the papers' "
        "numbers and what they need; with show one recipe in full.",
    )
    _add_words(
        recipes,
        "PATTERN | show NAME",
        "part of a name (kdda), shell pattern ('kdda/*/kd'), or the word show and a name",
    )
    recipes.add_argument("--json", action="store_true", help="machine-readable")


def _add_losses(commands: _Commands) -> None:
    losses = commands.add_parser(
        "losses",
        help="list the losses of a recipe; formula, source, tests and keys of one",
    )
    losses.add_argument("name", nargs="?", metavar="NAME", help="as in losses.NAME.weight=1")


def _add_doctor(commands: _Commands) -> None:
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
        "--batch", type=_positive, metavar="N", help="with --blocks: images a call; default: 32"
    )
    doctor.add_argument(
        "--precision",
        metavar="auto|bf16|fp16|fp32",
        help="with --blocks: default: auto, bf16 where the device computes in it",
    )
    doctor.add_argument("--json", action="store_true", help="machine-readable")
