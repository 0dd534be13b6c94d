"""`fastkd latency`: measure a network here, write the script for elsewhere, show results."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from fastkd.deploy.latency.alone import Asked, taken
from fastkd.deploy.latency.lines import HEADER, layer_lines, notes, row_line, title
from fastkd.deploy.latency.measuring import check_names, measure_all
from fastkd.deploy.latency.record import LatencyReport
from fastkd.deploy.latency.runtime import PROVIDERS
from fastkd.deploy.latency.script import write_script
from fastkd.deploy.latency.subject import open_subject, size_of
from fastkd.errors import RunFailed, UserError
from fastkd.models.config import NETWORK_OPTIONS
from fastkd.printable import printable, shown
from fastkd.runs.evaluate_saved import recipe_for

__all__ = ["KEYS", "latency"]

KEYS = tuple(f"student.{key}" for key in NETWORK_OPTIONS)
"""Recipe keys of a network that is named."""


def latency(options: argparse.Namespace) -> None:
    """One of the three, as the options say."""
    jobs = [name for name in ("what", "script", "read") if getattr(options, name) is not None]
    if len(jobs) != 1:
        raise UserError(
            "give one of: a network, a run or an ONNX file to measure; --script OUT.py; "
            "--read FILE.json. See `fastkd latency --help`"
        )
    if jobs != ["what"]:
        more = ("on", "batch", "threads") if jobs == ["read"] else ()
        _refuse(options, ("weights", "size", "classes", "json", "layers", *more), jobs[0])
    options.batch, options.threads = options.batch or [1], options.threads or [1]
    if jobs == ["read"]:
        _show([LatencyReport.read(Path(file)) for file in options.read])
    elif jobs == ["script"]:
        _script(options)
    else:
        _measure(options)


def _refuse(options: argparse.Namespace, names: tuple[str, ...], job: str) -> None:
    for name in names:
        if getattr(options, name):
            raise UserError(f"--{name} is for measuring here: leave it out with --{job}")


def _script(options: argparse.Namespace) -> None:
    names = options.on or ["ort-cpu"]
    check_names(names)
    if other := [name for name in names if name not in PROVIDERS]:
        raise UserError(
            f"the script runs onnxruntime only, not {other[0]}: --on some of {', '.join(PROVIDERS)}"
        )
    target = Path(options.script)
    write_script(target, Asked(names, options.batch, options.threads))
    print(f"{target}: copy it beside a FILE.onnx and run python {target.name} FILE.onnx there")


def _measure(options: argparse.Namespace) -> None:
    if options.json and (reason := taken(Path(options.json))):
        raise UserError(reason)
    with tempfile.TemporaryDirectory(prefix="fastkd-latency-") as folder:
        check_names(options.on or ())
        subject = open_subject(
            options.what,
            Path(folder),
            weights=options.weights,
            classes=options.classes,
            options=_options(options.what, options.words),
        )
        usual = ["ort-cpu"] if subject.model is None else ["eager", "ort-cpu"]
        report = measure_all(
            subject,
            Asked(options.on or usual, options.batch, options.threads),
            size=size_of(subject, options.size),
            layers=options.layers,
            begin=lambda report: _say([*title(report), HEADER]),
            say=lambda row: _say([row_line(row)]),
        )
    plain = report.plain()
    _say([line for row in plain["rows"] for line in layer_lines(row)])
    _say(notes(plain))
    if options.json and report.rows:
        report.write(Path(options.json))
    wrong = [f"{one.on}: {one.reason}" for one in report.missing if one.wrong]
    if wrong:
        raise RunFailed(*dict.fromkeys(wrong))
    if not report.rows:
        raise UserError("nothing could be measured: what is missing is said above")


def _options(name: str, words: list[str]) -> dict[str, Any]:
    """Options of the network, from its recipe keys."""
    known = tuple(f"{key}{end}" for key in KEYS for end in "=.")
    if other := [word for word in words if not word.startswith(known)]:
        raise UserError(
            f"{shown(other[0])}: expected student.KEY=VALUE with a KEY of the network, one of "
            f"{', '.join(NETWORK_OPTIONS)}"
        )
    return recipe_for(name, words).student.options() if words else {}


def _show(reports: list[LatencyReport]) -> None:
    for number, report in enumerate(reports):
        plain = report.plain()
        _say([*([""] if number else []), *title(plain), HEADER, *map(row_line, plain["rows"])])
        _say([line for row in plain["rows"] for line in layer_lines(row)])
        _say(notes(plain))


def _say(lines: list[str]) -> None:
    """Names in a file may be a stranger's."""
    text: list[Any] = [printable(part) for line in lines for part in line.split("\n")]
    if text:
        print("\n".join(text), flush=True)
