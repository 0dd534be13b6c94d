"""CWD and MGD: the released formulas written again in float64, odd and unequal maps, masks.

Sources of the formulas: SemSeg-distill/utils/criterion.py of irfanICMLL/TorchDistiller (class
CriterionCWD, norm_type channel, divergence kl) and seg/mmseg/distillation/losses/mgd.py of
yzd-v/MGD. Neither releases a value.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.losses import CWD, MGD
from fastkd.losses.base.term import LossTerm
from fastkd.testing import assert_loss_as_accurate, bind_pair, bind_term, call_term

PAIR = {"stage2": "stage2"}


def maps(student: tuple[int, ...], teacher: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    one, other = (
        2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in (student, teacher)
    )
    return one.requires_grad_(), other


def pooled(map_NCHW: Tensor, height: int, width: int) -> Tensor:
    """Average over whole blocks, which the sizes here are made of."""
    down, across = map_NCHW.shape[2] // height, map_NCHW.shape[3] // width
    return map_NCHW.unflatten(3, (width, across)).unflatten(2, (height, down)).mean((3, 5))


def channel_wise(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    n, c, _, _ = student.shape
    total = torch.zeros((), dtype=torch.float64)
    for image in range(n):
        for channel in range(c):
            p_s, p_t = (
                torch.exp(x[image, channel].flatten() / temperature) for x in (student, teacher)
            )
            p_s, p_t = p_s / p_s.sum(), p_t / p_t.sum()
            total = total + (p_t * (p_t.log() - p_s.log())).sum()
    return total / (n * c) * temperature**2


def check(term: LossTerm, student: Tensor, got: Tensor, expected: Tensor) -> None:
    """Values and gradients, for an upstream gradient that is not 1."""
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)
    leaves = [student, *term.parameters()]
    gradients = [torch.autograd.grad(-0.37 * x, leaves) for x in (got, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-12)
    assert gradients[0][0].abs().max() > 0


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("shape", [(3, 4, 7, 5), (1, 2, 1, 2), (2, 19, 9, 16)], ids=str)
def test_cwd_is_the_released_formula(shape: tuple[int, ...], temperature: float) -> None:
    student, teacher = maps(shape, shape)
    term = CWD(PAIR, temperature=temperature)
    inputs = bind_pair(term, student, teacher)
    assert list(term.parameters()) == []
    got = term(inputs).parts["cwd"]
    check(term, student, got, channel_wise(student, teacher, temperature))


@pytest.mark.parametrize("connector", ["conv", "released"])
def test_cwd_connects_widths_and_pools_sizes(connector: str) -> None:
    student, teacher = maps((3, 4, 6, 10), (3, 5, 12, 5))
    term = CWD(PAIR, temperature=2.0, connector=connector)  # type: ignore[arg-type]
    inputs = bind_pair(term, student, teacher)
    term.double()
    layers = term.connectors[0]
    with torch.no_grad():
        for parameter in term.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    got = term(inputs).parts["cwd"]
    convolution = layers[0] if connector == "released" else layers
    assert isinstance(convolution, nn.Conv2d)
    moved = torch.einsum("nchw,dc->ndhw", pooled(student, 6, 5), convolution.weight[..., 0, 0])
    assert convolution.bias is None
    if connector == "released":
        mean, variance = moved.mean((0, 2, 3)), moved.var((0, 2, 3), unbiased=False)
        moved = (moved - mean[:, None, None]) / (variance + 1e-5).sqrt()[:, None, None]
        norm = layers[1]
        moved = (moved * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
    check(term, student, got, channel_wise(moved, pooled(teacher, 6, 5), 2.0))


def test_cwd_takes_logits_by_default_and_sums_pairs() -> None:
    student, teacher = maps((2, 3, 4, 6), (2, 3, 4, 6))
    term = CWD()
    assert list(map(str, term.needs)) == ["x/student/logits", "x/teacher/logits"]
    both = CWD({"stage1": "stage1", "stage2": "stage1"})
    tensors = {need: teacher if "teacher" in need else student for need in both.needs}
    bind_term(both, tensors)
    one = term(bind_pair(term, student, teacher)).parts["cwd"]
    torch.testing.assert_close(call_term(both, tensors).parts["cwd"], 2 * one)
    # The same map with pixels in another order, and 0 for what is equal up to a constant.
    swapped = CWD()
    again = swapped(bind_pair(swapped, student.mT, teacher.mT)).parts["cwd"]
    torch.testing.assert_close(again, one)
    none = term(bind_pair(term, teacher + 3.0, teacher)).parts["cwd"]
    assert none.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cwd_is_as_accurate_as_torch(dtype: torch.dtype, layout: torch.memory_format) -> None:
    student, teacher = (x.detach().to(dtype) for x in maps((2, 6, 45, 31), (2, 6, 45, 31)))

    def eager(student: Tensor, teacher: Tensor) -> Tensor:
        log_p, p = (student / 4).flatten(2).log_softmax(2), (teacher / 4).flatten(2).softmax(2)
        return 16 * F.kl_div(log_p, p, reduction="sum") / (log_p.shape[0] * log_p.shape[1])

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        term = CWD(PAIR)
        return term(bind_pair(term, student, teacher)).parts["cwd"]

    given = (x.contiguous(memory_format=layout) for x in (student, teacher))
    assert_loss_as_accurate("cwd", ours, eager, *given)


def masked_generative(term: MGD, student: Tensor, teacher: Tensor, kept: Tensor) -> Tensor:
    """As the released code, with convolutions written as matrix products."""
    if isinstance(term.aligns[0], nn.Conv2d):
        weight = term.aligns[0].weight[..., 0, 0]
        student = torch.einsum("nchw,dc->ndhw", student, weight)
        student = student + term.aligns[0].bias[:, None, None]
    made = student * kept
    for place, layer in enumerate(term.generations[0]):
        if place == 1:
            made = made.clamp(min=0)
            continue
        columns = F.unfold(made, 3, padding=1)
        rows = layer.weight.flatten(1) @ columns + layer.bias[:, None]
        made = rows.unflatten(2, made.shape[2:])
    return ((made - teacher) ** 2).sum() / len(teacher)


@pytest.mark.parametrize("ratio", [0.0, 0.65, 0.75])
@pytest.mark.parametrize(
    ("student_shape", "teacher_shape"),
    [((3, 4, 5, 7), (3, 4, 5, 7)), ((2, 4, 6, 3), (2, 5, 6, 3)), ((2, 3, 4, 12), (2, 5, 8, 6))],
)
def test_mgd_is_the_released_formula(
    student_shape: tuple[int, ...], teacher_shape: tuple[int, ...], ratio: float
) -> None:
    student, teacher = maps(student_shape, teacher_shape)
    height, width = (min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True))
    term = MGD(PAIR, mask_ratio=ratio)
    inputs = bind_pair(term, student, teacher)
    term.double()
    torch.manual_seed(3)
    got = term(inputs).parts["mgd"]
    torch.manual_seed(3)
    kept = (torch.rand(len(student), 1, height, width) >= ratio).double()
    assert kept.mean().item() == pytest.approx(1 - ratio, abs=0.25)
    given = (pooled(student, height, width), pooled(teacher, height, width))
    check(term, student, got, masked_generative(term, *given, kept))


def test_masks_follow_torchs_seed_and_cover_their_share() -> None:
    student, teacher = maps((8, 3, 20, 30), (8, 3, 20, 30))
    term = MGD(PAIR)
    inputs = bind_pair(term, student, teacher)
    term.double()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(term(inputs).parts["mgd"].item())
    assert losses[0] == losses[1] != losses[2]
    # With a generation that passes on what it gets the loss tells which pixels were kept.
    term.generations[0] = nn.Identity()
    ones = torch.ones_like(teacher)
    tensors = dict(zip(map(str, term.needs), (ones, torch.zeros_like(ones)), strict=True))
    masked = call_term(term, tensors).parts["mgd"].item()
    assert masked / (3 * 20 * 30) == pytest.approx(0.25, abs=0.03)


def test_bf16_maps_are_summed_in_fp32() -> None:
    for term in (CWD(PAIR), MGD(PAIR)):
        student, teacher = torch.randn(2, 4, 6, 8).bfloat16(), torch.randn(2, 5, 3, 4).bfloat16()
        got = term(bind_pair(term, student, teacher)).parts[term.name]
        assert got.dtype == torch.float32
        assert torch.isfinite(got)


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(UserError, match=r"losses.cwd compares maps .* x/teacher/logits is \[5\]"):
        bind_pair(CWD(), torch.zeros(2, 3, 4, 4), torch.zeros(2, 5))
    with pytest.raises(UserError, match=r"losses.mgd compares maps .* x/student/stage2 is \[3\]"):
        bind_pair(MGD(PAIR), torch.zeros(2, 3), torch.zeros(2, 5, 4, 4))
    with pytest.raises(UserError, match="have only one in common: pair larger maps"):
        bind_pair(CWD(PAIR), torch.zeros(2, 3, 4, 1), torch.zeros(2, 3, 1, 6))
    with pytest.raises(UserError, match="mask_ratio=1"):
        MGD(PAIR, mask_ratio=1.0)
