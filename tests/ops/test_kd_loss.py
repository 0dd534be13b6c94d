"""`kd_loss` against float64, against published numbers, and in every corner of its contract.

With TRITON_INTERPRET=1 the same tests run the Triton kernels on the CPU; test_triton.py starts a
process that does.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fastkd.kernels import kd_loss, kd_loss_mean
from torch import Tensor

from fastkd.testing import assert_as_accurate, eager_kd_rows, kd_case, rms, shape_id, sines

ORACLE = json.loads((Path(__file__).parent / "kd_loss_oracle.json").read_text())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Few classes take the tile kernel, 33 and more the row kernel; 4099 is longer than a block of sums.
SHAPES = [(37, 10), (33, 101), (5, 1000), (3, 4099), (2, 2), (1, 33)]


@pytest.mark.interpreter_share(shape=[(33, 101)])
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


def option_case(shape: tuple[int, ...], option: str):
    o = OPTIONS[option]
    student, teachers, labels = kd_case(shape, torch.float32, 1, teachers=o.get("teachers", 1))
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


@pytest.mark.interpreter_share(shape=[(9, 101), (2, 19, 5, 13)])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", [(17, 10), (9, 101), (2, 19, 5, 13), (3, 150, 7)], ids=shape_id)
def test_options_match_the_reference_in_float64(fast: str, shape, option: str) -> None:
    student, teachers, labels, kwargs = option_case(shape, option)
    kwargs["class_dim"] = 1
    up = torch.randn(2, *student.movedim(1, -1).shape[:-1])
    results = []
    for wide, which in ((torch.float32, fast), (torch.float64, "reference")):
        leaf = student.to(wide).requires_grad_()
        others = teachers if which == fast else [t.double() for t in teachers]
        kd, ce, agree = kd_loss(leaf, others, labels, impl=which, **kwargs)
        grad = torch.zeros_like(leaf)
        total = (up[0] * kd + up[1] * ce).sum()
        if total.requires_grad:
            (grad,) = torch.autograd.grad(total, leaf)
        mean = kd_loss_mean(leaf, others, labels, impl=which, **kwargs)
        (mean_grad,) = torch.autograd.grad(3 * mean, leaf)
        results.append([x.detach().double() for x in (kd, ce, agree, grad, mean, mean_grad)])
    for name, got, want in zip(
        ["kd", "ce", "agree", "grad", "mean", "mean_grad"], *results, strict=True
    ):
        assert torch.allclose(got, want, rtol=1e-5, atol=5e-6), (
            f"{name}: {(got - want).abs().max()}"
        )


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
def test_few_long_rows(fast: str, near: bool) -> None:
    """Triton splits these over programs and merges the parts."""
    student, (teacher,), labels = kd_case((1, 33000), torch.float32, 0)
    if near:
        teacher = student + 1e-3 * teacher
    results = []
    for wide, impl in ((torch.float32, fast), (torch.float64, "reference")):
        leaf = student.to(wide).requires_grad_()
        kd, ce, agree = kd_loss(leaf, teacher.to(wide), labels, label_smoothing=0.1, impl=impl)
        results.append([kd, ce, agree, torch.autograd.grad((kd + ce).sum(), leaf)[0]])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-8)


def test_few_long_rows_are_split_and_everything_else_is_not() -> None:
    pytest.importorskip("triton")
    from fastkd.kernels.kd_loss.gpu import plan

    assert plan(1, 33000, 1).splits > 1  # the shape of test_few_long_rows
    assert plan(16, 1_000_000, 1).splits == 64
    assert plan(1024, 21841, 1).splits == plan(64, 100, 1).splits == 1
    assert plan(524288, 19, 131072).splits == 1
