"""`kd_loss` against float64, against published numbers, and in every corner of its contract.

With TRITON_INTERPRET=1 the same tests run the Triton kernels on the CPU; test_kd_loss_triton.py
starts a process that does.
"""

import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fastkd.kernels import kd_loss, kd_loss_mean, status
from fastkd.kernels.kd_loss.reference import kd_loss_reference
from torch import Tensor

from fastkd.testing import assert_as_accurate, eager_kd_rows, rms

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_CPP = status()["kd_loss"]["cpu"].startswith("c++") and not INTERPRETED
cpp = pytest.param("cpp", marks=pytest.mark.skipif(not HAS_CPP, reason="no C++ core"))
FAST = ["triton"] if INTERPRETED else [cpp]
IMPLS = FAST if INTERPRETED else ["reference", cpp]
ORACLE = json.loads((Path(__file__).parent / "kd_loss_oracle.json").read_text())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Few classes take the tile kernel, 33 and more the row kernel; 4099 is longer than a block of sums.
SHAPES = [(37, 10), (33, 101), (5, 1000), (3, 4099), (2, 2), (1, 33)]


def case(shape: tuple[int, ...], dtype: torch.dtype, seed: int, spread: float = 3.0, teachers=1):
    generator = torch.Generator().manual_seed(seed)
    student = (spread * torch.randn(shape, generator=generator)).to(dtype)
    others = [(spread * torch.randn(shape, generator=generator)).to(dtype) for _ in range(teachers)]
    rows = (shape[0], *shape[2:])
    labels = torch.randint(0, shape[1], rows, generator=generator)
    return student, others, labels


@pytest.fixture(autouse=True)
def _no_float64_on_triton(request: pytest.FixtureRequest) -> None:
    params = getattr(request.node, "callspec", None)
    values = params.params.values() if params else ()
    needs = torch.float64 in values or request.node.get_closest_marker("float64")
    if "triton" in values and needs:
        pytest.skip("float64 takes the reference on a GPU")


def ids(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def sines(a: int, scale: float, dtype: torch.dtype) -> Tensor:
    n = torch.arange(1, 81, dtype=torch.float64)
    return (scale * torch.sin(12.9898 * n + 78.233 * a)).view(8, 10).to(dtype)


@pytest.mark.parametrize("teachers", [1, 3], ids=["one", "three"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("impl", FAST)
def test_error_against_float64_is_at_most_twice_eager(impl, shape, dtype, teachers) -> None:
    parts: dict[str, list[list[Tensor]]] = {"kd": [], "ce": [], "grad": []}
    # The interpreter is slow: a third of the seeds where there are rows enough.
    for seed in range(3 if INTERPRETED and shape[0] > 2 else 10):
        student, others, labels = case(shape, dtype, seed, teachers=teachers)
        up_kd, up_ce = torch.randn(2, shape[0])
        for name in parts:
            parts[name].append([])
        for kind in ("got", "eager", "truth"):
            wide = torch.float64 if kind == "truth" else torch.float32
            leaf = (student if kind == "got" else student.to(wide)).detach().requires_grad_()
            if kind == "got":
                kd, ce, _ = kd_loss(leaf, others, labels, impl=impl)
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
        # The interpreter truncates fp32 to bf16 where a chip rounds: twice the error at best.
        factor = 4.0 if INTERPRETED and name == "grad" and dtype == torch.bfloat16 else 2.0
        assert_as_accurate(f"{name} {impl} {dtype}", got, eager, truth, factor=factor, floor=floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_published_values(impl: str, dtype: torch.dtype) -> None:
    tolerance = 1e-6 if dtype == torch.float64 else 2e-6
    want = ORACLE["sines"]["values"]
    pair = {
        name: sines(ORACLE["sines"][name]["a"], ORACLE["sines"][name]["scale"], dtype)
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
@pytest.mark.parametrize("impl", IMPLS)
def test_moonshine_vector(impl: str, dtype: torch.dtype) -> None:
    v = ORACLE["moonshine"]
    student = torch.tensor(v["student_logits"], dtype=dtype)
    teacher = torch.tensor(v["teacher_logits"], dtype=dtype)
    kd, ce, _ = kd_loss(student, teacher, torch.tensor(v["labels"]), impl=impl)
    tolerance = 1e-6 if dtype == torch.float64 else 2e-6
    want = [16 * kl for kl in v["kl_per_sample"]]
    assert kd.tolist() == pytest.approx(want, rel=tolerance, abs=tolerance)
    assert ce.mean().item() == pytest.approx(v["ce_mean"], rel=tolerance)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(37, 10), (33, 101), (2, 19, 5, 7)], ids=ids)
@pytest.mark.parametrize("impl", IMPLS)
def test_equal_logits_give_exactly_zero(impl: str, shape, dtype) -> None:
    student = case(shape, dtype, 0)[0].requires_grad_()
    kd = kd_loss(student, student.detach().clone(), class_dim=1, impl=impl).kd
    (grad,) = torch.autograd.grad((kd * torch.randn(kd.shape)).sum(), student)
    assert (kd == 0).all()
    assert (grad == 0).all()
    loss = kd_loss_mean(student, student.detach().clone(), class_dim=1, impl=impl)
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, student)[0] == 0).all()


@pytest.mark.parametrize("teachers", [1, 2], ids=["one", "two"])
@pytest.mark.parametrize("impl", IMPLS)
def test_kd_is_never_negative_near_equality(impl: str, teachers: int) -> None:
    """Plain fp32 torch reaches -4e-7 here; the C++ form also keeps its relative accuracy."""
    for shape in ((400, 10), (200, 101)):
        student = case(shape, torch.float32, 0)[0]
        near = [student + 1e-4 * torch.randn(shape) for _ in range(teachers)]
        kd = kd_loss(student, near, impl=impl).kd
        assert (kd >= 0).all()
        truth = kd_loss_reference(
            student.double(), [t.double() for t in near], None, None, None, 4.0, 0.0, -100, -1
        )[0]
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
    student, teachers, labels = case(shape, torch.float32, 1, teachers=o.get("teachers", 1))
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


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", [(17, 10), (9, 101), (2, 19, 5, 13), (3, 150, 7)], ids=ids)
@pytest.mark.parametrize("impl", FAST)
def test_options_match_the_reference_in_float64(impl: str, shape, option: str) -> None:
    student, teachers, labels, kwargs = option_case(shape, option)
    kwargs["class_dim"] = 1
    up = torch.randn(2, *student.movedim(1, -1).shape[:-1])
    results = []
    for wide, which in ((torch.float32, impl), (torch.float64, "reference")):
        leaf = student.to(wide).requires_grad_()
        others = teachers if which == impl else [t.double() for t in teachers]
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
@pytest.mark.parametrize("impl", IMPLS)
def test_cross_entropy_is_torchs(impl: str) -> None:
    student, _, labels = case((33, 101), torch.float64, 0)
    for kwargs in ({}, {"label_smoothing": 0.1}):
        got = kd_loss(student, None, labels, impl=impl, **kwargs).ce
        want = F.cross_entropy(student, labels, reduction="none", **kwargs)
        assert torch.allclose(got, want, rtol=1e-12)
    soft = torch.rand(33, 101, dtype=torch.float64)
    got = kd_loss(student, None, soft, impl=impl).ce
    assert torch.allclose(got, F.cross_entropy(student, soft, reduction="none"), rtol=1e-12)


@pytest.mark.float64
@pytest.mark.parametrize("teachers", [1, 2], ids=["one", "two"])
@pytest.mark.parametrize("shape", [(4, 7), (3, 40), (2, 5, 3)], ids=ids)
@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl: str, shape, teachers: int) -> None:
    student, others, labels = case(shape, torch.float64, 0, teachers=teachers)
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
@pytest.mark.parametrize("impl", IMPLS)
def test_second_derivatives(impl: str) -> None:
    student, others, labels = case((3, 5), torch.float64, 0)
    student.requires_grad_()
    up = torch.randn(2, 3, dtype=torch.float64)

    def rows(s: Tensor) -> Tensor:
        kd, ce, _ = kd_loss(s, others, labels, impl=impl)
        return up[0] * kd + up[1] * ce

    assert torch.autograd.gradgradcheck(rows, student)
    assert torch.autograd.gradgradcheck(
        lambda s: kd_loss_mean(s, others, labels, impl=impl), student
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_second_backward_and_inputs_left_alone(impl: str, scale: float, dtype) -> None:
    student, others, labels = case((9, 40), dtype, 0)
    student.requires_grad_()
    before = [x.clone() for x in (student.detach(), *others)]
    loss = scale * kd_loss_mean(student, others, labels, impl=impl)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(second, kept, rtol=2e-2 if dtype.itemsize == 2 else 1e-6, atol=0)
    student.grad = None
    loss = kd_loss_mean(student, others, labels, impl=impl)
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(student.grad, 3 * once, rtol=2e-2, atol=0)
    for now, then in zip((student.detach(), *others), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(64, 10), (33, 1000), (2, 19, 64, 64)], ids=ids)
@pytest.mark.skipif(not HAS_CPP, reason="no C++ core")
def test_repeats_bit_by_bit_on_any_number_of_threads(shape, threads: int) -> None:
    student, others, labels = case(shape, torch.float32, 0)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (2, threads, threads):
            torch.set_num_threads(count)
            leaf = student.clone().requires_grad_()
            loss = kd_loss_mean(leaf, others, labels, class_dim=1, impl="cpp")
            results.append((loss.item(), torch.autograd.grad(loss, leaf)[0]))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert loss == results[0][0]
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl: str) -> None:
    student, (teacher,), labels = case((12, 40), torch.float32, 0)
    want = kd_loss(student, teacher, labels, impl=impl)
    wide = torch.full((12, 80), math.nan)
    wide[:, :40] = student
    for s, t in (
        (student.t().contiguous().t(), teacher),
        (wide[:, :40], teacher.repeat(2, 1)[::2].contiguous().expand(12, 40)),
        (student, teacher.t().contiguous().t()),
    ):
        if not torch.equal(t, teacher):
            t = teacher
        s = s.detach().requires_grad_()
        got = kd_loss(s, t, labels, impl=impl)
        for a, b in zip(got, want, strict=True):
            assert torch.allclose(a, b, rtol=1e-6)
        (grad,) = torch.autograd.grad((got.kd + got.ce).sum(), s)
        leaf = student.clone().requires_grad_()
        parts = kd_loss(leaf, teacher, labels, impl=impl)
        (plain,) = torch.autograd.grad((parts.kd + parts.ce).sum(), leaf)
        assert torch.allclose(grad, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("classes", [19, 40])
@pytest.mark.parametrize("impl", IMPLS)
def test_channels_last_and_mixed_layouts(impl: str, classes: int) -> None:
    student, (teacher,), labels = case((2, classes, 6, 5), torch.float32, 0)
    want = kd_loss(student.double(), teacher.double(), labels, class_dim=1, impl="reference")
    grads = []
    for s_format in (torch.contiguous_format, torch.channels_last):
        for t_format in (torch.contiguous_format, torch.channels_last):
            s = student.clone(memory_format=s_format).requires_grad_()
            t = teacher.clone(memory_format=t_format)
            got = kd_loss(s, t, labels, class_dim=1, impl=impl)
            for a, b in zip(got, want, strict=True):
                assert torch.allclose(a.double(), b, rtol=2e-5, atol=1e-6)
            (grad,) = torch.autograd.grad(kd_loss_mean(s, t, labels, class_dim=1, impl=impl), s)
            assert impl == "reference" or grad.stride() == s.stride()
            grads.append(grad)
    for grad in grads[1:]:
        assert torch.allclose(grad, grads[0], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("shape", [(0, 10), (0, 100), (1, 10), (1, 1000), (0, 5, 2, 2)], ids=ids)
@pytest.mark.parametrize("impl", IMPLS)
def test_empty_and_single_batches(impl: str, shape) -> None:
    student, others, labels = case(shape, torch.float32, 0)
    student.requires_grad_()
    loss = kd_loss_mean(student, others, labels, class_dim=1, impl=impl)
    loss.backward()
    assert math.isfinite(loss.item())
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert (loss.item() == 0) == (shape[0] == 0)


@pytest.mark.parametrize("impl", IMPLS)
def test_all_rows_ignored_give_zero(impl: str) -> None:
    student, others, labels = case((6, 40), torch.float32, 0)
    student.requires_grad_()
    loss = kd_loss_mean(student, others, torch.full_like(labels, -100), impl=impl)
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, student)[0] == 0).all()


@pytest.mark.parametrize("shape", [(6, 10), (6, 40)], ids=ids)
@pytest.mark.parametrize("impl", IMPLS)
def test_nan_reaches_its_own_row_only(impl: str, shape) -> None:
    student, (teacher,), labels = case(shape, torch.float32, 0)
    student[2, 3] = math.nan
    student[4, 1] = math.nan
    labels[4] = -100
    student.requires_grad_()
    kd, ce, _ = kd_loss(student, teacher, labels, impl=impl)
    bad = torch.tensor([False, False, True, False, False, False])
    assert torch.equal(kd.isnan(), bad)
    assert torch.equal(ce.isnan(), bad)
    if impl != "reference":
        (grad,) = torch.autograd.grad((kd + ce).sum(), student)
        assert torch.equal(grad.isnan().any(1), bad)
        assert (grad[4] == 0).all()


@pytest.mark.parametrize("shape", [(6, 10), (6, 40)], ids=ids)
@pytest.mark.parametrize("impl", IMPLS)
def test_classes_masked_with_minus_infinity(impl: str, shape) -> None:
    student, (teacher,), _ = case(shape, torch.float32, 0)
    labels = torch.zeros(6, dtype=torch.long)
    want = kd_loss(student[:, :7], teacher[:, :7], labels, impl=impl)
    for x in (student, teacher):
        x[:, 7:] = -math.inf
    student.requires_grad_()
    got = kd_loss(student, teacher, labels, impl=impl)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad((got.kd + got.ce).sum(), student)
    assert grad.isfinite().all()
    assert (grad[:, 7:] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_do_not_overflow(impl: str) -> None:
    student = torch.tensor([[1e4, 0.0, -1e4], [3e38, -3e38, 0.0]])
    kd, ce, _ = kd_loss(student, student.flip(1) / 2, torch.tensor([0, 1]), impl=impl)
    assert kd[0].isfinite()
    assert ce[0].isfinite()
    assert kd[0] > 1e3


@pytest.mark.parametrize("impl", IMPLS)
def test_agreement_is_argmax_agreement_ties_included(impl: str) -> None:
    for shape in ((200, 6), (50, 40)):
        student, teacher = torch.randint(0, 3, (2, *shape)).float()
        want = (student.argmax(1) == teacher.argmax(1)).float()
        assert 0 < want.mean() < 1
        assert torch.equal(kd_loss(student, teacher, impl=impl).agree, want)


def test_no_gradient_reaches_teacher_or_soft_labels() -> None:
    student, (teacher,), _ = case((4, 6), torch.float32, 0)
    student.requires_grad_()
    teacher.requires_grad_()
    soft = torch.rand(4, 6).softmax(1).requires_grad_()
    for impl in ("reference", "triton" if INTERPRETED else None):
        kd_loss_mean(student, teacher, soft, impl=impl).backward()
    assert teacher.grad is None
    assert soft.grad is None
    assert student.grad is not None


BAD = {
    "class count": (
        lambda: kd_loss(torch.randn(4, 10), torch.randn(4, 9)),
        r"student logits are \[4, 10\] but teacher logits are \[4, 9\].*class list",
    ),
    "swapped": (
        lambda: kd_loss(torch.randn(4, 10), torch.randn(4, 10, requires_grad=True)),
        r"order is kd_loss\(student, teacher, labels\)",
    ),
    "temperature": (lambda: kd_loss(torch.randn(4, 10), temperature=0), "temperature=0"),
    "smoothing": (lambda: kd_loss(torch.randn(4, 10), label_smoothing=1.5), "label_smoothing=1.5"),
    "one class": (lambda: kd_loss(torch.randn(4, 1)), "got 1 classes"),
    "labels shape": (
        lambda: kd_loss(torch.randn(4, 10), None, torch.zeros(5, dtype=torch.long)),
        r"labels are \[5\]; expected \[4\]",
    ),
    "integer logits": (lambda: kd_loss(torch.ones(4, 10, dtype=torch.long)), "torch.int64"),
    "five teachers": (lambda: kd_loss(torch.randn(4, 10), [torch.randn(4, 10)] * 5), "at most 4"),
    "mask dtype": (lambda: kd_loss(torch.randn(4, 10), mask=torch.ones(4)), "expected torch.bool"),
    "weights shape": (lambda: kd_loss(torch.randn(4, 10), weights=torch.ones(3)), r"\[3\]"),
    "class dim": (lambda: kd_loss(torch.randn(4, 10, 3, 3), class_dim=2), "class_dim=2"),
    "impl": (lambda: kd_loss(torch.randn(4, 10), impl="cuda"), "impl='cuda'"),
    "probabilities": (
        lambda: kd_loss(torch.randn(4, 10).softmax(1), check=True),
        "these are probabilities",
    ),
    "label range": (
        lambda: kd_loss(torch.randn(4, 10), None, torch.tensor([0, 1, 10, 2]), check=True),
        "label 10 is no class",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_named(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(not HAS_CPP, reason="no C++ core")
@pytest.mark.parametrize("shape", [(6, 10), (6, 40)], ids=ids)
def test_bad_label_is_named_without_check(shape) -> None:
    student, others, labels = case(shape, torch.float32, 0)
    labels[4] = 77
    with pytest.raises(ValueError, match="label 77 in row 4 is no class"):
        kd_loss(student, others, labels, impl="cpp")


@pytest.mark.skipif(not INTERPRETED, reason="Triton's own launch shapes")
@pytest.mark.parametrize("near", [False, True], ids=["far", "near"])
def test_triton_splits_few_long_rows_over_programs(near: bool) -> None:
    from fastkd.kernels.kd_loss import gpu

    assert gpu.plan(1, 33000, 1).splits > 1
    student, (teacher,), labels = case((1, 33000), torch.float32, 0)
    if near:
        teacher = student + 1e-3 * teacher
    results = []
    for wide, impl in ((torch.float32, "triton"), (torch.float64, "reference")):
        leaf = student.to(wide).requires_grad_()
        kd, ce, agree = kd_loss(leaf, teacher.to(wide), labels, label_smoothing=0.1, impl=impl)
        results.append([kd, ce, agree, torch.autograd.grad((kd + ce).sum(), leaf)[0]])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-8)
