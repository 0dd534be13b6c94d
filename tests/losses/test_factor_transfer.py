"""FT: the released value, both parts written out, who is trained by which of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.losses import FT
from fastkd.testing import bind_pair, sines

ORACLE = json.loads((Path(__file__).parent / "feature_oracle.json").read_text())["values"]
PAIR = {"stage3": "stage3"}


def test_released_value() -> None:
    term = FT(PAIR)
    inputs = bind_pair(term, sines((8, 5, 4, 4), 26), sines((8, 5, 4, 4), 27))
    for modules in (term.translators, term.encoders, term.decoders):
        modules[0] = nn.Identity()
    parts = term(inputs).parts
    assert parts["ft"].item() == pytest.approx(ORACLE["ft_p1_2_p2_1"], rel=1e-6)
    assert parts["ft_reconstruction"].item() == 0


def leaky(x: Tensor) -> Tensor:
    return torch.maximum(x, 0.1 * x)


def narrowed(layers: Any, x: Tensor) -> Tensor:
    """The three convolutions of encoder or translator; batch statistics where it has norms."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            x = F.conv2d(x, layer.weight, layer.bias, padding=1)
        elif isinstance(layer, nn.BatchNorm2d):
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            x = (x - mean[:, None, None]) / (variance + 1e-5).sqrt()[:, None, None]
            x = x * layer.weight[:, None, None] + layer.bias[:, None, None]
        else:
            x = leaky(x)
    return x


def widened_again(layers: Any, x: Tensor) -> Tensor:
    """A transposed convolution of stride 1 is a convolution with the kernel turned round."""
    for layer in layers:
        if isinstance(layer, nn.ConvTranspose2d):
            kernel = layer.weight.transpose(0, 1).flip(2, 3)
            x = leaky(F.conv2d(x, kernel, layer.bias, padding=1))
    return x


def area(factor: Tensor, size: list[int]) -> Tensor:
    energy = F.interpolate(factor, size, mode="area").square().mean(1)
    return energy / energy.square().sum((1, 2), keepdim=True).sqrt()


@pytest.mark.parametrize("sides", [((5, 3), (5, 3)), ((6, 10), (3, 5)), ((3, 4), (5, 4))])
def test_values_and_gradients_are_the_formulas(sides: tuple[tuple[int, int], ...]) -> None:
    student = torch.randn(3, 4, *sides[0], dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 7, *sides[1], dtype=torch.float64)
    term = FT(PAIR, rate=0.4)
    inputs = bind_pair(term, student, teacher)
    term.double()
    translator, encoder, decoder = term.translators[0], term.encoders[0], term.decoders[0]
    assert [layer.out_channels for layer in encoder if isinstance(layer, nn.Conv2d)] == [7, 2, 2]
    size = [min(pair) for pair in zip(*sides, strict=True)]
    factor = narrowed(encoder, teacher)
    apart = area(narrowed(translator, student), size) - area(factor.detach(), size)
    error = widened_again(decoder, factor) - teacher
    expected = {
        "ft": apart.abs().sum() / apart.numel(),
        "ft_reconstruction": (error * error).sum() / error.numel(),
    }
    got = term(inputs).parts
    assert got.keys() == expected.keys() == term.weights.keys()
    paraphraser = [*encoder.parameters(), *decoder.parameters()]
    for part, leaves in (
        ("ft", [student, *translator.parameters()]),
        ("ft_reconstruction", paraphraser),
    ):
        torch.testing.assert_close(got[part], expected[part], rtol=1e-9, atol=0)
        gradients = [
            torch.autograd.grad(-1.7 * x[part], leaves, retain_graph=True) for x in (got, expected)
        ]
        for one, other in zip(*gradients, strict=True):
            assert other.abs().max() > 0
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-12)
    # The target does not come to meet the student, nor the student the paraphraser.
    for part, leaves in (("ft", paraphraser), ("ft_reconstruction", [student])):
        grads = torch.autograd.grad(got[part], leaves, retain_graph=True, allow_unused=True)
        assert grads == (None,) * len(leaves)


def test_the_paraphraser_has_a_fifth_of_the_rate() -> None:
    term = FT(PAIR)
    bind_pair(term, torch.zeros(2, 3, 4, 4), torch.zeros(2, 6, 4, 4))
    translators, paraphrasers = term.param_groups()
    assert (translators["lr_scale"], paraphrasers["lr_scale"]) == (1.0, 0.2)
    groups = [{id(p) for p in group["params"]} for group in (translators, paraphrasers)]
    assert groups[0].isdisjoint(groups[1])
    assert groups[0] | groups[1] == {id(p) for p in term.parameters()}


def test_modules_run_in_the_type_of_the_features_and_sum_in_fp32() -> None:
    term = FT(PAIR)
    student, teacher = torch.randn(3, 4, 6, 6).bfloat16(), torch.randn(3, 6, 3, 3).bfloat16()
    parts = term(bind_pair(term, student, teacher)).parts
    assert all(part.dtype == torch.float32 and torch.isfinite(part) for part in parts.values())


def test_rows_are_no_maps() -> None:
    with pytest.raises(UserError, match=r"losses.ft compares maps .*, but x/teacher/stage3 is"):
        bind_pair(FT(PAIR), torch.zeros(2, 3, 4, 4), torch.zeros(2, 3))
