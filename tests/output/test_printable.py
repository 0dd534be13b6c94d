"""Names and values of strangers reach the terminal on one line, escaped and cut."""

import io

import pytest

from fastkd.errors import Interrupted, RunFailed, UserError
from fastkd.output.console import Console
from fastkd.printable import MESSAGE, brief, first_line, in_words, printable, shown

EVIL = [
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "two\nlines",
    "over\rwritten",
    "a\x08b",
    "\x9b31m",
    "\u202egpj.exe",
    "zero\u200bwidth",
    "\udcff",
    "tab\there",
    "\u2028line",
    "nul\0",
]


@pytest.mark.parametrize("text", EVIL, ids=ascii)
def test_what_a_terminal_obeys_is_escaped(text):
    assert printable(text).isprintable()
    assert eval(f"'{printable(text)}'") == text
    assert eval(shown(text)) == text
    for error in (UserError(f"no {text}"), RunFailed(text), Interrupted(text, 130)):
        assert str(error).isprintable()
    screen = io.StringIO()
    console = Console(file=screen)
    console.note(f"run folder {text}")
    console.facts(f"evaluation of {text}", {text: text, "inner": {"name": text}})
    console.comparison([{"run": text, "note": text, "accuracy_last": 0.5}])
    assert all(line.isprintable() for line in screen.getvalue().split("\n"))


@pytest.mark.parametrize("text", ["plain", "ä/日本/🙂", "C:\\x", "a 'quoted' \"word\"", ""])
def test_ordinary_text_stays(text):
    assert printable(text) == shown(text) == text


def test_a_long_text_is_cut_and_keeps_its_end():
    said = str(UserError(f"{'x' * 5000}: set data.root=FOLDER"))
    assert len(said) == MESSAGE and said.endswith("x: set data.root=FOLDER")
    assert len(printable("\x1b" * 100_000)) == MESSAGE
    assert shown("a" + "y" * 5000 + "z", 100) == f"a{49 * 'y'} .. {49 * 'y'}z"
    assert len(shown("\x1b" * 5000, 100)) <= 100


def test_several_sentences_stay_several_lines():
    error = UserError("one\n", "two", shared=False)
    assert (str(error), error.shared) == ("one\\n\ntwo", False)


def test_brackets_and_colons_are_neither_markup_nor_emoji():
    screen = io.StringIO()
    console = Console(file=screen)
    name = "out=[red]/:car:/[/x]"
    console.note(name)
    console.comparison([{"run": name, "note": "[bold]b", "accuracy_last": 0.5}])
    console.facts("[b]title", {":car:": "[i]"})
    said = screen.getvalue()
    assert said.startswith(f"{name}\n")
    assert "out=[red]/:car:/" in said.split("run")[1] and "[/x]" in said and "[bold]b" in said
    assert "[b]title\n  :car:  [i]" in said


def test_the_message_of_an_error_is_one_line_of_it():
    traced = "The following operation failed in the TorchScript interpreter.\n  at x\nlast line.\n"

    assert first_line(ValueError("\n  sizes differ.\nin layer 3\n")) == "sizes differ"
    assert first_line(RuntimeError(traced)) == "last line"
    assert first_line(KeyError()) == "KeyError"
    assert first_line("a\nb") == "a"
    assert len(first_line(ValueError("x" * 999), 200)) == 200
    assert in_words(ValueError("no\nmore")) == "ValueError: no"
    assert in_words(KeyError()) == "KeyError"


def test_a_value_is_cut_and_an_absurd_one_is_not_written():
    nested = []
    for _ in range(100_000):
        nested = [nested]

    assert brief("a\x1b[2J") == r"'a\x1b[2J'"
    assert brief(list(range(1000))).startswith("[0, 1, 2, ")
    assert len(brief("x" * 1000)) < 70
    assert brief(10**5000) == brief(nested) == "(too large to show)"
