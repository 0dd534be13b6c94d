"""The zoo against the published table of its builds, and against plain recomputation.

zoo_oracle.json: parameters, multiply-accumulates and tap shapes of RepDistiller's networks for
CIFAR-100 (32 px, 100 classes) and Tiny ImageNet (64 px, 200 classes), and of torchvision's
ResNet-34 and 18 (224 px, 1000 classes).
"""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastkd.models import Tapped, count, create_model

ORACLE = json.loads(Path(__file__).with_name("zoo_oracle.json").read_text())
SETTINGS = {"cifar100": (100, 32), "tinyimagenet": (200, 64), "imagenet": (1000, 224)}
SMALL = ("resnet8", "resnet8x4", "wrn_16_2")


@pytest.mark.matrix
@pytest.mark.parametrize("build", ORACLE)
def test_build_equals_the_published_table(build: str) -> None:
    data, name = build.split("/")
    classes, side = SETTINGS[data]
    expected = ORACLE[build]
    stem = {"stem": "imagenet"} if data == "imagenet" else {}
    with torch.device("meta"):  # shapes and counts need no initial weights
        model = create_model(name, num_classes=classes, **stem)
    model.to_empty(device="cpu")

    size = count(model, (3, side, side))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert size.params == expected["params_total"]
    assert size.params_conv_linear == expected["params_conv_fc_with_bias"]
    assert size.macs == expected["macs_conv_fc"]
    assert (
        sum(p.numel() for norm in norms for p in norm.parameters()) == expected["params_bn_affine"]
    )
    assert count(model, (3, side, side), rule="kdda").macs == expected["macs_kdda"]
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == expected["n_conv"]
    biased = {conv.bias is not None for conv in convs}
    assert biased == {name.startswith("vgg")}

    names = [tap for tap in model.tap_names if ":" not in tap and tap != "logits"]
    with torch.no_grad():
        found = Tapped(model.eval(), names)(torch.randn(2, 3, side, side))
    shapes = [list(found[tap].shape[1:]) for tap in names]
    assert shapes == expected["feature_taps_CHW_plain_then_pooled"]
    assert found["logits"].shape == (2, classes)
    preact = [f"{tap}:preact" for tap in names[1:-1]]
    with torch.no_grad():
        before = Tapped(model, preact)(torch.randn(2, 3, side, side))
    assert [list(before[tap].shape[1:]) for tap in preact] == shapes[1:-1]


def test_quickstart_student_has_the_rounded_widths() -> None:
    model = create_model("resnet8", num_classes=10, width=0.25)
    names = ("stem", "stage1", "stage2", "stage3", "pooled")
    found = Tapped(model, names)(torch.randn(2, 3, 16, 16))
    assert [tuple(found[tap].shape[1:]) for tap in names] == [
        (4, 16, 16),
        (4, 16, 16),
        (8, 8, 8),
        (16, 4, 4),
        (16,),
    ]
    # Stem 108, stages 288 + 896 + 3584, head 170, batch norms 2 * (4 + 2 * 4 + 3 * 8 + 3 * 16).
    assert count(model).params == 108 + 288 + 896 + 3584 + 170 + 168


@pytest.mark.parametrize("name", SMALL)
def test_pooling_is_the_fixed_window_of_8_at_32_pixels(name: str) -> None:
    model = create_model(name, num_classes=10).eval()
    last = {"resnet8": "stage3", "resnet8x4": "stage3", "wrn_16_2": "stage3:preact"}[name]
    found = Tapped(model, (last, "pooled"))(torch.randn(2, 3, 32, 32))
    fixed = F.avg_pool2d(F.relu(found[last]), 8).flatten(1)
    torch.testing.assert_close(found["pooled"], fixed, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet56", "wrn_40_2", "resnet50", "vgg13", "mobilenetv2_half"])
def test_initial_weights(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=100)
    seen = 0
    for key, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach()
            std = math.sqrt(2 / (module.out_channels * weight[0, 0].numel()))
            # Five standard errors of the mean and of the standard deviation of n normal draws.
            assert abs(weight.mean()) < 5 * std / math.sqrt(weight.numel()), key
            assert abs(weight.std() - std) < 5 * std / math.sqrt(2 * weight.numel()), key
            assert module.bias is None or bool((module.bias == 0).all()), key
            seen += 1
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all(), key
            assert (module.eps, module.momentum) == (1e-5, 0.1), key
    assert seen == ORACLE[f"cifar100/{name}"]["n_conv"]
    head = model.get_submodule("fc")
    assert isinstance(head, nn.Linear)
    assert bool((head.bias == 0).all()) is (name in ("wrn_40_2", "vgg13", "mobilenetv2_half"))
    if name in ("vgg13", "mobilenetv2_half"):
        error = 0.01 / math.sqrt(2 * head.weight.numel())
        assert abs(head.weight.std().item() - 0.01) < 5 * error


def test_resnet_equals_its_formula_written_out() -> None:
    torch.manual_seed(0)
    model = create_model("resnet8", num_classes=10)
    images = torch.randn(4, 3, 32, 32)
    weights = dict(model.state_dict())

    def conv_bn(x: torch.Tensor, conv: str, norm: str, stride: int = 1) -> torch.Tensor:
        weight = weights[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
        return (x - mean) / (var + 1e-5).sqrt()

    x = conv_bn(images, "conv1", "bn1").relu()
    for layer, stride in (("layer1.0", 1), ("layer2.0", 2), ("layer3.0", 2)):
        out = conv_bn(x, f"{layer}.conv1", f"{layer}.bn1", stride).relu()
        out = conv_bn(out, f"{layer}.conv2", f"{layer}.bn2")
        if stride == 2:
            x = conv_bn(x, f"{layer}.downsample.0", f"{layer}.downsample.1", stride)
        x = (out + x).relu()
    expected = F.linear(x.mean((2, 3)), weights["fc.weight"], weights["fc.bias"])
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


def test_wrn_equals_its_formula_written_out() -> None:
    torch.manual_seed(0)
    model = create_model("wrn_10_2", num_classes=10)
    images = torch.randn(4, 3, 32, 32)
    weights = dict(model.state_dict())

    def conv(x: torch.Tensor, key: str, stride: int = 1) -> torch.Tensor:
        weight = weights[f"{key}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def bn_relu(x: torch.Tensor) -> torch.Tensor:
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
        return ((x - mean) / (var + 1e-5).sqrt()).relu()

    x = conv(images, "conv1")
    for layer, stride in (("layer1.0", 1), ("layer2.0", 2), ("layer3.0", 2)):
        active = bn_relu(x)
        out = conv(bn_relu(conv(active, f"{layer}.conv1", stride)), f"{layer}.conv2")
        x = out + conv(active, f"{layer}.shortcut", stride)
    expected = F.linear(bn_relu(x).mean((2, 3)), weights["fc.weight"], weights["fc.bias"])
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


def test_wrn_block_of_equal_width_adds_its_raw_input() -> None:
    model = create_model("wrn_16_2", num_classes=10)
    shortcuts = {key for key in model.state_dict() if "shortcut" in key}
    assert shortcuts == {f"layer{stage}.0.shortcut.weight" for stage in (1, 2, 3)}
    block = model.get_submodule("layer1.1")
    assert isinstance(block.conv2, nn.Conv2d)
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 32, 8, 8)
    assert torch.equal(block(x), x)
