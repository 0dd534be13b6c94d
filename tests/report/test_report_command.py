"""`fastkd report`: the folder that it writes, the page, and what it refuses."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest

from fastkd.report.figures import FIGURES
from fastkd.report.figures.figure import FigureKind
from tests.report.fake_runs import fake_run


@pytest.fixture
def runs(tmp_path):
    for seed in (0, 1):
        fake_run(
            tmp_path / f"runs/r{seed}", f"seed={seed}", values=[0.3, 0.7 + 0.01 * seed], alone=0.6
        )
    fake_run(tmp_path / "runs/unfinished", "seed=2", "optim.lr=0.1", values=[0.2], finished=False)
    return tmp_path / "runs"


class Page(HTMLParser):
    """Addresses of a page, and whether its elements are closed in order."""

    EMPTY = ("meta", "link", "img", "path", "use", "br")

    def __init__(self, text):
        super().__init__()
        self.addresses, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for key, value in attrs if key in ("href", "src", "xlink:href")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.addresses += [value for key, value in attrs if key in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_report_of_runs(command, runs, tmp_path):
    out = tmp_path / "out"
    said = command("report", str(runs), "--out", str(out))
    assert (said.code, said.err) == (0, "")
    assert "mean of 2: gain +10.50 points (standard error 0.50, n = 2)" in said.out
    names = {path.name for path in out.iterdir()}
    for figure in ("accuracy_epochs", "pareto", "hard_soft"):
        assert {f"{figure}.{kind}" for kind in ("png", "pdf", "svg", "csv", "tex")} <= names
    assert {"index.html", "table.csv", "table.tex", "table.md"} <= names
    assert "mean of 2: gain +10.50 points" in (out / "table.tex").read_text()
    page = Page((out / "index.html").read_text())
    assert page.open == []
    # Nothing that a network would be asked for.
    assert page.addresses and all(one.startswith(("data:", "#")) for one in page.addresses)
    assert "mean of 2: gain +10.50 points (standard error 0.50, n = 2)" in page.text
    assert "not finished: epoch 1 of 1" in page.text
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", (out / "index.html").read_text())
    numbers = [
        base64.b64decode(one.partition(",")[2])
        for one in page.addresses
        if one.startswith("data:text/csv")
    ]
    assert (out / "pareto.csv").read_bytes() in numbers


def test_some_figures_in_some_formats(command, runs, tmp_path):
    out = tmp_path / "out"
    words = ("--figures", "pareto,error_budget", "--formats", "svg", "--out", str(out))
    said = command("report", str(runs), *words)
    assert said.code == 0
    assert "nothing in these runs for error_budget" in said.out
    assert {path.name for path in out.iterdir()} == {"pareto.svg", "table.md", "index.html"}


def test_the_names_of_runs_are_text_on_the_page(command, tmp_path):
    run = fake_run(tmp_path / "runs/a", values=[0.5])
    summary = json.loads((run / "summary.json").read_text())
    summary["teacher"]["name"] = "<script>alert(1)</script>"
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.yaml").write_text("made_by: fastkd.distill\nname: <b>&\n")
    assert command("report", str(run), "--out", str(tmp_path / "out")).code == 0
    text = (tmp_path / "out/index.html").read_text()
    assert "<script" not in text and "<b>&" not in text


def test_a_figure_that_fails_spares_the_others(command, runs, tmp_path, monkeypatch):
    def fails(_):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setitem(FIGURES, "broken", FigureKind("broken", "Broken", "", fails, "nothing"))
    said = command("report", str(runs), "--out", str(tmp_path / "out"))
    assert said.code == 0
    assert "no figure broken: ZeroDivisionError: division by zero" in said.out
    assert (tmp_path / "out/pareto.png").exists()


def test_the_list_names_every_figure(command):
    said = command("report", "--list")
    assert said.code == 0
    lines = said.out.splitlines()
    assert [line.partition(":")[0] for line in lines[::2]] == list(FIGURES)
    assert all(line.startswith("    needs ") for line in lines[1::2])
    only = command("report", "--list", "--figures", "pareto")
    assert only.out.startswith("pareto: ") and only.out.count("\n") == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "name the folders of runs: fastkd report runs/RECIPE/*"),
        (("nowhere",), "there is no run folder nowhere"),
        (("RUNS", "--figures", "paretto"), "there is no figure paretto: choose of "),
        (("RUNS", "--formats", "jpg"), "there is no format jpg: choose of png, pdf, svg, csv"),
        (("RUNS", "--formats", ","), "--figures and --formats take names with commas"),
        (("RUNS", "optim.lr=1"), "a report takes keys of the data, such as data.root=DIR, not"),
        (("RUNS", "data.root=a"), "data.root=a says where the images are, which only --predict"),
        (("RUNS", "--list"), "--list only shows which figures there are"),
        (("--leaderboard",), "name what was run: fastkd report --leaderboard runs/"),
    ],
)
def test_wrong_words_are_one_sentence(command, words, sentence, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("report", *(str(runs) if word == "RUNS" else word for word in words))
    assert said.code == 2
    assert said.err.startswith(f"fastkd: {sentence}") and said.err.count("\n") == 1
    assert not (tmp_path / "report").exists()
