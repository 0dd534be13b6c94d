"""Which run folders a report finds, how it names them, and what it does with damaged ones."""

import json

import numpy as np
import pytest

from fastkd.errors import UserError
from fastkd.report.collecting import collect
from fastkd.report.runs_read import read_runs
from tests.report.fake_runs import fake_run


def test_folders_of_runs_are_searched_and_runs_inside_of_runs_are_not(tmp_path):
    one = fake_run(tmp_path / "runs/quickstart/b", values=[0.5, 0.7])
    two = fake_run(tmp_path / "runs/quickstart/a", values=[0.5], finished=False)
    fake_run(one / "alone/lr-0.4", values=[0.4])
    (tmp_path / "runs/quickstart/sweep-12345678.csv").write_text("row\n")
    found = read_runs([one, tmp_path / "runs", *(tmp_path / "runs/quickstart").iterdir()])
    assert [run.path for run in found] == [one, two]
    assert [run.finished for run in found] == [True, False]
    assert [run.label for run in found] == ["b", "a"]
    assert found[0].last_and_best() == (0.7, 0.7)
    assert found[1].key("optim.lr") == 0.4
    assert found[1].key("optim.nothing", 3) == 3


def test_a_damaged_run_is_named_and_left_out(tmp_path):
    good = fake_run(tmp_path / "good", values=[0.5])
    for name, file in (("a", "summary.json"), ("b", "facts.json"), ("c", "config.yaml")):
        (fake_run(tmp_path / name, values=[0.5]) / file).write_text("[1, 2")
    with pytest.warns(UserWarning, match="left out of the report") as said:
        found = read_runs([tmp_path])
    assert [run.path for run in found] == [good]
    assert [file in str(one.message) for one, file in zip(said, "abc", strict=True)] == [True] * 3


def test_nothing_to_report_on_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="there is no run folder"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="there is no run to report on"):
        read_runs([tmp_path])


def test_what_a_run_recorded(tmp_path):
    run = fake_run(tmp_path / "run", values=[0.5])
    record = run / "record"
    record.mkdir()
    (record / "kl.jsonl").write_text('{"epoch": 1, "ratio": 0.5}\n{"epoch": 2, "ra')
    for epoch in (10, 2):
        np.savez(record / f"weights-epoch{epoch:04d}.npz", counts=np.full(3, epoch))
    (record / "weights-epoch0003.npz").write_bytes(b"PK\x03\x04")
    (record / "weights-of-others-epoch0001.npz").write_bytes(b"")
    (found,) = read_runs([run])
    assert found.recorded("kl") == [{"epoch": 1, "ratio": 0.5}]
    with pytest.warns(UserWarning, match=r"weights-epoch0003.npz is damaged"):
        arrays = found.recorded("weights")
    assert isinstance(arrays, dict) and list(arrays) == [2, 10]
    assert arrays[10]["counts"].tolist() == [10, 10, 10]
    assert found.recorded("tsne") is None


def test_runs_are_named_by_what_differs_and_measured_by_their_baseline(tmp_path):
    for seed in (0, 1, 2):
        fake_run(
            tmp_path / f"r{seed}",
            f"seed={seed}",
            values=[0.4, 0.70 + 0.01 * seed],
            alone=0.68 + 0.012 * seed,
        )
    fake_run(tmp_path / "short", "seed=3", values=[0.5], finished=False)
    collected = collect(read_runs([tmp_path]))
    assert [run.label for run in collected.runs[:2]] == ["epochs=2 seed=0", "epochs=2 seed=1"]
    assert {run.group for run in collected.runs} == {"epochs=2", "epochs=1"}
    unfinished = next(row for row in collected.rows if "not finished" in row["note"])
    assert unfinished["note"] == "not finished: epoch 1 of 1"
    assert unfinished["accuracy_last"] == 0.5
    # 2.0, 1.8, 1.6 points.
    assert collected.verdicts == [
        "epochs=2 mean of 3: gain +1.80 points (standard error 0.12, n = 3)"
    ]


def test_the_baseline_may_be_a_run_of_its_own(tmp_path):
    own = fake_run(tmp_path / "own", "baseline.lrs=0.4", values=[0.7], alone=0.6)
    inside = fake_run(own / "alone/lr-0.4", values=[0.6])
    summary = json.loads((inside / "summary.json").read_text())
    (inside / "summary.json").write_text(json.dumps(summary | {"digest": "0" * 16}))
    (run,) = collect(read_runs([own])).runs
    assert run.alone == inside


def test_a_run_of_distill_is_reported_by_its_numbers(tmp_path):
    run = fake_run(tmp_path / "mine", values=[0.5, 0.6])
    (run / "config.yaml").write_text("made_by: fastkd.distill\nepochs: 2\n")
    other = fake_run(tmp_path / "other", values=[0.5])
    collected = collect(read_runs([run, other]))
    assert [row["run"] for row in collected.rows] == ["quickstart", "mine"]
    assert collected.rows[1]["accuracy_last"] == 0.6
