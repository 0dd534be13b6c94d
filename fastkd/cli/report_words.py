"""The words of `fastkd report`."""

import argparse

from fastkd.cli.parser import Commands, add_words

__all__ = ["REPORT_HELP", "add_report"]

REPORT_HELP = """
examples:
  fastkd report runs/quickstart/* --out report       everything these runs have data for
  fastkd report runs/ --figures pareto,class_gain --formats pdf,csv
  fastkd report runs/mine --predict data.root=DATA   figures by class and of calibration
  fastkd report --list                               every figure, its paper, what it needs
  fastkd report --leaderboard runs/ benchmarks/results/quickstart_seeds.json

DIR/index.html shows all of it without a network. Unfinished runs are drawn as far as they are.
"""


def add_report(commands: Commands) -> None:
    """Add the command to the parser's commands."""
    report = commands.add_parser(
        "report",
        help="figures, tables and a page of runs; the leaderboard",
        description="Draw the papers' figures of RUN (run folders, folders of runs, sweeps), and "
        "write them,\ntheir numbers, the table of runs and index.html into DIR.",
        epilog=REPORT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_words(
        report, "RUN | key=value", "run folders or folders of them; with --predict keys of the data"
    )
    report.add_argument(
        "--out", metavar="DIR", help="where files go; default: report, of the leaderboard: docs"
    )
    report.add_argument("--figures", metavar="NAME,..", help="only these; default: all")
    report.add_argument(
        "--formats", metavar="png,pdf,..", help="of png, pdf, svg, csv, tex; default: all"
    )
    report.add_argument(
        "--list", action="store_true", help="print every figure, its paper and what it needs"
    )
    report.add_argument(
        "--predict",
        action="store_true",
        help="ask the saved networks about the validation images, once, for figures by class and "
        "of calibration",
    )
    report.add_argument(
        "--leaderboard",
        action="store_true",
        help="write leaderboard.md and .html: our numbers beside the papers', of run folders and "
        "files of benchmarks/results",
    )
