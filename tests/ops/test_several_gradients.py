"""Gradients for several incoming ones at once: is_grads_batched, which maps a backward pass."""

import pytest
import torch
from grouped_pointwise_modules import FORMS, Block, Shape
from torch import Tensor

from fastkd.kernels import attention_loss, attention_map, kd_loss, kd_loss_mean

LABELS = torch.tensor([1, 0, 6, 3])


def _logits() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 7, requires_grad=True), torch.randn(4, 7)


def _kd(impl: str) -> tuple[Tensor, Tensor]:
    student, teacher = _logits()
    rows = kd_loss(student, teacher, LABELS, temperature=3.0, impl=impl)
    return student, rows.kd + 2 * rows.ce


def _ce(impl: str) -> tuple[Tensor, Tensor]:
    student, teacher = _logits()
    return student, kd_loss(student, teacher, LABELS, impl=impl).ce


def _mean(impl: str) -> tuple[Tensor, Tensor]:
    student, teacher = _logits()
    return student, kd_loss_mean(student, teacher, LABELS, kd_weight=0.7, ce_weight=0.3, impl=impl)


def _without_labels(impl: str) -> tuple[Tensor, Tensor]:
    student, teacher = _logits()
    return student, kd_loss_mean(student, teacher, kd_weight=1.0, ce_weight=0.0, impl=impl)


def _map(impl: str) -> tuple[Tensor, Tensor]:
    features = torch.randn(2, 5, 6, 4, requires_grad=True)
    return features, attention_map(features, size=(3, 2), impl=impl)


def _attention(impl: str) -> tuple[Tensor, Tensor]:
    features = torch.randn(2, 5, 6, 4, requires_grad=True)
    return features, attention_loss(features, torch.randn(2, 3, 6, 4), form="distance", impl=impl)


def _unasked(impl: str) -> tuple[Tensor, Tensor]:
    student, teacher = _logits()
    return student, kd_loss(student, teacher, impl=impl).ce


OPS = [_kd, _ce, _mean, _without_labels, _map, _attention]


@pytest.mark.parametrize("op", OPS)
def test_they_are_those_of_one_after_the_other(op, impl: str) -> None:
    leaf, out = op(impl)
    check([leaf], out)


def test_of_a_loss_that_was_not_asked_for_they_are_zero(fast) -> None:
    leaf, out = _unasked(fast)
    check([leaf], out)


@pytest.mark.parametrize("form", FORMS)
def test_those_of_every_input_of_a_block(form: str, impl: str) -> None:
    block = Block(Shape(form, 12, 4, 12))
    given = [t.requires_grad_() for t in block.draw() if t is not None]
    check([*given, *block.parameters()], block.fused(*given, impl=impl))


def check(leaves: list[Tensor], out: Tensor) -> None:
    upstreams = torch.randn(3, *out.shape)
    together = torch.autograd.grad(out, leaves, upstreams, is_grads_batched=True, retain_graph=True)
    for place, upstream in enumerate(upstreams):
        alone = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
        for leaf, one, many in zip(leaves, alone, together, strict=True):
            assert many.shape == (3, *leaf.shape)
            torch.testing.assert_close(many[place], one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", OPS)
def test_differentiated_again_too(op, impl: str) -> None:
    """With create_graph, the sum over the upstreams as the gradient of their sum."""
    leaf, out = op(impl)
    upstreams = torch.randn(3, *out.shape)
    many = torch.autograd.grad(out, leaf, upstreams, is_grads_batched=True, create_graph=True)[0]
    one = torch.autograd.grad(out, leaf, upstreams.sum(0), create_graph=True)[0]
    torch.testing.assert_close(many.sum(0), one, rtol=1e-4, atol=1e-6)
    if one.requires_grad:
        penalties = [g.square().sum() for g in (many.sum(0), one)]
        again = [torch.autograd.grad(p, leaf, retain_graph=True)[0] for p in penalties]
        torch.testing.assert_close(*again, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("form", ["mean_square", "distance"])
def test_equal_maps_have_no_gradient_there_either(p: int, form, impl: str) -> None:
    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = attention_loss(features, features.detach(), p=p, form=form, impl=impl)
    for how in ({}, {"create_graph": True}):
        (grad,) = torch.autograd.grad(loss, features, retain_graph=True, **how)
        assert (grad == 0).all()


def test_rows_that_do_not_count_have_none(impl: str) -> None:
    """They may hold NaN, in the student, in the teacher and in soft labels."""
    student = torch.tensor([[1.0, 2.0], [float("nan"), 1.0]], requires_grad=True)
    teacher = torch.tensor([[0.5, 0.0], [1.0, float("inf")]])
    labels = torch.tensor([[0.5, 0.5], [float("nan"), 0.0]])
    mask = torch.tensor([True, False])
    loss = kd_loss_mean(student, teacher, labels, mask=mask, impl=impl)
    alone = student[:1].detach().requires_grad_()
    wanted = kd_loss_mean(alone, teacher[:1], labels[:1], impl=impl)
    (want,) = torch.autograd.grad(wanted, alone)
    for how in ({}, {"create_graph": True}):
        (grad,) = torch.autograd.grad(loss, student, retain_graph=True, **how)
        torch.testing.assert_close(grad[:1], want)
        assert (grad[1] == 0).all()
