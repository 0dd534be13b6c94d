"""Every number that the papers print belongs to one recipe; the tables are held against themselves.

Printed differences (accuracy drop, distillation gain, accuracy gain) were not transcribed into
published.json: they stand here, copied from the papers by themselves.
"""

from collections import Counter

import pytest

from fastkd.recipes.catalogue import all_recipes
from fastkd.recipes.published import METRICS, cells, papers

# Rows times columns, without the cells that the paper leaves empty or our text has lost.
CELLS = {
    ("moonshine", "2"): 2 + 25 * 6,
    ("moonshine", "3"): 2 + 4 * 4,
    ("moonshine", "4"): 3,
    **{("demystification", f"{table} left"): (5 + 2) * 4 for table in range(1, 7)},
    **{("demystification", f"{table} right"): (4 + 2) * 4 for table in range(1, 7)},
    ("kdda", "1"): 6 * 3,
    ("kdda", "2"): 6 * 3,
    ("kdda", "3"): 10 * 7,
    ("kdda", "4"): 10 * 7,
    ("kdda", "5"): 10 * 2,
    ("kdda", "9"): (2 + 12) * 7,
    ("kdda", "10"): 4 * 7,
    ("meal_v2", "3"): 3 * 2,
    ("meal_v2", "4"): 4 * 2,
    ("meal_v2", "5"): 2 * 2,
    ("meal_v2", "section 6.2"): 2,
    ("meal_v2", "section 6.3"): 5,
    ("meal_v2", "6"): 5 * 4,
    ("alignkd", "1"): 2 * 3,
    ("alignkd", "2"): 2 * 3,
    ("alignkd", "3"): 2,
    ("crd", "1"): 13 * 7,
    ("crd", "2"): 13 * 6,
    ("later", "mdistiller README"): 11,
    ("later", "DIST README"): 6,
    ("later", "logit-standardization README"): 10 * 2,
    ("later", "SimKD README"): 1,
}

# Demystification's last two rows, tables 1 to 6, left then right.
DROPS_AND_GAINS = """
7.33 6.16 2.4 1.06      -1.54 -0.21 1.18 2.26
1.36 1.73 2.14 3.64     2.8 2.73 2.33 0.94
9.43 10.8 11.16 11.46   -0.44 -2.2 -2.28 -2.4
9.59 10.62 11.63 11.7   -2.74 -2.65 -2.12 -0.55
7.12 4.34 3.03 2.15     -4.45 -0.9 1.35 2.22
2.06 3.06 3.85 4.45     1.74 0.73 -0.58 -1.48
7.65 6.1 5.28 3.74      -1.58 -0.71 0.1 0.97
0.83 1.41 1.89 5.12     2.71 2.64 2.33 1.97
8.78 8.04 7.54 5.2      -4.41 -4.5 -1.22 0.45
6.09 6.45 7.22 8.52     0.52 -0.3 -1.48 -4.79
27.29 27.48 27.55 29.49 -14.29 -8.92 -8.35 -5.08
30.05 23.46 21.99 20.68 -4.02 -4.43 -6.88 -9.04
"""

# "Acc. gain" of table 9 of the data augmentation paper.
GAINS = {
    "KD": "0.42 0.52 1.58 1.18 1.42 1.04 2.16",
    "AT": "0.33 0.69 1.15 0.54 2.07 0.66 0.86",
    "CC": "0.66 0.53 1.33 1.31 0.42 1.28 2.07",
    "SP": "0.31 0.08 0.94 0.61 0.38 1.25 1.36",
    "PKT": "0.52 0.61 1.21 1.05 0.85 1.09 2.13",
    "VID": "0.52 0.03 0.84 1.05 1.43 1.21 2.05",
}


def rows(paper, table):
    """Row -> numbers without their deviations."""
    found = papers()[paper]["tables"][table]["rows"]
    return {
        row: [value[0] if isinstance(value, list) else value for value in values]
        for row, values in found.items()
    }


def test_every_cell_has_exactly_one_recipe():
    printed = Counter(cell for paper in papers() for cell in cells(paper))
    covered = Counter(
        cell for entry in all_recipes().values() if entry.row is None for cell in entry.published
    )
    assert covered == printed
    assert Counter((cell.paper, cell.table) for cell in printed) == CELLS


def test_cells_of_one_recipe_agree():
    """The same run in several tables: a cell that went to a wrong recipe shows here."""
    several = 0
    for name, entry in all_recipes().items():
        values = {}
        for cell in entry.published:
            values.setdefault(cell.metric, set()).add(cell.value)
        assert all(len(found) == 1 for found in values.values()), name
        several += len(entry.published) > len(values)
    assert several > 30


def test_what_the_papers_quote_from_crd_is_what_crd_reports():
    recipes, compared = all_recipes(), 0
    for name, entry in recipes.items():
        base = recipes.get(name.removeprefix("kdda/"))
        if base is None or base is entry or not (base.published and entry.published):
            continue
        assert entry.published[0].value == base.published[0].value, name
        compared += 1
    assert compared == 7 + 7 + 1  # KD and CRD+KD of seven pairs, KD of resnet110--resnet20


@pytest.mark.parametrize("number", range(12))
def test_demystification_s_differences_are_those_printed(number):
    table = f"{number // 2 + 1} {('left', 'right')[number % 2]}"
    found = rows("demystification", table)
    base, plain = found.pop("Baseline"), found.pop("NR-baseline")
    best = [max(column) for column in zip(*found.values(), strict=True)]
    differences = [b - p for b, p in zip(base, plain, strict=True)]
    differences += [a - b for a, b in zip(best, base, strict=True)]
    printed = [float(word) for word in DROPS_AND_GAINS.strip().splitlines()[number].split()]
    assert differences == pytest.approx(printed, abs=1e-9)


@pytest.mark.parametrize("loss", GAINS)
def test_the_gains_of_table_9_are_those_printed(loss):
    found = rows("kdda", "9")
    gains = [w - o for w, o in zip(found[f"{loss}+TLCutMix"], found[loss], strict=True)]
    assert gains == pytest.approx([float(word) for word in GAINS[loss].split()], abs=1e-9)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("moonshine/cifar10/wrn_40_2--wrn_40_2-G:4/at", "top-1 error 5.00"),
        ("moonshine/cifar100/wrn_40_2--wrn_40_2-BG:2:M:8/kd", "top-1 error 29.13"),
        ("moonshine/cifar100/wrn_16_1/scratch", "top-1 error 34.00"),
        ("moonshine/imagenet/resnet34--resnet18-0.5/at", "top-1 error 37.20"),
        ("moonshine/cityscapes/erfnet--erfnet-G:N/at", "mean class IoU 68.11"),
        ("demystification/cifar100/wrn_22_2-R-G4--NR-g8/kd", "top-1 accuracy 69.60"),
        ("demystification/cifar100/mobilenetv2-NR-G16/scratch", "top-1 accuracy 57.18"),
        (
            "kdda/cifar100/wrn_40_2--wrn_16_2/tlcutmix-pick@960",
            "top-1 accuracy 76.41 +- 0.10",
        ),
        ("kdda/cifar100/vgg13--mobilenetv2_half/vid+tlcutmix", "top-1 accuracy 69.70 +- 0.22"),
        ("kdda/tiny_imagenet/resnet50--vgg8/crd+tlcutmix-pick@480", "top-1 accuracy 62.60 +- 0.17"),
        ("kdda/imagenet/resnet34--resnet18/tlcutmix-pick@200", "top-1 accuracy 71.76"),
        ("meal_v2/imagenet/senet154+resnet152s--resnet50/224px", "top-1 accuracy 80.67"),
        (
            "meal_v2/imagenet/tf_efficientnet_b4.ns+tf_efficientnet_b4.aa--resnet50/380px",
            "top-1 accuracy 81.72",
        ),
        ("transfer/birdsnap/resnet50-meal_v2/linear", "top-1 accuracy 53.56"),
        ("alignkd/cifar100/resnet18--plain18/alignkd", "top-1 accuracy 76.85"),
        ("alignkd/cifar100/resnet34--plain34/jointrd", "top-1 accuracy 74.89"),
        ("cifar100/resnet32x4--shufflenetv1/nst", "top-1 accuracy 74.12"),
        ("cifar100/resnet56--resnet20/dkd-ls", "top-1 accuracy 72.32"),
    ],
)
def test_a_name_finds_its_number(name, shown):
    assert str(all_recipes()[name].published[0]) == shown


def test_metrics_and_epochs_are_known_ones():
    for paper in papers():
        for cell in cells(paper):
            assert cell.metric in METRICS
            assert cell.epoch in (None, "last", "best")
            assert 0 < cell.value < 100
