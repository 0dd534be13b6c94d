"""`use_kernels` follows what is done to a network later, and takes no code that does more."""

import copy
import inspect
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastkd.kernels import status
from fastkd.models import kernels_report, use_kernels

pytestmark = pytest.mark.skipif(
    status()["grouped_pointwise"]["cpu"].startswith("reference"), reason="no C++ core"
)


class Half(nn.Module):
    def forward(self, x):
        return x / 2


class Thrice(nn.Identity):
    def forward(self, x):
        return 3 * x


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Unit(nn.Module):
    """With layers that do nothing, one behind the other, as timm's blocks have them."""

    def __init__(self, between=nn.Identity):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.between = between()
        self.gate = nn.Identity()
        self.tail = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.shortcut = nn.Conv2d(8, 8, 1)
        self.last_act = F.relu
        self.calls = 0
        self.seen = None
        self.log = []
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, x):
        inner = self.gate(self.between(self.act(self.norm(self.conv(x)))))
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.last_act(self.tail(inner) + shortcut)


class Branching(Unit):
    """By values of every kind that a module may hold."""

    def __init__(self):
        super().__init__()
        self._hidden = False
        self.pair = (1, (False, 2.0))
        self.config = {"flags": [False, True]}
        self.object = None

    def forward(self, x):
        flags = self._hidden, self.pair[1][0], self.config["flags"][0], self.object
        out = super().forward(x)
        return -out if any(flags) else out


BRANCHES = {
    "hidden": lambda unit: setattr(unit, "_hidden", True),
    "in a tuple": lambda unit: setattr(unit, "pair", (1, (True, 2.0))),
    "in a list in a dict": lambda unit: unit.config["flags"].__setitem__(0, True),
    "any object": lambda unit: setattr(unit, "object", object()),
}


@pytest.mark.parametrize("change", BRANCHES)
def test_it_follows_what_its_code_branches_on(change):
    torch.manual_seed(0)
    plain = Branching().eval()
    fused = use_kernels(copy.deepcopy(plain), "fused")
    twin = copy.deepcopy(fused)
    assert kernels_report(fused).changed
    BRANCHES[change](plain)
    for model in (fused, twin):
        assert model.forward._trace() is model.forward.traces[0]
        BRANCHES[change](model)
        torch.testing.assert_close(model(X), plain(X), rtol=1e-4, atol=1e-5)


class Asking(Unit):
    def __init__(self, question):
        super().__init__()
        self.question = question

    def forward(self, x):
        out = super().forward(x)
        return -out if getattr(torch, self.question)() else out


MODES = {
    "is_grad_enabled": torch.enable_grad,
    "is_inference_mode_enabled": torch.inference_mode,
    "is_autocast_cpu_enabled": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.filterwarnings("ignore:torch.is_autocast_cpu_enabled:DeprecationWarning")
@pytest.mark.parametrize("question", MODES)
def test_it_follows_modes_that_its_code_asks_for(question):
    torch.manual_seed(0)
    plain = Asking(question).eval()
    fused = use_kernels(copy.deepcopy(plain), "fused")
    assert kernels_report(fused).changed
    with torch.no_grad():
        usual = plain(X)
        for model in (plain, fused):
            torch.testing.assert_close(model(X), usual, rtol=1e-4, atol=1e-5)
            with MODES[question]():
                torch.testing.assert_close(model(X).float(), -usual, rtol=0.1, atol=0.05)


def replaced_forward(layer, factor=3):
    layer.forward = lambda x: factor * type(layer).forward(layer, x)


def reflect(unit):
    unit.conv.padding_mode = "reflect"
    unit.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


CHANGES = {
    "a layer that did nothing": lambda unit: setattr(unit, "between", Half()),
    "its hook": lambda unit: unit.gate.register_forward_hook(lambda *given: given[-1] * 2),
    "a shortcut": lambda unit: setattr(unit, "shortcut", None),
    "a function": lambda unit: setattr(unit, "last_act", F.silu),
    "one more layer": lambda unit: unit.tail.append(Half()),
    "the code of a convolution": lambda unit: replaced_forward(unit.conv),
    "the code of an activation": lambda unit: replaced_forward(unit.act),
    "the code of a container": lambda unit: replaced_forward(unit.tail),
    "a class": lambda unit: setattr(unit.conv, "__class__", Doubled),
    "padding": reflect,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("later", [True, False])
def test_it_computes_what_the_changed_modules_do(change, later):
    torch.manual_seed(0)
    plain = Unit().eval()
    fused = copy.deepcopy(plain)
    steps = [CHANGES[change], lambda unit: use_kernels(unit, "fused")]
    for step in reversed(steps) if later else steps:
        step(fused)
    before, x = plain(X), X.clone()
    CHANGES[change](plain)
    assert not torch.allclose(plain(x), before)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)


X = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(0))


def test_a_child_of_identity_may_do_something():
    torch.manual_seed(0)
    plain = Unit(Thrice).eval()
    fused = use_kernels(copy.deepcopy(plain), "fused")
    torch.testing.assert_close(fused(X), plain(X), rtol=1e-4, atol=1e-5)


def test_statistics_are_updated_once():
    """Layers that do nothing must not keep the convolution and norm in front of them alive."""
    plain = Unit()
    fused = use_kernels(copy.deepcopy(plain), "fused")
    assert kernels_report(fused).changed
    plain(X)
    fused(X)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_activations_inside_norms_of_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    plain = timm.create_model("mobilenetv2_050", num_classes=3).eval()
    fused = use_kernels(copy.deepcopy(plain), "fused")
    assert len(kernels_report(fused).changed) == 17
    x, seen = torch.randn(1, 3, 32, 32), []
    fused.blocks[1][0].bn1.act.register_forward_hook(lambda *given: seen.append(given))
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
    assert len(seen) == 1
    for model in (plain, fused):
        model.blocks[2][0].bn1.act = nn.SiLU()
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)


class Counting(Unit):
    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Keeping(Unit):
    def forward(self, x):
        self.seen = super().forward(x)
        return self.seen


class Logging(Unit):
    def forward(self, x):
        self.log.append(x.shape)
        return super().forward(x)


class Writing(Unit):
    def forward(self, x):
        self.batches += 1
        return super().forward(x)


class Skipping(Unit):
    def forward(self, x):
        return x if random.random() < 0.5 else super().forward(x)


@pytest.mark.parametrize("kind", [Counting, Keeping, Logging, Writing, Skipping])
def test_code_that_does_more_stays_plain_and_is_not_run_by_the_search(kind):
    plain = kind().eval()
    fused = copy.deepcopy(plain)
    random.seed(0)
    state = random.getstate()
    report = kernels_report(use_kernels(fused, "fused"))
    assert random.getstate() == state
    assert not report.changed and "in its forward" in report.left["conv"]
    assert (fused.calls, fused.seen, fused.log, fused.batches) == (0, None, [], 0)
    for model in (plain, fused):
        random.seed(0)
        outs = [model(X) for _ in range(8)]
        model.outs = torch.stack(outs)
    assert torch.equal(plain.outs, fused.outs)
    assert fused.calls == plain.calls and len(fused.log) == len(plain.log)
    assert fused.batches == plain.batches and type(fused.seen) is type(plain.seen)


def test_measuring_inside_checkpointing_neither_waits_nor_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTKD_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTKD_PLANNER", raising=False)
    torch.manual_seed(0)
    plain = Unit()
    auto = use_kernels(copy.deepcopy(plain), "auto")
    grads = []
    for model in (plain, auto):
        x = torch.randn(2, 8, 23, 29, generator=torch.Generator().manual_seed(0)).requires_grad_()
        checkpoint(model, x, use_reentrant=False).square().mean().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)


def test_a_network_that_is_one_chain_is_exported_with_its_argument_names():
    torch.manual_seed(0)
    fused = use_kernels(Unit(), "fused").eval()
    assert list(inspect.signature(fused.forward).parameters) == ["x"]
    exported = torch.export.export(fused, (X,), dynamic_shapes={"x": {0: torch.export.Dim("n")}})
    assert not [node for node in exported.graph.nodes if "fastkd" in str(node.target)]
    torch.testing.assert_close(exported.module()(X[:1]), fused(X[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (8, 4), (8, 8)])
@pytest.mark.parametrize("of_input", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("of_weights", [torch.contiguous_format, torch.channels_last])
def test_its_output_has_the_layout_of_plain_modules(channels, groups, of_input, of_weights):
    """A view of it works if that of the network itself does."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=groups),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 6, 1),
    ).to(memory_format=of_weights)
    fused = use_kernels(copy.deepcopy(plain), "fused")
    assert kernels_report(fused).changed
    x = X[:, :channels].contiguous(memory_format=of_input)
    outs = [model(x) for model in (plain, fused)]
    assert outs[0].stride() == outs[1].stride()
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


class ByKeyword(Unit):
    def forward(self, x):
        inner = self.gate(self.between(self.act(self.norm(self.conv(input=x)))))
        return self.last_act(self.tail(inner) + self.shortcut(x))


class ActByKeyword(Unit):
    def forward(self, x):
        inner = F.relu(input=self.norm(input=self.conv(x)))
        return self.last_act(self.tail(inner) + self.shortcut(x))


class Aliased(Unit):
    """`gate` passes its input on, and the sum reads that after it was changed in place."""

    def forward(self, x):
        x = x + 0
        alias = self.gate(x)
        inner = self.act(self.norm(self.conv(x)))
        alias.relu_()
        return self.last_act(self.tail(inner) + x)


class Viewed(Unit):
    def forward(self, x):
        x = x + 0
        alias = x.view(-1)
        inner = self.act(self.norm(self.conv(x)))
        F.relu(alias, True)
        return self.last_act(self.tail(inner) + x)


@pytest.mark.parametrize("kind", [ByKeyword, ActByKeyword, Aliased, Viewed])
def test_calls_that_are_not_of_a_chain_stay_plain(kind):
    torch.manual_seed(0)
    plain = kind().eval()
    fused = use_kernels(copy.deepcopy(plain), "fused")
    reason = kernels_report(fused).left["conv"]
    wanted = {ByKeyword: "keyword", ActByKeyword: "not followed"}.get(kind, "overwritten")
    assert wanted in reason
    with torch.no_grad():
        torch.testing.assert_close(fused(X), plain(X), rtol=1e-4, atol=1e-5)


def test_a_copy_runs_its_own_layers():
    torch.manual_seed(0)
    fused = use_kernels(Branching().eval(), "fused")
    out, twin = fused(X), copy.copy(fused)
    twin.object = object()
    torch.testing.assert_close(twin(X), -out, rtol=1e-4, atol=1e-5)
    twin = use_kernels(twin, "fused")
    torch.testing.assert_close(twin(X), -out, rtol=1e-4, atol=1e-5)
    assert torch.equal(fused(X), out)
    for same in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert same.forward.module is same
        assert torch.equal(same(X), out) and same.forward.traces


class Scaled(Unit):
    def __init__(self):
        super().__init__()
        self.scale = 0.0

    def forward(self, x):
        return self.scale * super().forward(x)


def test_a_scheduled_number_neither_uses_up_nor_piles_up_traces():
    torch.manual_seed(0)
    plain = Scaled().eval()
    fused = use_kernels(copy.deepcopy(plain), "fused")
    for epoch in range(24):
        for model in (plain, fused):
            model.scale = epoch / 8
        for _ in range(16):
            out = fused(X[:1, :, :1, :1])
        torch.testing.assert_close(out, plain(X[:1, :, :1, :1]), rtol=1e-4, atol=1e-5)
        assert fused.forward._trace() is not None
    assert len(fused.forward.traces) <= 4
    assert kernels_report(fused).changed


def test_code_that_changes_with_every_call_runs_as_it_is_and_is_reported():
    fused = use_kernels(Scaled().eval(), "fused")
    for call in range(32):
        fused.scale = call / 8
        fused(X[:1, :, :1, :1])
    report = kernels_report(fused)
    assert fused.forward.traced < 20 and not report.changed
    assert "change from call to call" in report.left["conv"]
