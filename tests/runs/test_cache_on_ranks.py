"""Caches of answers that one process or two write and read, also after a kill."""

import json

import pytest

from tests.programs.tiny import different


@pytest.fixture(scope="module")
def found(program, tmp_path_factory):
    """What programs/cached_runs.py found."""
    place = tmp_path_factory.mktemp("cached")
    said = program("cached_runs.py", place)
    assert said.code == 0, said.err
    runs = json.loads((place / "found.json").read_text())
    for name, run in runs.items():
        assert set(run["codes"]) == {0}, f"{name}: {run['log']}"
    return runs


def unlike(one, other):
    return [key for key in different(one, other) if not key.startswith("summary.answers")]


def answers(run):
    names = ("images_read", "images_written")
    return tuple(int(run["facts"][f"summary.answers.{name}"]) for name in names)


@pytest.mark.parametrize("number", ["", " on two"])
def test_the_run_that_writes_is_the_run_with_the_teacher(found, number):
    assert not unlike(found[f"live{number}"]["facts"], found[f"written{number}"]["facts"])


def test_what_two_wrote_two_read_bit_for_bit(found):
    read = found["read on two"]
    assert not unlike(found["live on two"]["facts"], read["facts"])
    assert answers(read) == (60, 0)  # of rank 0


def test_what_two_filled_two_read_bit_for_bit(found):
    read = found["read what was filled"]
    assert not unlike(found["live on two"]["facts"], read["facts"])
    assert answers(read) == (60, 0)


@pytest.mark.parametrize(
    ("name", "live", "each"),
    [
        ("read on two what one wrote", "live on two", 60),
        ("read on one what two wrote", "live", 120),
    ],
)
def test_another_number_of_processes_reads_what_is_stored(found, name, live, each):
    """The teacher's answers to a batch of another size are rounded otherwise."""
    read, live = found[name], found[live]
    assert answers(read) == (each, 0)
    for epoch in (0, 1):
        key = f"rows.{epoch}.train_loss"
        assert float(read["facts"][key]) == pytest.approx(float(live["facts"][key]), rel=1e-4)


@pytest.mark.parametrize("name", ["killed", "killed, picked"])
def test_a_killed_run_goes_on_with_what_it_had_kept(found, name):
    run = found[name]
    assert not unlike(found[f"{name}, live"]["facts"], run["facts"])
    assert "resumed tiny/kd" in run["log"]
