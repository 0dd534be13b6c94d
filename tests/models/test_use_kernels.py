"""`use_kernels`: the numbers of plain modules, in the modules of the network."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fastkd.kernels import grouped_pointwise, status
from fastkd.models import Tapped, cheapen, count, create_model, fuse, kernels_report, use_kernels
from fastkd.models.blocks.layers import GroupedPointwise
from fastkd.models.fused import chain as chain_module
from fastkd.models.zoo.erfnet import ResidualBlock1d
from fastkd.models.zoo.mobilenetv2 import InvertedResidual
from fastkd.models.zoo.resnet import BasicBlock
from fastkd.models.zoo.wrn import PreactBlock
from fastkd.training.ema import EMA

pytestmark = pytest.mark.skipif(
    status()["grouped_pointwise"]["cpu"].startswith("reference"), reason="no C++ core"
)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the inputs that the op was called with."""
    seen = []

    def counted(x_NCHW, *args, **options):
        seen.append(tuple(x_NCHW.shape))
        return grouped_pointwise(x_NCHW, *args, **options)

    monkeypatch.setattr(chain_module, "grouped_pointwise", counted)
    return seen


def lively(model):
    """Batch norms that do something."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def results(model, x_NCHW, upstream):
    """Output, gradient of the input, of all parameters, and all buffers, each as one vector."""
    x_NCHW = x_NCHW.clone().requires_grad_()
    out = model(x_NCHW)
    out.backward(upstream.to(out))
    grads = [parameter.grad.flatten() for parameter in model.parameters()]
    buffers = [buffer.flatten().double() for buffer in model.buffers()]
    return [out, x_NCHW.grad, torch.cat(grads), torch.cat(buffers)]


def assert_as_exact(model, x_NCHW, upstream):
    """Fused, it is at most twice as far from fp64 as plain."""
    exact = results(copy.deepcopy(use_kernels(model, "plain")).double(), x_NCHW.double(), upstream)
    plain = results(copy.deepcopy(model), x_NCHW, upstream)
    fused = results(use_kernels(model, "fused"), x_NCHW, upstream)
    for truth, one, other in zip(exact, plain, fused, strict=True):
        scale = truth.double().norm()
        assert (other - truth).norm() <= 2 * (one - truth).norm() + 1e-6 * scale


def blocks():
    """A block of each kind with the shape of its input."""
    relu6 = {"relu": nn.ReLU6, "bias": True}
    return {
        "G": (GroupedPointwise(12, 20, 3, kernel_size=3, padding=1), 12),
        "preact": (PreactBlock(16, 16, 1, block="G(4)"), 16),
        "preact, stride": (PreactBlock(16, 24, 2, block="G(N)"), 16),
        "preact, bottleneck": (PreactBlock(16, 16, 1, block="BG(2,4)"), 16),
        "basic": (BasicBlock(16, 16, 1, block="G(8)"), 16),
        "basic, stride": (BasicBlock(16, 32, 2, block="G(N)"), 16),
        "inverted": (InvertedResidual(8, 8, 1, expansion=6, **relu6), 8),
        "inverted, stride": (InvertedResidual(8, 12, 2, expansion=6, **relu6), 8),
        "erfnet": (ResidualBlock1d(16, 4, 0.0, block="G(N)"), 16),
    }


@pytest.mark.parametrize("name", blocks())
@pytest.mark.parametrize("training", [True, False])
def test_computes_what_plain_modules_do(name, training, calls):
    torch.manual_seed(0)
    block, channels = blocks()[name]
    model = lively(nn.Sequential(block)).train(training)
    x_NCHW = torch.randn(3, channels, 9, 11)
    assert_as_exact(model, x_NCHW, torch.randn_like(copy.deepcopy(model)(x_NCHW)))
    assert calls


@pytest.mark.parametrize(
    ("name", "options", "taken"),
    [
        (
            "wrn_16_1",
            {"block": "G(4)"},
            {"3x3 -> 1x1 -> norm": 2, "norm -> 3x3 -> 1x1 -> norm": 4, "3x3 -> 1x1 + residual": 6},
        ),
        ("resnet8", {"block": "BG(2,4)"}, {"1x1 -> 3x3 -> 1x1 -> norm + residual": 3}),
        (
            "mobilenetv2",
            {},
            {"1x1 -> 3x3 -> 1x1 -> norm": 7, "1x1 -> 3x3 -> 1x1 -> norm + residual": 10},
        ),
        ("shufflenetv1", {}, {}),
        (
            "timm:mobilenetv2_100",
            {},
            {
                "3x3 -> 1x1 -> norm": 1,
                "1x1 -> 3x3 -> 1x1 -> norm": 6,
                "1x1 -> 3x3 -> 1x1 -> norm + residual": 10,
            },
        ),
        (
            "torchvision:mobilenet_v2",
            {},
            {
                "3x3 -> 1x1 -> norm": 1,
                "1x1 -> 3x3 -> 1x1 -> norm": 6,
                "1x1 -> 3x3 -> 1x1 -> norm + residual": 10,
            },
        ),
        ("torchvision:resnext50_32x4d", {}, {"1x1 -> 3x3 -> 1x1 -> norm + residual": 16}),
    ],
)
def test_which_chains_it_finds(name, options, taken):
    with torch.device("meta"):
        model = create_model(name, 10, kernels="fused", **options)
    report = kernels_report(model)
    found = [text.removesuffix(" as one op") for text in report.changed.values()]
    assert {text: found.count(text) for text in found} == taken
    assert all(model.get_submodule(path).kernel_size == (3, 3) for path in report.changed)
    assert not report.changed.keys() & report.left.keys()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return lively(create_model("wrn_10_1", 10, block="G(4)", kernels="fused"))


X_NCHW = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_modules_and_state_stay_plain(net, calls):
    plain = use_kernels(copy.deepcopy(net), "plain")
    assert list(dict(net.named_modules())) == list(dict(plain.named_modules()))
    plain.load_state_dict(net.state_dict())
    net.load_state_dict(plain.state_dict())
    plain(X_NCHW)
    assert not calls
    net(X_NCHW)
    assert len(calls) == 6
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key])


def test_copies_compute_with_their_own_modules(net, calls):
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), EMA(net, 0.5).module):
        calls.clear()
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not twin(X_NCHW).any() and len(calls) == 6
        assert net(X_NCHW).any()


@pytest.mark.parametrize(
    "place",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_a_hook_inside_a_chain_makes_it_plain(place, net, calls):
    called = []
    handle = getattr(net.layer1[0].conv1.norm, place)(lambda *args: called.append(1))
    net(X_NCHW).sum().backward()
    assert called and len(calls) == 5
    handle.remove()
    calls.clear()
    net(X_NCHW)
    assert len(calls) == 6


def test_a_tap_on_an_intermediate_makes_its_chain_plain(calls):
    model = create_model("torchvision:mobilenet_v2", 4, kernels="fused").eval()
    tapped = Tapped(model, ["features.3.conv.1"])
    x_NCHW = torch.rand(1, 3, 32, 32)
    features = tapped(x_NCHW)["features.3.conv.1"]
    assert len(calls) == 16 and features.min() == 0
    tapped.remove()
    calls.clear()
    model(x_NCHW)
    assert len(calls) == 17


def test_taps_of_the_zoo_keep_the_chains(net, calls):
    plain = use_kernels(copy.deepcopy(net), "plain")
    found = Tapped(net, net.tap_names)(X_NCHW)
    assert len(calls) == 6
    for tap, value in Tapped(plain, net.tap_names)(X_NCHW).items():
        torch.testing.assert_close(found[tap], value, rtol=1e-4, atol=1e-5)


def test_it_is_counted_and_exported_as_plain_modules(net, calls):
    net.eval()
    assert count(net) == count(use_kernels(copy.deepcopy(net), "plain"))
    program = torch.export.export(net, (X_NCHW,))
    assert not [node for node in program.graph.nodes if "fastkd" in str(node.target)]
    assert "fastkd::" not in str(torch.jit.trace(net, X_NCHW, check_trace=False).inlined_graph)
    parameters = dict(net.named_parameters())
    torch.func.grad(lambda p: torch.func.functional_call(net, p, (X_NCHW,)).sum())(parameters)
    assert not calls


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_torchscript_compiles_the_plain_modules():
    model = create_model("torchvision:mobilenet_v2", 4, kernels="fused").eval()
    x_NCHW = torch.rand(1, 3, 32, 32)
    expected = model(x_NCHW)
    torch.testing.assert_close(torch.jit.script(model)(x_NCHW), expected)


def test_folding_and_kernels_compose_in_either_order(net, calls):
    plain = use_kernels(copy.deepcopy(net), "plain").eval()
    expected = plain(X_NCHW)
    for model in (fuse(net), use_kernels(fuse(plain), "fused")):
        calls.clear()
        torch.testing.assert_close(model(X_NCHW), expected, rtol=1e-4, atol=1e-5)
        assert len(calls) == 6
    calls.clear()
    assert fuse(plain)(X_NCHW) is not None and not calls


def test_a_rewrite_looks_for_chains_again(calls):
    dense = create_model("resnet8", 10, kernels="auto")
    assert not kernels_report(dense).changed
    assert len(kernels_report(cheapen(dense, "G(4)")).changed) == 6


def test_it_follows_what_is_done_to_its_modules(net, calls):
    plain = use_kernels(copy.deepcopy(net), "plain")
    for model in (net, plain):
        block = model.layer1[0]
        block.bn2.eval()
        block.conv1.norm.momentum = None
        block.conv2.norm = nn.Identity()
        model(X_NCHW)
    assert len(calls) == 6
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key], rtol=1e-4, atol=1e-5)


def test_it_follows_the_attributes_of_a_block(net, calls):
    net.eval()
    before = net(X_NCHW)
    net.layer2[0].dropout = 0.5
    torch.testing.assert_close(net(X_NCHW), before)
    net.layer2[0].train()
    assert not torch.equal(net(X_NCHW), net(X_NCHW))
    assert len(calls) == 4 * 6


def test_a_module_used_twice_and_recomputed(calls):
    torch.manual_seed(0)
    block = lively(BasicBlock(8, 8, 1, block="G(N)"))

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x):
            return checkpoint(self.block, self.block(x), use_reentrant=False)

    # Where the second pass may stop early, it leaves out the last update of running statistics.
    with set_checkpoint_early_stop(False):
        assert_as_exact(Twice(), torch.randn(4, 8, 7, 5), torch.randn(4, 8, 7, 5))
    assert len(calls) == 6  # Two chains, twice, and those of the second call again.


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_it_compiles_as_one_graph(backend, calls):
    torch.manual_seed(0)
    model = lively(nn.Sequential(BasicBlock(8, 8, 1, block="G(N)")))
    twin = copy.deepcopy(use_kernels(model, "fused"))
    compiled = torch.compile(twin, fullgraph=True, dynamic=False, backend=backend)
    x_NCHW = torch.randn(2, 8, 6, 6)
    for training in (True, False):
        model.train(training)
        twin.train(training)
        calls.clear()
        torch.testing.assert_close(compiled(x_NCHW), model(x_NCHW))
        assert len(calls) == 4


def test_autocast_and_wrong_types_are_those_of_plain_modules(net):
    with torch.autocast("cpu", torch.bfloat16):
        out = net(X_NCHW)
    assert out.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match=r"same|type"):
        net(X_NCHW.bfloat16())
