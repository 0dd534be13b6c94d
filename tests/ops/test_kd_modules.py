"""`KDLoss` and its presets against the peers' formulas, `KLDivLoss` against torch's."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.losses import KDLoss, KLDivLoss


def logits(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return (
        3 * torch.randn(12, 10, dtype=dtype),
        3 * torch.randn(12, 10, dtype=dtype),
        torch.arange(12) % 10,
    )


def kl(student: Tensor, teacher: Tensor, temperature: float, reduction: str) -> Tensor:
    """T^2 * torch's kl_div, in the reduction that a peer uses."""
    log_p = F.log_softmax(student / temperature, 1)
    p = F.softmax(teacher / temperature, 1)
    return F.kl_div(log_p, p, reduction=reduction) * temperature**2


PEER_NUMBERS = json.loads((Path(__file__).parent / "kd_presets.json").read_text())
PEERS = {
    "repdistiller": lambda s, t, y: 0.1 * F.cross_entropy(s, y) + 0.9 * kl(s, t, 4, "sum") / len(s),
    "mdistiller": lambda s, t, y: 0.1 * F.cross_entropy(s, y) + 0.9 * kl(s, t, 4, "batchmean"),
    "timm": lambda s, t, y: F.cross_entropy(s, y) + kl(s, t, 1, "batchmean"),
    "deit": lambda s, t, y: 0.5 * F.cross_entropy(s, y) + 0.5 * kl(s, t, 1, "sum") / s.numel(),
    "modelopt": lambda s, t, y: kl(s, t, 1, "mean"),
    "moonshine": lambda s, t, y: 0.1 * F.cross_entropy(s, y) + 2 * 0.9 * kl(s, t, 4, "mean"),
    "meal_v2": lambda s, t, y: F.cross_entropy(s, F.softmax(t, 1)),
}


@pytest.mark.filterwarnings("ignore:reduction:UserWarning")
@pytest.mark.parametrize("impl_dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", PEERS)
def test_preset_is_the_peers_formula(name, impl_dtype: torch.dtype) -> None:
    student, teacher, labels = logits(impl_dtype)
    got_leaf, want_leaf = student.clone().requires_grad_(), student.double().requires_grad_()
    got = KDLoss.preset(name)(got_leaf, teacher, labels)
    want = PEERS[name](want_leaf, teacher.double(), labels)
    tolerance = 1e-12 if impl_dtype == torch.float64 else 1e-6
    assert got.item() == pytest.approx(want.item(), rel=tolerance)
    (got_grad,) = torch.autograd.grad(got, got_leaf)
    (want_grad,) = torch.autograd.grad(want, want_leaf)
    torch.testing.assert_close(got_grad.double(), want_grad, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", PEER_NUMBERS)
def test_preset_is_what_the_peers_own_code_gave(name) -> None:
    """kd_presets.json: made by make_preset_oracle.py from the peers' checkouts."""
    want = PEER_NUMBERS[name]
    n = torch.arange(1, 81, dtype=torch.float64)
    student = (3 * torch.sin(12.9898 * n + 78.233)).view(8, 10).requires_grad_()
    teacher = (4 * torch.sin(12.9898 * n + 78.233 * 2)).view(8, 10)
    loss = KDLoss.preset(name)(student, teacher, (3 * torch.arange(8) + 1) % 10)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(want["loss"], rel=1e-6)
    assert grad.norm().item() == pytest.approx(want["grad_norm"], rel=1e-6)
    assert grad[0, 0].item() == pytest.approx(want["grad_00"], rel=1e-6)


def test_timm_preset_is_what_timms_own_task_computes() -> None:
    from timm.task import LogitDistillationTask

    class Fixed(nn.Module):
        pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "num_classes": 10}  # noqa: RUF012
        num_classes, num_features, in_chans = 10, 10, 3

        def __init__(self, out: Tensor) -> None:
            super().__init__()
            self.out = nn.Parameter(out)

        def forward(self, x: Tensor) -> Tensor:
            return self.out

    student, teacher, labels = logits(torch.float32)
    task = LogitDistillationTask(
        Fixed(student), Fixed(teacher), nn.CrossEntropyLoss(), device=torch.device("cpu")
    )
    want = task(torch.zeros(12, 3, 2, 2), labels)["loss"]
    got = KDLoss.preset("timm")(student, teacher, labels)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


def test_meal_v2_averages_teachers_in_probability() -> None:
    student, teacher, _ = logits()
    others = [teacher, torch.randn(12, 10, dtype=torch.float64), student.flip(1)]
    target = torch.stack([F.softmax(t, 1) for t in others]).mean(0)
    got = KDLoss.preset("meal_v2")(student, others)
    assert got.item() == pytest.approx(F.cross_entropy(student, target).item(), rel=1e-12)


def test_overrides_and_unknown_preset() -> None:
    assert KDLoss.preset("timm", temperature=4.0).temperature == 4.0
    with pytest.raises(ValueError, match=r"got 'kdlib'; expected one of deit, mdistiller"):
        KDLoss.preset("kdlib")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ce_weight= and kd_weight="):
        KDLoss(alpha=1.5)
    with pytest.raises(ValueError, match="batchmean"):
        KDLoss(reduction="batchmean")  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", ["repdistiller", "moonshine", "meal_v2", "modelopt"])
def test_reductions_agree_on_dense_logits_with_ignored_pixels(preset) -> None:
    student, teacher = torch.randn(2, 2, 19, 6, 5, dtype=torch.float64)
    labels = torch.randint(0, 19, (2, 6, 5))
    labels[0, :2] = 255
    weights = torch.rand(2, dtype=torch.float64)
    mask = torch.rand(2, 6, 5) > 0.2
    rows, total, mean = (
        KDLoss.preset(preset, ignore_index=255, reduction=reduction)(
            student, teacher, labels, weights=weights, mask=mask
        )
        for reduction in ("none", "sum", "mean")
    )
    counts = mask & (labels != 255)
    assert rows.shape == labels.shape
    assert (rows[~counts] == 0).all()
    assert total.item() == pytest.approx(rows.sum().item(), rel=1e-12)
    assert mean.item() == pytest.approx(rows.sum().item() / counts.sum().item(), rel=1e-12)


def test_without_labels_only_the_distillation_term_is_left() -> None:
    student, teacher, _ = logits()
    want = 0.9 * kl(student, teacher, 4, "batchmean")
    assert KDLoss()(student, teacher).item() == pytest.approx(want.item(), rel=1e-12)


@pytest.mark.filterwarnings("ignore:reduction:UserWarning")
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
def test_kldivloss_is_torchs(reduction: str, log_target: bool) -> None:
    student, teacher, _ = logits()
    target = F.log_softmax(teacher, 1) if log_target else F.softmax(teacher, 1)
    leaves = [F.log_softmax(student, 1).requires_grad_() for _ in range(2)]
    kwargs = {"reduction": reduction, "log_target": log_target}
    got, want = KLDivLoss(**kwargs)(leaves[0], target), nn.KLDivLoss(**kwargs)(leaves[1], target)
    assert torch.equal(got, want)
    for loss in (got, want):
        loss.sum().backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_kldivloss_check_names_a_swapped_order() -> None:
    student, teacher, _ = logits()
    log_p, p = F.log_softmax(student, 1), F.softmax(teacher, 1)
    loss = KLDivLoss(reduction="batchmean", check=True)
    assert loss(log_p, p) > 0
    with pytest.raises(ValueError, match="input is outside the range of log-probabilities"):
        loss(p, log_p)
    with pytest.raises(ValueError, match="target is outside the range of probabilities"):
        loss(log_p, log_p)


def test_a_preset_takes_weights_and_not_alpha() -> None:
    assert KDLoss.preset("repdistiller", kd_weight=0.5).kd_weight == 0.5
    with pytest.raises(ValueError, match="expected ce_weight and kd_weight"):
        KDLoss.preset("repdistiller", alpha=0.5)


def test_what_is_not_by_default_is_printed() -> None:
    def printed(loss: KDLoss) -> str:
        return repr(loss).removeprefix("KDLoss(").removesuffix(")")

    assert printed(KDLoss()) == "temperature=4, ce_weight=0.1, kd_weight=0.9"
    assert printed(KDLoss.preset("meal_v2")) == (
        "temperature=1, ce_weight=0, kd_weight=1, keep_teacher_entropy=True"
    )
    unusual = KDLoss(
        temperature=2.5,
        per_class=True,
        label_smoothing=0.1,
        ignore_index=255,
        reduction="sum",
        class_dim=-1,
        check=True,
    )
    assert printed(unusual) == (
        "temperature=2.5, ce_weight=0.1, kd_weight=0.9, per_class=True, label_smoothing=0.1, "
        "ignore_index=255, reduction='sum', class_dim=-1, check=True"
    )
