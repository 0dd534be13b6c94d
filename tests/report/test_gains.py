"""What a table says of a gain: paired where seeds are shared, by Student's t either way."""

import math
import statistics

import pytest

from fastkd.recipes.loading import load_recipe
from fastkd.report.gains import _T95, Gain, alone_of, paired, unpaired, verdict_lines
from fastkd.report.rows import rows_of

stats = pytest.importorskip("scipy.stats")


def test_the_quantiles_are_those_of_students_t():
    found = [round(float(stats.t.ppf(0.975, freedom)), 3) for freedom in range(1, len(_T95) + 1)]
    assert list(_T95) == found


@pytest.mark.parametrize("values", [[0.012, 0.015, 0.009], [0.001, -0.02, 0.03, 0.01]])
def test_a_paired_gain_is_scipys_t_test_of_the_differences(values):
    found = paired(values)
    expected = stats.ttest_1samp(values, 0.0)
    assert found is not None
    assert math.isclose(found.mean / found.error, expected.statistic)
    assert found.shown == (expected.pvalue < 0.05)


def test_an_unpaired_gain_is_welchs():
    ours, others = [0.71, 0.73, 0.74, 0.72], [0.70, 0.66, 0.69]
    found, expected = unpaired(ours, others), stats.ttest_ind(ours, others, equal_var=False)
    assert found is not None
    assert math.isclose(found.mean / found.error, expected.statistic)
    assert math.isclose(found.freedom, expected.df)
    assert (found.runs, found.others) == (4, 3)
    # A group without any spread.
    same = unpaired([0.7, 0.7], [0.6, 0.6])
    assert same is not None and same.shown


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        (Gain(0.012, 0.003, 5, 4), "gain +1.20 points (standard error 0.30, n = 5)"),
        (Gain(0.012, 0.005, 5, 4), "no gain shown: +1.20 points (standard error 0.50, n = 5)"),
        (Gain(-0.05, 0.001, 5, 4), "no gain shown: -5.00 points (standard error 0.10, n = 5)"),
        (
            Gain(0.1, 0.01, 3, 3.5, others=4),
            "gain +10.00 points (standard error 1.00, n = 3 and 4, not paired)",
        ),
    ],
)
def test_words(gain, said):
    assert str(gain) == said


def test_one_run_shows_nothing():
    assert paired([0.5]) is None
    assert unpaired([0.5], [0.4, 0.3]) is None


def runs(seeds, alone_seeds, rates=(0.4,)):
    """Recipes and summaries of a student with its teacher, and of students alone."""
    recipes, found = {}, {}
    for seed in seeds:
        recipes[(f"seed={seed}",)] = load_recipe(
            "quickstart", overrides=[f"seed={seed}", "baseline.lrs="]
        )
        found[(f"seed={seed}",)] = {"accuracy_last": 0.9 + 0.01 * seed, "accuracy_best": 0.95}
    for seed in alone_seeds:
        for rate in rates:
            recipe = load_recipe("quickstart", overrides=[f"seed={seed}", "baseline.lrs="])
            choice = ("recipe=alone", f"optim.lr={rate}", f"seed={seed}")
            recipes[choice] = alone_of(recipe, rate)
            reached = 0.8 + 0.002 * seed**2 + rate / 100
            found[choice] = {"accuracy_last": reached, "accuracy_best": 0.9}
    return recipes, found


def test_runs_of_the_same_seeds_are_paired_and_others_are_not():
    rows = rows_of(*runs(range(3), range(3)))
    differences = [0.1 + 0.01 * seed - 0.002 * seed**2 - 0.004 for seed in range(3)]
    (line,) = verdict_lines(rows)
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(3)
    assert line == (
        f"mean of 3: gain {100 * mean:+.2f} points (standard error {100 * error:.2f}, n = 3)"
    )
    (line,) = verdict_lines(rows_of(*runs(range(3), range(7, 9), rates=(0.1, 0.4))))
    assert line.endswith("n = 3 and 2, not paired)")
    # Alone at its better rate.
    alone = [0.8 + 0.002 * seed**2 + 0.004 for seed in (7, 8)]
    assert f"{100 * (0.91 - statistics.mean(alone)):+.2f} points" in line


def test_a_student_alone_has_no_verdict_of_its_own():
    recipes, found = runs((), range(3))
    assert verdict_lines(rows_of(recipes, found)) == []
