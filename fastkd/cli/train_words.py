"""The words of `fastkd train`, `compare` and `table`, for `fastkd.cli.arguments`."""

import argparse

from fastkd.cli.parser import Commands, add_words, positive

__all__ = ["add_compare", "add_table", "add_train"]

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


def add_train(commands: Commands) -> None:
    """`fastkd train`."""
    train = commands.add_parser(
        "train",
        help="train a student by a recipe",
        description="Train a student by a recipe; without arguments, the quickstart.",
        epilog=TRAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_words(train, "RECIPE | key=value", "a named recipe, then overrides of its keys")
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
        type=positive,
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


def add_compare(commands: Commands) -> None:
    """`fastkd compare`."""
    compare = commands.add_parser(
        "compare",
        help="train several recipes with the same seeds, and each student alone",
        description="Train every RECIPE with every seed, and the students alone; then one table\n"
        "with the mean over the seeds and the gain over the student alone.",
        epilog=COMPARE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_words(compare, "RECIPE | key=value", "named recipes, then overrides for all of them")
    compare.add_argument(
        "--seeds",
        type=positive,
        metavar="N",
        help="seeds 0 to N-1 for each; default: the recipe's own seed",
    )
    _add_verbose(compare)
    _add_sweep(compare)
    _add_formats(compare)


def add_table(commands: Commands) -> None:
    """`fastkd table`."""
    table = commands.add_parser(
        "table",
        help="one table of finished runs",
        description="A table of finished runs, with what differs among them as their names.",
    )
    add_words(table, "RUN", "folder of a run")
    _add_formats(table)
