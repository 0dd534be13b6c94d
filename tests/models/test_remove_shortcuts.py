"""`remove_shortcuts` against networks in which the shortcut is made to add nothing, and exactly."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models import resnet as torchvision_resnet

from fastkd.errors import UserError
from fastkd.models import (
    Tapped,
    cheapen,
    count,
    create_model,
    fuse,
    model_from_file,
    remove_shortcuts,
)
from fastkd.models.blocks.layers import ResidualBlock
from fastkd.models.card import card_of
from fastkd.storage.weights import save_weights

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def randomized(model):
    """Batch norms that do something, in evaluation mode."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def small_resnet(block, blocks=(2, 2, 2, 2)):
    """torchvision's with a stem for small images."""
    model = torchvision_resnet.ResNet(block, list(blocks), num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


class Nothing(nn.Module):
    """A shortcut that adds nothing."""

    def forward(self, x):
        return torch.zeros(())


FOREIGN = {
    "torchvision:resnet18": ("downsample", 8, 3),
    "torchvision:resnet50": ("downsample", 16, 4),
    "torchvision:regnet_y_400mf": ("proj", 16, 4),
    "timm:resnet18": ("downsample", 8, 3),
    "timm:seresnet50": ("downsample", 16, 4),
    "timm:resnet50d": ("downsample", 16, 4),
    "timm:regnety_002": ("downsample", 13, 4),
}


@torch.no_grad()
@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_blocks_lose_what_they_added(name):
    shortcut, blocks, projections = FOREIGN[name]
    model = randomized(create_model(name, 5))
    silent = create_model(name, 5).eval()
    silent.load_state_dict(model.state_dict())
    for module in silent.modules():
        if hasattr(module, shortcut):
            # torchvision's RegNet adds x itself where there is no projection.
            setattr(module, shortcut, Nothing())
    plain = remove_shortcuts(model)
    assert len(plain.rewrite_report.changed) == blocks
    torch.testing.assert_close(plain(IMAGES), silent(IMAGES), rtol=1e-5, atol=1e-6)
    assert not any(shortcut in key for key in plain.state_dict())
    kept = {k: v for k, v in model.state_dict().items() if shortcut not in k.split(".")}
    assert list(plain.state_dict()) == list(kept)
    assert all(torch.equal(value, kept[key]) for key, value in plain.state_dict().items())

    some = remove_shortcuts(model, keep_projection=True)
    assert len(some.rewrite_report.changed) == blocks - projections
    assert list(some.rewrite_report.left.values()) == ["projection kept"] * projections
    assert list(some.state_dict()) == list(model.state_dict())
    assert not torch.allclose(some(IMAGES), model(IMAGES))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "switch", "number"),
    [
        ("timm:mobilenetv2_100", "has_skip", 10),
        ("timm:efficientnet_b0", "has_skip", 9),
        ("torchvision:mobilenet_v2", "use_res_connect", 10),
        ("torchvision:mobilenet_v3_small", "use_res_connect", 6),
    ],
)
def test_inverted_residual_blocks_are_switched_off(name, switch, number):
    model = randomized(create_model(name, 5))
    plain = remove_shortcuts(model)
    assert len(plain.rewrite_report.changed) == number
    assert not any(getattr(module, switch, False) for module in plain.modules())
    assert sum(getattr(module, switch, False) for module in model.modules()) == number
    assert list(plain.state_dict()) == list(model.state_dict())
    assert not torch.allclose(plain(IMAGES), model(IMAGES))


@torch.no_grad()
@pytest.mark.parametrize("name", ["wrn_16_2", "resnet20"])
@pytest.mark.parametrize(("keep", "option"), [(False, False), (True, "projection")])
def test_zoo_networks_become_what_shortcuts_builds(name, keep, option, tmp_path):
    model = randomized(create_model(name, 7, block="G(4)"))
    plain = remove_shortcuts(model, keep_projection=keep)
    built = create_model(name, 7, block="G(4)", shortcuts=option).eval()
    assert str(plain) == str(built)
    built.load_state_dict(plain.state_dict())
    assert torch.equal(plain(IMAGES), built(IMAGES))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in plain.state_dict().items())
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            shortcut = getattr(module, module.shortcut_name)
            if not keep or isinstance(shortcut, nn.Identity):
                setattr(module, module.shortcut_name, Nothing())
    assert torch.equal(plain(IMAGES), model(IMAGES))
    save_weights(tmp_path / "plain.safetensors", plain)
    assert str(model_from_file(tmp_path / "plain.safetensors")) == str(built)


def test_padded_shortcuts_are_removed_like_others():
    model = create_model("resnet20", 7, shortcuts="pad")
    some = remove_shortcuts(model, keep_projection=True)
    assert list(some.rewrite_report.left.values()) == ["padding kept"] * 2
    assert not hasattr(some, "fastkd_name")  # no option builds this
    assert card_of(remove_shortcuts(model)).options == {"shortcuts": False}


def test_batch_norms_that_were_zeroed_for_the_shortcut_start_at_one():
    model = timm.create_model("resnet18", num_classes=5)
    assert not model.layer1[0].bn2.weight.any()
    plain = remove_shortcuts(model)
    assert (plain.layer1[0].bn2.weight == 1).all()
    assert plain.rewrite_report.notes == (
        "8 batch norms had scale 0, which blocks everything, and now start at 1",
    )
    assert not model.layer1[0].bn2.weight.any()


def test_stochastic_depth_goes_with_the_shortcut():
    model = timm.create_model("resnet18", num_classes=5, drop_path_rate=0.9, zero_init_last=False)
    plain = remove_shortcuts(model).train()
    assert not any(type(module).__name__ == "DropPath" for module in plain.modules())


@torch.no_grad()
@pytest.mark.parametrize(
    "build",
    [
        lambda: create_model("resnet20", 7),
        lambda: create_model("resnet8x4", 7),
        lambda: small_resnet(torchvision_resnet.Bottleneck, (1, 1, 1, 1)),
        lambda: timm.create_model("resnet18", num_classes=5),
        lambda: timm.create_model("resnet26", num_classes=5),
    ],
    ids=["resnet20", "resnet8x4", "torchvision-bottleneck", "timm-basic", "timm-bottleneck"],
)
def test_exact_removal_keeps_the_function(build):
    model = randomized(build())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    exact = remove_shortcuts(model, exact=True)
    expected = model.double()(IMAGES.double())
    error = (exact(IMAGES) - expected).norm() / expected.norm()
    assert error < 2e-6
    assert not any(isinstance(module, ResidualBlock) for module in exact.modules())
    assert not any("downsample" in key for key in exact.state_dict())
    assert all(torch.equal(v.float(), before[k]) for k, v in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize(
    ("blocks", "params", "gmacs"), [((2, 2, 2, 2), 19.66, 1.012), ((3, 4, 6, 3), 39.87, 2.220)]
)
def test_exact_removal_costs_what_it_is_known_to_cost(blocks, params, gmacs):
    # 11.17 M parameters and 0.555 GMAC before for ResNet-18, 21.28 M and 1.159 for ResNet-34.
    with torch.device("meta"):
        exact = remove_shortcuts(small_resnet(torchvision_resnet.BasicBlock, blocks), exact=True)
        size = count(exact, (3, 32, 32))
    assert round(size.params / 1e6, 2) == params
    assert round(size.macs / 1e9, 3) == gmacs
    assert "evaluation mode, batch norm is folded" in exact.rewrite_report.notes[0]


@torch.no_grad()
def test_taps_stay_after_each_way():
    model = randomized(create_model("resnet20", 7))
    taps = ("stage1", "stage2:preact", "stage3")
    found = Tapped(model, taps)(IMAGES)
    exact = Tapped(remove_shortcuts(model, exact=True), taps)(IMAGES)
    for tap, value in found.items():
        torch.testing.assert_close(exact[tap], value, rtol=1e-4, atol=1e-4)
    plain = Tapped(remove_shortcuts(model), taps)(IMAGES)
    assert {k: v.shape for k, v in plain.items()} == {k: v.shape for k, v in found.items()}


@torch.no_grad()
def test_rewrites_follow_each_other():
    model = randomized(timm.create_model("resnet18", num_classes=5))
    small = fuse(cheapen(remove_shortcuts(model), "G(2)").eval())
    other = fuse(remove_shortcuts(cheapen(model, "G(2)")).eval())
    assert small(IMAGES).shape == (2, 5)
    assert count(small) == count(other)


def test_plain_networks_train_and_export():
    model = remove_shortcuts(create_model("timm:test_resnet", 4))
    images = torch.randn(8, 3, 64, 64)
    nn.functional.cross_entropy(model(images), torch.arange(8) % 4).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (
            lambda: torchvision.models.vgg11(),
            {},
            "VGG has no shortcut that can be removed; supported",
        ),
        (
            lambda: create_model("wrn_10_2", 7),
            {"keep_projection": True},
            "no shortcut that can be removed except projections",
        ),
        (
            lambda: create_model("resnet8", 7),
            {"keep_projection": True, "exact": True},
            "exclude each other",
        ),
        (
            lambda: create_model("wrn_10_2", 7),
            {"exact": True},
            "layer1.0: its shortcut cannot be removed exactly: PreactBlock is not a basic",
        ),
        (lambda: create_model("resnet8", 7, block="G(2)"), {"exact": True}, "GroupedPointwise"),
        (lambda: create_model("resnet8", 7, shortcuts="pad"), {"exact": True}, "not one 1x1"),
        (
            lambda: timm.create_model("seresnet50"),
            {"exact": True},
            r"it has se \(SEModule\) in its branch",
        ),
        (
            lambda: timm.create_model("resnet18", act_layer=nn.SiLU),
            {"exact": True},
            "its activation act1 is SiLU, not ReLU",
        ),
        (lambda: timm.create_model("resnet50d"), {"exact": True}, "not one 1x1 convolution"),
        (lambda: timm.create_model("resnext50_32x4d"), {"exact": True}, "centred ordinary"),
        (
            lambda: create_model("timm:mobilenetv2_100", 7),
            {"exact": True},
            "InvertedResidual is not a basic",
        ),
    ],
)
def test_refusals(build, options, message):
    with torch.device("meta"):
        model = build()
    with pytest.raises(UserError, match=message):
        remove_shortcuts(model, **options)


def test_hub_networks_take_shortcuts_as_an_option(tmp_path):
    model = create_model("timm:test_resnet", 5, shortcuts=False, block="G(2)")
    save_weights(tmp_path / "plain.safetensors", model)
    assert str(model_from_file(tmp_path / "plain.safetensors")) == str(model)
    assert card_of(create_model("timm:test_resnet", 5, shortcuts=True)).options == {
        "shortcuts": True
    }
    with pytest.raises(UserError, match="shortcuts='pad': of this network they can be kept"):
        create_model("timm:test_resnet", 5, shortcuts="pad")
