"""Cheap blocks against Moonshine's tables and against formulas written out, in zoo networks.

moonshine_oracle.json: every cell of the paper's tables as printed, and the exact counts of an
independent rebuild.
"""

import json
import math
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastkd.errors import UserError
from fastkd.models import Tapped, cheapen, count, create_model
from fastkd.models.blocks.grammar import parse_block
from fastkd.models.blocks.layers import GroupedPointwise, PaddedShortcut, init_convs, substitute
from fastkd.models.zoo.resnet import BasicBlock
from fastkd.models.zoo.wrn import PreactBlock

MOONSHINE = json.loads(Path(__file__).with_name("moonshine_oracle.json").read_text())


def wrn(row, num_classes, **options):
    name = row["network"].lower().replace("-", "_").replace("x", "_")
    with torch.device("meta"):  # the shapes are enough
        return create_model(name, num_classes, **options)


def conv_params(model):
    kinds = (nn.Conv2d, nn.BatchNorm2d)
    return [
        sum(p.numel() for m in model.modules() if type(m) is kind for p in m.parameters())
        for kind in kinds
    ]


@pytest.mark.matrix
@pytest.mark.parametrize(
    "row", MOONSHINE["table2"], ids=lambda row: f"{row['network']}-{row['block']}"
)
def test_moonshine_table_2(row):
    built = wrn(row, 10, block=row["block"])
    size = count(built)
    assert (size.params, size.macs) == (row["params"], row["macs_conv"] + row["macs_fc"])
    assert conv_params(built) == [row["params_conv"], row["params_bn"]]
    printed = (Decimal(size.params) / 1000).quantize(Decimal("0.1"), ROUND_HALF_UP)
    assert printed == Decimal(str(row["paper_params_K"]))
    # The network that is made cheap afterwards has the same layers, in the same order and place.
    assert str(cheapen(wrn(row, 10), row["block"])) == str(built)


@pytest.mark.parametrize("row", MOONSHINE["blocks"], ids=lambda row: row["block"])
def test_moonshine_block_table(row):
    wide = PreactBlock(row["N"], row["N"], 1, block=row["block"])
    assert conv_params(wide) == [row["conv_params"], row["bn_params"]]


def eval_norm(x, norm):
    shape = (1, -1, 1, 1)
    scaled = (x - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + 1e-5).sqrt()
    return scaled * norm.weight.view(shape) + norm.bias.view(shape)


def randomized(model):
    """Batch norms that do something, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, (low, high) in (
                (module.weight, (0.5, 1.5)),
                (module.bias, (-0.5, 0.5)),
                (module.running_mean, (-0.5, 0.5)),
                (module.running_var, (0.5, 2.0)),
            ):
                nn.init.uniform_(tensor, low, high, generator=generator)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(("stride", "side"), [(1, 7), (2, 7), (2, 8)])
def test_grouped_pointwise_is_what_moonshine_draws(stride, side):
    layer = randomized(substitute(parse_block("G(N/3)"), 6, 10, stride=stride))
    assert isinstance(layer, GroupedPointwise)
    x = torch.randn(2, 6, side, side)
    halves = [
        F.conv2d(part, weight, stride=stride, padding=1)
        for part, weight in zip(x.split(3, 1), layer.grouped.weight.split(3, 0), strict=True)
    ]
    active = eval_norm(torch.cat(halves, 1), layer.norm).relu()
    expected = torch.einsum("nchw,oc->nohw", active, layer.pointwise.weight[:, :, 0, 0])
    torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
def test_bottleneck_is_what_moonshine_draws(stride):
    layer = randomized(substitute(parse_block("BG(2,M/2)"), 6, 8, stride=stride))
    x = torch.randn(2, 6, 7, 7)
    out = torch.einsum("nchw,oc->nohw", x, layer.reduce.weight[:, :, 0, 0])
    out = eval_norm(out, layer.norm1).relu()
    assert out.shape[1] == 4 and layer.spatial.groups == 2
    halves = [
        F.conv2d(part, weight, stride=stride, padding=1)
        for part, weight in zip(out.split(2, 1), layer.spatial.weight.split(2, 0), strict=True)
    ]
    out = eval_norm(torch.cat(halves, 1), layer.norm2).relu()
    expected = torch.einsum("nchw,oc->nohw", out, layer.expand.weight[:, :, 0, 0])
    torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 3)])
def test_two_by_two_is_a_3x3_with_taps_at_its_corners_only(stride, dilation):
    spatial = {"stride": stride, "padding": dilation, "dilation": dilation}
    layer = substitute(parse_block("S-2x2"), 3, 5, **spatial)
    corners = torch.zeros(5, 3, 3, 3)
    corners[:, :, ::2, ::2] = layer.weight
    x = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(layer(x), F.conv2d(x, corners, **spatial))


def test_weights_are_drawn_for_the_fan_out_without_the_groups():
    layer = init_convs(substitute(parse_block("G(16)"), 256, 256))
    for conv, std in (
        (layer.grouped, math.sqrt(2 / (9 * 256))),
        (layer.pointwise, math.sqrt(2 / 256)),
    ):
        weight = conv.weight.detach()
        # Five standard errors of the standard deviation of n normal draws.
        assert abs(weight.std() - std) < 5 * std / math.sqrt(2 * weight.numel())
        assert conv.bias is None


def conv(x, layer):
    pad = tuple(size // 2 for size in layer.kernel_size)
    return F.conv2d(x, layer.weight, stride=layer.stride, padding=pad, groups=layer.groups)


def grouped(x, layer):
    return conv(eval_norm(conv(x, layer.grouped), layer.norm).relu(), layer.pointwise)


def squeezed(x, layer):
    x = eval_norm(conv(x, layer.reduce), layer.norm1).relu()
    return conv(eval_norm(conv(x, layer.spatial), layer.norm2).relu(), layer.expand)


@torch.no_grad()
@pytest.mark.parametrize("shortcuts", [True, False, "pad", "projection"])
@pytest.mark.parametrize(("inputs", "stride"), [(8, 1), (4, 2)])
@pytest.mark.parametrize("block", ["G(2)", "B(2)"])
def test_preactivation_block(block, inputs, stride, shortcuts):
    made = randomized(PreactBlock(inputs, 8, stride, block=block, shortcuts=shortcuts))
    x = torch.randn(2, inputs, 6, 6)
    active = eval_norm(x, made.bn1).relu()
    if block == "G(2)":
        hidden = eval_norm(grouped(active, made.conv1), made.bn2).relu()
        expected = grouped(hidden, made.conv2)
    else:
        expected = squeezed(active, made.conv1)
    if inputs == 8:
        expected += x if shortcuts in (True, "pad") else 0
    elif shortcuts in (True, "projection"):
        expected += conv(active, made.shortcut)
    elif shortcuts == "pad":
        expected[:, 2:6] += active[:, :, ::2, ::2]
    torch.testing.assert_close(made(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("shortcuts", [True, False, "pad", "projection"])
@pytest.mark.parametrize(("inputs", "stride"), [(8, 1), (4, 2)])
@pytest.mark.parametrize("block", ["G(2)", "B(2)"])
def test_postactivation_block(block, inputs, stride, shortcuts):
    made = randomized(BasicBlock(inputs, 8, stride, block=block, shortcuts=shortcuts))
    x = torch.randn(2, inputs, 6, 6)
    if block == "G(2)":
        hidden = eval_norm(grouped(x, made.conv1), made.bn1).relu()
        expected = eval_norm(grouped(hidden, made.conv2), made.bn2)
    else:
        expected = eval_norm(squeezed(x, made.conv1), made.bn1)
    if inputs == 8:
        expected += x if shortcuts in (True, "pad") else 0
    elif shortcuts in (True, "projection"):
        expected += eval_norm(conv(x, made.downsample[0]), made.downsample[1])
    elif shortcuts == "pad":
        expected[:, 2:6] += x[:, :, ::2, ::2]
    torch.testing.assert_close(made(x), expected.relu())


def test_padding_of_an_odd_difference_keeps_every_channel():
    x = torch.randn(2, 3, 5, 5)
    out = PaddedShortcut(3, 6, 2)(x)
    assert out.shape == (2, 6, 3, 3)
    assert torch.equal(out[:, 1:4], x[:, :, ::2, ::2])
    assert out[:, [0, 4, 5]].abs().sum() == 0


def test_padded_shortcuts_have_no_weights():
    padded, plain = (create_model("resnet20", 10, shortcuts=how) for how in ("pad", False))
    # The ResNet-20 of He et al. 2015, table 6, with its batch norms: 0.27 M parameters.
    assert count(padded).params == count(plain).params == 269722


def test_a_wrong_kind_of_shortcut_names_the_kinds():
    with pytest.raises(UserError, match="shortcuts='none': expected True, False, 'pad' or 'proj"):
        create_model("resnet8", 10, shortcuts="none")


@pytest.mark.parametrize("block", ["S", "B(2)"])
def test_dropout_acts_in_training_in_front_of_the_last_convolution(block):
    model = create_model("wrn_10_1", 10, block=block, dropout=0.5)
    first = model.get_submodule("layer1.0")
    last = first.conv2 if block == "S" else first.conv1
    seen = []
    last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = torch.randn(8, 3, 32, 32)
    model(images)
    model.eval()(images)
    dropped, whole = ((each == 0).float().mean() for each in seen)
    assert 0.7 < dropped < 0.8  # half of what the ReLU lets through
    assert 0.4 < whole < 0.6
    with pytest.raises(UserError, match=r"dropout=1\.0: expected a probability below 1"):
        create_model("wrn_10_1", 10, dropout=1.0)


@pytest.mark.parametrize("block", ["S-2x2", "G(N)", "BG(2,4)"])
@pytest.mark.parametrize("name", ["resnet8x4", "wrn_10_2"])
def test_cheap_networks_train_compile_export_and_run_in_channels_last(name, block):
    model = create_model(name, 7, block=block)
    images = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    F.cross_entropy(model(images), torch.arange(4)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    model.eval()
    with torch.no_grad():
        expected = model(images)
        last = model.to(memory_format=torch.channels_last)
        torch.compiler.reset()  # every network of the zoo is one more graph of the same function
        compiled = torch.compile(last, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-5)
        exported = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(exported(images), expected, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images)
    assert (half.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("block", ["G(4)", "B(2)"])
def test_taps_stay(block):
    images = torch.randn(2, 3, 32, 32)
    for name in ("resnet8x4", "wrn_16_2"):
        taps = ("stem", "stage1", "stage2:preact", "stage3", "pooled")
        cheap, plain = (
            Tapped(create_model(name, 7, **options).eval(), taps)(images)
            for options in ({"block": block}, {})
        )
        assert {k: v.shape for k, v in cheap.items()} == {k: v.shape for k, v in plain.items()}
