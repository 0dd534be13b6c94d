"""What is particular to one family: options, image sizes, and formulas that no other code gave."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.models import Tapped, cheapen, create_model, remove_shortcuts
from fastkd.models.zoo.erfnet import ResidualBlock1d
from fastkd.storage.weights import load_into


@pytest.mark.parametrize("depth", [18, 34])
def test_torchvision_weights_load_and_give_the_same_logits(depth: int) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(f"resnet{depth}", num_classes=10).eval()
    ours = create_model(f"resnet{depth}", 10, stem="imagenet").eval()
    load_into(ours, theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize("shortcuts", [False, "projection"])
def test_plain_network_equals_its_formula_written_out(shortcuts: bool | str) -> None:
    torch.manual_seed(0)
    model = create_model("plain18", 10, width=0.25, shortcuts=shortcuts).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor, 0.5)  # pyright: ignore[reportArgumentType]
    state = dict(model.state_dict())

    def conv_bn(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        parts = (state[f"{norm}.{key}"] for key in ("running_mean", "weight", "bias"))
        mean, scale, shift = (part.view(1, -1, 1, 1) for part in parts)
        return (x - mean) * scale / 1.00001**0.5 + shift

    images = torch.randn(2, 3, 16, 16)
    x = conv_bn(images, "conv1", "bn1").relu()
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            path, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            out = conv_bn(x, f"{path}.conv1", f"{path}.bn1", stride).relu()
            out = conv_bn(out, f"{path}.conv2", f"{path}.bn2")
            if shortcuts == "projection" and stride == 2:
                out = out + conv_bn(x, f"{path}.downsample.0", f"{path}.downsample.1", 2)
            x = out.relu()
    expected = F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


def test_cheap_block_of_erfnet_equals_its_formula_written_out() -> None:
    torch.manual_seed(0)
    model = create_model("erfnet", 20, block="G(N)")
    layers = model.get_submodule("layers")
    dilations = [each.pair2.grouped.dilation[0] for each in layers if hasattr(each, "pair2")]
    assert dilations == [*[1] * 5, *(2, 4, 8, 16) * 2, *[1] * 4]
    block = layers.get_submodule("9")  # layer 10: 128 channels, dilation 4
    assert isinstance(block, ResidualBlock1d)
    block.dropout.p = 0.0

    def bn(x: Tensor) -> Tensor:
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
        return (x - mean) / (var + 1e-3).sqrt()

    def pair(x: Tensor, name: str, dilation: int) -> Tensor:
        weights = {key: value for key, value in block.state_dict().items() if key.startswith(name)}
        assert not any(key.endswith("pointwise.bias") for key in weights)
        depthwise = weights[f"{name}.grouped.weight"]
        x = F.conv2d(x, depthwise, padding=dilation, dilation=dilation, groups=128)
        return F.conv2d(bn(x).relu(), weights[f"{name}.pointwise.weight"])

    x = torch.randn(2, 128, 12, 9)
    out = bn(pair(bn(pair(x, "pair1", 1)).relu(), "pair2", 4))
    torch.testing.assert_close(block(x), (x + out).relu(), rtol=1e-4, atol=1e-5)


def test_only_the_pairs_of_the_erfnet_student_lose_their_bias() -> None:
    model = create_model("erfnet", 20, block="G(N)")
    biased = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.bias is not None
    }
    assert biased == {f"layers.{n}.conv" for n in (0, 1, 7, 16, 19)} | {"head"}


def test_inverted_residuals_add_where_they_can_and_only_then() -> None:
    model = create_model("mobilenetv2", 10)
    adds = [
        block.shortcut is not None for group in model.get_submodule("blocks") for block in group
    ]
    repeats = (1, 2, 3, 4, 3, 3, 1)
    assert adds == [block > 0 for blocks in repeats for block in range(blocks)]
    bare = create_model("mobilenetv2", 10, shortcuts=False)
    assert all(b.shortcut is None for group in bare.get_submodule("blocks") for b in group)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("resnet18", "BG(2,M)"),
        ("plain34", "G(N)"),
        ("resnet50", "G(4)"),
        ("vgg8", "G(8)"),
        ("mobilenetv2", "G(4)"),
        ("mobilenetv2_half", "S"),
        ("erfnet", "G(N)"),
    ],
)
def test_cheapened_is_what_the_option_builds(name: str, block: str) -> None:
    with torch.device("meta"):
        model = cheapen(create_model(name, 10), block)
        assert str(model) == str(create_model(name, 10, block=block))


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "mobilenetv2", "erfnet"])
def test_without_shortcuts_is_what_the_option_builds(name: str) -> None:
    with torch.device("meta"):
        model = remove_shortcuts(create_model(name, 10))
        assert str(model) == str(create_model(name, 10, shortcuts=False))
        if name == "resnet34":
            assert str(model) == str(create_model("plain34", 10))
            kept = remove_shortcuts(create_model(name, 10), keep_projection=True)
            assert str(kept) == str(create_model("plain34", 10, shortcuts="projection"))


@pytest.mark.parametrize("side", [32, 64, 224])
@pytest.mark.parametrize("name", ["shufflenetv1", "shufflenetv2", "mobilenetv2_half", "vgg8"])
def test_last_map_follows_the_image_size(name: str, side: int) -> None:
    model = create_model(name, 10).eval()
    last = f"stage{3 if 'shuffle' in name else 4}"
    with torch.no_grad():
        found = Tapped(model, [last])(torch.randn(1, 3, side, side))
    expected = {"vgg8": side // (8 if side == 32 else 16), "mobilenetv2_half": side // 16}
    assert found[last].shape[2:] == (expected.get(name, side // 8),) * 2
    assert found["logits"].shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("plain18", {"shortcuts": True}, "plain18 has no shortcuts.*or build resnet18"),
        ("plain34", {"shortcuts": "pad"}, "expected False or 'projection', or build resnet34"),
        ("resnet18", {"stem": "tiny"}, "stem='tiny'; expected one of cifar, imagenet, imagenet-no"),
        ("resnet18", {"width": 0.001}, "leaves no channels"),
        ("resnet50", {"stem": "imagenet"}, "resnet50 has no option 'stem'; its options: depth, b"),
        ("mobilenetv2", {"block": "B(2)"}, r"block B\(2\) does not fit.*use S, G\(g\)"),
        ("mobilenetv2", {"block": "G(5)"}, "32 channels cannot be split into 5 groups"),
        ("erfnet", {"block": "G(3)"}, "64 channels cannot be split into 3 groups"),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model(name, 10, **options)


def test_erfnet_says_which_image_sizes_it_takes() -> None:
    with pytest.raises(UserError, match="images of 40x36 pixels; height and width must be mul"):
        create_model("erfnet", 20)(torch.zeros(1, 3, 40, 36))
