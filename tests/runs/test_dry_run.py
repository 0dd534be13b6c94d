"""`--dry-run` says what a run would take, of all its stages, and leaves nothing."""

import itertools
import re
import types

import pytest

import fastkd.data.sources.synthetic
from fastkd.testing.recipes import TINY

WORDS = [*TINY, "student.name=resnet8"]
TAUGHT = ["teacher.name=resnet8", "teacher.width=0.5", "teacher.epochs=2", "teacher.min_accuracy=0"]


@pytest.fixture(autouse=True)
def _few_validation_images(monkeypatch):
    monkeypatch.setitem(fastkd.data.sources.synthetic.NUM_IMAGES, "val", 50)


def test_a_dry_run_says_what_a_run_would_take_and_leaves_nothing(command, tmp_path):
    said = command("train", "--dry-run", *WORDS, *TAUGHT)
    assert (said.code, said.err) == (0, "")
    facts = dict(re.findall(r"^  (\S.*?)  +(\S.*)$", said.out, re.MULTILINE))
    assert facts["image"] == "3 x 32 x 32"
    assert facts["parts"] == "0.9 kd, 0.1 ce"
    assert facts["student"].startswith("resnet8: 19,954 parameters")
    assert facts["shapes: x/teacher/logits"] == "32 x 10"
    assert facts["steps"] == "2"
    assert {"seconds per step", "peak memory MiB"} <= set(facts)
    assert not any(tmp_path.iterdir())


def test_a_cache_is_left_aside_and_said_to_be(command, tmp_path):
    said = command("train", "--dry-run", *WORDS, *TAUGHT, "teacher.cache=answers")
    told = r"^  teacher cache +answers, left aside in a dry run: the teacher is asked$"
    assert re.search(told, said.out, re.MULTILINE), said.out
    assert not any(tmp_path.iterdir())


def test_networks_are_named_with_their_blocks(command):
    blocks = ("student.block=G:4", "teacher.block=S-2x2")
    said = command("train", "--dry-run", *WORDS, *TAUGHT, *blocks)
    assert re.search(r"^  student +resnet8 G\(4\): ", said.out, re.MULTILINE)
    assert re.search(r"^  teacher +resnet8 S-2x2: ", said.out, re.MULTILINE)
    assert "of training: teacher resnet8 S-2x2 " in said.out


def test_a_dry_run_projects_every_stage_that_is_still_to_be_trained(command, monkeypatch, tmp_path):
    clock = itertools.count()
    # Every look at this clock is a second later than the one before.
    ticking = types.SimpleNamespace(perf_counter=lambda: float(next(clock)))
    monkeypatch.setattr("fastkd.runs.dry_run.time", ticking)
    words = [*WORDS, *TAUGHT, "baseline.lrs=0.1,0.2"]

    def projected():
        said = command("train", "--dry-run", *words)
        return re.search(r"projected duration +(.*)\n", said.out)[1]

    # Epochs of two steps: two of the teacher, one of each student.
    student = "student alone (2 runs) 0:04, student distilled 0:02"
    assert projected() == f"0:10 of training: teacher resnet8 0:04, {student}"
    assert command("train", *words).code == 0
    assert projected() == f"0:06 of training: {student}"
