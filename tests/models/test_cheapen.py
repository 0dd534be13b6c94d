"""`cheapen`: which convolutions of ten foreign networks it takes, what it keeps, what it says."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn

from fastkd.errors import UserError
from fastkd.models import (
    available_taps,
    cheapen,
    count,
    create_model,
    fuse,
    model_from_file,
    remove_shortcuts,
)
from fastkd.models.blocks.layers import Bottleneck, GroupedPointwise
from fastkd.models.card import card_of
from fastkd.storage.weights import save_weights

REPLACED = {
    "timm:resnet34": 32,
    "timm:wide_resnet50_2": 16,
    "timm:densenet121": 58,
    "timm:vgg11_bn": 7,
    "timm:inception_v3": 16,
    "torchvision:resnet34": 32,
    "torchvision:wide_resnet50_2": 16,
    "torchvision:densenet121": 58,
    "torchvision:vgg11_bn": 7,
    "torchvision:inception_v3": 16,
}
REFUSED = {
    "timm:mobilenetv2_100": ("17 x depthwise already", "blocks.*.conv_dw", 17),
    "timm:efficientnet_b0": ("16 x depthwise already", "blocks.*.conv_dw", 16),
    "timm:convnext_tiny": ("18 x depthwise already", "stages.*.conv_dw", 18),
    "timm:resnext50_32x4d": ("16 x grouped already", "layer?.*.conv2", 16),
    "timm:regnety_032": ("21 x grouped already", "s?.*.conv2.conv", 21),
}


def on_meta(name):
    with torch.device("meta"):
        return create_model(name, None)


def spatial(model):
    """Paths of the convolutions larger than one pixel."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
    }


@pytest.mark.parametrize("name", REPLACED)
@pytest.mark.filterwarnings("ignore:The default weight initialization of inception_v3")
def test_ordinary_3x3_convolutions_are_replaced(name):
    model = on_meta(name)
    cheap = cheapen(model, "G(4)")
    report = cheap.rewrite_report
    before, after = spatial(model), spatial(cheap)
    assert len(report.changed) == REPLACED[name]
    stem = next(iter(before))
    for path, conv in before.items():
        replaced = conv.kernel_size == (3, 3) and path != stem
        assert (path in report.changed) is replaced
        assert (f"{path}.grouped" in after) is replaced
        assert (path in after) is not replaced
    everything = [path for path, one in model.named_modules() if isinstance(one, nn.Conv2d)]
    assert sorted({*report.changed, *report.left}) == sorted(everything)
    # DenseNet's 3x3 convolutions are bottlenecks, 128 -> 32 channels, for which G(4) is dearer.
    dearer = "have more weights than what they replace"
    assert [dearer in note for note in report.notes] == [True] * ("densenet" in name)


@pytest.mark.parametrize("name", REFUSED)
def test_networks_that_are_cheap_already_are_refused_unless_named(name):
    reason, where, number = REFUSED[name]
    model = on_meta(name)
    with pytest.raises(UserError, match=f"no convolution of .* can become G.*{reason}.*where="):
        cheapen(model, "G(4)")
    named = cheapen(model, "G(N)", where=where)
    assert len(named.rewrite_report.changed) == number
    for path in named.rewrite_report.changed:
        old, new = model.get_submodule(path), named.get_submodule(path)
        assert isinstance(new, GroupedPointwise)
        assert (new.grouped.kernel_size, new.grouped.stride) == (old.kernel_size, old.stride)


def test_res34_g_of_the_paper_is_the_cheapened_resnet34():
    # Moonshine table 3: 8,146,600 and 3,132,520 parameters.
    for block, params, macs in (("G(4)", 8146600, 1388871680), ("G(N)", 3132520, 553102592)):
        for name in ("timm:resnet34", "torchvision:resnet34"):
            size = count(cheapen(on_meta(name), block), (3, 224, 224))
            assert (size.params, size.macs) == (params, macs + 512000)


def all_kinds():
    """One eligible convolution of every kind, and what stands around them."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(4, 8),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2, bias=True, padding_mode="reflect"),
        nn.GroupNorm(4, 12, eps=1e-3),
        nn.LeakyReLU(0.3),
        nn.Conv2d(12, 8, (3, 3), stride=(2, 1), padding="valid", bias=False),
        LayerNorm2d(8),
        nn.SiLU(),
        nn.Conv2d(8, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


@pytest.mark.parametrize("block", ["S-2x2", "G(N)", "BG(2,M)"])
def test_geometry_bias_norm_and_activation_stay(block):
    model = all_kinds().to(torch.float64)
    model[3].eval()
    model[9].weight.requires_grad_(False)
    cheap = cheapen(model, block)
    assert set(cheap.rewrite_report.changed) == {"3", "6", "9"}
    x = torch.randn(2, 3, 17, 16, dtype=torch.float64)
    for old, new in zip(model, cheap, strict=True):
        expected = old(x)
        got = new(x)
        assert got.shape == expected.shape and got.dtype == torch.float64
        if old is not model[3] and old is not model[6] and old is not model[9]:
            assert torch.equal(got, expected)
        x = expected
    assert not cheap[3].training and cheap[6].training
    assert cheap[9].requires_grad_ and all(p.requires_grad for p in cheap[9].parameters())
    convs = {
        path: [one for one in cheap.get_submodule(path).modules() if isinstance(one, nn.Conv2d)]
        for path in ("3", "6", "9")
    }
    assert convs["3"][-1].bias is not None and convs["6"][-1].bias is None
    assert any(one.padding_mode == "reflect" for one in convs["3"])
    if block != "S-2x2":
        kinds = [(nn.GroupNorm, nn.LeakyReLU), (LayerNorm2d, nn.SiLU), (LayerNorm2d, nn.SiLU)]
        for path, (norm, activation) in zip(convs, kinds, strict=True):
            inside = [type(one) for one in cheap.get_submodule(path).modules()]
            assert norm in inside and activation in inside
        inner = next(one for one in cheap[3].modules() if isinstance(one, nn.GroupNorm))
        slope = next(one for one in cheap[3].modules() if isinstance(one, nn.LeakyReLU))
        assert inner.eps == 1e-3 and slope.negative_slope == 0.3
        assert all(one.bias is None for path in convs for one in convs[path][:-1])


def test_s_makes_nothing_new_of_an_ordinary_convolution():
    model = all_kinds()
    same = cheapen(model, "S")
    assert not same.rewrite_report.changed and str(same) == str(model)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in same.state_dict().items())


def test_without_any_norm_the_inner_convolution_keeps_a_bias():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    made = cheapen(model, "G(N)")[1]
    assert isinstance(made.norm, nn.Identity) and isinstance(made.activation, nn.ReLU)
    assert made.grouped.bias is not None and made.pointwise.bias is not None


def test_stem_shortcut_and_head_stay_unless_named():
    model = timm.create_model("resnet50d", num_classes=10)
    assert {"conv1.0", "conv1.3", "conv1.6"} <= set(cheapen(model, "G(2)").rewrite_report.left)
    named = cheapen(model, "G(2)", where=["conv1.3", "layer4.2"])
    assert list(named.rewrite_report.changed) == ["conv1.3", "layer4.2.conv2"]
    assert named.rewrite_report.left["layer4.2.conv1"] == "1x1"

    last = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 5, 3)
    )
    assert cheapen(last, "G(2)").rewrite_report.left == {"0": "stem", "3": "head"}


def test_other_weights_are_copied_and_the_original_is_untouched():
    model = timm.create_model("test_resnet", num_classes=5)
    before = copy.deepcopy(model.state_dict())
    cheap = cheapen(model, "G(2)")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    new = cheap.state_dict()
    for key, value in before.items():
        if key.removesuffix(".weight") not in cheap.rewrite_report.changed:
            assert torch.equal(new[key], value), key
    with torch.no_grad():
        next(iter(cheap.parameters())).fill_(7)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_convolution_that_runs_twice_is_replaced_once():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), shared, nn.Sequential(nn.ReLU(), shared), nn.Flatten(), nn.Linear(64, 2)
    )
    cheap = cheapen(model, "G(2)")
    assert isinstance(cheap[1], GroupedPointwise) and cheap[1] is cheap[2][1]


def test_what_cannot_be_divided_is_left_with_the_numbers_or_refused_by_name():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 2)
    )
    cheap = cheapen(model, "G(4)")
    assert list(cheap.rewrite_report.changed) == ["2"]
    assert "6 channels cannot be split into 4 groups" in cheap.rewrite_report.left["1"]
    with pytest.raises(
        UserError, match=r"^1: block G\(4\): 6 channels cannot be split into 4 groups"
    ):
        cheapen(model, "G(4)", where="1")


@pytest.mark.parametrize(
    ("model", "where", "message"),
    [
        (nn.Linear(2, 2), None, "no convolution of Linear can become G.*it has none"),
        (nn.Conv2d(3, 4, 1), None, "1 x 1x1"),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 3)), None, "a ConvTranspose2d, not a plain Conv2d"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), "conv?", "where='conv[?]' names no module"),
        (nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3)}), "steam", "names no module; nearest: stem"),
    ],
)
def test_refusals(model, where, message):
    with pytest.raises(UserError, match=message):
        cheapen(model, "G(4)", where=where)


def test_a_network_that_cannot_be_copied_says_so():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.features = torch.ones(2, requires_grad=True) * 2
    with pytest.raises(UserError, match=r"Sequential cannot be copied \(RuntimeError"):
        cheapen(model, "G(2)")


@pytest.mark.parametrize("name", ["wrn_16_2", "resnet20"])
@pytest.mark.parametrize("block", ["S", "S-2x2", "G(4)", "B(2)", "BG(2,M/4)"])
def test_zoo_networks_become_what_block_builds(name, block, tmp_path):
    model = create_model(name, 7).to(torch.float64)
    cheap, built = cheapen(model, block), create_model(name, 7, block=block).to(torch.float64)
    assert str(cheap) == str(built)
    assert {p.dtype for p in cheap.parameters()} == {torch.float64}
    built.load_state_dict(cheap.state_dict())
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(cheap.eval()(images), built.eval()(images))
    assert available_taps(cheap) == available_taps(model)
    old, new = model.state_dict(), cheap.state_dict()
    kept = {key for key, value in old.items() if key in new and torch.equal(new[key], value)}
    assert {"conv1.weight", "fc.weight", "layer2.0.bn1.weight", "layer1.0.bn1.bias"} <= kept
    assert (kept == set(old)) is (block == "S")
    # A weight file of it rebuilds it.
    save_weights(tmp_path / "cheap.safetensors", cheap.to(torch.float32))
    assert str(model_from_file(tmp_path / "cheap.safetensors")) == str(built)


def test_part_of_a_zoo_network():
    model = create_model("wrn_16_2", 7)
    stage = cheapen(model, "B(2)", where="layer3")
    assert isinstance(stage.layer3[1].conv1, Bottleneck) and stage.layer3[1].conv2 is None
    assert str(stage.layer2) == str(model.layer2)
    # One convolution of a pair is replaced alone.
    alone = cheapen(model, "B(2)", where="layer1.1.conv2")
    assert isinstance(alone.layer1[1].conv2, Bottleneck)
    assert list(alone.rewrite_report.changed) == ["layer1.1.conv2"]
    # Both of a pair are the pair.
    both = cheapen(model, "B(2)", where="layer1.1.conv*")
    assert isinstance(both.layer1[1].conv1, Bottleneck) and both.layer1[1].conv2 is None
    for part in (stage, alone, both):
        part.eval()(torch.randn(1, 3, 32, 32))
        assert not hasattr(part, "fastkd_name")  # no name would rebuild it


def test_a_block_that_is_no_longer_as_built_is_refused_not_drawn_anew():
    model = create_model("resnet20", 7)
    for altered in (fuse(model), cheapen(model, "G(2)", where="layer1.0.conv1")):
        with pytest.raises(UserError, match="this BasicBlock was altered after it was built"):
            cheapen(altered, "G(4)")
        key = "layer1.0.conv2.weight"
        plain = remove_shortcuts(altered)
        assert torch.equal(plain.state_dict()[key], altered.state_dict()[key])


def test_cheap_again_and_back():
    model = create_model("resnet20", 7, block="G(4)")
    again = cheapen(model, "G(4)")
    assert not again.rewrite_report.changed
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    assert str(cheapen(model, "B(2)")) == str(create_model("resnet20", 7, block="B(2)"))
    assert str(cheapen(model, "S")) == str(create_model("resnet20", 7))
    # What both have in common keeps its weights.
    other = cheapen(model, "G(2)")
    name = "layer2.1.conv1.pointwise.weight"
    assert torch.equal(other.state_dict()[name], model.state_dict()[name])


@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:resnet18"])
def test_hub_networks_take_block_as_an_option(name, tmp_path):
    model = create_model(name, 5, block="G:2")
    assert str(model) == str(cheapen(create_model(name, 5), "G(2)"))
    assert card_of(model).options == {"block": "G(2)"}
    save_weights(tmp_path / "cheap.safetensors", model)
    again = model_from_file(tmp_path / "cheap.safetensors")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


def test_the_report_reads_well():
    report = cheapen(create_model("wrn_16_2", 7), "G(4)").rewrite_report
    assert str(report).splitlines() == [
        "cheapen G(4): 12 changed, 4 left",
        "  changed  12 x 3x3, now G(4) (layer1.0.conv1, layer1.0.conv2, layer1.1.conv1, ..)",
        "  left     1 x stem (conv1)",
        "  left     3 x kept by its residual block (layer1.0.shortcut, layer2.0.shortcut, "
        "layer3.0.shortcut)",
    ]


def check_training_and_export(model, side):
    """20 steps on a fixed batch halve the loss; the exported graph gives the same logits."""
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, side, side), torch.arange(8) % 4
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(20):
        logits = model.train()(images)
        loss = F.cross_entropy(logits[0] if isinstance(logits, tuple) else logits, labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0], losses
    model.eval()
    with torch.no_grad():
        exported = torch.export.export(model, (images[:2],)).module()
        torch.testing.assert_close(exported(images[:2]), model(images[:2]), rtol=1e-4, atol=1e-4)


def test_a_cheapened_foreign_network_trains_and_exports():
    check_training_and_export(cheapen(create_model("timm:test_resnet", 4), "G(4)"), 64)


SIDES = {"timm:inception_v3": 96}


@pytest.mark.slow
@pytest.mark.parametrize("name", [each for each in REPLACED if each.startswith("timm:")])
def test_every_cheapened_network_trains_and_exports(name):
    check_training_and_export(cheapen(create_model(name, 4), "G(4)"), SIDES.get(name, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_every_network_cheapened_by_name_trains_and_exports(name):
    check_training_and_export(cheapen(create_model(name, 4), "G(N)", where=REFUSED[name][1]), 64)
