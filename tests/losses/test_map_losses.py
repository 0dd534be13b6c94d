"""Losses on maps: JointRD, stage MSE, ReviewKD and SimKD against formulas in float64; messages."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.losses import JointRD, ReviewKD, SimKD, StageMSE
from fastkd.losses.base.term import LossTerm
from fastkd.losses.jointrd import expected_negative
from fastkd.losses.reviewkd import context_loss
from fastkd.models import create_model
from fastkd.models.taps import pooled_taps
from fastkd.teachers.teacher import freeze
from fastkd.testing import bind_term, call_term, fill_with_sines, sines

PEER = json.loads((Path(__file__).parent / "peer_losses.json").read_text())["jointrd_total"]
STAGES = ("stage1", "stage2", "stage3")
LABELS_N = torch.arange(5) % 10


@pytest.fixture(scope="module")
def teacher() -> Any:
    torch.manual_seed(3)
    network = create_model("resnet14", 10, width=0.5).double()
    network(torch.rand(64, 3, 16, 16).double())  # running statistics of its own
    return freeze(network)


def taps(teacher: Any, form: str = "paper") -> dict[str, Tensor]:
    """Student features with gradient, and the teacher's answers to other images."""
    torch.manual_seed(4)
    shapes = {"stage1": (8, 8, 8), "stage2": (16, 4, 4), "stage3": (32, 2, 2)}
    if form == "released":
        shapes["stage3:preact"] = shapes.pop("stage3")
    tensors = {
        f"x/student/{tap}": torch.randn(5, *shape).double().requires_grad_()
        for tap, shape in shapes.items()
    }
    names = ("stage3:preact", "stage3", "pooled", "logits")
    with torch.no_grad():
        found = teacher.forward_taps(torch.rand(5, 3, 8, 8).double(), names)
    return tensors | {f"x/teacher/{tap}": value for tap, value in found.items()}


def of_teacher(teacher: Any) -> dict[str, Any]:
    return {
        "teacher_stages": teacher.forward_from,
        "teacher_head": teacher.fc,
        "teacher_norm": teacher.layer3[-1].bn2,
    }


def total(term: LossTerm, tensors: dict[str, Tensor], epoch: float) -> Tensor:
    parts = call_term(term, tensors, LABELS_N, epoch=epoch).parts
    return torch.stack([weight * parts[name] for name, weight in term.weights.items()]).sum()


def margin_distance(student_NCHW: Tensor, teacher_NCHW: Tensor, margin_C11: Tensor) -> Tensor:
    """The three cases of the released code one by one."""
    margin_NCHW = margin_C11.expand_as(teacher_NCHW)
    loss = student_NCHW.new_zeros(())
    s, t, m = student_NCHW, teacher_NCHW, margin_NCHW
    for case, aim in ((t > 0, t), ((t <= 0) & (t > m) & (s > t), t), ((t <= m) & (s > m), m)):
        loss = loss + (s - aim)[case].pow(2).sum()
    return loss / len(student_NCHW)


@pytest.mark.parametrize("epoch", [0, 20, 75])
@pytest.mark.parametrize("feature", ["pooled", "logits", "map"])
def test_jointrd_joined_equals_junction_by_junction(teacher: Any, feature: str, epoch: int) -> None:
    tensors = taps(teacher)
    student = [tensors[f"x/student/{stage}"] for stage in STAGES]
    term = JointRD(STAGES, weight=0.7, feature_weight=0.3, feature=feature)
    bind_term(term, tensors, **of_teacher(teacher))
    loss = total(term, tensors, epoch)
    tap = "stage3" if feature == "map" else feature
    eta = PEER[str(epoch)]["eta"]
    truth = torch.zeros((), dtype=torch.float64)
    for number, features in enumerate(student, start=1):
        if number == 3 and feature == "map":
            own = features
        else:
            own = teacher.forward_between(features, f"stage{number}", tap)
        truth = truth + eta * 0.3 * (own - tensors[f"x/teacher/{tap}"]).pow(2).mean()
        if number < 3:
            logits_NC = teacher.forward_between(features, f"stage{number}", "logits")
            truth = truth - eta * logits_NC.log_softmax(1)[torch.arange(5), LABELS_N].mean()
    assert_same(loss, 0.7 * truth, student)


@pytest.mark.parametrize("epoch", [0, 20, 75])
def test_released_jointrd_has_the_factors_of_its_code(teacher: Any, epoch: int) -> None:
    tensors = taps(teacher, "released")
    last, target = "x/student/stage3:preact", tensors["x/teacher/stage3:preact"]
    student = [*(tensors[f"x/student/{stage}"] for stage in STAGES[:2]), tensors[last]]
    term = JointRD(STAGES, weight=0.25, form="released")
    bind_term(term, tensors, **of_teacher(teacher)).double()
    for number, connector in enumerate(term.connectors):
        fill_with_sines(connector, 10 * number)
    loss = total(term, tensors, epoch)
    margin_C11 = expected_negative(teacher.layer3[-1].bn2)
    assert (margin_C11 < 0).all()
    # Of its four junctions the first three have one factor; ours are two.
    joint, distance = PEER[str(epoch)]["of_ce"][0], PEER[str(epoch)]["of_distance"]
    truth = torch.zeros((), dtype=torch.float64)
    for number, features in enumerate(student):
        preact = features
        if number < 2:
            stage = f"stage{number + 1}"
            preact = teacher.forward_between(features, stage, "stage3:preact")
            logits_NC = teacher.forward_between(features, stage, "logits")
            truth = truth + joint * F.cross_entropy(logits_NC, LABELS_N)
        through = term.connectors[number](preact)
        factor = distance[0] if number < 2 else distance[-1]
        truth = truth + factor * margin_distance(through, target, margin_C11)
    assert_same(loss, truth, [*student, term.connectors[1][0].weight])


def assert_same(loss: Tensor, truth: Tensor, leaves: list[Tensor]) -> None:
    assert loss.item() == pytest.approx(truth.item(), rel=1e-10)
    ours = torch.autograd.grad(-3 * loss, leaves)
    theirs = torch.autograd.grad(-3 * truth, leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-12)
        assert mine.abs().sum() > 0


def test_each_teacher_stage_runs_once_for_all_junctions(teacher: Any) -> None:
    tensors = taps(teacher)
    runs: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda _, x, __: runs.append(len(x[0])))
        for layer in (teacher.layer2[0].conv1, teacher.layer3[0].conv1)
    ]
    term = bind_term(JointRD(STAGES), tensors, **of_teacher(teacher))
    runs.clear()
    call_term(term, tensors, LABELS_N)
    for hook in hooks:
        hook.remove()
    assert runs == [5, 10]


def test_jointrd_says_what_does_not_fit(teacher: Any) -> None:
    tensors = taps(teacher)
    known = of_teacher(teacher)
    with pytest.raises(UserError, match="which only networks of the zoo with a classifier expose"):
        bind_term(JointRD(STAGES), tensors)
    released = taps(teacher, "released")
    with pytest.raises(UserError, match="last batch norm, and it has none"):
        bind_term(JointRD(STAGES, form="released"), released, **known | {"teacher_norm": None})
    tensors["x/student/stage2"] = torch.zeros(5, 12, 4, 4)
    with pytest.raises(UserError, match=r"behind stage2 do not take the student's .* \[12, 4, 4\]"):
        bind_term(JointRD(STAGES), tensors, **known)
    tensors = taps(teacher) | {"x/student/stage3": torch.zeros(5, 32, 3, 3)}
    with pytest.raises(UserError, match=r"stage3 is \[32, 3, 3\] per image but x/teacher/stage3"):
        bind_term(JointRD(STAGES, feature="map"), tensors, **known)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_stage_mse(reduction: str) -> None:
    tensors = {
        "x/student/stage1": sines((3, 2, 5, 5), 1).requires_grad_(),
        "x/teacher/stage1": sines((3, 2, 5, 5), 2),
        "x/student/pooled": sines((3, 7), 3).requires_grad_(),
        "x/teacher/pooled": sines((3, 7), 4),
    }
    term = StageMSE({"stage1": "stage1", "pooled": "pooled"}, weight=2.0, reduction=reduction)
    bind_term(term, tensors)
    loss = total(term, tensors, 30)
    truth = torch.zeros((), dtype=torch.float64)
    for tap, elements in (("stage1", 50), ("pooled", 7)):
        difference = tensors[f"x/student/{tap}"] - tensors[f"x/teacher/{tap}"]
        divisor = 3 * elements if reduction == "mean" else 3
        truth = (
            truth
            + 2.0 * PEER["30"]["eta"] * difference.flatten().dot(difference.flatten()) / divisor
        )
    assert_same(loss, truth, [tensors["x/student/stage1"], tensors["x/student/pooled"]])
    tensors["x/teacher/pooled"] = torch.zeros(3, 8)
    with pytest.raises(UserError, match=r"pooled is \[7\] per image and x/teacher/pooled \[8\]"):
        bind_term(term, tensors)


@pytest.mark.parametrize("side", [9, 4, 3, 1])
def test_context_loss_pools_both_maps(side: int) -> None:
    student_NCHW = torch.randn(2, 3, side, side).double().requires_grad_()
    teacher_NCHW = torch.randn(2, 3, side, side).double()
    levels = [(student_NCHW - teacher_NCHW).pow(2).mean()]
    for grid in (4, 2, 1):
        if grid < side:
            pooled = [F.adaptive_avg_pool2d(m, (grid, grid)) for m in (student_NCHW, teacher_NCHW)]
            levels.append((pooled[0] - pooled[1]).pow(2).mean())
    weights = [0.5**k for k in range(len(levels))]
    truth = sum(w * level for w, level in zip(weights, levels, strict=True)) / sum(weights)
    assert isinstance(truth, Tensor)
    assert_same(context_loss(student_NCHW, teacher_NCHW), truth, [student_NCHW])


def test_reviewkd_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="got 2 taps of the student and 1 of the teacher"):
        ReviewKD(student=("stage1", "stage2"), teacher=("stage1",))
    tensors = {"x/student/stage1": torch.zeros(2, 3, 4), "x/teacher/stage1": torch.zeros(2, 3, 4)}
    with pytest.raises(UserError, match=r"stage1 is \[3, 4\] per image: name stages"):
        bind_term(ReviewKD(student=("stage1",), teacher=("stage1",)), tensors)


def test_simkd_says_what_does_not_fit() -> None:
    tensors = {
        "x/student/stage3": torch.zeros(2, 5, 4, 4),
        "x/teacher/stage3": torch.zeros(2, 6, 4, 4),
    }
    with pytest.raises(UserError, match="6 pooled channels of its stage3, but the teacher has no"):
        bind_term(SimKD(), tensors)
    with pytest.raises(UserError, match="but the teacher has one of 8 values"):
        bind_term(SimKD(), tensors, teacher_head=nn.Linear(8, 10))
    with pytest.raises(UserError, match=r"factor=7 leaves no channels of the teacher's 6"):
        bind_term(SimKD(factor=7), tensors, teacher_head=nn.Linear(6, 10))
    vector = {"x/student/pooled": torch.zeros(2, 5), **tensors}
    with pytest.raises(UserError, match=r"maps \[C, H, W\], but x/student/pooled is \[5\]"):
        bind_term(SimKD(student="pooled"), vector, teacher_head=nn.Linear(6, 10))


def known_of(teacher: Any) -> dict[str, Any]:
    images_NCHW = torch.randn(2, 3, 16, 16)
    pooled = partial(pooled_taps, teacher, teacher.fc, images_NCHW)
    return {"teacher_head": teacher.fc, "teacher_pooled": pooled}


def test_simkd_refuses_the_raw_sum_of_a_wide_resnet() -> None:
    teacher: Any = freeze(create_model("wrn_10_1", 10))
    tensors = {
        "x/student/stage3": torch.zeros(2, 5, 4, 4),
        "x/teacher/stage3": torch.zeros(2, 64, 4, 4),
        "x/teacher/stage3:preact": torch.zeros(2, 64, 4, 4),
    }
    known = known_of(teacher)
    with pytest.raises(UserError, match=r"set losses\.simkd\.teacher=stage3:preact"):
        bind_term(SimKD(), tensors, **known)
    bind_term(SimKD(teacher="stage3:preact"), tensors, **known)
    # A CIFAR ResNet pools its stage3 as it is.
    plain: Any = freeze(create_model("resnet8", 10))
    bind_term(SimKD(), tensors, **known_of(plain))
