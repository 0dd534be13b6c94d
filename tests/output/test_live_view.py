"""What a terminal and a notebook show of a run: a bar and a line per stage, and no widget."""

import io
import re
import sys
from typing import Any, ClassVar

import pytest

from fastkd.output import console as console_module
from fastkd.output import notebook
from fastkd.output.console import Console
from fastkd.output.group_console import GroupConsole

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SETUP = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import fastkd
from fastkd.losses import CrossEntropy
data = DataLoader(TensorDataset(torch.randn(32, 3, 8, 8), torch.arange(32) % 4), batch_size=8)
student = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
"""
CALL = """
result = fastkd.distill(student, None, data, data, epochs=6, losses=[CrossEntropy()], device="cpu")
"""


def row(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "train_loss": 1 / epoch, "val_accuracy": 0.5, "images_per_s": 1234.0}


def stage(console: Any, name: str, epochs: int, *, data_wait: float = 0.02) -> None:
    console.stage(name)
    for epoch in range(epochs):
        for step in (2, 4):
            console.progress(
                epoch=epoch,
                epochs=epochs,
                step=step,
                steps=4,
                images_per_s=1234.0,
                data_wait=data_wait,
                loss=1.5,
            )
        console.epoch(row(epoch + 1), epochs)


def screen(width: int, monkeypatch: pytest.MonkeyPatch, **how: Any) -> tuple[str, list[str]]:
    """Everything that a terminal was sent, and the lines that are still there at the end."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    with Console(file=out, live=True, **how) as console:
        stage(console, "teacher/digits/wrn_16_2", 3)
        stage(console, "quickstart", 40)
    return out.getvalue(), left_on_screen(out.getvalue())


def left_on_screen(sent: str) -> list[str]:
    """The lines that a terminal of any height shows after this."""
    lines, at, column = [""], 0, 0
    for token in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|[\r\n])", sent):
        if token == "\n":
            at, column = at + 1, 0
            lines += [""] if at == len(lines) else []
        elif token == "\r":
            column = 0
        elif token == "\x1b[1A":
            at -= 1
        elif token == "\x1b[2K":
            lines[at] = ""
        elif not token.startswith("\x1b"):
            line = lines[at].ljust(column)
            lines[at] = line[:column] + token + line[column + len(token) :]
            column += len(token)
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.parametrize("width", [70, 80, 120])
def test_a_terminal_has_a_bar_per_stage_and_keeps_one_line_of_each(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    sent, lines = screen(width, monkeypatch)
    assert "━" in sent
    assert [line.split("  ")[:2] for line in lines] == [
        ["teacher/digits/wrn_16_2", "epoch 3/3"],
        ["quickstart", "epoch 40/40"],
    ]
    bars = [one for one in re.split(r"[\r\n]", ESCAPES.sub("", sent)) if "━" in one]
    assert bars and max(map(len, bars)) <= width
    assert "epoch 7/40  1,234 images/s  loss 1.500" in sent or width >= 100
    assert ("wait 2%" in sent) == (width >= 100)


def test_a_narrow_terminal_has_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    sent, lines = screen(60, monkeypatch)
    assert "━" not in sent and "epoch 7/40" in sent
    assert len(lines) >= 2


def test_verbose_adds_a_line_per_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    _, lines = screen(120, monkeypatch, verbose=True)
    assert [re.search(r"epoch +\d+", line)[0] for line in lines] == [
        *(f"epoch {n}" for n in (1, 2, 3)),
        *(f"epoch {n:>2}" for n in range(1, 41)),
    ]


def test_waiting_for_data_is_said_on_any_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = io.StringIO()
    with Console(file=out, live=True) as console:
        stage(console, "x", 1, data_wait=0.4)
    assert "wait 40%" in out.getvalue()


def test_runs_that_are_trained_together_are_verbose_too() -> None:
    for verbose in (False, True):
        out = io.StringIO()
        group = GroupConsole(Console(file=out, live=True, verbose=verbose))
        stage(group.of("lr=0.1", "quickstart"), "quickstart", 3)
        assert ("lr=0.1: epoch 1/3" in out.getvalue()) == verbose
        assert "lr=0.1: epoch 3/3" in out.getvalue()


class Shown:
    """What a notebook shows of one output: every state that it had."""

    every: ClassVar[list["Shown"]] = []

    def __init__(self, content: Any) -> None:
        self.states = [content]
        self.every.append(self)

    def update(self, content: Any, *, raw: bool) -> None:
        assert raw
        self.states.append(content)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Shown]:
    display = pytest.importorskip("IPython.display", reason="IPython is not installed")
    monkeypatch.setattr(console_module, "in_notebook", lambda: True)
    monkeypatch.setattr(Shown, "every", [])
    monkeypatch.setattr(display, "display", lambda content, raw, display_id: Shown(content))
    return Shown.every


def test_a_notebook_has_one_output_per_stage(
    shown: list[Shown], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notebook, "_REDRAWN_S", 0.0)
    with Console() as console:
        console.note("run folder x")
        stage(console, "teacher", 2)
        stage(console, "student", 3)
        console.comparison([{"run": "student", "accuracy_last": 0.5}])
    first, second = shown
    for output, name, epochs in ((first, "teacher", 2), (second, "student", 3)):
        # Two steps and the end of each epoch.
        assert len(output.states) == 3 * epochs
        assert all(state.keys() == {"text/plain"} for state in output.states)
        last = output.states[-1]["text/plain"]
        assert last.startswith(f"{name}  epoch {epochs}/{epochs}  loss")
        assert "accuracy 50.00%" in last
    said = capsys.readouterr().out
    assert said.startswith("run folder x\n") and "student" in said
    assert "epoch" not in said


def test_a_notebook_is_not_told_everything(
    shown: list[Shown], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notebook.time, "monotonic", lambda: 100.0)
    with Console() as console:
        stage(console, "student", 40)
    (output,) = shown
    first, last = output.states
    assert "epoch 1/40" in first["text/plain"] and "epoch 40/40" in last["text/plain"]


def test_a_quiet_call_and_other_ranks_show_nothing(shown: list[Shown]) -> None:
    stage(Console(enabled=False), "student", 2)
    assert shown == []


def test_a_kernel_without_ipython_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not notebook.in_notebook()
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    assert not notebook.in_notebook()


@pytest.mark.matrix
def test_a_real_notebook_is_clean() -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    cells = [nbformat.v4.new_code_cell(text) for text in (SETUP, CALL)]
    book = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(book, kernel_name="python3", timeout=300).execute()
    assert book.cells[0].outputs == []
    outputs = book.cells[1].outputs
    assert 1 <= len(outputs) <= 3
    assert not [one for one in outputs if one.output_type == "error"]
    kinds = {kind for one in outputs for kind in one.get("data", {})}
    assert kinds == {"text/plain"}
    (line,) = [one.data["text/plain"] for one in outputs if one.output_type == "display_data"]
    assert line.startswith("distill  epoch 6/6  loss ")
    streams = "".join(one.text for one in outputs if one.output_type == "stream")
    assert "epoch" not in streams and "\x1b" not in streams
