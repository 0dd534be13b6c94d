"""Names and values of strangers reach the terminal on one line, escaped and cut."""

import io

import pytest

from fastkd.errors import Interrupted, RunFailed, UserError
from fastkd.output.console import Console
from fastkd.printable import MESSAGE, printable, shown

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
