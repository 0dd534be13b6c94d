"""The leaderboard: our numbers beside the papers', misses and what was not run included."""

import json
from pathlib import Path

import pytest

from fastkd.errors import UserError
from fastkd.recipes.catalogue import all_recipes
from fastkd.report.benchmark_files import read_benchmark
from fastkd.report.leaderboard import write_leaderboard
from tests.report.fake_runs import fake_run

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ROW = "cifar100/resnet56--resnet20/kd"
SHIPPED = ("quickstart_seeds", "quickstart_seeds_bf16", "cifar10_methods", "precision_cifar10")


def paper_run(folder, seed, reached, *keys):
    epochs = "epochs=240"
    return fake_run(
        folder,
        f"seed={seed}",
        "data.root=.",
        "baseline.lrs=",
        *keys,
        epochs,
        recipe=ROW,
        values=[reached],
    )


def board(tmp_path, *paths):
    out = tmp_path / "out"
    said = []
    files = write_leaderboard([str(path) for path in paths], out, say=said.append)
    assert [file.name for file in files] == ["leaderboard.md", "leaderboard.html"]
    return (out / "leaderboard.md").read_text(), (out / "leaderboard.html").read_text(), said


def line_of(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return line


@pytest.mark.parametrize(
    ("reached", "cells"),
    [
        # The paper prints 70.66.
        ((0.71, 0.72), "| top-1 accuracy 71.50 | 2 | 0.71 | 70.66 ("),
        ((0.70, 0.708), "| top-1 accuracy 70.40 | 2 | 0.57 | 70.66 ("),
        ((0.69, 0.692), "| top-1 accuracy 69.10 | 2 | 0.14 | 70.66 ("),
    ],
)
def test_a_row_of_a_paper(tmp_path, reached, cells):
    for seed, value in enumerate(reached):
        paper_run(tmp_path / f"runs/{seed}", seed, value)
    text, page, _ = board(tmp_path, tmp_path / "runs")
    line = line_of(text, f"| {ROW} |")
    assert cells in line
    mean = 100 * sum(reached) / 2
    assert f"| {mean - 70.66:+.2f} |" in line
    verdict = {71.5: "reached", 70.4: "within the spread", 69.1: "missed"}[round(mean, 2)]
    assert line.endswith(f"| {verdict} |")
    assert f"<td>{verdict}</td>" in page


def test_a_changed_run_is_compared_with_nothing(tmp_path):
    paper_run(tmp_path / "runs/a", 0, 0.8, "batch_size=32")
    text, _, _ = board(tmp_path, tmp_path / "runs")
    assert "No recipe of a paper was run with its keys unchanged." in text
    line = line_of(text, f"| {ROW} |")
    assert "batch_size=32 (there 64)" in line and "70.66" not in line


def test_what_was_not_run_is_counted(tmp_path):
    paper_run(tmp_path / "runs/a", 0, 0.8)
    rows = [one for one in all_recipes().values() if one.published and one.row is None]
    text, _, _ = board(tmp_path, tmp_path / "runs")
    assert (
        f"{len(rows) - 1} of the {len(rows)} recipes that are rows of papers were not run" in text
    )
    pair = line_of(text, "- cifar100/resnet56--resnet20: ")
    assert "at 70.55" in pair and "kd 70.66" not in pair


def test_unfinished_runs_are_not_on_it(tmp_path):
    (paper_run(tmp_path / "runs/a", 0, 0.8) / "summary.json").unlink()
    text, _, _ = board(tmp_path, tmp_path / "runs")
    assert f"| {ROW} |" not in text


def test_gains_of_benchmarks_are_those_that_their_pages_print(tmp_path):
    one = read_benchmark(RESULTS / "quickstart_seeds.json")
    facts = json.loads((RESULTS / "quickstart_seeds.json").read_text())
    distilled = one.groups[-1]
    assert distilled.gain is not None
    assert distilled.gain.mean == pytest.approx(facts["gain"])
    assert distilled.gain.error == pytest.approx(facts["error"])
    methods = {
        group.name: group for group in read_benchmark(RESULTS / "cifar10_methods.json").groups
    }
    # docs/cifar10_methods.md: +6.53 +7.08 +7.36 and +12.94 +14.57 +13.57.
    assert methods["resnet20, KD"].gain.mean == pytest.approx(0.0699, abs=1e-4)
    assert methods["plain18 x0.25, AlignKD"].gain.mean == pytest.approx(0.13693, abs=1e-4)
    assert methods["resnet20, alone"].gain is None
    fp32, bf16 = (
        next(g for g in read_benchmark(RESULTS / "precision_cifar10.json").groups if g.name == name)
        for name in ("resnet8, KD, precision fp32", "resnet8, KD, precision bf16")
    )
    assert fp32.gain.runs == bf16.gain.runs == 3


def test_cycles_are_measured_by_none(tmp_path):
    rows = [
        {"cycle": cycle, "seed": seed, "accuracy": 0.6 - 0.01 * (cycle or 0) + 0.003 * seed}
        for cycle in (None, 3)
        for seed in (0, 1)
    ]
    file = tmp_path / "cycle_cifar10.json"
    file.write_text(json.dumps({"command": "python x", "rows": rows}))
    none, three = read_benchmark(file).groups
    assert (none.name, none.gain) == ("cycle none", None)
    assert three.gain.mean == pytest.approx(-0.03)


def test_files_without_accuracies_are_named(tmp_path):
    times = tmp_path / "times.json"
    times.write_text('{"rows": [{"ms": 3}]}')
    text, _, said = board(tmp_path, times, RESULTS / "quickstart_seeds.json")
    assert "gain +1.35 points (standard error 0.27, n = 10)" in text
    (line,) = said
    assert "times.json has no accuracies by seed" in line
    with pytest.raises(UserError, match="name what was run"):
        board(tmp_path, times)


def test_the_shipped_page_is_that_of_the_shipped_results(tmp_path):
    text, _, _ = board(tmp_path, *(RESULTS / f"{name}.json" for name in SHIPPED))
    shipped = (ROOT / "docs" / "leaderboard.md").read_text()
    # What is not run changes with every recipe that is added.
    assert shipped.partition("## Not run")[0] == text.partition("## Not run")[0]
