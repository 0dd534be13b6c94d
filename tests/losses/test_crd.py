"""CRD: the released values over two steps, the formula in float64, draws, banks and resume."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.errors import UserError
from fastkd.losses import CRD, BindContext
from fastkd.losses.base.registry import typed_config
from fastkd.losses.base.term import TermInputs, TermOutput
from fastkd.testing import assert_as_accurate, bind_pair, sines

ORACLE = json.loads((Path(__file__).parent / "feature_oracle.json").read_text())["values"]
YES, NO = torch.tensor(True), torch.tensor(False)


def step(term: CRD, inputs: TermInputs, ok: Tensor = YES) -> TermOutput:
    """Forward and commit."""
    out = term(inputs)
    assert out.carry is not None
    term.commit({key: value.detach() for key, value in out.carry.items()}, inputs.index_N, ok)
    return out


def case(samples: int, batch: int, **keys: Any) -> tuple[CRD, TermInputs]:
    """A term in float64 with unit rows in its banks, and a batch of scattered ids."""
    term = CRD(**keys)
    student = torch.randn(batch, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(batch, 9, dtype=torch.float64)
    inputs = bind_pair(term, student, teacher, num_samples=samples)
    index_N = torch.randperm(samples)[:batch]
    return term.double(), inputs._replace(index_N=index_N, labels_N=term.labels_M[index_N])


def test_released_values(monkeypatch: pytest.MonkeyPatch) -> None:
    term = CRD(dim=12, negatives=6)
    inputs = bind_pair(term, sines((8, 16), 7), sines((8, 24), 8), num_samples=32)
    term.double()
    picked_NK = torch.tensor(ORACLE["crd_contrast_idx"])
    inputs = inputs._replace(index_N=torch.tensor(ORACLE["crd_y"]))
    assert torch.equal(picked_NK[:, 0], inputs.index_N)
    with torch.no_grad():
        term.student_MD.copy_(sines((32, 12), 18, 0.5))
        term.teacher_MD.copy_(sines((32, 12), 19, 0.5))
        for tensor, number, scale in (
            (term.embed_student.weight, 14, 0.2),
            (term.embed_student.bias, 15, 0.1),
            (term.embed_teacher.weight, 16, 0.2),
            (term.embed_teacher.bias, 17, 0.1),
        ):
            tensor.copy_(sines(tuple(tensor.shape), number, scale))
    directions: list[float] = []
    contrast = term.contrast
    monkeypatch.setattr(term, "draw_negatives", lambda _: picked_NK[:, 1:])
    monkeypatch.setattr(
        term, "contrast", lambda q: (directions.append(contrast(q).item()), contrast(q))[1]
    )
    for number in (1, 2):
        total = step(term, inputs).parts["crd"].item()
        assert total == pytest.approx(ORACLE[f"crd_step{number}_total"], rel=1e-6)
        expected = [ORACLE[f"crd_step{number}_{side}_term"] for side in ("student", "teacher")]
        assert directions[-2:] == pytest.approx(expected, rel=1e-6)
        assert term.normalizer_2.tolist() == pytest.approx(
            [ORACLE["crd_Z_v1"], ORACLE["crd_Z_v2"]], rel=1e-6
        )


def written_out(term: CRD, inputs: TermInputs, picked_NK: Tensor, z: list[float]) -> Tensor:
    """Bank rows gathered first, as the paper has it; one sample after the other."""
    student, teacher = inputs.tensors.values()
    num, negatives = len(term.labels_M), picked_NK.shape[1] - 1
    c = negatives / num
    total = student.new_zeros(())
    for embed, rows, bank_MD, norm in (
        (term.embed_student, student, term.teacher_MD, z[0]),
        (term.embed_teacher, teacher, term.student_MD, z[1]),
    ):
        for row, picked_K in zip(rows, picked_NK, strict=True):
            v = embed.weight @ row + embed.bias
            v = v / v.square().sum().sqrt()
            q = [torch.exp((v * bank_MD[j]).sum() / term.temperature) / norm for j in picked_K]
            total = total - torch.log(q[0] / (q[0] + c + 1e-7))
            for q_j in q[1:]:
                total = total - torch.log(c / (q_j + c + 1e-7))
    return total / len(student)


def test_value_and_gradient_are_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    term, inputs = case(30, 7, dim=5, negatives=11, temperature=0.2)
    step(term, inputs, YES)
    negatives_NK = term.draw_negatives(inputs.labels_N)
    monkeypatch.setattr(term, "draw_negatives", lambda _: negatives_NK)
    picked_NK = torch.cat([inputs.index_N[:, None], negatives_NK], 1)
    got = term(inputs).parts["crd"]
    expected = written_out(term, inputs, picked_NK, term.normalizer_2.tolist())
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    leaves = [inputs.tensors["x/student/pooled"], *term.parameters()]
    gradients = [torch.autograd.grad(-0.4 * x, leaves) for x in (got, expected)]
    for one, other in zip(*gradients, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def gathered_first(term: CRD, inputs: TermInputs, picked_NK: Tensor) -> Tensor:
    """The released code's order of operations, in any type."""
    student, teacher = inputs.tensors.values()
    c = (picked_NK.shape[1] - 1) / len(term.labels_M)
    total = student.new_zeros(())
    for embed, rows, bank_MD, z in (
        (term.embed_student, student, term.teacher_MD, term.normalizer_2[0]),
        (term.embed_teacher, teacher, term.student_MD, term.normalizer_2[1]),
    ):
        v_ND = F.normalize(embed(rows))
        q_NK = (torch.einsum("nkd,nd->nk", bank_MD[picked_NK], v_ND) / term.temperature).exp() / z
        own_N = torch.log(q_NK[:, 0] / (q_NK[:, 0] + c + 1e-7))
        other_N = torch.log(c / (q_NK[:, 1:] + c + 1e-7)).sum(1)
        total = total - (own_N + other_N).mean()
    return total


def test_fp32_is_as_accurate_as_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    term = CRD(dim=16)
    student, teacher = torch.randn(4, 6), torch.randn(4, 9)
    inputs = bind_pair(term, student, teacher, num_samples=25_000)
    step(term, inputs)
    negatives_NK = term.draw_negatives(inputs.labels_N)
    assert negatives_NK.shape == (4, 16384)
    monkeypatch.setattr(term, "draw_negatives", lambda _: negatives_NK)
    picked_NK = torch.cat([inputs.index_N[:, None], negatives_NK], 1)
    found = {}
    for name, dtype in (("got", torch.float32), ("eager", torch.float32), ("truth", torch.float64)):
        leaf = student.to(dtype).requires_grad_()
        tensors = {"x/student/pooled": leaf, "x/teacher/pooled": teacher.to(dtype)}
        wide = inputs._replace(tensors=tensors)
        term.to(dtype)
        loss = term(wide).parts["crd"] if name == "got" else gathered_first(term, wide, picked_NK)
        found[name] = loss.detach(), torch.autograd.grad(loss, leaf)[0]
    losses, gradients = zip(*(found[name] for name in ("got", "eager", "truth")), strict=True)
    assert_as_accurate("loss", *losses, floor=losses[2].item() * 2**-23)
    assert_as_accurate("gradient", *gradients)


def test_negatives_are_other_classes_never_twice_and_all_equally_often() -> None:
    torch.manual_seed(1)
    term = CRD(dim=2, negatives=4)
    bind_pair(term, torch.zeros(4, 3), torch.zeros(4, 3), num_samples=11, num_classes=5)
    labels_M = term.labels_M
    times_CM = torch.zeros(5, 11)
    draws = 4000
    for _ in range(draws // 20):
        labels_N = torch.arange(5).repeat(20)
        drawn_NK = term.draw_negatives(labels_N)
        assert (labels_M[drawn_NK] != labels_N[:, None]).all()
        assert (drawn_NK.sort(dim=1).values.diff(dim=1) > 0).all()
        times_CM.index_put_(
            (labels_N[:, None].expand_as(drawn_NK), drawn_NK), torch.ones(()), accumulate=True
        )
    for label in range(5):
        others = labels_M != label
        share = 4 / int(others.sum())
        spread = (share * (1 - share) / draws) ** 0.5
        assert ((times_CM[label, others] / draws - share).abs() < 5 * spread).all()
        assert (times_CM[label, ~others] == 0).all()


def test_a_step_moves_the_rows_of_its_batch_and_keeps_the_first_normalizer() -> None:
    term, inputs = case(20, 6, dim=4, negatives=5, momentum=0.25)
    before = {bank: getattr(term, bank).clone() for bank in term.banks}
    out = step(term, inputs, NO)
    assert all(torch.equal(getattr(term, bank), before[bank]) for bank in term.banks)
    step(term, inputs, YES)
    assert out.carry is not None
    for bank, new_ND in (
        ("student_MD", out.carry["student"]),
        ("teacher_MD", out.carry["teacher"]),
    ):
        expected = before[bank].clone()
        for row, place in zip(new_ND, inputs.index_N.tolist(), strict=True):
            moved = 0.25 * expected[place] + 0.75 * row
            expected[place] = moved / moved.norm()
        torch.testing.assert_close(getattr(term, bank), expected)
    first_2 = term.normalizer_2.clone()
    assert (first_2 > 0).all()
    step(term, inputs, YES)
    assert torch.equal(term.normalizer_2, first_2)


def test_of_a_repeated_sample_the_first_row_counts() -> None:
    term, inputs = case(20, 6, dim=4, negatives=5)
    twice = inputs._replace(index_N=inputs.index_N[[0, 1, 2, 1, 1, 5]])
    expected = term.student_MD[twice.index_N[1]].clone()
    out = step(term, twice)
    assert out.carry is not None
    expected = 0.5 * expected + 0.5 * out.carry["student"][1]
    torch.testing.assert_close(term.student_MD[twice.index_N[1]], expected / expected.norm())


def test_too_many_negatives_is_an_error_that_says_how_many_there_are() -> None:
    rows = torch.zeros(4, 3)
    with pytest.raises(UserError, match=r"losses.crd.negatives=50, but .* set it to at most 16$"):
        bind_pair(CRD(negatives=50), rows, rows, num_samples=20, num_classes=5)
    context = BindContext(20, 5, torch.arange(20) % 5, {n: (3,) for n in CRD().needs})
    CRD(negatives=16).bind(context)


def test_one_pair_only() -> None:
    with pytest.raises(ValueError, match="crd has one bank per network: give one pair, got"):
        CRD({"a": "a", "b": "b"})
    with pytest.raises(ValueError, match=r"losses.crd.pairs"):
        typed_config("crd", {"weight": 1, "pairs": {"a": "a", "b": "b"}})


def test_killed_ranks_end_with_the_same_banks(
    killed_runs: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    name = "crd on two ranks, before step 5"
    found = killed_runs(tmp_path / "runs", name)[name]
    assert found["codes"] == [[-9, -9], [0, 0]], found["log"]
    assert "resumed tiny/kd at epoch 2 of 2, step 1 of 4" in found["log"]
    # last.pt of the resumed run and of the run that nobody killed, bit by bit.
    assert found["different"] == []
    mine, other = found["states"]
    assert mine == other
    assert {f"terms.1.{bank}" for bank in ("student_MD", "teacher_MD", "normalizer_2")} <= set(mine)
    (path,) = (tmp_path / "runs").glob("crd-*/runs/tiny/kd/*/last.pt")
    saved = torch.load(path, weights_only=True)["terms"]["crd"]
    assert (saved["normalizer_2"] > 0).all()
    # Every one of the 57 rows was moved: all have length 1, which none had at first.
    for bank in ("student_MD", "teacher_MD"):
        torch.testing.assert_close(saved[bank].norm(dim=1), torch.ones(57))
