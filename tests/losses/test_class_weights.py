"""Class weights of CrossEntropy and KD: torch's weighted mean, ERFNet's formula, refusals."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.compute.ranks import World
from fastkd.errors import UserError
from fastkd.losses import KD, CrossEntropy
from fastkd.losses.base.registry import typed_config
from fastkd.losses.base.term import BindContext, LossTerm
from fastkd.losses.cross_entropy import class_weights_C
from fastkd.output.console import Console
from fastkd.recipes.loading import load_recipe
from fastkd.runs.stages import Session, build_stage, open_recipe_data
from fastkd.testing import assert_as_accurate, bind_term, call_term, eager_dense_loss, luck

WEIGHTS = (0.5, 3.0, 0.0, 7.25, 1.0)
C = len(WEIGHTS)
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def case(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Logits of both networks and labels, about a fifth of them -100."""
    generator = torch.Generator().manual_seed(11)
    student, teacher = (2 * torch.randn(shape, generator=generator) for _ in range(2))
    labels = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
    void = torch.rand(labels.shape, generator=generator) < 0.2
    return student.to(dtype), teacher.to(dtype), labels.masked_fill(void, -100)


def value(term: LossTerm, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    tensors = {"x/student/logits": student, "x/teacher/logits": teacher}
    if not list(term.buffers()):
        bind_term(term, tensors, num_classes=student.shape[1])
    parts = call_term(term, tensors, labels).parts
    return torch.stack([weight * parts[name] for name, weight in term.weights.items()]).sum()


def written_out(student: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """The weighted mean, pixel by pixel."""
    weight = torch.tensor(WEIGHTS, dtype=torch.float64)
    rows = student.movedim(1, -1).reshape(-1, C)
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for row, label in zip(rows, labels.flatten().tolist(), strict=True):
        if label != -100:
            log_p = row - row.logsumexp(0)
            ce = -(1 - smoothing) * log_p[label] - smoothing * log_p.mean()
            total, weights = total + weight[label] * ce, weights + weight[label].item()
    return total / weights


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(7, C), (2, C, 3, 5)], ids=["images", "pixels"])
def test_weighted_mean_and_gradient(shape: tuple[int, ...], smoothing: float) -> None:
    student, teacher, labels = case(shape)
    student.requires_grad_()
    term = CrossEntropy(weight=2.0, class_weights=WEIGHTS, label_smoothing=smoothing)
    got = value(term, student, teacher, labels)
    expected = 2.0 * written_out(student, labels, smoothing)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    one, other = (torch.autograd.grad(-0.37 * loss, student)[0] for loss in (got, expected))
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-14)
    assert not one.movedim(1, -1)[labels == -100].any()
    if not smoothing:
        weight = torch.tensor(WEIGHTS, dtype=torch.float64)
        torchs = F.cross_entropy(student, labels, weight, ignore_index=-100)
        torch.testing.assert_close(got, 2.0 * torchs, rtol=1e-10, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", [(0.9, 0.1), (0.0, 1.0), (0.9, 0.0)], ids=str)
@pytest.mark.parametrize("shape", [(2, C, 33, 17), (1, 150, 7, 9)], ids=str)
def test_dense_losses_are_as_accurate_as_torch(
    shape: tuple[int, ...],
    parts: tuple[float, float],
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> None:
    student, teacher, labels = case(shape, dtype)
    student, teacher = (x.contiguous(memory_format=layout) for x in (student, teacher))
    kd_weight, ce_weight = parts
    weights = tuple(0.5 + c for c in range(shape[1]))
    term: LossTerm = CrossEntropy(weight=ce_weight or 1.0, class_weights=weights)
    if kd_weight:
        given: dict[str, Any] = {"class_weights": weights} if ce_weight else {}
        term = KD(weight=kd_weight, ce_weight=ce_weight, **given)
    weight_C = torch.tensor(weights)

    def eager(*batch: Tensor) -> Tensor:
        return eager_dense_loss(*batch, weight_C, kd_weight=kd_weight, ce_weight=ce_weight)

    def ours(*batch: Tensor) -> Tensor:
        return value(term, *batch)

    def measured(loss: Callable[..., Tensor], kind: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = student.detach().to(kind).requires_grad_()
        found = loss(leaf, teacher.to(kind), labels)
        return found.detach(), torch.autograd.grad(-0.37 * found, leaf)[0]

    got, plain, truth = (
        measured(ours, dtype),
        measured(eager, torch.float32),
        measured(eager, torch.float64),
    )
    assert_as_accurate("loss", got[0], plain[0], truth[0], floor=luck(truth[0]))
    assert_as_accurate("gradient", got[1], plain[1].to(dtype), truth[1])


def test_kd_weighs_its_cross_entropy_alone() -> None:
    student, teacher, labels = case((2, C, 3, 5))
    known = (labels != -100).flatten()
    for standardize in (False, True):
        plain = KD(ce_weight=0.25, standardize=standardize)
        weighted = KD(ce_weight=0.25, standardize=standardize, class_weights=WEIGHTS)
        tensors = {"x/student/logits": student, "x/teacher/logits": teacher}
        bind_term(weighted, tensors, num_classes=C)
        one, other = (call_term(term, tensors, labels).parts for term in (plain, weighted))
        torch.testing.assert_close(one["kd"], other["kd"], rtol=0, atol=0)
        torch.testing.assert_close(other["ce"], written_out(student, labels), rtol=1e-10, atol=0)
    # KL counts where the cross entropy does, and everywhere without one.
    everywhere = call_term(KD(ce_weight=0, temperature=3.0), tensors, labels).parts["kd"]
    counted = call_term(KD(ce_weight=0.1, temperature=3.0), tensors, labels).parts["kd"]
    rows = [
        (F.log_softmax(z / 3.0, dim=1)).movedim(1, -1).reshape(-1, C) for z in (student, teacher)
    ]
    kl = 9.0 * (rows[1].exp() * (rows[1] - rows[0])).sum(1)
    torch.testing.assert_close(everywhere, kl.mean(), rtol=1e-9, atol=0)
    torch.testing.assert_close(counted, kl[known].mean(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("term", [CrossEntropy(class_weights=WEIGHTS), KD(class_weights=WEIGHTS)])
def test_no_label_at_all_costs_nothing(term: LossTerm) -> None:
    student, teacher, labels = case((2, C, 3, 5), torch.float32)
    student.requires_grad_()
    loss = value(term, student, teacher, torch.full_like(labels, -100))
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, student)[0].any()


@pytest.mark.parametrize("shape", [(8, C), (2, C, 3, 5)], ids=["images", "pixels"])
@pytest.mark.parametrize("term", [CrossEntropy(class_weights=WEIGHTS), KD(class_weights=WEIGHTS)])
def test_a_batch_of_classes_that_weigh_nothing_teaches_nothing(
    term: LossTerm, shape: tuple[int, ...]
) -> None:
    """torch divides 0 by 0."""
    student, _, labels = case(shape, torch.float32)
    student.requires_grad_()
    # The teacher agrees, so that only the cross entropy could teach.
    loss = value(term, student, student.detach(), torch.full_like(labels, WEIGHTS.index(0.0)))
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-6


def context(labels: list[int], **given: Any) -> BindContext:
    return BindContext(len(labels), C, torch.tensor(labels), {}, **given)


def test_erfnets_formula_counts_images_or_pixels() -> None:
    images = context([0, 0, 0, 1, 4, -100, 0, 1])
    expected = [1 / math.log(1.10 + n / 7) for n in (4, 2, 0, 0, 1)]
    assert class_weights_C("erfnet", "ce", images).tolist() == pytest.approx(expected, rel=1e-6)
    count_C = torch.tensor([900, 30, 0, 60, 10])
    pixels = context([-100] * 8, count_pixels=lambda: count_C)
    for word, offset in (("erfnet", 1.10), ("erfnet_encoder", 1.20)):
        expected = [1 / math.log(offset + n / 1000) for n in count_C.tolist()]
        got = class_weights_C(word, "ce", pixels)  # type: ignore[arg-type]
        assert got.tolist() == pytest.approx(expected, rel=1e-6)


# The lists of Eromera/erfnet_pytorch train/main.py for road, sidewalk, building and motorcycle, and
# the shares of all pixels of Cityscapes' training set (11.5% of which have no class) behind them.
@pytest.mark.parametrize(
    ("word", "released"),
    [
        ("erfnet", [2.8149201869965, 6.9850029945374, 3.7890393733978, 10.405355453491]),
        ("erfnet_encoder", [2.3653597831726, 4.4237880706787, 2.9691488742828, 5.4631009101868]),
    ],
)
def test_released_lists_follow_from_shares_of_all_pixels(word: Any, released: list[float]) -> None:
    shares = [0.3264, 0.0538, 0.2015, 0.0009]
    rest = torch.tensor([*shares, 1 - sum(shares)])
    counts = context([-100], count_pixels=lambda: (1e7 * rest).long())
    got = class_weights_C(word, "ce", counts).tolist()[:4]
    assert got == pytest.approx(released, rel=3e-3)


def test_a_checkpoint_has_the_weights() -> None:
    student, teacher, labels = case((2, C, 3, 5))
    first = CrossEntropy(class_weights="erfnet")
    tensors = {"x/student/logits": student}
    bind_term(first, tensors, num_classes=C, count_pixels=lambda: torch.tensor([5, 4, 3, 2, 1]))
    resumed = CrossEntropy(class_weights="erfnet")
    bind_term(resumed, tensors, num_classes=C, count_pixels=lambda: torch.tensor([1, 1, 1, 1, 1]))
    resumed.load_state_dict(first.state_dict())
    one, other = (value(term, student, teacher, labels) for term in (first, resumed))
    assert one.item() == other.item()
    assert CrossEntropy().state_dict() == {}


def test_keys_of_a_recipe() -> None:
    spelled: dict[str, Any] = {
        "erfnet": "erfnet",
        "none": "none",
        "listed": [1, 2.5, 0],
        "one": 3,
    }
    keys = {
        name: typed_config("ce", {"weight": 1, "class_weights": v}) for name, v in spelled.items()
    }
    assert [dict(one)["class_weights"] for one in keys.values()] == [
        "erfnet",
        "none",
        (1.0, 2.5, 0.0),
        (3.0,),
    ]
    without = typed_config("ce", {"weight": 1}).outcome()
    assert keys["none"].outcome() == without
    assert "class_weights" not in without
    assert keys["erfnet"].outcome() == {**without, "class_weights": "erfnet"}
    with pytest.raises(UserError, match="expected one of none, erfnet, erfnet_encoder or a list"):
        typed_config("ce", {"weight": 1, "class_weights": "enet"})


def test_what_does_not_fit_is_an_error() -> None:
    student, teacher, _ = case((4, C), torch.float32)
    soft = teacher.softmax(1)
    with pytest.raises(UserError, match=r"losses.ce.class_weights weighs .* leave one of them out"):
        value(CrossEntropy(class_weights=WEIGHTS), student, teacher, soft)
    with pytest.raises(UserError, match=r"losses.kd.class_weights weighs .* leave one of them out"):
        value(KD(class_weights=WEIGHTS), student, teacher, soft)
    with pytest.raises(UserError, match="ce_weight=0 leaves out"):
        KD(ce_weight=0, class_weights="erfnet")
    with pytest.raises(UserError, match="has 2 numbers, 2 of them above 0: give 5, one per class"):
        value(CrossEntropy(class_weights=(1.0, 2.0)), student, teacher, soft)
    with pytest.raises(UserError, match="has 5 numbers, 0 of them above 0"):
        value(CrossEntropy(class_weights=(0.0,) * 5), student, teacher, soft)
    with pytest.raises(UserError, match="which this data cannot count: give 5 numbers"):
        class_weights_C("erfnet", "ce", context([-100, -100]))
    with pytest.raises(UserError, match="expected one of 'none', 'erfnet', 'erfnet_encoder' or a"):
        CrossEntropy(class_weights=(1.0, -2.0))


def synthetic(*overrides: str) -> Any:
    """A recipe of one epoch on small images, with class weights."""
    values = {
        **{"name": "test", "epochs": 1, "batch_size": 8, "compile": "off", "precision": "fp32"},
        "data": {"name": "synthetic", "train_limit": 40, "image_size": 8},
        "student": {"name": "resnet8", "width": 0.25},
    }
    return load_recipe(None, values=values, overrides=("losses.ce.weight=1", *overrides))


def test_a_list_on_the_command_line() -> None:
    recipe = synthetic("losses.ce.class_weights=1,2.5,0")
    assert dict(recipe.losses["ce"])["class_weights"] == (1.0, 2.5, 0.0)
    recipe = synthetic("losses.ce.class_weights=erfnet")
    assert dict(recipe.losses["ce"])["class_weights"] == "erfnet"
    assert synthetic("losses.ce.class_weights=none").digest() == synthetic().digest()


def test_mixed_images_have_no_class_to_weigh() -> None:
    recipe = synthetic("losses.ce.class_weights=erfnet", "augment.mixup=0.2")
    session = Session(World(0, 0, 1, torch.device("cpu"), None), Console(enabled=False), Path("."))
    data = open_recipe_data(recipe, session)
    with pytest.raises(UserError, match=r"losses.ce.class_weights weighs"):
        build_stage(recipe, data, (), session)
