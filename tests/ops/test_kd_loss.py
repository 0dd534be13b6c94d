"""`kd_loss` against float64, against published numbers, and in every corner of its contract.

With TRITON_INTERPRET=1 the same tests run the Triton kernels on the CPU; test_triton.py starts a
process that does.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.kernels import kd_loss, kd_loss_mean
from fastkd.testing import assert_as_accurate, eager_kd_rows, kd_case, rms, shape_id, sines

ORACLE = json.loads((Path(__file__).parent / "kd_loss_oracle.json").read_text())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Few classes take the tile kernel, 33 and more the row kernel; 4099 is longer than a block of sums.
SHAPES = [(37, 10), (33, 101), (5, 1000), (3, 4099), (2, 2), (1, 33)]


@pytest.mark.interpreter_share(shape=[(33, 101)], dtype=[torch.float32, torch.bfloat16])
@pytest.mark.parametrize("teachers", [1, 3], ids=["one", "three"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_error_against_float64_is_at_most_twice_eager(
    fast, interpreted, shape, dtype, teachers
) -> None:
    parts: dict[str, list[list[Tensor]]] = {"kd": [], "ce": [], "grad": []}
    # The interpreter is slow: a third of the seeds where there are rows enough.
    for seed in range(3 if interpreted and shape[0] > 2 else 10):
        student, others, labels = kd_case(shape, dtype, seed, teachers=teachers)
        up_kd, up_ce = torch.randn(2, shape[0])
        for seeds in parts.values():
            seeds.append([])
        for kind in ("got", "eager", "truth"):
            wide = torch.float64 if kind == "truth" else torch.float32
            leaf = (student if kind == "got" else student.to(wide)).detach().requires_grad_()
            if kind == "got":
                kd, ce, _ = kd_loss(leaf, others, labels, impl=fast)
            else:
                kd, ce = eager_kd_rows(leaf, [t.to(wide) for t in others], labels, 4.0)
            (grad,) = torch.autograd.grad((up_kd * kd + up_ce * ce).sum(), leaf)
            grad = grad if kind == "truth" else grad.to(dtype)
            for name, value in (("kd", kd), ("ce", ce), ("grad", grad)):
                parts[name][-1].append(value.detach())
    for name, runs in parts.items():
        got, eager, truth = (torch.stack([run[i] for run in runs]) for i in range(3))
        # Per-row losses may always be off by one unit in the last place.
        floor = 0.0 if name == "grad" else torch.finfo(torch.float32).eps * rms(truth)
        # The interpreter truncates fp32 to bf16 where a chip rounds, and has its exp2 and log2 from
        # numpy, whose AVX-512 versions are off by up to 4 units in the last place.
        factor = 4.0 if interpreted else 2.0
        assert_as_accurate(f"{name} {fast} {dtype}", got, eager, truth, factor=factor, floor=floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_published_values(impl: str, dtype: torch.dtype) -> None:
    tolerance = 1e-6 if dtype == torch.float64 else 2e-6
    want = ORACLE["sines"]["values"]
    pair = {
        name: sines((8, 10), ORACLE["sines"][name]["a"], ORACLE["sines"][name]["scale"], dtype)
        for name in ("student", "teacher", "student_xprime", "teacher_xprime")
    }
    labels = (3 * torch.arange(8) + 1) % 10
    kd, ce, _ = kd_loss(pair["student"], pair["teacher"], labels, impl=impl)
    xprime = kd_loss(pair["student_xprime"], pair["teacher_xprime"], impl=impl).kd.mean()
    total = kd_loss_mean(pair["student"], pair["teacher"], labels, impl=impl)
    got = {
        "ce": ce.mean(),
        "kd_T4": kd.mean(),
        "kd_total_r0.1_a0.9": total,
        "kd_T4_on_xprime": xprime,
        "tlcutmix_total_r0.1_a0.9": total + 0.9 * xprime,
    }
    for name, value in got.items():
        assert value.item() == pytest.approx(want[name], rel=tolerance), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moonshine_vector(impl: str, dtype: torch.dtype) -> None:
    v = ORACLE["moonshine"]
    student = torch.tensor(v["student_logits"], dtype=dtype)
    teacher = torch.tensor(v["teacher_logits"], dtype=dtype)
    kd, ce, _ = kd_loss(student, teacher, torch.tensor(v["labels"]), impl=impl)
    tolerance = 1e-6 if dtype == torch.float64 else 2e-6
    want = [16 * kl for kl in v["kl_per_sample"]]
    assert kd.tolist() == pytest.approx(want, rel=tolerance, abs=tolerance)
    assert ce.mean().item() == pytest.approx(v["ce_mean"], rel=tolerance)
    # The authors' code divides the KL by N * C and doubles it; the other two are the plain mean
    # over rows and the authors' without the 2.
    for name, per_row in {
        "loss_moonshine_code": 2 / student.shape[1],
        "loss_fixed_at_code": 1,
        "loss_elementwise_mean_no_factor2": 1 / student.shape[1],
    }.items():
        loss = kd_loss_mean(
            student,
            teacher,
            torch.tensor(v["labels"]),
            kd_weight=v["alpha"] * per_row,
            ce_weight=1 - v["alpha"],
            temperature=v["T"],
            impl=impl,
        )
        assert loss.item() == pytest.approx(v[name], rel=tolerance), name


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(37, 10), (33, 101), (2, 19, 5, 7)], ids=shape_id)
def test_equal_logits_give_exactly_zero(impl: str, shape, dtype) -> None:
    student = kd_case(shape, dtype, 0)[0].requires_grad_()
    kd = kd_loss(student, student.detach().clone(), class_dim=1, impl=impl).kd
    (grad,) = torch.autograd.grad((kd * torch.randn(kd.shape)).sum(), student)
    assert (kd == 0).all()
    assert (grad == 0).all()
    loss = kd_loss_mean(student, student.detach().clone(), class_dim=1, impl=impl)
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, student)[0] == 0).all()


@pytest.mark.parametrize("teachers", [1, 2], ids=["one", "two"])
def test_kd_is_never_negative_near_equality(impl: str, teachers: int) -> None:
    """Plain fp32 torch reaches -4e-7 here; the C++ form also keeps its relative accuracy."""
    for shape in ((400, 10), (200, 101)):
        student = kd_case(shape, torch.float32, 0)[0]
        near = [student + 1e-4 * torch.randn(shape) for _ in range(teachers)]
        kd = kd_loss(student, near, impl=impl).kd
        assert (kd >= 0).all()
        truth = kd_loss(student.double(), [t.double() for t in near], impl="reference").kd
        assert truth.max() < 1e-7
        if impl != "reference" and teachers == 1:
            assert (kd.double() / truth - 1).abs().max() < 1e-2


OPTIONS = {
    "hard": {},
    "smooth": {"label_smoothing": 0.1},
    "ignore": {"ignore": True},
    "mask": {"mask": True},
    "weights": {"weights": True},
    "soft": {"soft": True},
    "soft-smooth": {"soft": True, "label_smoothing": 0.2, "weights": True, "mask": True},
    "no-labels": {"labels": None},
    "no-teacher": {"teachers": 0},
    "four-teachers": {"teachers": 4},
    "bf16-teacher": {"teacher_dtype": torch.bfloat16},
    "hot": {"temperature": 20.0},
    "cold": {"temperature": 0.5},
}


def option_case(shape: tuple[int, ...], option: str, seed: int):
    o = OPTIONS[option]
    student, teachers, labels = kd_case(shape, torch.float32, seed, teachers=o.get("teachers", 1))
    labels[(0,) * labels.dim()] = -100 if o.get("ignore") else 0
    if o.get("soft"):
        labels = torch.rand(shape).softmax(1)
    teachers = [t.to(o.get("teacher_dtype", torch.float32)) for t in teachers]
    kwargs = {k: o[k] for k in ("temperature", "label_smoothing") if k in o}
    rows = (shape[0], *shape[2:])
    if o.get("weights"):
        kwargs["weights"] = torch.rand(rows)
    if o.get("mask"):
        kwargs["mask"] = torch.rand(rows) > 0.3
    return student, teachers, o.get("labels", labels), kwargs


def eager_rows(
    student: Tensor, teachers: list[Tensor], labels: Tensor | None, kwargs: dict
) -> tuple[Tensor, Tensor, Tensor]:
    """(kd, ce, whether the row counts) in torch's own losses, classes in dimension 1."""
    kd = ce = (0 * student).sum(1)
    counts = torch.ones_like(kd, dtype=torch.bool)
    if teachers:
        others = [t.to(student.dtype) for t in teachers]
        kd = eager_kd_rows(student, others, None, kwargs.get("temperature", 4.0))[0]
    if labels is not None:
        smoothing = kwargs.get("label_smoothing", 0.0)
        target = labels.to(student.dtype) if labels.is_floating_point() else labels
        ce = F.cross_entropy(student, target, reduction="none", label_smoothing=smoothing)
        counts = counts if labels.is_floating_point() else labels != -100
    counts = counts & kwargs.get("mask", counts)
    weights = kwargs.get("weights", torch.ones(kd.shape)).to(student.dtype)
    return (*(torch.where(counts, weights * part, 0) for part in (kd, ce)), counts)


@pytest.mark.interpreter_share(shape=[(9, 101)])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", [(17, 10), (9, 101), (2, 19, 5, 13), (3, 150, 7)], ids=shape_id)
def test_options_are_at_most_twice_as_wrong_as_eager(
    fast: str, interpreted: bool, shape, option: str
) -> None:
    names = ("kd", "ce", "grad", "mean", "mean_grad")
    parts: dict[str, list[list[Tensor]]] = {name: [] for name in names}
    for seed in range(1 if interpreted else 10):
        student, teachers, labels, kwargs = option_case(shape, option, seed)
        up = torch.randn(2, *student.movedim(1, -1).shape[:-1])
        for values in parts.values():
            values.append([])
        for kind in ("got", "eager", "truth"):
            leaf = student.to(torch.float64 if kind == "truth" else torch.float32).requires_grad_()
            if kind == "got":
                rest = kwargs | {"class_dim": 1, "impl": fast}
                kd, ce, _ = kd_loss(leaf, teachers, labels, **rest)
                mean = kd_loss_mean(leaf, teachers, labels, **rest)
            else:
                kd, ce, counts = eager_rows(leaf, teachers, labels, kwargs)
                mean = (0.9 * kd + 0.1 * ce).sum() / counts.sum()
            total = (up[0] * kd + up[1] * ce).sum()
            grad = torch.zeros_like(leaf)
            if total.requires_grad:
                (grad,) = torch.autograd.grad(total, leaf, retain_graph=True)
            (mean_grad,) = torch.autograd.grad(3 * mean, leaf)
            for name, value in zip(parts, (kd, ce, grad, mean, mean_grad), strict=True):
                parts[name][-1].append(value.detach())
    for name, runs in parts.items():
        got, eager, truth = (torch.stack([run[i] for run in runs]) for i in range(3))
        # The kernel for dense logits adds soft labels over all classes in one fp32 number.
        dense_soft = name == "ce" and option.startswith("soft") and len(shape) > 2
        factor = 4.0 if interpreted else 3.0 if dense_soft else 2.0
        # A mean may always be off by two units in the last place, everything else by one.
        floor = (2 if name == "mean" else 1) * torch.finfo(torch.float32).eps * rms(truth)
        assert_as_accurate(f"{name} {option}", got, eager, truth, factor=factor, floor=floor)


@pytest.mark.interpreter_share(shape=[(2, 19, 5, 13)])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", [(17, 10), (9, 101), (2, 19, 5, 13), (3, 150, 7)], ids=shape_id)
def test_agreement_is_that_of_the_reference(fast: str, shape, option: str) -> None:
    student, teachers, labels, kwargs = option_case(shape, option, 1)
    got, want = (
        kd_loss(
            student.to(wide),
            [t.to(wide) for t in teachers],
            labels,
            impl=impl,
            **kwargs,
            class_dim=1,
        ).agree
        for wide, impl in ((torch.float32, fast), (torch.float64, "reference"))
    )
    assert torch.equal(got.double(), want)


@pytest.mark.float64
def test_cross_entropy_is_torchs(impl: str) -> None:
    student, _, labels = kd_case((33, 101), torch.float64, 0)
    for kwargs in ({}, {"label_smoothing": 0.1}):
        got = kd_loss(student, None, labels, impl=impl, **kwargs).ce
        want = F.cross_entropy(student, labels, reduction="none", **kwargs)
        assert torch.allclose(got, want, rtol=1e-12)
    soft = torch.rand(33, 101, dtype=torch.float64)
    got = kd_loss(student, None, soft, impl=impl).ce
    assert torch.allclose(got, F.cross_entropy(student, soft, reduction="none"), rtol=1e-12)


@pytest.mark.float64
@pytest.mark.parametrize("teachers", [1, 2], ids=["one", "two"])
@pytest.mark.parametrize("shape", [(4, 7), (3, 40), (2, 5, 3)], ids=shape_id)
def test_gradcheck(impl: str, shape, teachers: int) -> None:
    student, others, labels = kd_case(shape, torch.float64, 0, teachers=teachers)
    student.requires_grad_()
    up = torch.randn(2, *labels.shape, dtype=torch.float64)

    def rows(s: Tensor) -> Tensor:
        kd, ce, _ = kd_loss(s, others, labels, class_dim=1, label_smoothing=0.1, impl=impl)
        return up[0] * kd + up[1] * ce

    def mean(s: Tensor) -> Tensor:
        return 2.5 * kd_loss_mean(s, others, labels, class_dim=1, impl=impl)

    assert torch.autograd.gradcheck(rows, student)
    assert torch.autograd.gradcheck(mean, student)


@pytest.mark.float64
def test_second_derivatives(impl: str) -> None:
    student, others, labels = kd_case((3, 5), torch.float64, 0)
    student.requires_grad_()
    up = torch.randn(2, 3, dtype=torch.float64)

    def rows(s: Tensor) -> Tensor:
        kd, ce, _ = kd_loss(s, others, labels, impl=impl)
        return up[0] * kd + up[1] * ce

    assert torch.autograd.gradgradcheck(rows, student)
    assert torch.autograd.gradgradcheck(
        lambda s: kd_loss_mean(s, others, labels, impl=impl), student
    )


@pytest.mark.parametrize("near", [False, True], ids=["far", "near"])
def test_few_long_rows(fast: str, interpreted: bool, near: bool) -> None:
    """Triton splits these over programs and merges the parts."""
    student, (teacher,), labels = kd_case((1, 33000), torch.float32, 0)
    if near:
        teacher = student + 1e-3 * teacher
    results = []
    for wide, impl in (
        (torch.float32, fast),
        (torch.float32, "reference"),
        (torch.float64, "reference"),
    ):
        leaf = student.to(wide).requires_grad_()
        kd, ce, agree = kd_loss(leaf, teacher.to(wide), labels, label_smoothing=0.1, impl=impl)
        (grad,) = torch.autograd.grad((kd + ce).sum(), leaf)
        results.append([kd.detach(), ce.detach(), grad, agree])
    for name, got, eager, truth in zip(["kd", "ce", "grad", "agree"], *results, strict=True):
        if name == "agree":
            assert torch.equal(got.double(), truth)
            continue
        floor = 0.0 if name == "grad" else torch.finfo(torch.float32).eps * rms(truth)
        factor = 4.0 if interpreted else 2.0
        assert_as_accurate(name, got, eager, truth, factor=factor, floor=floor)


def test_few_long_rows_are_split_and_everything_else_is_not() -> None:
    pytest.importorskip("triton")
    from fastkd.kernels.kd_loss.gpu import plan

    assert plan(1, 33000, 1).splits > 1  # the shape of test_few_long_rows
    assert plan(16, 1_000_000, 1).splits == 64
    assert plan(1024, 21841, 1).splits == plan(64, 100, 1).splits == 1
    assert plan(524288, 19, 131072).splits == 1
