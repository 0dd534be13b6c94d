"""The `fastkd` command: dispatches each command and turns errors into exit codes.

Its words are in `fastkd.cli.arguments`. In this package an import inside a function has one reason,
start-up time: `fastkd --help` and `fastkd recipes` do not wait for torch.
"""

import atexit
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from fastkd.cli.arguments import parse
from fastkd.errors import FastKDError
from fastkd.output.streams import discard
from fastkd.printable import printable
from fastkd.storage.atomic import FULL, sentence

__all__ = ["main"]

_COMMANDS = {
    "train": ("fastkd.cli.running", "train"),
    "compare": ("fastkd.cli.comparing", "compare"),
    "table": ("fastkd.cli.comparing", "table"),
    "report": ("fastkd.cli.reporting", "report"),
    "eval": ("fastkd.cli.running", "evaluate"),
    "predict": ("fastkd.cli.predicting", "predict"),
    "export": ("fastkd.cli.exporting", "export_saved"),
    "data": ("fastkd.cli.data", "data"),
    "cache": ("fastkd.cli.caching", "cache"),
    "bench": ("fastkd.cli.benching", "bench"),
    "models": ("fastkd.cli.networks", "models"),
    "cheapen": ("fastkd.cli.networks", "cheapen"),
    "latency": ("fastkd.cli.latency", "latency"),
    "compress": ("fastkd.cli.compressing", "compress_model"),
    "recipes": ("fastkd.cli.listings", "recipes"),
    "losses": ("fastkd.cli.listings", "losses"),
    "doctor": ("fastkd.cli.doctor", "doctor"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code. With several ranks an error ends the process."""
    _prepare_streams()
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            module, function = _COMMANDS[options.command]
            code = getattr(import_module(module), function)(options) or 0
        print(end="", flush=True)  # what fails in writing shall fail here
        return code
    except FastKDError as error:
        _complain(*error.args, every_rank=not error.shared)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _leave(error.exit_code)
        return error.exit_code
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # `fastkd models | head`: the reader closed the pipe, which is not an error.
            discard(sys.stdout)
            return 0
        # Without a file it does not come from a disk: it is a mistake of ours.
        if error.filename is None and error.errno not in FULL:
            raise
        _complain(sentence(error))
        return 1
    except KeyboardInterrupt:
        _complain("stopped")
        return 130


def _prepare_streams() -> None:
    """Standard streams that take any text; closed ones lead nowhere.

    A file that is opened later would else get the number of a closed stream, and what is printed.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            with suppress(OSError):
                os.fstat(number)
                continue  # open, but Python was told not to use it
            while os.open(os.devnull, os.O_WRONLY) < number:
                pass
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))
        elif isinstance(stream, TextIOWrapper):
            # Names of files and classes may not exist in the encoding of a terminal.
            stream.reconfigure(errors="backslashreplace")


def _leave(code: int) -> NoReturn:
    """End this rank: when Python tears gloo down after an error, a rank sometimes aborts."""
    atexit._run_exitfuncs()  # loaders stop their workers
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: Any
) -> None:
    """Show fastkd's warnings as plain sentences, others as Python does."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        _complain(f"note: {message}")
    else:
        sys.stderr.write(
            warnings.formatwarning(printable(str(message)), category, filename, lineno)
        )


def _complain(*sentences: str, every_rank: bool = False) -> None:
    if every_rank or os.environ.get("RANK", "0") == "0":
        print("fastkd:", "\n".join(map(printable, sentences)), file=sys.stderr)
