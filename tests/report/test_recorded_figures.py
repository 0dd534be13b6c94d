"""Figures of recordings: their numbers are those of record/, and without it there is no figure."""

import json
import math

import numpy as np
import pytest

from fastkd.report.collecting import collect
from fastkd.report.figures import FIGURES
from fastkd.report.figures.figure import log_axis, new_figure, save
from fastkd.report.runs_read import read_runs
from tests.report.fake_runs import fake_run

RECORDED = (
    "kl_ratio",
    "mix_samples",
    "weight_histograms",
    "weight_percentiles",
    "tsne",
    "alignment",
    "step_time",
)
PLACES = {"first": "conv1", "middle": "layer2.0.conv2", "last": "layer3.0.conv2"}


@pytest.fixture
def read(tmp_path):
    """The runs below a folder, named and with their baselines."""
    return lambda: collect(read_runs([tmp_path])).runs


def record(run, name, rows):
    (run / "record").mkdir(exist_ok=True)
    file = run / f"record/{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def drawn_and_saved(name, runs, folder):
    """The figure, whose picture can be written."""
    drawn = FIGURES[name].of(runs)
    assert drawn is not None
    files = save(drawn, folder / name, ["png", "csv", "tex"])
    assert all(file.stat().st_size > 20 for file in files)
    return drawn


@pytest.mark.parametrize("name", RECORDED)
def test_nothing_recorded_is_no_figure(name, tmp_path, read):
    fake_run(tmp_path / "a", values=[0.5, 0.6], alone=0.4)
    assert FIGURES[name].of(read()) is None


def test_kl_by_epoch_with_both_means(tmp_path, read):
    run = fake_run(tmp_path / "a", "seed=0", values=[0.5, 0.6])
    fake_run(tmp_path / "b", "seed=1", values=[0.5, 0.6])
    rows = [
        {"epoch": 1, "kl_all": 2.0, "kl_hardest": 3.0, "ratio": 1.5},
        {"epoch": 2, "kl_all": 1.0, "kl_hardest": 1.8, "ratio": 1.8},
    ]
    record(run, "kl", rows)
    drawn = drawn_and_saved("kl_ratio", read(), tmp_path)
    assert [(row["epoch"], row["done"], row["ratio"]) for row in drawn.rows] == [
        (1, 0.5, 1.5),
        (2, 1.0, 1.8),
    ]
    assert [(row["kl_all"], row["kl_hardest"]) for row in drawn.rows] == [(2.0, 3.0), (1.0, 1.8)]


def test_the_ratio_of_a_pick_is_that_of_the_whole_epoch(tmp_path, read):
    keys = (
        "augment.xprime=cutmix",
        "losses.kd.views=x,xprime",
        "augment.pick.criterion=kl",
        "augment.pick.share=0.5",
    )
    run = fake_run(tmp_path / "a", *keys, values=[0.5, 0.6], pick_ratio=[1.2, math.nan])
    rows = (run / "metrics.jsonl").read_text().replace("NaN", "null")
    (run / "metrics.jsonl").write_text(rows)
    drawn = drawn_and_saved("kl_ratio", read(), tmp_path)
    assert [(row["epoch"], row["ratio"]) for row in drawn.rows] == [(1, 1.2)]


def weights(epoch, counts=None):
    counts = [10] * 100 if counts is None else counts
    layer = {"low": -0.5, "high": 0.5, "counts": counts}
    percentiles = {str(p): (p - 50) / 100 + 0.01 * epoch for p in (10, 25, 50, 75, 90)}
    return {"epoch": epoch} | {
        place: {"layer": path, **layer, "percentiles": percentiles}
        for place, path in PLACES.items()
    }


def test_histograms_are_of_the_last_epoch_and_before_the_training(tmp_path, read):
    run = fake_run(tmp_path / "a", values=[0.5, 0.6])
    last = [0] * 100
    last[0], last[99] = 900, 300
    record(run, "weights", [weights(0), weights(1), weights(2, counts=last)])
    drawn = drawn_and_saved("weight_histograms", read(), tmp_path)
    assert {(row["run"], row["epoch"]) for row in drawn.rows} == {
        ("before training", 0),
        ("student distilled", 2),
    }
    own = [r for r in drawn.rows if (r["epoch"], r["layer"]) == (2, "conv1")]
    # 1200 weights fill 20 bins.
    assert len(own) == 20 and (own[0]["from"], own[-1]["to"]) == (-0.5, 0.5)
    assert [row["share"] for row in own if row["share"]] == [0.75, 0.25]
    assert sum(row["share"] for row in drawn.rows) == pytest.approx(6)


def test_percentiles_by_epoch(tmp_path, read):
    for seed in (0, 1):
        run = fake_run(tmp_path / f"r{seed}", f"seed={seed}", values=[0.5, 0.6])
        record(run, "weights", [weights(epoch) for epoch in range(3)])
    drawn = drawn_and_saved("weight_percentiles", read(), tmp_path)
    assert len(drawn.rows) == 2 * 3 * 3 * 5
    (one,) = (
        row["weight"]
        for row in drawn.rows
        if (row["layer"], row["percent"], row["epoch"]) == ("layer3.0.conv2", 90, 2)
        and row["run"] == drawn.rows[0]["run"]
    )
    assert one == pytest.approx(0.42)


def test_layers_without_a_finite_weight_are_passed_over(tmp_path, read):
    run = fake_run(tmp_path / "a", values=[0.5])
    nothing = {"low": None, "high": None, "counts": [], "percentiles": {}}
    row = {"epoch": 1} | {place: {"layer": path} | nothing for place, path in PLACES.items()}
    record(run, "weights", [weights(0), row])
    drawn = drawn_and_saved("weight_histograms", read(), tmp_path)
    assert {row["run"] for row in drawn.rows} == {"before training"}
    values = [row["weight"] for row in drawn_and_saved("weight_percentiles", read(), tmp_path).rows]
    assert values.count(None) == 15


def samples(count=6, classes=5):
    shares = np.linspace(0.5, 0.1, classes).astype(np.float32)
    answers = {"images_SHWC": np.zeros((count, 16, 16, 3), np.uint8)}
    for name in ("target", "teacher", "student"):
        answers[f"{name}_classes_SK"] = np.tile(np.arange(classes), (count, 1))
        answers[f"{name}_shares_SK"] = np.tile(shares, (count, 1))
    answers["target_shares_SK"][:, 2:] = 0
    return answers | {"disagreement": np.array(0.25), "counted": np.array(40)}


@pytest.mark.parametrize(("count", "classes"), [(6, 5), (1, 2)])
def test_samples_with_what_the_networks_see(tmp_path, read, count, classes):
    run = fake_run(tmp_path / "a", values=[0.5])
    names = ["a class with a very long name, longer than the panel", "b$_$", "c", "d", "e"]
    (run / "facts.json").write_text(json.dumps({"data": {"classes": names}}))
    (run / "record").mkdir()
    np.savez(run / "record/samples-epoch0001.npz", **samples(count, classes))
    drawn = drawn_and_saved("mix_samples", read(), tmp_path)
    shown = min(count, 4)
    assert len(drawn.rows) == shown * (2 + 2 * classes)
    first = [row for row in drawn.rows if (row["sample"], row["answer"]) == (1, "teacher")]
    assert [row["class"] for row in first] == names[:classes]
    assert first[0]["share"] == pytest.approx(0.5)
    assert "25% of 40 images" in drawn.figure.get_suptitle()


def test_the_distance_of_stages(tmp_path, read):
    run = fake_run(tmp_path / "a", values=[0.5, 0.6])
    rows = [
        {"epoch": epoch, "mse": {"stage1": 2 / epoch}, "relative": {"stage1": 0.5 / epoch}}
        for epoch in (1, 2)
    ]
    record(run, "alignment", rows)
    drawn = drawn_and_saved("alignment", read(), tmp_path)
    distances = [(r["epoch"], r["mse"], r["relative"]) for r in drawn.rows if "stage" in r]
    assert distances == [(1, 2.0, 0.5), (2, 1.0, 0.25)]
    accuracies = [(r["epoch"], r["accuracy"]) for r in drawn.rows if "accuracy" in r]
    assert accuracies == [(1, 0.5), (2, 0.6)]


def test_eta_is_that_of_the_loss(tmp_path, read):
    fake_run(
        tmp_path / "a", "losses={stage_mse: {weight: 1, pairs: {stage1: stage1}}}", values=[0.5] * 6
    )
    drawn = FIGURES["eta_schedule"].of(read())
    if drawn is None:
        pytest.fail("stage_mse has a schedule")
    assert [row["epoch"] for row in drawn.rows] == [1, 2, 3, 4, 5, 6]


def test_step_time_is_the_median_without_the_first_epoch(tmp_path, read):
    run = fake_run(tmp_path / "a", values=[0.5] * 4)
    times = [(90.0, 60.0), (1.0, 6.0), (2.0, 8.0), (4.0, 5.0)]
    record(
        run,
        "time",
        [
            {"epoch": epoch, "steps": 4, "data_ms": data, "backward_ms": backward}
            for epoch, (data, backward) in enumerate(times, start=1)
        ],
    )
    drawn = drawn_and_saved("step_time", read(), tmp_path)
    assert [(row["part"], row["ms_per_step"], row["share"]) for row in drawn.rows] == [
        ("data", 2.0, 0.25),
        ("backward", 6.0, 0.75),
    ]


def test_step_time_keeps_the_order_of_a_step_where_one_run_lacks_a_part(tmp_path, read):
    for name, pick in (("a", {}), ("b", {"pick_ms": 3.0})):
        run = fake_run(tmp_path / name, values=[0.5])
        record(run, "time", [{"epoch": 1, "teacher_ms": 1.0, **pick, "backward_ms": 2.0}])
    drawn = drawn_and_saved("step_time", read(), tmp_path)
    (legend,) = drawn.figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["teacher", "pick", "backward"]


def layers(path, names=("student", "alone", "teacher"), each=12):
    rng = np.random.default_rng(0)
    labels = np.repeat([7, 2, 4], each)
    arrays = {"labels_N": labels, "classes_K": np.array([7, 2, 4])}
    for name in names:
        # Three clouds far apart.
        inputs = rng.normal(size=(3 * each, 5)) + 40 * np.repeat(np.eye(3, 5), each, axis=0)
        arrays |= {f"{name}_ND": inputs.astype(np.float16), f"{name}_accuracy": np.array(0.5)}
    np.savez(path, **arrays)
    return path


def with_layers(runs, file):
    from dataclasses import replace

    return [replace(run, last_layers=file) for run in runs]


def test_the_t_sne_keeps_clouds_apart(tmp_path, read):
    fake_run(tmp_path / "a", values=[0.5])
    runs = with_layers(read(), layers(tmp_path / "layers.npz"))
    drawn = drawn_and_saved("tsne", runs, tmp_path)
    assert len(drawn.rows) == 3 * 36
    assert {row["network"] for row in drawn.rows} == {
        "teacher",
        "student alone",
        "student distilled",
    }
    student = [row for row in drawn.rows if row["network"] == "student distilled"]
    places = {
        name: np.array([(r["x"], r["y"]) for r in student if r["class"] == name])
        for name in ("class 7", "class 2", "class 4")
    }
    centres = {name: own.mean(0) for name, own in places.items()}
    for name, own in places.items():
        nearest = [min(centres, key=lambda one: np.hypot(*(centres[one] - at))) for at in own]
        assert nearest == [name] * 12


def test_the_t_sne_of_a_student_without_teacher_and_of_few_images(tmp_path, read):
    keys = ("teacher=null", "losses={ce: {weight: 1}}")
    fake_run(tmp_path / "a", *keys, values=[0.5])
    runs = with_layers(read(), layers(tmp_path / "l.npz", names=("student",), each=1))
    drawn = drawn_and_saved("tsne", runs, tmp_path)
    assert [row["network"] for row in drawn.rows] == ["student"] * 3


def test_runs_with_classes_of_their_own_have_legends_of_their_own(tmp_path, read):
    from dataclasses import replace

    for seed in (0, 1):
        fake_run(tmp_path / f"r{seed}", f"seed={seed}", values=[0.5])
    first, second = with_layers(read(), layers(tmp_path / "l.npz", names=("student",)))
    with np.load(first.last_layers) as file:
        arrays = dict(file)
    arrays |= {"labels_N": arrays["labels_N"] + 1, "classes_K": arrays["classes_K"] + 1}
    np.savez(tmp_path / "other.npz", **arrays)
    runs = [first, replace(second, last_layers=tmp_path / "other.npz")]
    drawn = drawn_and_saved("tsne", runs, tmp_path)
    said = [
        [text.get_text() for text in axes.get_legend().get_texts()] for axes in drawn.figure.axes
    ]
    assert said == [["class 7", "class 2", "class 4"], ["class 8", "class 3", "class 5"]]


@pytest.mark.parametrize(
    ("values", "scale"), [([1.0, 1.2], "linear"), ([2.0, 30.0], "log"), ([0.0, 3.0], "linear")]
)
def test_a_log_axis_always_has_labels(values, scale):
    figure, axes = new_figure("column")
    panel = axes[0, 0]
    panel.plot(values)
    log_axis(panel)
    figure.canvas.draw()
    low, high = panel.get_ylim()
    ticks = [*panel.yaxis.get_major_ticks(), *panel.yaxis.get_minor_ticks()]
    shown = [t.label1.get_text() for t in ticks if low <= t.get_loc() <= high]
    assert panel.get_yscale() == scale
    assert any(shown) and not any("10^" in text for text in shown)


def test_a_damaged_file_of_last_layers_is_left_out(tmp_path, read):
    fake_run(tmp_path / "a", values=[0.5])
    (tmp_path / "layers.npz").write_bytes(b"PK not a zip")
    with pytest.warns(UserWarning, match=r"layers\.npz is damaged"):
        assert FIGURES["tsne"].of(with_layers(read(), tmp_path / "layers.npz")) is None
