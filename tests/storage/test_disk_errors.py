"""Whatever a disk refuses, in whatever file of a run: one sentence, and nothing that is lost.

The faults are put into the functions by which Python writes; a finished run is compared with one
without faults.
"""

import builtins
import errno
import io
import json
import os
from pathlib import Path

import pytest

from fastkd.errors import RunFailed
from fastkd.output.occupancy import occupied
from fastkd.output.run_folder import RunFolder
from fastkd.report.plots import draw_curves
from fastkd.storage.atomic import append_line, atomic_path, sentence

# Errors, and what the sentence must advise.
ERRORS = {
    errno.EIO: "check it",
    errno.EFBIG: "ulimit -f",
    errno.EROFS: "mounted read-only",
    errno.EACCES: "permissions",
    errno.EMFILE: "ulimit -n",
    errno.ENOSPC: "no space left on the disk",
    # Not in the reports.
    errno.EDQUOT: "no space left on the disk",
    errno.ESTALE: "gone on the server",
    errno.EPERM: "permissions",
    errno.ENAMETOOLONG: "shorter name",
    errno.ETIMEDOUT: "timed out",
}


@pytest.mark.parametrize("function", ["fsync", "replace", "open"])
@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
def test_a_whole_file_or_a_row_that_cannot_be_written(tmp_path, monkeypatch, function, error):
    whole, rows = tmp_path / "summary.json", tmp_path / "metrics.jsonl"
    whole.write_text("before")
    append_line(rows, "1")

    def refuse(*words, **keys):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, function, refuse)

    def write():
        with atomic_path(whole) as beside:
            beside.write_text("after")

    with pytest.raises(RunFailed) as caught:
        write()
    assert str(whole) in str(caught.value)
    assert ERRORS[error] in str(caught.value)
    assert "\n" not in str(caught.value)
    if function != "replace":
        with pytest.raises(RunFailed, match=r"metrics\.jsonl"):
            append_line(rows, "2")
    monkeypatch.undo()
    assert whole.read_text() == "before" or function == "open"  # the rename was done, not flushed
    assert rows.read_text() == "1\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "summary.json"]


@pytest.mark.parametrize("share", [1, 3, 7])
def test_short_writes_add_up_to_a_whole_row(tmp_path, monkeypatch, share):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, bytes(data)[:share], at))
    append_line(tmp_path / "rows", '{"epoch": 1}')
    append_line(tmp_path / "rows", '{"epoch": 2}')
    assert (tmp_path / "rows").read_text() == '{"epoch": 1}\n{"epoch": 2}\n'


def test_a_disk_that_fills_up_within_a_row_keeps_the_rows_before(tmp_path, monkeypatch):
    target = tmp_path / "rows"
    append_line(target, "first")
    pwrite = os.pwrite

    def fills_up(fd, data, at):
        if at > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, bytes(data)[:4], at)

    monkeypatch.setattr(os, "pwrite", fills_up)
    with pytest.raises(RunFailed, match="no space left on the disk"):
        append_line(target, "second, which is long")
    assert target.read_text() == "first\n"


TORN = {
    "half a row": b'{"epoch": 3, "lo',
    "a row without its end": b'{"epoch": 3}',
    "half a character": '{"epoch": 3, "é'.encode()[:-1],
    "zeros after a crash of the machine": bytes(40),
    "more than a block": b'{"epoch": 3, "x": "' + b"x" * 100_000,
}


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_row_is_cut(tmp_path, torn):
    folder = RunFolder(tmp_path)
    folder.append_metrics({"epoch": 1})
    folder.append_metrics({"epoch": 2})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(TORN[torn])
    assert folder.metrics() == [{"epoch": 1}, {"epoch": 2}]
    folder.append_metrics({"epoch": 3, "again": True})
    assert folder.metrics() == [{"epoch": 1}, {"epoch": 2}, {"epoch": 3, "again": True}]
    folder.finish({"epochs": 3})
    assert (tmp_path / "metrics.csv").read_text() == "epoch,again\n1,\n2,\n3,True\n"


def test_a_row_glued_to_a_torn_one_by_an_older_version_is_cut_with_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo{"epoch": 2}\n{"epoch": 3}\n')
    assert RunFolder(tmp_path).metrics() == [{"epoch": 1}]


class World:
    size, is_main = 1, True


def test_leftovers_go_when_the_folder_is_taken_and_when_the_run_ends(tmp_path):
    names = (".last.pt.tmp", ".best.safetensors.tmp", ".curves.png.tmp", ".metrics.csv.tmp")
    mine = tmp_path / "notes.tmp"
    mine.touch()
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    with occupied(tmp_path, World()):
        assert {path.name for path in tmp_path.iterdir()} == {mine.name, ".lock"}
        (tmp_path / names[0]).write_bytes(b"half")
        RunFolder(tmp_path).finish({})
        assert not (tmp_path / names[0]).exists()
    assert mine.exists()


def fails_for(monkeypatch, name, error):
    """Opening this file, or its temporary one, for writing fails."""
    real, real_os = io.open, os.open

    def opens(file, mode="r", *words, **keys):
        if isinstance(file, str | Path) and name in str(file) and set(mode) & set("wax+"):
            raise OSError(error, os.strerror(error), str(file))
        return real(file, mode, *words, **keys)

    def opens_os(file, flags, *words, **keys):
        if isinstance(file, str | Path) and name in str(file) and flags & (os.O_RDWR | os.O_CREAT):
            raise OSError(error, os.strerror(error), str(file))
        return real_os(file, flags, *words, **keys)

    monkeypatch.setattr(io, "open", opens)
    monkeypatch.setattr(builtins, "open", opens)
    monkeypatch.setattr(os, "open", opens_os)


RUN = ("train", "quickstart", "teacher=null", "losses.kd=null", "losses.ce.weight=1", "epochs=1")
RUN = (*RUN, "baseline.lrs=", "data.name=synthetic", "data.train_limit=100", "out=run")
NEEDED = ("config.yaml", "environment.json", "metrics.jsonl", "best.safetensors", "last.pt")


@pytest.mark.parametrize("name", [*NEEDED, "summary.json"])
@pytest.mark.parametrize("error", [errno.EIO, errno.EROFS, errno.EMFILE], ids=errno.errorcode.get)
def test_a_file_that_a_run_needs(command, monkeypatch, tmp_path, name, error):
    with monkeypatch.context() as patch:
        fails_for(patch, name, error)
        said = command(*RUN)
    assert said.code == 1
    assert said.err.startswith(f"fastkd: run/{name} could not be written: ")
    assert ERRORS[error] in said.err
    assert said.err.count("\n") == 1
    if name == "summary.json":
        # Everything else is there: the run is finished by resuming it.
        monkeypatch.chdir(tmp_path)
        assert command("train", "--resume", "run").code == 0
        assert json.loads((tmp_path / "run/summary.json").read_text())["epochs"] == 1


@pytest.mark.parametrize("name", ["curves.png", "metrics.csv"])
@pytest.mark.parametrize(
    "error", [errno.EFBIG, errno.EACCES, errno.ENOSPC], ids=errno.errorcode.get
)
def test_a_picture_or_a_csv_never_fails_a_trained_run(command, monkeypatch, tmp_path, name, error):
    with monkeypatch.context() as patch:
        fails_for(patch, name, error)
        said = command(*RUN)
    assert said.code == 0
    assert name in said.out + said.err
    assert ERRORS[error] in said.out + said.err
    assert (tmp_path / "run/summary.json").exists()
    assert not (tmp_path / "run" / name).exists()


def test_a_picture_that_cannot_be_drawn_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: 1 / 0)
    said = draw_curves(tmp_path / "curves.png", {"run": [{"epoch": 1, "train_loss": 1.0}]})
    assert said == "no curves: ZeroDivisionError: division by zero"


def test_a_job_that_is_started_again_after_its_end_has_nothing_to_do(command, tmp_path):
    words = [word for word in RUN if word != "out=run"]
    assert command(*words).code == 0
    again = command(*words, "--resume", "auto")
    assert (again.code, again.out) == (0, "quickstart: finished before, nothing to resume\n")
    assert len(list((tmp_path / "runs/quickstart").iterdir())) == 1
    assert command(*RUN, "--resume", "auto").code == 0
    again = command(*RUN, "--resume", "auto")
    assert (again.code, again.out) == (0, "quickstart: finished before, nothing to resume\n")
    other = command(*RUN, "optim.lr=0.01", "--resume", "auto")
    assert (other.code, "run is finished" in other.err) == (2, True)


def test_an_unusual_error_names_file_and_reason():
    error = OSError(errno.ELOOP, os.strerror(errno.ELOOP), "a/b")
    assert sentence(error) == "a/b could not be used: Too many levels of symbolic links"
    assert sentence(OSError("odd"), Path("x")) == "x could not be written: odd"
