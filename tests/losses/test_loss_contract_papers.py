"""Losses in a trainer: gradients, one graph, bad steps, resume; what SimKD leaves.

The artificial term of test_loss_contract.py is the one that is killed.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World
from fastkd.data.facts import Facts
from fastkd.data.loaders.planned import Loading
from fastkd.data.loaders.resident import ResidentLoader
from fastkd.data.sources.image_set import ImageSet
from fastkd.data.sources.synthetic import make_synthetic
from fastkd.errors import UserError
from fastkd.losses import (
    AB,
    CC,
    CRD,
    CWD,
    DIST,
    DKD,
    FSP,
    FT,
    KD,
    MGD,
    NST,
    PKT,
    RKD,
    SP,
    VID,
    Discriminator,
    FitNet,
    JointRD,
    ReviewKD,
    SimKD,
    SoftCE,
    StageMSE,
)
from fastkd.losses.base.needs import Need
from fastkd.losses.base.term import LossTerm
from fastkd.models import create_model
from fastkd.models.taps import Tapped
from fastkd.output.run_folder import RunFolder
from fastkd.storage.checkpoint import Checkpoint
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.teaching import Teaching
from fastkd.training.build import build_trainer
from fastkd.training.config import OptimConfig
from fastkd.training.progress import Plan
from fastkd.training.settings import Output, TrainData, TrainingSettings
from fastkd.training.step import Prepared
from fastkd.training.trainer import Trainer

CLASSES = 10
STAGES = ("stage1", "stage2", "stage3")


FEATURE_PAIRS = {"stage1": "stage1", "stage3": "stage2"}
TERMS: dict[str, Callable[[], LossTerm]] = {
    "kd-mixed-view": lambda: KD(views=("xprime",), class_weights="erfnet"),
    "kd-mixed-logits": lambda: KD(
        views=("x", "xprime"), ce_weight=0, xprime_target="mixed_logits", name="of_mixed"
    ),
    "kd-standardized": lambda: KD(ce_weight=0, standardize=True, name="standardized"),
    "soft-ce": SoftCE,
    "dkd": DKD,
    "dist": DIST,
    "reviewkd": ReviewKD,
    "simkd": SimKD,
    "stage-mse": lambda: StageMSE({"stage1": "stage1", "pooled": "pooled"}),
    "jointrd": lambda: JointRD(STAGES),
    "jointrd-logits": lambda: JointRD(STAGES, feature="logits", name="of_logits"),
    "jointrd-released": lambda: JointRD(STAGES, form="released", name="released"),
    "discriminator": Discriminator,
    "cc": CC,
    "crd": lambda: CRD(dim=16, negatives=12),
    "cwd": lambda: CWD(FEATURE_PAIRS),
    "mgd": lambda: MGD(FEATURE_PAIRS),
    "fitnet": lambda: FitNet({"stage1": "stage2", "stage2": "stage2", "stage3": "stage2"}),
    "ab": lambda: AB({"stage1:preact": "stage1:preact", "stage2:preact": "stage3:preact"}),
    "fsp": lambda: FSP({tap: tap for tap in ("stem", *STAGES)}),
    "ft": lambda: FT({"stage3": "stage2"}),
    "nst": lambda: NST(FEATURE_PAIRS),
    "pkt": PKT,
    "rkd": RKD,
    "sp": lambda: SP({"stage3": "stage3"}),
    "vid": lambda: VID(FEATURE_PAIRS),
}


def images(split: str, num: int) -> ImageSet:
    whole = make_synthetic(split, 8)
    return ImageSet(
        whole.name, whole.images_NHWC[:num].copy(), whole.labels_N[:num].copy(), whole.classes
    )


def loader(split: str, num: int) -> ResidentLoader:
    return ResidentLoader(
        images(split, num),
        Loading(
            batch_size=10,
            seed=0,
            train=split == "train",
            normalization=((0.5,) * 3, (0.25,) * 3),
            placement=Placement(
                World(0, 0, 1, torch.device("cpu"), None), Precision("fp32", "cpu")
            ),
        ),
    )


def build(
    *terms: LossTerm,
    precision: str = "fp32",
    folder: RunFolder | None = None,
    epochs: int = 1,
    epoch_factor: float = 1.0,
    ema: float | None = None,
) -> Trainer:
    """A trainer for resnet8 from another, whose stages have the same shapes."""
    torch.manual_seed(0)
    train = loader("train", 40)
    plan = Plan(stage="contract", digest="0" * 16, seed=0, epochs=epochs, epoch_factor=epoch_factor)
    return build_trainer(
        plan,
        student=create_model("resnet8", CLASSES, width=0.5),
        teaching=Teaching((LoadedNet(create_model("resnet8", CLASSES, width=0.5)),)),
        terms=terms,
        data=TrainData(
            train,
            loader("val", 20),
            Facts((3, 8, 8), CLASSES, train.labels_N, "class", ((0.5,) * 3, (0.25,) * 3)),
            40,
        ),
        settings=TrainingSettings(
            optim=OptimConfig(lr=0.05, schedule="constant"),
            xprime="cutmix",
            ema=ema,
            compile="off",
        ),
        placement=Placement(World(0, 0, 1, torch.device("cpu"), None), Precision(precision, "cpu")),
        output=Output(folder),
    )


def inputs_of(trainer: Trainer, prepared: Prepared) -> tuple[Any, ...]:
    views, batch, targets = prepared.views, prepared.batch, prepared.targets
    scheduled = trainer.update.scheduled(0.0)
    return views, batch.labels_N, batch.index_N, targets, scheduled


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", TERMS)
def test_a_real_term_gives_finite_loss_and_gradients(name: str, precision: str) -> None:
    trainer = build(TERMS[name](), precision=precision)
    out = trainer.step(*inputs_of(trainer, next(trainer.prepare(0))))
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert out.loss > 0
    for parameter, gradient in [(p, p.grad) for p in trainer.step.parameters()]:
        assert gradient is not None
        assert gradient.shape == parameter.shape
        assert torch.isfinite(gradient).all()
    body = trainer.student.get_submodule("layer2").parameters()
    assert all(parameter.grad.abs().sum() > 0 for parameter in body if parameter.grad is not None)
    assert trainer.teacher is not None
    assert all(parameter.grad is None for parameter in trainer.teacher.model.parameters())


@pytest.mark.parametrize("name", TERMS)
def test_a_real_term_trains_and_leaves_the_teacher_alone(name: str) -> None:
    trainer = build(TERMS[name]())
    assert trainer.teacher is not None
    teacher = {key: value.clone() for key, value in trainer.teacher.model.state_dict().items()}
    before = {key: value.clone() for key, value in trainer.step.named_parameters()}
    summary = trainer.fit()
    assert math.isfinite(trainer.history[0]["train_loss"])
    assert trainer.history[0]["skipped"] == 0
    assert 0 <= summary["accuracy_last"] <= 1
    moved = {key for key, value in trainer.step.named_parameters() if (value != before[key]).any()}
    own = {key for key in before if key.startswith("terms.")}
    assert own <= moved
    assert len(moved) > len(own)
    for key, value in trainer.teacher.model.state_dict().items():
        assert torch.equal(value, teacher[key]), key


@pytest.mark.matrix
def test_all_terms_together_are_one_graph_under_autocast() -> None:
    trainer = build(*(make() for make in TERMS.values()), precision="bf16")
    arguments = inputs_of(trainer, next(trainer.prepare(0)))
    state = {key: value.clone() for key, value in trainer.step.state_dict().items()}
    eager = trainer.step(*arguments)
    trainer.step.load_state_dict(state)
    torch.compiler.reset()
    compiled = torch.compile(trainer.step, backend="aot_eager", fullgraph=True, dynamic=False)
    out = compiled(*arguments)
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in trainer.step.parameters())
    found = dict(zip(trainer.step.metric_names, out.metrics_M.tolist(), strict=True))
    truth = dict(zip(trainer.step.metric_names, eager.metrics_M.tolist(), strict=True))
    # aot_eager draws the negatives of CRD and the masks of MGD from another stream.
    for drawn in ("crd", "mgd", "loss"):
        assert math.isfinite(found.pop(drawn))
        del truth[drawn]
    assert found == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_a_bad_step_changes_nothing(name: str) -> None:
    trainer = build(TERMS[name]())
    prepared = next(trainer.prepare(0))
    trainer.optimize(prepared, 0, 0)
    before = {key: value.clone() for key, value in trainer.step.state_dict().items()}
    for view in prepared.views.values():
        view[3, 0, 0, 0] = float("nan")
    trainer.optimize(prepared, 0, 1)
    assert trainer.guard.counts() == (1, 1)
    for key, value in trainer.step.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_all_terms_together_resume_where_they_stopped(tmp_path: Path) -> None:
    def everything(folder: str) -> Trainer:
        terms = [make() for make in TERMS.values()]
        return build(*terms, folder=RunFolder.create(tmp_path, folder, "0" * 16), epochs=2)

    whole, first, second = everything("whole"), everything("first"), everything("second")
    whole.fit()
    first.plan = replace(first.plan, epochs=1)
    first.fit()
    assert first.folder is not None
    second.resume(Checkpoint.open(first.folder.path / "last.pt"))
    second.fit()
    for key, value in whole.step.state_dict().items():
        assert torch.equal(value, second.step.state_dict()[key]), key
    assert [row["train_loss"] for row in whole.history] == (
        [row["train_loss"] for row in second.history]
    )


@pytest.mark.parametrize("text", ["x/studnt/logits", "logits", "x/student/", "/teacher/stage1"])
def test_a_need_that_is_none_is_told_the_nets(text: str) -> None:
    with pytest.raises(ValueError, match="net one of student, teacher, mixed.*got '" + text):
        Need(text)


def test_schedules_stretch_with_the_epochs() -> None:
    short = build(DKD(), JointRD(STAGES), epoch_factor=0.05)
    long = build(DKD(), JointRD(STAGES))
    for epoch in (0.0, 0.15, 1.0, 3.0, 7.0):
        assert short.update.scheduled(epoch) == long.update.scheduled(20 * epoch)
    assert short.update.scheduled(3.0)["jointrd"]["eta"] == 0.5
    assert short.update.scheduled(1.0)["dkd"]["warmup"] == 1


def test_simkd_evaluates_and_keeps_projector_and_teacher_head() -> None:
    trainer = build(SimKD())
    summary = trainer.fit()
    term, teacher = trainer.terms[0], trainer.teacher
    assert isinstance(term, SimKD)
    assert teacher is not None
    kept = trainer.kept().eval()
    term.projector.eval()
    correct, loss, num = 0, 0.0, 0
    with torch.no_grad():
        for batch in trainer.val_loader.epoch(0):
            stage3_NCHW = Tapped(trainer.student, ["stage3"])(batch.images_NCHW)["stage3"]
            pooled_ND = term.projector(stage3_NCHW).mean((2, 3))
            logits_NC = teacher.model.get_submodule("fc")(pooled_ND)
            torch.testing.assert_close(kept(batch.images_NCHW), logits_NC)
            correct += int((logits_NC.argmax(1) == batch.labels_N).sum())
            loss += F.cross_entropy(logits_NC, batch.labels_N, reduction="sum").item()
            num += len(batch.labels_N)
    assert summary["accuracy_last"] == correct / num
    assert trainer.history[0]["val_loss"] == pytest.approx(loss / num, rel=1e-5)
    assert not any("head" in key for key in term.state_dict())


def test_simkd_counts_the_training_accuracy_of_what_it_keeps() -> None:
    trainer = build(SimKD())
    prepared = next(trainer.prepare(0))
    out = trainer.step(*inputs_of(trainer, prepared))
    # In training mode, as in the step; the batch norms have the statistics of this batch in both.
    answer_N = trainer.kept()(prepared.views["x"]).argmax(1)
    correct = (answer_N == prepared.batch.labels_N).sum()
    assert dict(zip(trainer.step.metric_names, out.metrics_M, strict=True))["correct"] == correct
    own_N = trainer.student(prepared.views["x"]).argmax(1)
    assert (own_N != answer_N).any()


def test_an_average_of_half_a_network_is_refused() -> None:
    with pytest.raises(UserError, match="the loss simkd appends layers of its own"):
        build(KD(), SimKD(), ema=0.9)


def test_crd_scores_the_old_bank_and_then_moves_only_the_rows_of_the_batch() -> None:
    trainer = build(TERMS["crd"]())
    term = trainer.terms[0]
    assert isinstance(term, CRD)
    before_MD = term.student_MD.clone()
    prepared = next(trainer.prepare(0))
    trainer.optimize(prepared, 0, 0)
    index_N = prepared.batch.index_N
    moved_M = (term.student_MD != before_MD).any(1)
    assert moved_M.nonzero().flatten().tolist() == sorted(index_N.tolist())
    normalizer_2 = term.normalizer_2.clone()
    assert (normalizer_2 > 0).all()
    trainer.optimize(prepared, 0, 1)
    assert torch.equal(term.normalizer_2, normalizer_2)
