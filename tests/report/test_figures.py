"""Every figure of a report: which numbers it shows, what it needs, how it is written."""

import csv
import json
import math

import numpy as np
import pytest
from PIL import Image

from fastkd.errors import UserError
from fastkd.report.answers import Answers
from fastkd.report.collecting import collect
from fastkd.report.figures import FIGURES
from fastkd.report.figures.calibration import calibration
from fastkd.report.figures.cost import front_of
from fastkd.report.figures.figure import FORMATS, Drawn, new_figure, save
from fastkd.report.figures.supervision import initialisation_of, supervision_of
from fastkd.report.runs_read import read_runs
from tests.report.fake_runs import fake_run

CLASSES = ("bird", "cat", "dog")


@pytest.fixture
def read(tmp_path):
    """The runs below a folder, named and with their baselines."""
    return lambda: collect(read_runs([tmp_path])).runs


def answers(labels, predicted, confidence=0.9):
    predicted = np.array(predicted, dtype=np.int32)
    others = (predicted + 1) % len(CLASSES)
    sure = np.broadcast_to(np.array(confidence, dtype=np.float32), predicted.shape)
    return Answers(
        np.array(labels, dtype=np.int32),
        np.stack([predicted, others], 1),
        np.stack([sure, 1 - sure], 1),
        CLASSES,
    )


def with_answers(run, folder, **found):
    from dataclasses import replace

    files = {}
    for name, one in found.items():
        files[name] = folder / f"{run.path.name}-{name}.npz"
        one.write(files[name])
    return replace(run, predictions=files)


def test_accuracy_by_epoch_has_last_and_best_of_unfinished_runs_too(tmp_path, read):
    fake_run(tmp_path / "a", "seed=0", values=[0.2, 0.6, 0.5], alone=0.4)
    fake_run(tmp_path / "b", "seed=1", values=[0.3], finished=False)
    drawn = FIGURES["accuracy_epochs"].of(read())
    rows = [(row["epochs"], row["accuracy_last"], row["accuracy_best"]) for row in drawn.rows]
    assert rows == [(3, 0.5, 0.6), (1, 0.3, 0.3), (3, 0.4, 0.4)]
    assert [row["best_epoch"] for row in drawn.rows] == [2, 1, 1]
    assert [row["finished"] for row in drawn.rows] == [True, False, True]


def test_error_against_epochs_groups_seeds_by_method(tmp_path, read):
    for epochs in (2, 4):
        for seed in (0, 1):
            for loss in ("kd", "dkd"):
                keys = [f"seed={seed}", "losses={dkd: {weight: 1}, ce: {weight: 1}}"]
                reached = 0.5 + 0.1 * epochs + 0.02 * seed + 0.01 * (loss == "dkd")
                fake_run(
                    tmp_path / f"{loss}{epochs}{seed}",
                    *(keys if loss == "dkd" else keys[:1]),
                    values=[0.1] * (epochs - 1) + [reached],
                )
    drawn = FIGURES["error_budget"].of(read())
    found = {(row["method"], row["epochs"]): row for row in drawn.rows}
    assert {epochs for _, epochs in found} == {2, 4}
    methods = {method for method, _ in found}
    assert len(methods) == 2
    kd = next(method for method in methods if "dkd" not in method)
    assert math.isclose(found[kd, 2]["accuracy_error"], 0.29)
    assert math.isclose(found[kd, 2]["standard_error"], 0.01)
    assert found[kd, 4]["runs"] == 2
    assert FIGURES["error_budget"].of([run for run in read() if len(run.history) == 2]) is None


def test_the_pareto_front():
    costs, reached = [3.0, 1.0, 2.0, 2.0, 4.0], [0.7, 0.5, 0.6, 0.65, 0.7]
    assert front_of(costs, reached) == [1, 3, 0]
    # Whatever is on it is beaten by none: by the definition.
    rng = np.random.default_rng(0)
    costs, reached = rng.integers(0, 6, 40).tolist(), rng.integers(0, 6, 40).tolist()
    front = set(front_of(costs, reached))
    points = list(zip(costs, reached, strict=True))
    for place, (cost, value) in enumerate(points):
        beaten = any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points)
        assert not (beaten and place in front)
    assert {points[place] for place in front} == {
        (cost, value)
        for cost, value in points
        if not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points)
    }


def test_cost_takes_measured_latency_where_it_is_kept(tmp_path, read):
    run = fake_run(tmp_path / "a", values=[0.5], alone=0.4)
    drawn = FIGURES["pareto"].of(read())
    by_name = {row["network"]: row for row in drawn.rows}
    assert by_name["quickstart"]["ms an image in training"] == 2.5
    assert by_name["quickstart, alone"]["ms an image in training"] == 1.25
    assert by_name["teacher wrn_16_2"]["parameters"] == 691674
    assert [row["front by parameters"] for row in drawn.rows] == [True, False, True]
    row = {"on": "eager", "input": [1, 3, 16, 16], "threads": 2, "p50_ms": 0.25}
    (run / "latency.json").write_text(json.dumps({"rows": [row]}))
    drawn = FIGURES["pareto"].of(read())
    assert drawn.rows[0]["ms a call (eager, batch 1, threads 2)"] == 0.25


def test_kinds_of_labels_and_of_starts(tmp_path, read):
    soft = "losses={soft_ce: {weight: 1}}"
    fake_run(tmp_path / "a", values=[0.5, 0.6], val_top5=[0.8, 0.9], alone=0.4)
    fake_run(tmp_path / "b", soft, values=[0.5, 0.6], val_top5=[0.8, 0.95])
    (tmp_path / "w.pt").write_bytes(b"")
    fake_run(tmp_path / "c", soft, f"student.weights={tmp_path}/w.pt", values=[0.7, 0.8])
    runs = read()
    said = {run.path.name: (supervision_of(run), initialisation_of(run)) for run in runs}
    assert said["a"] == ("hard and soft labels", "random")
    assert said["b"] == ("soft labels", "random")
    assert said["c"] == ("soft labels", "w.pt")
    drawn = FIGURES["hard_soft"].of(runs)
    assert {row["series"] for row in drawn.rows} == {
        "hard labels",
        "hard and soft labels",
        "soft labels",
    }
    assert {row["metric"] for row in drawn.rows} == {"val_accuracy", "val_top5"}
    drawn = FIGURES["initialisation"].of(runs)
    assert {row["series"] for row in drawn.rows} == {"random", "w.pt"}
    assert FIGURES["initialisation"].of(runs[:2]) is None


def test_with_and_without_the_discriminator(tmp_path, read):
    both = "losses={soft_ce: {weight: 1}, discriminator: {weight: 1}}"
    fake_run(tmp_path / "a", both, values=[0.5, 0.6], train_discriminator=[0.7, 0.4])
    assert FIGURES["discriminator"].of(read()) is None
    fake_run(tmp_path / "b", "losses={soft_ce: {weight: 1}}", values=[0.4, 0.5])
    # Another student says nothing about the discriminator.
    fake_run(tmp_path / "c", "student.width=1.0", values=[0.9, 0.9])
    drawn = FIGURES["discriminator"].of(read())
    assert {row["value"] for row in drawn.rows if row["series"] == "without"} == {0.4, 0.5}
    assert len([row for row in drawn.rows if row["metric"] == "train_discriminator"]) == 2


def test_gains_and_confusions_by_class(tmp_path, read):
    fake_run(tmp_path / "a", values=[0.5])
    (run,) = read()
    labels = [0, 0, 1, 1, 1, 1, 2, 2]
    alone = answers(labels, [1, 0, 1, 2, 2, 0, 2, 2])
    student = answers(labels, [0, 0, 1, 1, 2, 0, 2, 1])
    runs = [with_answers(run, tmp_path, alone=alone, student=student)]
    drawn = FIGURES["class_gain"].of(runs)
    gains = {row["class"]: row["gain"] for row in drawn.rows}
    assert gains == {"bird": 0.5, "cat": 0.25, "dog": -0.5}
    assert [row["class"] for row in drawn.rows] == ["bird", "cat", "dog"]
    drawn = FIGURES["confusion_pairs"].of(runs)
    changes = {(row["label"], row["taken for"]): row["change"] for row in drawn.rows}
    assert changes == {("bird", "cat"): -0.5, ("cat", "dog"): -0.25, ("dog", "cat"): 0.5}
    # Without a student alone the teacher is the reference; without answers there is no figure.
    runs = [with_answers(run, tmp_path, teacher=alone, student=student)]
    assert "teacher accuracy" in FIGURES["class_gain"].of(runs).rows[0]
    for name in ("class_gain", "confusion_pairs", "reliability"):
        assert FIGURES[name].of([run]) is None


def test_of_many_classes_the_largest_changes_are_drawn_and_all_are_in_the_numbers(tmp_path, read):
    fake_run(tmp_path / "a", values=[0.5])
    (run,) = read()
    names = tuple(f"class {number}" for number in range(100))
    rng = np.random.default_rng(1)
    labels = np.arange(2000, dtype=np.int32) % 100
    sure = np.full((2000, 2), 0.5, dtype=np.float32)

    def noisy(share):
        wrong = rng.random(2000) < share
        said = np.where(wrong, rng.integers(0, 100, 2000), labels).astype(np.int32)
        return Answers(labels, np.stack([said, (said + 1) % 100], 1), sure, names)

    runs = [with_answers(run, tmp_path, alone=noisy(0.5), student=noisy(0.3))]
    drawn = FIGURES["class_gain"].of(runs)
    assert len(drawn.rows) == 100
    assert len(drawn.figure.axes[0].get_yticks()) == 20
    assert len(FIGURES["confusion_pairs"].of(runs).rows) == 12


def test_the_calibration_error_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.34, 1.0, 5000).astype(np.float32)
    labels = rng.integers(0, 3, 5000)
    right = rng.random(5000) < confidence - 0.2
    found = calibration([answers(labels, np.where(right, labels, (labels + 1) % 3), confidence)])
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    torch = pytest.importorskip("torch")
    # Probability of the named class against whether it is right, as torchmetrics bins it.
    expected = metrics.binary_calibration_error(
        torch.tensor(confidence.astype(np.float64)), torch.tensor(right.astype(int)), n_bins=15
    )
    assert math.isclose(found.error, float(expected), rel_tol=1e-5)
    assert math.isclose(float(found.share_B.sum()), 1.0)
    perfect = calibration([answers([0, 1, 2], [0, 1, 2], 1.0)])
    assert perfect.error == 0.0


def test_answers_are_read_as_they_were_written_and_damaged_ones_are_refused(tmp_path):
    one = answers([0, 1, 2, 2], [0, 2, 2, 1])
    one.write(tmp_path / "a.npz")
    again = Answers.read(tmp_path / "a.npz")
    assert again.classes == CLASSES
    assert np.array_equal(again.confusion(), [[1, 0, 0], [0, 0, 1], [0, 1, 1]])
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match="zip"):
        Answers.read(tmp_path / "b.npz")
    answers([0, 5], [0, 1]).write(tmp_path / "c.npz")
    with pytest.raises(ValueError, match="class ids"):
        Answers.read(tmp_path / "c.npz")


def test_files_of_a_figure(tmp_path):
    figure, axes = new_figure("column", ratio=0.5)
    axes[0, 0].plot([1, 2], [3, 4])
    drawn = Drawn(figure, [{"run": "a & b_c", "share": 0.123456, "best": None}, {"run": "d"}])
    files = save(drawn, tmp_path / "figure", FORMATS)
    assert [file.suffix for file in files] == [".png", ".pdf", ".svg", ".csv", ".tex"]
    # 3.4 inches at 300 dots.
    assert Image.open(files[0]).size == (1020, 510)
    with files[3].open() as opened:
        assert list(csv.reader(opened))[1] == ["a & b_c", "0.123456", ""]
    assert r"a \& b\_c & 0.1235 &  \\" in files[4].read_text()
    before = [file.read_bytes() for file in files]
    save(drawn, tmp_path / "figure", FORMATS)
    assert [file.read_bytes() for file in files] == before
    assert save(Drawn(figure, []), tmp_path / "bare", ["csv", "tex", "png"])[0].suffix == ".png"
    with pytest.raises(UserError, match="there is no format jpg"):
        save(drawn, tmp_path / "figure", ["jpg"])


def test_every_kind_is_described():
    for name, kind in FIGURES.items():
        assert name == kind.name and name.isidentifier()
        assert kind.title and kind.needs and not kind.needs.endswith(".")
