"""The command in any encoding, terminal and pipe, and without docstrings, home or user name."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastkd.config.docstrings import docstring_of
from fastkd.losses import AT, CRD, DKD
from fastkd.output.console import Console
from fastkd.storage.cache_folder import cache_folder
from fastkd.training.config import OptimConfig

TINY = ("train", "quickstart", "teacher=null", "losses.kd=null", "losses.ce.weight=1", "epochs=1")
TINY = (*TINY, "baseline.lrs=", "data.name=synthetic", "data.train_limit=64", "compile=off")


def shell(text, cwd, **environment):
    """A line of a shell in which $FASTKD is the command."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {text}"],
        cwd=cwd,
        env={**os.environ, "FASTKD": f"{sys.executable} -m fastkd", **environment},
        capture_output=True,
        text=True,
        errors="replace",
    )


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["ascii", "C"],
)
def test_a_path_that_the_terminal_cannot_show_is_shown_in_escapes(tmp_path, environment):
    said = shell("$FASTKD train --resume läuft-шаг quickstart", tmp_path, **environment)
    assert said.returncode == 2
    assert "Traceback" not in said.stderr
    assert "there is no run folder l" in said.stderr


def test_a_console_prints_in_the_encoding_of_its_file(tmp_path):
    for encoding, printed in (("ascii", r"l\xe4uft \u0448"), ("latin-1", "läuft \\u0448")):
        with (tmp_path / encoding).open("w", encoding=encoding) as file:
            Console(file=file).note("läuft ш")
        assert (tmp_path / encoding).read_text(encoding=encoding) == f"{printed}\n"


@pytest.mark.parametrize("columns", ["0", "1", "7", "10000", "x"])
@pytest.mark.parametrize("term", ["dumb", "", "xterm"])
def test_any_width_and_kind_of_terminal(command, monkeypatch, columns, term):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", term)
    said = command("train", "--help")
    assert said.code == 0
    assert "--resume" in said.out
    console = Console()
    console.note("said")
    console.facts("facts", {"a": 1})
    console.comparison([{"run": "one", "accuracy_last": 0.5}])


def test_a_training_whose_reader_leaves_goes_on_to_its_end(tmp_path):
    said = shell(f"$FASTKD {' '.join(TINY)} out=run | head -n 1", tmp_path)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout == "run folder run\n"
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.parametrize("closing", ["2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(tmp_path, closing):
    said = shell(f"$FASTKD losses kd {closing}", tmp_path)
    assert (said.returncode, said.stderr) == (0, "")
    assert ("losses.kd.weight" in said.stdout) == (closing == "2>&-")


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("flag", "words"),
    [("-O", "losses crd"), ("-OO", "losses crd"), ("-OO", "train --print-config")],
)
def test_without_asserts_and_docstrings_it_says_the_same(tmp_path, command, flag, words):
    said = shell(f"{sys.executable} {flag} -m fastkd {words}", tmp_path)
    assert said.returncode == 0, said.stderr
    assert said.stdout == command(*words.split()).out


@pytest.mark.parametrize("kind", [AT, CRD, DKD, OptimConfig])
def test_a_docstring_is_found_in_the_source(monkeypatch, kind):
    expected = inspect.getdoc(kind)
    assert docstring_of(kind) == expected
    monkeypatch.setattr(kind, "__doc__", None)
    assert docstring_of(kind) == expected


def test_a_user_without_a_home_caches_among_temporary_files(monkeypatch, tmp_path):
    def home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("FASTKD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_folder() == tmp_path / f"fastkd-{os.getuid()}"
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert cache_folder() == Path("/shared/fastkd")
