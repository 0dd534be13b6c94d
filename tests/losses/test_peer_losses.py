"""Every loss that has released code gives its authors' numbers: values, gradients, factors.

peer_losses.json was made by make_peer_losses.py, which ran that code in float64 on the inputs
below; logit_losses.json holds the values of the project's specification.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkd.losses import DIST, DKD, KD, CrossEntropy, Discriminator, ReviewKD, SimKD
from fastkd.losses.base.schedules import cosine_decay
from fastkd.losses.base.term import LossTerm
from fastkd.losses.dist import between_rows
from fastkd.losses.dkd import decoupled_rows
from fastkd.losses.jointrd import expected_negative, partial_l2
from fastkd.losses.reviewkd import context_loss
from fastkd.testing import bind_term, call_term, fill_with_sines, sines

HERE = Path(__file__).parent
PEERS: dict[str, Any] = json.loads((HERE / "peer_losses.json").read_text())
VALUES: dict[str, float] = json.loads((HERE / "logit_losses.json").read_text())["values"]
LABELS_N = (3 * torch.arange(8) + 1) % 10


def logits() -> dict[str, Tensor]:
    return {
        "x/student/logits": sines((8, 10), 1, 3).requires_grad_(),
        "x/teacher/logits": sines((8, 10), 2, 4),
        "xprime/student/logits": sines((8, 10), 34, 3),
        "xprime/teacher/logits": sines((8, 10), 35, 4),
    }


def total(term: LossTerm, tensors: dict[str, Tensor], epoch: float = 0.0) -> Tensor:
    parts = call_term(term, tensors, LABELS_N[: len(tensors[term.needs[0]])], epoch=epoch).parts
    return torch.stack([weight * parts[name] for name, weight in term.weights.items()]).sum()


def assert_as_measured(name: str, loss: Tensor, leaves: Sequence[Tensor]) -> None:
    peer = PEERS[name]
    assert loss.item() == pytest.approx(peer["loss"], rel=1e-6)
    gradients = torch.autograd.grad(loss, leaves)
    assert [g.norm().item() for g in gradients] == pytest.approx(peer["grad_norm"], rel=1e-6)
    # At places all over the tensor: a permuted gradient has the same norm.
    for gradient, entries in zip(gradients, peer["grad_entries"], strict=True):
        assert len(entries) == min(gradient.numel(), 6)
        found = {place: gradient.flatten()[int(place)].item() for place in entries}
        assert found == pytest.approx(entries, rel=1e-6)


SPECIFIED = {
    "ce": lambda: CrossEntropy(),
    "kd_T4": lambda: KD(weight=1.0, ce_weight=0.0),
    "kd_total_r0.1_a0.9": lambda: KD(),
    "kd_T4_on_xprime": lambda: KD(weight=1.0, ce_weight=0.0, views=("xprime",)),
    "tlcutmix_total_r0.1_a0.9": lambda: KD(views=("x", "xprime")),
    "dkd_a1_b8_T4": lambda: DKD(warmup_epochs=0),
    "lskd_kd_tau2": lambda: KD(weight=1.0, ce_weight=0.0, temperature=2.0, standardize=True),
    "lskd_dkd_a1_b8_tau2": lambda: DKD(temperature=2.0, standardize=True, warmup_epochs=0),
}


@pytest.mark.parametrize("name", SPECIFIED)
def test_specified_value(name: str) -> None:
    assert total(SPECIFIED[name](), logits()).item() == pytest.approx(VALUES[name], rel=1e-6)


def test_specified_parts_of_dkd() -> None:
    student_NC, teacher_NC, *_ = logits().values()
    found = [rows.mean().item() for rows in decoupled_rows(student_NC, teacher_NC, LABELS_N, 4.0)]
    assert found == pytest.approx([VALUES["dkd_tckd_T4"], VALUES["dkd_nckd_T4"]], rel=1e-6)


@pytest.mark.parametrize("tau", [1, 4])
def test_specified_parts_of_dist(tau: int) -> None:
    student_NC, teacher_NC, *_ = ((z / tau).softmax(1) for z in logits().values())
    inter = tau**2 * between_rows(student_NC, teacher_NC).item()
    intra = tau**2 * between_rows(student_NC.T, teacher_NC.T).item()
    assert inter == pytest.approx(VALUES[f"dist_inter_tau{tau}"], rel=1e-6)
    assert intra == pytest.approx(VALUES[f"dist_intra_tau{tau}"], rel=1e-6)


def test_specified_context_loss() -> None:
    levels = {(6, 8, 8): (3, 32), (6, 4, 4): (5, 6), (16, 1, 1): (7, 33)}
    losses = [context_loss(sines((8, *s), a), sines((8, *s), b)) for s, (a, b) in levels.items()]
    assert sum(losses).item() == pytest.approx(VALUES["reviewkd_hcl"], rel=1e-6)


# Epochs of the peer count from 1, ours from 0: its epoch 3 is 2.
LOGIT_TERMS = {
    "dkd": (lambda: DKD(alpha=1.5, beta=6.0, temperature=2.0), 2.0),
    "dkd_standardized": (lambda: DKD(alpha=1.5, beta=6.0, temperature=2.0, standardize=True), 2.9),
    "kd_standardized": (
        lambda: KD(weight=9.0, ce_weight=0.1, temperature=2.0, standardize=True),
        0.0,
    ),
    "dist": (lambda: DIST(weight=1.0, temperature=4.0), 0.0),
}


@pytest.mark.parametrize("name", LOGIT_TERMS)
def test_logit_terms_equal_their_peers(name: str) -> None:
    make, epoch = LOGIT_TERMS[name]
    tensors = logits()
    assert_as_measured(name, total(make(), tensors, epoch), [tensors["x/student/logits"]])


def test_simkd_equals_its_peer() -> None:
    tensors = {
        "x/student/stage2": sines((4, 5, 8, 8), 101).requires_grad_(),
        "x/teacher/stage3": sines((4, 6, 4, 4), 102).relu(),
    }
    head = nn.Linear(6, 10).double().requires_grad_(False)
    fill_with_sines(head, 130)
    term = SimKD(student="stage2")
    bind_term(term, tensors, teacher_head=head).double()
    fill_with_sines(term.projector, 110)
    output = call_term(term, tensors)
    loss = output.parts["simkd"]
    assert_as_measured("simkd", loss, [tensors["x/student/stage2"], term.projector[0].weight])
    assert output.logits_NC is not None
    found = output.logits_NC.flatten()[:6].tolist()
    assert found == pytest.approx(PEERS["simkd"]["logits"], rel=1e-6)


def test_simkd_with_a_larger_teacher_map_equals_its_peer() -> None:
    tensors = {
        "x/student/stage3": sines((4, 5, 3, 3), 101).requires_grad_(),
        # Rectified by the term: the peer got it so.
        "x/teacher/stage3:preact": sines((4, 6, 7, 7), 102),
    }
    term = SimKD(teacher="stage3:preact", factor=3)
    bind_term(term, tensors, teacher_head=nn.Linear(6, 10).double()).double()
    fill_with_sines(term.projector, 110)
    loss = call_term(term, tensors).parts["simkd"]
    assert_as_measured("simkd_smaller", loss, [tensors["x/student/stage3"]])


def test_reviewkd_equals_its_peer() -> None:
    shapes = {"stage1": (4, 8, 8), "stage2": (6, 4, 4), "stage3": (8, 2, 2), "pooled": (8,)}
    tensors = {
        f"x/student/{tap}": sines((4, *shape), 141 + k).requires_grad_()
        for k, (tap, shape) in enumerate(shapes.items())
    }
    student = list(tensors.values())
    for k, shape in enumerate([(5, 8, 8), (7, 4, 4), (9, 4, 4)], start=1):
        tensors[f"x/teacher/stage{k}:preact"] = sines((4, *shape), 150 + k)
    tensors["x/teacher/pooled"] = sines((4, 10), 154)
    term = ReviewKD(weight=1.0)
    bind_term(term, tensors).double()
    for level, fusion in enumerate(term.fusions):
        fill_with_sines(fusion.enter, 160 + 20 * level)
        fill_with_sines(fusion.leave, 165 + 20 * level)
        if fusion.attention is not None:
            fill_with_sines(fusion.attention, 170 + 20 * level)
    loss = call_term(term, tensors, epoch=4.0).parts["reviewkd"]
    assert_as_measured("reviewkd", loss, [*student, term.fusions[0].enter[0].weight])


def test_discriminator_equals_its_peer() -> None:
    tensors = {
        "x/student/logits": sines((8, 64), 230, 3).requires_grad_(),
        "x/teacher/mean_logits": sines((8, 64), 231, 4),
    }
    term = Discriminator(hidden=(16, 4), last_relu=True)
    bind_term(term, tensors, num_classes=64).double()
    # The peer's layers are 1x1 convolutions: the same numbers in another shape.
    fill_with_sines(term, 220)
    loss = call_term(term, tensors).parts["discriminator"]
    leaves = [tensors["x/student/logits"], term.layers[0].weight, term.layers[4].bias]
    assert_as_measured("meal_discriminator", loss, leaves)


def test_margin_and_partial_distance_of_jointrd_equal_its_peer() -> None:
    norm = nn.BatchNorm2d(6).double()
    norm.weight.data.copy_(sines((6,), 203))
    norm.bias.data.copy_(torch.tensor([-2.0, -0.5, 0.0, 0.4, 1.5, 9.0]))
    margin_C11 = expected_negative(norm)
    assert margin_C11.flatten().tolist() == pytest.approx(PEERS["jointrd_margin"]["margin"])
    student_NCHW = sines((4, 6, 3, 3), 201, 2).requires_grad_()
    loss = partial_l2(student_NCHW, sines((4, 6, 3, 3), 202, 2), margin_C11)
    assert_as_measured("jointrd_margin", loss, [student_NCHW])


def test_eta_equals_its_peer() -> None:
    eta = cosine_decay(60, 0.5)
    peer = {int(key): value for key, value in PEERS["jointrd_total"].items() if key.isdigit()}
    assert len(peer) == 8
    for epoch, found in peer.items():
        assert eta(epoch) == pytest.approx(found["eta"], rel=1e-12)
        assert eta(epoch + 0.99) == eta(epoch)
