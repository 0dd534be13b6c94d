"""The end of a run of a paper's row: the number is in the table, in a note and in summary.json."""

import io
import json

import pytest

from fastkd.output.console import Console
from fastkd.output.run_folder import RunFolder
from fastkd.recipes.loading import load_recipe
from fastkd.report.comparison import finish_report
from fastkd.report.paper import paper_row

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
