"""Every network of the zoo does what a trainer asks of it, at 32 and 64 pixels.

Backward pass, tracing as one graph, export, channels-last, bf16. By default one build of each form
of a family (four siblings are traced with `-m matrix`); its other depths and widths, which repeat
the same blocks, with `-m slow`.

Inductor itself takes 10 to 80 s of a core for a network: it compiles the smallest of one family
with `-m matrix` (`SMALLEST`), all others with `-m slow`.
"""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkd.models import create_model, list_models
from fastkd.testing.networks import CLASSIFIERS, DENSE, Build

FORMS: dict[str, Build] = {
    **CLASSIFIERS,
    **DENSE,
    "erfnet_encoder": ("erfnet_encoder", {}),
}
OTHERS = {
    **{name: (name, {}) for name in list_models() if name not in FORMS},
    "plain18-full": ("plain18", {}),
}
SMALLEST: dict[str, Build] = {"wrn_10_1": ("wrn_10_1", {})}
OTHER_FAMILIES: dict[str, Build] = {
    "vgg8": ("vgg8", {}),
    "resnet8-narrow": ("resnet8", {"width": 0.25}),
    "plain18-narrow": ("plain18", {"width": 0.25}),
    "resnet50": ("resnet50", {}),
    "mobilenetv2_half": ("mobilenetv2_half", {}),
    "shufflenetv1": ("shufflenetv1", {}),
    "shufflenetv2": ("shufflenetv2", {}),
    "erfnet": ("erfnet", {}),
}
slow = pytest.mark.slow
# Traced in the matrix: of most kinds of blocks a smaller one is traced by default.
SIBLINGS = {
    form: FORMS[form]
    for form in (
        "mobilenetv2",
        "mobilenetv2_half",
        "erfnet",
        "erfnet-G(N)",
        "erfnet_encoder",
        "resnet50",
        "shufflenetv1",
        "shufflenetv2",
    )
}
TRACED = {form: build for form, build in FORMS.items() if form not in SIBLINGS}


def builds(
    default: dict[str, Any],
    others: dict[str, Any],
    matrix: Mapping[str, Any] = MappingProxyType({}),
) -> pytest.MarkDecorator:
    """Run a test on `default`, with `-m matrix` on `matrix`, with `-m slow` on the `others`."""
    fast = [pytest.param(*build, id=form) for form, build in default.items()]
    more = [
        pytest.param(*build, id=form, marks=pytest.mark.matrix) for form, build in matrix.items()
    ]
    rest = [
        pytest.param(*build, id=form, marks=slow)
        for form, build in others.items()
        if form not in default and form not in matrix
    ]
    return pytest.mark.parametrize(("name", "options"), [*fast, *more, *rest])


networks = builds(FORMS, OTHERS)
traced_networks = builds(TRACED, OTHERS, SIBLINGS)
sides = pytest.mark.parametrize("side", [32, 64])


def build(name: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, 7, **options)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@networks
@sides
def test_gradients_reach_every_parameter(name: str, options: dict[str, Any], side: int) -> None:
    model = build(name, options)
    logits = model(torch.randn(3, 3, side, side))
    dense = {"erfnet": (side, side), "erfnet_encoder": (side // 8, side // 8)}
    assert logits.shape == (3, 7, *dense.get(name, ()))
    (logits * torch.randn_like(logits)).sum().backward()
    layers = dict(model.named_modules())
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        layer, _, kind = key.rpartition(".")
        # A batch norm takes a bias in front of it out again.
        if kind == "weight" or not isinstance(layers[layer], nn.Conv2d):
            assert parameter.grad.abs().sum() > 0, key


@networks
@sides
def test_channels_last_and_bf16_stay_close(name: str, options: dict[str, Any], side: int) -> None:
    model = build(name, options).eval()
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        plain = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images)
        model.to(memory_format=torch.channels_last)
        features: list[Tensor] = []
        for tap, value in model.walk(images.contiguous(memory_format=torch.channels_last)):
            if tap not in ("pooled", "logits"):
                assert value.is_contiguous(memory_format=torch.channels_last), tap
            features.append(value)
    assert distance(features[-1], plain) < 1e-5
    assert half.dtype == torch.bfloat16
    assert distance(half, plain) < 0.05


def train_step(step: nn.Module, model: nn.Module, images: Tensor) -> list[Tensor]:
    logits = step(images)
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return [logits.detach(), *(parameter.grad for parameter in model.parameters())]


def assert_compiles(model: nn.Module, side: int, backend: str) -> None:
    torch.compiler.reset()
    # At 1x1 pixels a batch norm over two images would divide rounding errors by almost nothing.
    images = torch.randn(8, 3, side, side)
    twin = copy.deepcopy(model)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    traced = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    torch.manual_seed(1)
    found = train_step(traced, model, images)
    torch.manual_seed(1)
    expected = train_step(twin, twin, images)
    torch.manual_seed(1)
    relaid = train_step(other, other, images.contiguous(memory_format=torch.channels_last))
    largest = max(range(1, len(found)), key=lambda index: expected[index].norm())
    # A ReLU whose input is a rounding error away from 0 may take the other side. In a deep network
    # many do: eager torch in the other memory layout says how much that changes.
    for index, floor in ((0, 1e-4), (largest, 0.02)):
        # Three times: it is one draw of a spread.
        allowed = max(floor, 3 * distance(relaid[index], expected[index]))
        assert distance(found[index], expected[index]) < allowed
    for key, buffer in twin.named_buffers():
        torch.testing.assert_close(model.get_buffer(key), buffer, rtol=1e-4, atol=1e-5)


@traced_networks
@pytest.mark.parametrize("side", [32, pytest.param(64, marks=slow)])
def test_a_training_step_traces_as_one_graph(name: str, options: dict[str, Any], side: int) -> None:
    assert_compiles(build(name, options), side, "aot_eager")


@traced_networks
@pytest.mark.parametrize("side", [pytest.param(32, marks=slow), 64])
def test_exports(name: str, options: dict[str, Any], side: int) -> None:
    model = build(name, options).eval()
    images = torch.randn(2, 3, side, side)
    exported = torch.export.export(model, (images,))
    torch.testing.assert_close(exported.module()(images), model(images))


@builds({}, FORMS | OTHERS | OTHER_FAMILIES, SMALLEST)
def test_a_training_step_compiles(name: str, options: dict[str, Any]) -> None:
    model = build(name, options)
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):  # compiled code draws other numbers
            module.p = 0.0
    assert_compiles(model, 32, "inductor")
