"""Nothing that somebody else wrote is removed, whatever `--out` and `--force` say."""

import os
from pathlib import Path

import pytest

from fastkd.deploy.source import HF_FILES
from fastkd.deploy.target import check_target, proven
from fastkd.errors import UserError


@pytest.fixture
def precious(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with somebody's work, in the middle of which the user is."""
    inside = tmp_path / "work" / "project" / "here"
    inside.mkdir(parents=True)
    (tmp_path / "work" / "thesis.txt").write_text("years")
    (inside / "data.bin").write_bytes(b"1")
    monkeypatch.chdir(inside)
    return tmp_path / "work"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(one.relative_to(folder)): one.read_bytes()
        for one in sorted(folder.rglob("*"))
        if one.is_file()
    }


@pytest.mark.parametrize("files", [(), HF_FILES], ids=["file", "folder"])
@pytest.mark.parametrize("out", ["..", ".", "", "../..", "/", "../here", "../../project/"])
def test_folders_with_anything_else_are_refused(precious: Path, out: str, files) -> None:
    before = contents(precious)
    with pytest.raises(UserError, match="--out"):
        check_target(Path(out), force=True, files=files)
    assert contents(precious) == before


def test_a_link_to_a_folder_is_that_folder(precious: Path) -> None:
    Path("link").symlink_to(precious, target_is_directory=True)
    for files in ((), HF_FILES):
        with pytest.raises(UserError, match=r"--out link (is a folder|holds)"):
            check_target(Path("link"), force=True, files=files)


def test_a_file_is_no_folder(precious: Path) -> None:
    with pytest.raises(UserError, match=r"data\.bin is a file, and a folder is written"):
        check_target(Path("data.bin"), force=True, files=HF_FILES)


def test_what_is_no_ordinary_file_is_refused(precious: Path) -> None:
    os.mkfifo("pipe")
    (Path("student") / HF_FILES[0]).mkdir(parents=True)
    for out, files, said in (("pipe", (), "pipe is no ordinary"), ("student", HF_FILES, "holds c")):
        with pytest.raises(UserError, match=said):
            check_target(Path(out), force=True, files=files)


def test_only_what_an_export_wrote_is_replaced(precious: Path) -> None:
    target = Path("student")
    target.mkdir()
    for name in HF_FILES:
        (target / name).write_text("old")
    with pytest.raises(UserError, match="student exists: --force replaces it"):
        check_target(target, force=False, files=HF_FILES)
    check_target(target, force=True, files=HF_FILES)
    with proven(target) as made:
        made.mkdir()
        (made / HF_FILES[0]).write_text("new")
        # Of somebody who was quick.
        (target / "notes.txt").write_text("mine")
    assert (target / HF_FILES[0]).read_text() == "new"
    assert (target / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match=r"student holds notes\.txt, which no export wrote"):
        check_target(target, force=True, files=HF_FILES)


def test_a_folder_that_appears_meanwhile_stays(precious: Path) -> None:
    target = Path("student.onnx")
    check_target(target, force=True)

    def write() -> None:
        with proven(target) as made:
            made.write_text("proven")
            target.mkdir()
            (target / "mine").write_text("kept")

    with pytest.raises(Exception, match=r"student\.onnx"):
        write()
    assert (target / "mine").read_text() == "kept"


@pytest.mark.parametrize("fails", [False, True])
def test_a_name_is_given_at_the_end_or_not_at_all(precious: Path, fails: bool) -> None:
    target = Path("student.onnx")
    target.write_text("old")
    try:
        with proven(target) as made:
            assert made.name == "student.onnx"
            made.write_text("new")
            assert target.read_text() == "old"
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert target.read_text() == ("old" if fails else "new")
    assert sorted(os.listdir()) == ["data.bin", "student.onnx"]
