"""The parser that all commands share, and what several of them add to it."""

import argparse
import re
from typing import NoReturn, TypeAlias

from fastkd.cli.wrong_words import near, see
from fastkd.errors import UserError
from fastkd.printable import shown

__all__ = ["Commands", "Parser", "add_words", "positive"]


class Parser(argparse.ArgumentParser):
    """argparse with one-sentence errors that name the nearest valid word."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        match = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL)
        if match:
            word, commands = match[1], match[2].replace("'", "").split(", ")
            message = f"there is no command '{word}'{near(word, commands)}"
        raise UserError(f"{message}{see(message, self.prog)}")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def positive(text: str) -> int:
    """An option's whole number above 0."""
    if not re.fullmatch("0*[1-9][0-9]{0,4}", text):
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected a whole number above 0")
    return int(text)


def add_words(parser: argparse.ArgumentParser, metavar: str, text: str) -> None:
    """The words behind a command, of which `parse` also takes those between its options."""
    parser.add_argument("words", nargs="*", default=[], metavar=metavar, help=text)
