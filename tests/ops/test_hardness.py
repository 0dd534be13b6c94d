"""`hardness` against float64, against published numbers, and in every corner of its contract.

With TRITON_INTERPRET=1 the same tests run the Triton kernels on the CPU; test_triton.py starts a
process that does.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastkd.kernels import hardness, select_hardest
from fastkd.testing import assert_as_accurate, eager_hardness, kd_case, rms, shape_id, sines

ORACLE = json.loads((Path(__file__).parent / "hardness_oracle.json").read_text())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CRITERIA = ["kl", "teacher_entropy", "student_entropy", "cross_entropy", "margin"]
NO_LABELS = torch.empty(0, dtype=torch.long)
# 101: a rest beyond whole vectors; 4099: longer than a block of sums, and two Triton blocks.
SHAPES = [(37, 10), (33, 101), (5, 1000), (3, 4099), (4, 2), (1, 33)]


@pytest.mark.interpreter_share(shape=[(33, 101)], dtype=[torch.float32, torch.bfloat16])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_error_against_float64_is_at_most_twice_eager(
    fast, interpreted, shape, dtype, criterion
) -> None:
    runs: list[list[Tensor]] = []
    # The interpreter is slow: a third of the seeds where there are rows enough.
    for seed in range(3 if interpreted and shape[0] > 2 else 10):
        student, (teacher,), labels = kd_case(shape, dtype, seed)
        got = hardness(student, teacher, labels, criterion=criterion, impl=fast)
        eager = eager_hardness(student.float(), teacher.float(), labels, criterion)
        truth = eager_hardness(student.double(), teacher.double(), labels, criterion)
        runs.append([got, eager, truth])
    got, eager, truth = (torch.stack(part) for part in zip(*runs, strict=True))
    assert got.dtype == torch.float32
    # A score may always be off by one unit in the last place.
    floor = torch.finfo(torch.float32).eps * rms(truth)
    assert_as_accurate(f"{criterion} {fast} {dtype}", got, eager, truth, floor=floor)


@pytest.mark.float64
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("shape", [(17, 10), (9, 1101)], ids=shape_id)
def test_float64(impl: str, shape, criterion: str) -> None:
    student, (teacher,), labels = kd_case(shape, torch.float64, 0)
    got = hardness(student, teacher, labels, criterion=criterion, temperature=2.5, impl=impl)
    want = eager_hardness(student, teacher, labels, criterion, 2.5)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_published_values(impl: str, dtype: torch.dtype) -> None:
    tolerance = 1e-6 if dtype == torch.float64 else 2e-6
    student, teacher = sines((8, 10), 1, 3, dtype), sines((8, 10), 2, 4, dtype)
    for criterion, values, order in (
        ("kl", "pick_d_T4", "kld"),
        ("teacher_entropy", "pick_teacher_entropy_T1", "teacher_entropy"),
        ("student_entropy", "pick_student_entropy_T1", "student_entropy"),
    ):
        scores = hardness(student, teacher, criterion=criterion, impl=impl)
        assert scores.tolist() == pytest.approx(ORACLE[values], rel=tolerance), criterion
        index = select_hardest(scores, 4, impl=impl).index
        assert index.tolist() == ORACLE[f"pick_idx_top4_ascending_{order}"][::-1]
        if criterion == "kl":
            ratio = scores[index].mean() / scores.mean()
            assert ratio.item() == pytest.approx(ORACLE["kl_ratio_r_eq4"], rel=tolerance)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(37, 10), (33, 101), (2, 4099)], ids=shape_id)
def test_equal_logits_score_exactly_zero(impl: str, shape, dtype) -> None:
    student = kd_case(shape, dtype, 0)[0]
    assert (hardness(student, student.clone(), impl=impl) == 0).all()


def test_kl_is_never_negative_near_equality(impl: str) -> None:
    """Plain fp32 torch reaches -4e-7 here; the kernels also keep the order of such samples."""
    student = kd_case((400, 101), torch.float32, 0)[0]
    teacher = student + 1e-4 * torch.rand(400, 1) * torch.randn(400, 101)
    scores = hardness(student, teacher, impl=impl)
    assert (scores >= 0).all()
    if impl != "reference":
        truth = eager_hardness(student.double(), teacher.double(), NO_LABELS, "kl")
        assert truth.max() < 1e-7
        # fp32 logits round at 1e-7, these differ by some 1e-4: 1 % is the error of the input.
        assert (scores.double() / truth - 1).abs().median() < 1e-2


def test_a_probability_of_zero_adds_nothing(impl: str) -> None:
    """The released code sums -p log p of a softmax that underflows: its NaN sorts as hardest."""
    logits = torch.tensor([[300.0, 0.0, -300.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    p = logits.softmax(1)
    assert (-p * p.log()).sum(1).isnan().tolist() == [True, False]
    for criterion in ("teacher_entropy", "student_entropy"):
        scores = hardness(logits, logits, criterion=criterion, impl=impl)
        assert scores[0] == 0
        assert select_hardest(scores, 1, impl=impl).index.tolist() == [1]
    kl = hardness(logits.flip(0), logits, temperature=1.0, impl=impl)
    want = eager_hardness(logits.flip(0).double(), logits.double(), NO_LABELS, "kl", 1.0)
    torch.testing.assert_close(kl.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("shape", [(6, 10), (6, 40), (3, 4400)], ids=shape_id)
def test_classes_masked_with_minus_infinity(impl: str, shape, criterion: str) -> None:
    kept, sides = 7, []
    for seed in range(4):
        student, (teacher,), _ = kd_case(shape, torch.float32, seed)
        inner = [student[:, -kept:].clone(), teacher[:, -kept:].clone()]
        last = torch.full((shape[0],), kept - 1)
        # The first ones, so that a whole block is minus infinity.
        student[:, :-kept] = teacher[:, :-kept] = -math.inf
        labels = last + shape[1] - kept
        got = hardness(student, teacher, labels, criterion=criterion, impl=impl)
        eager = eager_hardness(*inner, last, criterion)
        sides.append([got, eager, eager_hardness(*(x.double() for x in inner), last, criterion)])
    got, eager, truth = (torch.stack(part) for part in zip(*sides, strict=True))
    floor = torch.finfo(torch.float32).eps * rms(truth)
    assert_as_accurate(criterion, got, eager, truth, floor=floor)


def test_what_the_student_rules_out_and_the_teacher_does_not_is_infinitely_hard(impl: str) -> None:
    student, (teacher,), labels = kd_case((3, 40), torch.float32, 0)
    student[1, labels[1]] = -math.inf
    for criterion in ("kl", "cross_entropy", "margin"):
        scores = hardness(student, teacher, labels, criterion=criterion, impl=impl)
        assert scores.isinf().tolist() == [False, True, False]
        assert scores[1] > 0


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("shape", [(6, 10), (6, 40), (6, 4100)], ids=shape_id)
def test_nan_reaches_its_own_row_only(impl: str, shape, criterion: str) -> None:
    student, (teacher,), labels = kd_case(shape, torch.float32, 0)
    student[2, 3] = teacher[2, 3] = student[4, -1] = teacher[4, -1] = math.nan
    scores = hardness(student, teacher, labels, criterion=criterion, impl=impl)
    assert scores.isnan().tolist() == [False, False, True, False, True, False]


@pytest.mark.parametrize("criterion", ["cross_entropy", "margin"])
def test_a_label_that_is_no_class_scores_nan(impl: str, criterion: str) -> None:
    student, _, labels = kd_case((6, 40), torch.float32, 0)
    want = hardness(student, labels=labels, criterion=criterion, impl=impl)
    wrong = labels.clone()
    wrong[1], wrong[3], wrong[5] = -100, 40, -1
    got = hardness(student, labels=wrong, criterion=criterion, impl=impl)
    assert got.isnan().tolist() == [False, True, False, True, False, True]
    assert torch.equal(got[::2], want[::2])
    narrow = hardness(student, labels=wrong.to(torch.int32), criterion=criterion, impl=impl)
    torch.testing.assert_close(narrow, got, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_strides_and_leading_dimensions_do_not_matter(impl: str, criterion: str) -> None:
    student, (teacher,), labels = kd_case((12, 40), torch.float32, 0)
    padded = torch.full((12, 81), math.nan)
    padded[:, :40] = student
    wanted = hardness(student, teacher, labels, criterion=criterion, impl=impl)
    for s, t, y in (
        (student.t().contiguous().t(), teacher, labels),
        (padded[:, :40], teacher.t().contiguous().t(), labels),
        (student, teacher.repeat_interleave(2, 0)[::2], labels.repeat_interleave(3)[::3]),
        (student.view(3, 4, 40), teacher.view(3, 4, 40), labels.view(3, 4)),
    ):
        got = hardness(s, t, y, criterion=criterion, impl=impl)
        assert got.shape == y.shape
        torch.testing.assert_close(got.flatten(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float64),
        (torch.float64, torch.float16),
    ],
    ids=str,
)
def test_student_and_teacher_of_two_dtypes(impl: str, student_dtype, teacher_dtype) -> None:
    student, (teacher,), _ = kd_case((9, 40), torch.float32, 0)
    student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
    got = hardness(student, teacher, impl=impl)
    wide = torch.float64 in (student_dtype, teacher_dtype)
    assert got.dtype == (torch.float64 if wide else torch.float32)
    truth = eager_hardness(student.double(), teacher.double(), NO_LABELS, "kl")
    if wide:
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-14)
        return
    eager = eager_hardness(student.float(), teacher.float(), NO_LABELS, "kl")
    floor = torch.finfo(torch.float32).eps * rms(truth)
    assert_as_accurate("kl", got, eager, truth, floor=floor)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("shape", [(0, 10), (0, 100), (1, 2), (1, 1000), (2, 0, 5)], ids=shape_id)
def test_empty_and_single_pools(impl: str, shape, criterion: str) -> None:
    student, teacher = torch.randn(2, *shape)
    labels = torch.zeros(shape[:-1], dtype=torch.long)
    scores = hardness(student, teacher, labels, criterion=criterion, impl=impl)
    assert scores.shape == shape[:-1]
    assert scores.isfinite().all()


@pytest.mark.usefixtures("needs_cpp")
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_instruction_set_and_thread_count_gives_the_same(criterion: str) -> None:
    from fastkd.kernels._library import Core, core
    from fastkd.kernels.hardness import cpu

    found = core()
    assert isinstance(found, Core)
    student, (teacher,), labels = kd_case((101, 1013), torch.float32, 0)
    eager = eager_hardness(student, teacher, labels, criterion)
    truth = eager_hardness(student.double(), teacher.double(), labels, criterion)
    logits = teacher if criterion == "teacher_entropy" else student
    kind = criterion.removeprefix("teacher_").removeprefix("student_")
    before = torch.get_num_threads()
    try:
        for isa in found.isas:
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(cpu.hardness(logits, teacher, labels, kind, 4.0, isa=isa))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
            floor = torch.finfo(torch.float32).eps * rms(truth)
            assert_as_accurate(f"{criterion} {isa}", results[0], eager, truth, floor=floor)
    finally:
        torch.set_num_threads(before)


def test_only_what_a_criterion_needs_is_read(impl: str) -> None:
    student, (teacher,), labels = kd_case((5, 7), torch.float32, 0)
    other = torch.randn(3, 3)
    for criterion, needs in (
        ("teacher_entropy", {"teacher": teacher}),
        ("student_entropy", {"student": student}),
        ("margin", {"student": student, "labels": labels}),
    ):
        rest = {"student": other, "teacher": other, "labels": labels[:2]} | needs
        want = hardness(**needs, criterion=criterion, impl=impl)
        assert torch.equal(hardness(**rest, criterion=criterion, impl=impl), want)


BAD = {
    "no teacher": (
        dict(student=torch.randn(4, 10)),
        r"'kl' needs student and teacher; got no teacher",
    ),
    "no labels": (
        dict(student=torch.randn(4, 10), criterion="margin"),
        r"'margin' needs student and labels; got no labels",
    ),
    "criterion": (
        dict(student=torch.randn(4, 10), criterion="entropy"),
        r"got criterion='entropy'; expected one of kl, teacher_entropy, student_entropy",
    ),
    "class count": (
        dict(student=torch.randn(4, 10), teacher=torch.randn(4, 9)),
        r"student logits are \[4, 10\] but teacher logits are \[4, 9\].*class list",
    ),
    "one class": (
        dict(student=torch.randn(4, 1), criterion="student_entropy"),
        r"got student logits \[4, 1\].*at least 2 classes",
    ),
    "one row": (
        dict(teacher=torch.randn(10), criterion="teacher_entropy"),
        r"got teacher logits \[10\].*expected floating point \[N, C\]",
    ),
    "integer logits": (
        dict(student=torch.ones(4, 10, dtype=torch.long), criterion="student_entropy"),
        "torch.int64",
    ),
    "labels": (
        dict(student=torch.randn(4, 10), labels=torch.zeros(5).long(), criterion="margin"),
        r"got labels \[5\] of torch.int64; expected one class index per row.*logits \[4, 10\]",
    ),
    "teacher's device": (
        dict(student=torch.randn(4, 10), teacher=torch.empty(4, 10, device="meta")),
        "teacher logits are on meta but student logits are on cpu; move them there",
    ),
    "labels' device": (
        dict(
            student=torch.empty(4, 10, device="meta"),
            labels=torch.zeros(4).long(),
            criterion="margin",
        ),
        "labels are on cpu but student logits are on meta; move them there",
    ),
    "soft labels": (
        dict(student=torch.randn(4, 10), labels=torch.rand(4), criterion="cross_entropy"),
        "torch.float32; expected one class index",
    ),
    "temperature": (
        dict(student=torch.randn(4, 10), teacher=torch.randn(4, 10), temperature=0.0),
        r"temperature=0.0; expected a finite number above 0",
    ),
    "infinite temperature": (
        dict(student=torch.randn(4, 10), teacher=torch.randn(4, 10), temperature=float("inf")),
        r"temperature=inf; expected a finite number above 0",
    ),
    "impl": (dict(student=torch.randn(4, 10), teacher=torch.randn(4, 10), impl="cuda"), "'cuda'"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_named(name: str) -> None:
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        hardness(**arguments)
