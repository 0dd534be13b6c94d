"""Images with several labels: mAP over all samples once, and a training on a source of one's own.

The truth of mAP is scikit-learn's average precision, class by class.
"""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World
from fastkd.data.batch import Batch
from fastkd.errors import UserError
from fastkd.evaluation.evaluate import evaluate
from fastkd.evaluation.headline import headline
from fastkd.losses import AT, KD, BinaryCrossEntropy, CrossEntropy
from fastkd.output.table import comparison_table
from fastkd.training.config import OptimConfig

CPU = torch.device("cpu")
FP32 = Precision("fp32", "cpu")
ALONE = World(0, 0, 1, CPU, None)


class Scores:
    """A loader whose images are the scores themselves."""

    def __init__(self, scores_NC, targets_NC, batch_size):
        self.parts = zip(scores_NC.split(batch_size), targets_NC.split(batch_size), strict=True)
        self.batches = [
            Batch(scores[:, :, None, None], targets, torch.zeros(len(targets)).long())
            for scores, targets in self.parts
        ]

    def epoch(self, epoch, start_step=0):
        return iter(self.batches)


def read(images_NCHW):
    return images_NCHW[:, :, 0, 0]


def sklearn_map(scores_NC, targets_NC):
    """By class, over the known labels, of classes with a positive."""
    found = []
    for scores, targets in zip(scores_NC.T.numpy(), targets_NC.T.numpy(), strict=True):
        known = targets != -1
        if (targets == 1).any():
            found.append(average_precision_score(targets[known], scores[known]))
    return np.mean(found)


def example(num, classes, unknown=0.0, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    scores_NC = scale * torch.randn(num, classes, generator=generator)
    targets_NC = (torch.rand(num, classes, generator=generator) < 0.3).float()
    targets_NC[torch.rand(num, classes, generator=generator) < unknown] = -1
    return scores_NC, targets_NC


@pytest.mark.parametrize(("num", "classes", "batch_size"), [(41, 20, 8), (7, 1, 3), (30, 3, 30)])
@pytest.mark.parametrize("unknown", [0.0, 0.25])
def test_map_is_that_of_scikit_learn(num, classes, batch_size, unknown):
    scores, targets = example(num, classes, unknown)
    found = evaluate(read, Scores(scores, targets, batch_size), FP32, ALONE, "multi")
    assert found["map"] == pytest.approx(sklearn_map(scores, targets), rel=1e-6)
    assert found["samples"] == num
    known = targets != -1
    bce = nn.BCEWithLogitsLoss()(scores[known].double(), targets[known].double())
    assert found["loss"] == pytest.approx(bce.item(), rel=1e-6)
    assert headline(found) == "map"


def test_only_the_order_counts_also_of_logits_whose_sigmoid_is_1():
    scores, targets = example(60, 4)
    usual = evaluate(read, Scores(scores, targets, 60), FP32, ALONE, "multi")["map"]
    for large in (scores * 3 + 40, scores.double().exp().float() * 1e4):
        assert torch.equal(large.argsort(0), scores.argsort(0))
        assert evaluate(read, Scores(large, targets, 60), FP32, ALONE, "multi")["map"] == usual
    within = torch.sigmoid(scores)
    assert evaluate(read, Scores(within, targets, 60), FP32, ALONE, "multi")["map"] == usual


def test_equal_scores_and_classes_without_a_positive():
    scores, targets = example(50, 5)
    scores = scores.round()
    targets[:, 2] = 0
    found = evaluate(read, Scores(scores, targets, 9), FP32, ALONE, "multi")
    assert found["map"] == pytest.approx(sklearn_map(scores, targets), rel=1e-6)
    nothing = torch.zeros(50, 5)
    found = evaluate(read, Scores(nothing, targets, 9), FP32, ALONE, "multi")
    assert found["map"] == pytest.approx(found["chance"])


def test_labels_that_map_does_not_know_are_refused():
    scores, targets = example(6, 2)
    targets[3, 1] = 0.5
    with pytest.raises(UserError, match=r"0, 1 and -1 .*such as 0\.5"):
        evaluate(read, Scores(scores, targets, 6), FP32, ALONE, "multi")
    with pytest.raises(UserError, match="the validation images have none"):
        evaluate(read, Scores(scores, torch.zeros(6, 2), 6), FP32, ALONE, "multi")


SHAPES = 5


def shapes_set(num, seed):
    """Images [num, 3, 16, 16] with patches of up to five colours, and which colours they are."""
    generator = torch.Generator().manual_seed(seed)
    there_NC = (torch.rand(num, SHAPES, generator=generator) < 0.35).float()
    images = 0.3 * torch.randn(num, 3, 16, 16, generator=generator)
    colours = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [2, 2, 0], [0, 2, 2]])
    for sample in range(num):
        for kind in there_NC[sample].nonzero()[:, 0].tolist():
            top, left = torch.randint(0, 12, (2,), generator=generator).tolist()
            images[sample, :, top : top + 5, left : left + 5] = colours[kind][:, None, None]
    return TensorDataset(images, there_NC)


def loaders(batch_size=32, difficult=False):
    train, val = shapes_set(256, 1), shapes_set(101, 2)
    if difficult:
        for part in (train, val):
            labels = part.tensors[1]
            generator = torch.Generator().manual_seed(3)
            labels[torch.rand(labels.shape, generator=generator) < 0.1] = -1
    return DataLoader(train, batch_size, shuffle=True), DataLoader(val, batch_size)


def scores_of(student, loader):
    with torch.no_grad():
        return (
            torch.cat([student.eval()(images) for images, _ in loader]),
            torch.cat([labels for _, labels in loader]),
        )


QUICK = {"precision": "fp32", "compile": "off", "quiet": True}
OPTIM = OptimConfig(lr=0.1, schedule="cosine", weight_decay=1e-4)


@pytest.mark.parametrize("difficult", [False, True])
def test_a_training_on_several_labels(tmp_path, difficult):
    train, val = loaders(difficult=difficult)
    student = fastkd.create_model("resnet8", SHAPES, width=0.5)
    before = sklearn_map(*scores_of(student, val))
    result = fastkd.distill(
        student,
        None,
        train,
        val,
        epochs=8,
        losses=[BinaryCrossEntropy()],
        optim=OPTIM,
        out=tmp_path / "run",
        **QUICK,
    )
    found = result.metrics
    assert found["map_last"] == pytest.approx(sklearn_map(*scores_of(result.student, val)), 1e-6)
    assert found["map_last"] > before + 0.25
    rows = found["history"]
    assert rows[-1]["train_bce"] < 0.8 * rows[0]["train_bce"]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    assert not any("accuracy" in key or "top5" in key for row in rows for key in row)
    assert found["map_best"] == max(row["val_map"] for row in rows)

    # The best epoch lies on the disk under its own metric, and loads by its metadata.
    from fastkd.models.registry import model_from_file
    from fastkd.storage.weights import load_weights

    best = model_from_file(tmp_path / "run")
    assert sklearn_map(*scores_of(best, val)) == pytest.approx(found["map_best"], rel=1e-6)
    facts = load_weights(tmp_path / "run")[1]
    assert float(facts["map"]) == pytest.approx(found["map_best"], abs=1e-6)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    def run(epochs, out, resume=False):
        torch.manual_seed(4)
        student = fastkd.create_model("resnet8", SHAPES, width=0.5)
        train, val = loaders()
        return fastkd.distill(
            student,
            None,
            train,
            val,
            epochs=epochs,
            losses=[BinaryCrossEntropy()],
            optim=OPTIM,
            out=out,
            resume=resume,
            **QUICK,
        )

    whole = run(2, tmp_path / "whole")
    from fastkd.training.trainer import Trainer

    original = Trainer.end_epoch

    def stop_after_the_first(self):
        original(self)
        if self.progress.epoch == 1:
            raise RuntimeError("pulled the plug")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "end_epoch", stop_after_the_first)
        with pytest.raises(RuntimeError, match="plug"):
            run(2, tmp_path / "broken")
    again = run(2, tmp_path / "broken", resume=True)
    for one, other in zip(
        whole.student.state_dict().values(), again.student.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)
    assert whole.metrics["map_best"] == again.metrics["map_best"]


def test_a_teacher_helps_on_several_labels():
    """Feature losses go with bce; a logit loss without its cross entropy does, too."""
    train, val = loaders()
    teacher = fastkd.create_model("resnet8", SHAPES)
    student = fastkd.create_model("resnet8", SHAPES, width=0.5)
    losses = [
        BinaryCrossEntropy(),
        AT({"stage2": "stage2"}, weight=10.0),
        KD(ce_weight=0, weight=0.1),
    ]
    result = fastkd.distill(
        student, teacher, train, val, epochs=1, losses=losses, optim=OPTIM, **QUICK
    )
    (row,) = result.metrics["history"]
    assert row["train_at"] > 0 and row["train_kd"] > 0 and 0 < row["val_map"] < 1


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([CrossEntropy()], r"the loss ce needs one class id per image, \[N\], the data has labels"),
        ([KD(), BinaryCrossEntropy()], "the loss kd needs one class id .* KD with ce_weight=0"),
    ],
)
def test_losses_on_class_ids_are_refused(losses, said):
    train, val = loaders()
    student = fastkd.create_model("resnet8", SHAPES)
    teacher = fastkd.create_model("resnet8", SHAPES)
    with pytest.raises(UserError, match=said):
        fastkd.distill(student, teacher, train, val, epochs=1, losses=losses, **QUICK)


def test_labels_that_do_not_fit_are_refused():
    train, val = loaders()
    losses = [BinaryCrossEntropy()]
    student = fastkd.create_model("resnet8", 7)
    with pytest.raises(UserError, match=r"labels are \[N, 5\].*gives 7 logits.*num_classes=5"):
        fastkd.distill(student, None, train, val, epochs=1, losses=losses, **QUICK)
    student = fastkd.create_model("resnet8", SHAPES)
    ids = DataLoader(TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8) % 5), 4)
    with pytest.raises(UserError, match=r"gives labels \[N\], one class id per image, another one"):
        fastkd.distill(student, None, ids, val, epochs=1, losses=losses, **QUICK)
    # Of images of one class it makes rows of its own.
    assert fastkd.distill(student, None, ids, ids, epochs=1, losses=losses, **QUICK)


def test_labels_of_no_known_kind_are_named():
    """Not an unknown one, which may stand before them."""
    scores, targets = example(6, 3)
    targets[0, 0], targets[5, 2] = -1, 0.5
    with pytest.raises(UserError, match=r"hold others, such as 0\.5$"):
        evaluate(read, Scores(scores, targets, 3), FP32, ALONE, "multi")


class Annotated(TensorDataset):
    """Calls the files of its annotations targets, as torchvision's VOC data sets do."""

    targets = ("000005.xml", "000007.xml")


def test_what_a_data_set_calls_targets_is_its_own_affair():
    images, labels = torch.randn(8, 3, 16, 16), torch.ones(8, SHAPES)
    loader = DataLoader(Annotated(images, labels), 4)
    student = fastkd.create_model("resnet8", SHAPES, width=0.5)
    losses = [BinaryCrossEntropy()]
    result = fastkd.distill(student, None, loader, loader, epochs=1, losses=losses, **QUICK)
    assert result.metrics["map_last"] == 1


def test_the_closing_table_is_headed_by_the_metric():
    from rich.console import Console

    def text(rows):
        console = Console(width=80)
        with console.capture() as capture:
            console.print(comparison_table(rows))
        return capture.get()

    found = text([{"run": "teacher", "map": 0.9}, {"run": "student", "map_last": 0.8125}])
    assert "mAP" in found and "81.25%" in found and "90.00%" in found
    assert "accuracy" not in found
    assert "accuracy" in text([{"run": "student", "accuracy_last": 0.5}])
