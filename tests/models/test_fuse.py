"""`fuse`: equal outputs with batch norm folded, what stays, and what cannot be traced."""

import copy

import pytest
import torch
from torch import nn
from torch.fx.experimental import optimization
from torch.nn.modules.batchnorm import _BatchNorm

from fastkd.errors import UserError
from fastkd.models import Tapped, create_model, fuse, remove_shortcuts
from fastkd.testing import rms


def randomized(model):
    """Batch norms that do something, in evaluation mode."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def batch_norms(model):
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


# Batch norms of the network and those that do not follow one convolution: in front of it
# (pre-activation), behind a sum or a concatenation.
NETWORKS = {
    "resnet20": (21, 0),
    "wrn_16_2": (13, 6),
    "timm:resnet50": (53, 0),
    "timm:mobilenetv2_100": (52, 0),
    "timm:efficientnet_b0": (49, 0),
    "timm:regnety_002": (44, 0),
    "timm:densenet121": (121, 62),
    "timm:repvgg_a0": (61, 17),
    "timm:convnext_atto": (0, 0),
    "torchvision:resnet18": (20, 0),
    "torchvision:mobilenet_v3_small": (34, 0),
    "torchvision:shufflenet_v2_x0_5": (56, 0),
}


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_as_accurate_as_before(name):
    model = randomized(create_model(name, 7))
    before = copy.deepcopy(model.state_dict())
    total, left = NETWORKS[name]
    fused = fuse(model)
    images = torch.randn(2, 3, 64, 64)
    truth = copy.deepcopy(model).double()(images.double())
    error, eager = rms(fused(images) - truth), rms(model(images) - truth)
    assert error <= max(4 * eager, 1e-6 * rms(truth)), (error, eager, rms(truth))
    assert (batch_norms(model), batch_norms(fused)) == (total, left)
    report = fused.rewrite_report
    assert (len(report.changed), len(report.left)) == (total - left, left)
    assert type(fused) is type(model) and not fused.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not hasattr(fused, "fastkd_name")  # create_model does not build a fused one


@torch.no_grad()
def test_as_torchs_own_fusion_where_that_works():
    model = randomized(create_model("torchvision:resnet18", 7))
    theirs, ours = optimization.fuse(model), fuse(model)
    for path, module in ours.named_modules():
        if isinstance(module, nn.Conv2d):
            other = theirs.get_submodule(path)
            assert torch.equal(module.weight, other.weight)
            assert torch.equal(module.bias, other.bias)


@torch.no_grad()
def test_taps_of_the_zoo_are_there():
    images = torch.randn(2, 3, 32, 32)
    for name in ("resnet20", "wrn_16_2"):
        model = randomized(create_model(name, 7))
        # Not the stem of a WRN, which is a convolution that now holds its batch norm.
        taps = ("stage1", "stage2:preact", "stage3", "pooled")
        before, after = (Tapped(each, taps)(images) for each in (model, fuse(model)))
        for tap, value in before.items():
            torch.testing.assert_close(after[tap], value, rtol=1e-4, atol=1e-4)


def test_a_fused_plain_network_is_convolutions_only():
    fused = fuse(remove_shortcuts(create_model("resnet20", 7)))
    assert batch_norms(fused) == 0
    kinds = {type(module) for module in fused.modules() if not list(module.children())}
    assert kinds == {nn.Conv2d, nn.Identity, nn.Linear}


def test_it_exports_and_compiles():
    fused = fuse(create_model("resnet20", 7))
    images = torch.randn(2, 3, 32, 32)
    exported = torch.export.export(fused, (images,))
    assert not any("batch_norm" in str(node.target) for node in exported.graph.nodes)
    torch.compiler.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), fused(images))


class Awkward(nn.Module):
    """Convolutions whose batch norm must not be folded, and one whose must."""

    def __init__(self):
        super().__init__()
        self.read_twice = nn.Conv2d(3, 4, 1)
        self.norm1 = nn.BatchNorm2d(4)
        self.shared = nn.Conv2d(4, 4, 1)
        self.norm2 = nn.BatchNorm2d(4)
        self.batch_statistics = nn.Conv2d(4, 4, 1)
        self.norm3 = nn.BatchNorm2d(4, track_running_stats=False)
        self.hooked = nn.Conv2d(4, 4, 1)
        self.norm4 = nn.BatchNorm2d(4)
        self.grouped_up = nn.ConvTranspose2d(4, 4, 2, groups=2)
        self.norm5 = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False)
        self.norm6 = nn.BatchNorm2d(6, affine=False)
        self.normed = nn.Conv2d(6, 6, 1)
        self.norm7 = nn.Sequential(nn.BatchNorm2d(6), nn.BatchNorm2d(6))
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.norm8 = nn.BatchNorm2d(6)

    def forward(self, x):
        x = self.read_twice(x)
        x = x + self.norm1(x)
        x = self.norm2(self.shared(self.shared(x)))
        x = self.norm3(self.batch_statistics(x))
        x = self.norm4(self.hooked(x))
        x = self.norm5(self.grouped_up(x))
        x = self.norm6(self.up(x))
        x = self.norm7(self.normed(x))
        return self.norm8(self.depthwise(x))


@torch.no_grad()
def test_only_what_may_be_folded_is():
    model = Awkward()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    seen = []
    model.hooked.register_forward_hook(lambda module, args, output: output * 2)
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    fused = fuse(model.eval())
    assert seen == []  # tracing is nobody's forward pass
    assert set(fused.rewrite_report.changed) == {"norm6", "norm7.0", "norm8"}
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(fused(images), model(images), rtol=1e-5, atol=1e-5)


class Branching(nn.Module):
    """Cannot be traced: its path depends on the values of its images."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.conv = nn.Conv2d(4, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.body(x)
        return self.bn(self.conv(x)) if x.mean() > 0 else x


@torch.no_grad()
def test_what_cannot_be_traced_is_folded_in_parts():
    model = randomized(Branching())
    fused = fuse(model)
    assert fused.rewrite_report.changed == {"body.1": "folded into its convolution"}
    assert list(fused.rewrite_report.left) == ["bn"]
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(fused(images), model(images), rtol=1e-5, atol=1e-6)


def test_a_network_that_cannot_be_copied_says_so():
    model = Branching()
    model.cache = torch.ones(2, requires_grad=True) * 2
    with pytest.raises(UserError, match="Branching cannot be copied"):
        fuse(model)
