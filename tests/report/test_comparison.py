"""The end of a run of a paper's row: the number is in the table, in a note and in summary.json."""

import io
import json
import math

import pytest
import torch

from fastkd.evaluation.chance import Chance, chance_of, class_counts
from fastkd.output.console import Console
from fastkd.output.run_folder import RunFolder
from fastkd.recipes.loading import load_recipe
from fastkd.report.class_iou import class_lines, with_class_names
from fastkd.report.comparison import failure, finish_report
from fastkd.report.paper import paper_row
from fastkd.report.plots import plot_curves

ROW = "kdda/cifar100/resnet56--resnet20/kd"
RUN = {
    "accuracy_last": 0.7031,
    "accuracy_best": 0.7062,
    "history": [{"epoch": 1, "val_accuracy": 0.7031, "train_loss": 1.5}],
}
SUMMARY = RUN | {
    "teacher": {"name": "resnet56", "accuracy": 0.7234},
    "alone": RUN | {"lr": 0.05, "accuracy_last": 0.6906},
    "alone_tried": [{"lr": 0.05, "accuracy_last": 0.6906}],
}


@pytest.fixture
def finish(tmp_path):
    """finish(recipe's name, overrides) -> what the console said, what summary.json holds."""

    def run(name, *overrides):
        folder = RunFolder.create(tmp_path, "run", "0" * 16)
        screen, summary = io.StringIO(), dict(SUMMARY)
        recipe = load_recipe(name, overrides=overrides)
        summary["lr"] = recipe.optim.lr
        finish_report(
            summary,
            folder,
            Console(file=screen),
            teachers=[one.label for one in recipe.teachers().values()],
            block=recipe.student.block,
            paper=paper_row(recipe.name, recipe.dotted(), summary),
        )
        saved = json.loads((folder.path / "summary.json").read_text())
        assert summary.get("paper") == saved.get("paper")
        assert (folder.path / "curves.png").read_bytes()[:4] == b"\x89PNG"
        return screen.getvalue().splitlines(), saved

    return run


def line_of(lines, start):
    (found,) = [line for line in lines if line.startswith(start)]
    return found


def test_networks_are_named_with_their_blocks(finish):
    lines, _ = finish(ROW, "data.root=x", "student.block=G:4", "teacher.block=B:2")
    assert line_of(lines, "student distilled G(4) ").split()[3] == "70.31%"
    assert line_of(lines, "teacher resnet56 B(2) ").split()[3] == "72.34%"


def test_the_papers_number_stands_beside_ours(finish):
    lines, saved = finish(ROW, "data.root=x")
    assert line_of(lines, "student distilled").split()[2:4] == ["70.31%", "70.62%"]
    assert line_of(lines, "student alone").split()[2] == "69.06%"
    assert line_of(lines, "teacher resnet56").split()[2] == "72.34%"
    table_row = line_of(lines, "paper, Table 1").split()
    assert table_row == ["paper,", "Table", "1", "70.66%", "+-", "0.24"]
    note = line_of(lines, "the paper's top-1 accuracy 70.66 +- 0.24 (Table 1); here 70.31 in the ")
    assert ", -0.35 points; " in note
    assert saved["paper"].pop("ours") == pytest.approx(70.31)
    assert saved["paper"] == {
        "metric": "top1",
        "value": 70.66,
        "std": 0.24,
        "place": "Table 1",
        "changed": [],
    }
    assert saved["accuracy_last"] == 0.7031


def test_a_run_with_other_keys_has_the_note_and_no_row(finish):
    lines, saved = finish(ROW, "data.root=x", "epochs=30")
    assert not [line for line in lines if line.startswith("paper,")]
    note = line_of(lines, "not comparable with the paper's top-1 accuracy 70.66 +- 0.24 (Table 1)")
    assert note.endswith(": epochs=30 (there 240)")
    assert saved["paper"]["changed"] == ["epochs=30 (there 240)"]
    assert "ours" not in saved["paper"]


def test_a_run_of_no_paper_says_nothing_of_one(finish):
    lines, saved = finish("quickstart")
    assert not [line for line in lines if line.startswith(("paper", "the paper", "not compar"))]
    assert "paper" not in saved
    assert line_of(lines, "student distilled").split()[2] == "70.31%"


CHANCE = Chance(accuracy=0.25, floor=0.3, loss=math.log(4))


@pytest.mark.parametrize(
    ("accuracy", "loss", "said"),
    [
        (0.31, 1.3, ""),
        (0.31, 9.0, ""),  # overconfident
        (
            0.30,
            1.4,
            "student: at chance, 30.00% where always naming the commonest class gives 25.00",
        ),
        (0.05, 1.4, "student: at chance, 5.00% where"),
        (
            0.9,
            14.0,
            "student: diverged, the validation loss is 14 and that of guessing 1.386. Lower",
        ),
        (0.25, 1.6e21, "student: diverged, the validation loss is 1.6e+21 and"),
        (0.25, math.nan, "student: diverged, the validation loss is nan and"),
        (0.2, None, "student: at chance"),
    ],
)
def test_a_student_that_has_learned_nothing_is_said(accuracy, loss, said):
    summary = {"accuracy_last": accuracy, "lr": 0.4, "history": [{"val_loss": loss}]}
    found = failure("student", summary, CHANCE)
    assert found.startswith(said) and bool(found) == bool(said)
    assert not found or found.endswith("optim.lr=0.04")


@pytest.mark.parametrize(
    ("labels", "classes", "accuracy", "floor"),
    [
        ([0, 1, 2, 3] * 25, 4, 0.25, 0.25 + 2 * math.sqrt(0.25 * 0.75 / 100)),
        ([0] * 54 + [1] * 10, 2, 54 / 64, 54 / 64 + 2 * math.sqrt(54 * 10 / 64**3)),
        ([0] * 5 + [1] * 4 + [-1, -1], 3, 5 / 9, 5 / 9 + 2 * math.sqrt(5 * 4 / 9**3)),
        # All right, or nothing can be told.
        ([0] * 9 + [1], 2, 0.9, 0.9),
        ([2] * 4, 3, 1.0, 0.75),
        ([-100, -100], 5, 0.2, 0.0),
    ],
)
def test_chance_is_the_commonest_class(labels, classes, accuracy, floor):
    found = chance_of(class_counts(torch.tensor(labels), classes))
    assert found == Chance(pytest.approx(accuracy), pytest.approx(floor), math.log(classes))
    assert found.beaten_by(1.0)
    known = [label for label in labels if label >= 0]
    assert not any(found.beaten_by(known.count(c) / len(known)) for c in set(known) - {2})


def test_chance_of_several_labels_is_what_the_evaluation_says():
    counts_C = class_counts(torch.tensor([[1, 0, -1], [0, 1, 1]]), 3)
    found = chance_of(counts_C, {"map": 0.4, "chance": 0.36, "samples": 100})
    assert (found.accuracy, found.floor) == (0.36, pytest.approx(0.36 + 2 * 0.048))


def test_both_students_are_judged(tmp_path):
    screen = io.StringIO()
    row = {"epoch": 1, "val_accuracy": 0.2, "val_loss": 1e9, "train_loss": 6967.0}
    run = {"accuracy_last": 0.2, "accuracy_best": 0.2, "lr": 0.4, "history": [row]}
    summary = run | {"teacher": None, "alone": run, "alone_tried": [{"lr": 0.4}]}
    folder = RunFolder.create(tmp_path, "run", "0" * 16)
    finish_report(summary, folder, Console(file=screen), chance=CHANCE)
    said = screen.getvalue()
    assert "\nstudent alone: diverged, the validation loss is 1e+09 and" in said
    assert "\nstudent: diverged, " in said
    assert "diverged; lr 0.4, best of 1" in said
    assert summary["verdict"] == summary["alone"]["verdict"] == "diverged"
    saved = json.loads((folder.path / "summary.json").read_text())
    assert saved["verdict"] == "diverged"


IOU = {"sky": 0.9, "road": 0.81234, "pole": None}


def dense_run(miou, **more):
    row = {"epoch": 1, "val_miou": miou, "val_pixel_accuracy": 0.8, "train_loss": 1.0}
    row |= {"val_loss": 1.1}
    scores = {"class_iou_best": IOU, "class_iou_last": IOU}
    return {"miou_last": miou, "miou_best": miou, "lr": 0.1, "history": [row], **scores, **more}


def test_a_run_on_labelled_pixels_is_told_by_its_miou(tmp_path):
    screen = io.StringIO()
    summary = dense_run(
        0.61,
        teacher={"name": "erfnet", "miou": 0.72, "class_iou": {"sky": 1.0, "road": 0.5, "pole": 0}},
        alone=dense_run(0.03, class_iou_best={"sky": 0.1, "road": 0.2, "pole": None}),
        alone_tried=[{"lr": 0.1, "miou_last": 0.03}],
    )
    folder = RunFolder.create(tmp_path, "run", "0" * 16)
    chance = Chance(accuracy=0.04, floor=0.04, loss=math.log(3))
    finish_report(summary, folder, Console(file=screen), teachers=["erfnet"], chance=chance)
    lines = screen.getvalue().splitlines()
    assert lines[0].split() == ["mIoU", "gain"] or lines[0].split() == ["mIoU", "images"]
    assert line_of(lines, "teacher erfnet").split()[2] == "72.00%"
    assert line_of(lines, "student alone ").split()[2:5] == ["3.00%", "3.00%", "at"]
    assert line_of(lines, "student distilled").split()[2] == "61.00%"
    assert line_of(lines, "IoU by class").split()[3:] == ["alone", "teacher", "distilled"]
    assert line_of(lines, "sky ").split()[1:] == ["10.00%", "100.00%", "90.00%"]
    assert line_of(lines, "pole ").split()[1:] == ["-", "0.00%", "-"]
    said = line_of(lines, "student alone: at chance, 3.00% where an answer that ignores the image")
    assert said.endswith(
        "gives 4.00%. Give it more epochs or another learning rate, such as optim.lr=0.01"
    )
    saved = json.loads((folder.path / "summary.json").read_text())
    assert saved["class_iou_best"] == IOU
    assert "verdict" not in saved


def test_scores_get_the_names_of_their_classes():
    found = {"class_iou_best": {"0": 0.5, "1": None}, "miou_best": 0.5}
    assert with_class_names(found, ("a", "b"))["class_iou_best"] == {"a": 0.5, "b": None}
    assert with_class_names(found) == found
    assert with_class_names({"accuracy_best": 1.0}, ("a",)) == {"accuracy_best": 1.0}
    assert class_lines({"accuracy_best": 1.0, "teacher": None, "alone": None}) == []
    many = {str(number): 0.5 for number in range(150)}
    (said,) = class_lines({"class_iou_best": many, "teacher": None, "alone": None})
    assert "150 classes: in summary.json" in said


@pytest.mark.parametrize(
    ("metric", "printed"), [("accuracy", "accuracy"), ("map", "mAP"), ("miou", "mIoU")]
)
def test_the_curves_are_of_the_headline_metric(tmp_path, metric, printed, monkeypatch):
    from matplotlib.axes import Axes

    titles = []
    plain = Axes.set
    monkeypatch.setattr(
        Axes, "set", lambda axes, **given: titles.append(given) or plain(axes, **given)
    )
    rows = [{"epoch": 1, f"val_{metric}": 0.5, "train_loss": 1.0}]
    plot_curves(tmp_path / "c.png", {"student": rows}, teachers={"teacher": 0.7})
    assert titles[0] == {"title": f"Validation {printed}", "xlabel": "epoch", "ylabel": printed}
