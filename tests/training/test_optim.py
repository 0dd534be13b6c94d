"""Optimizers: equal to torch's plain ones, safe to skip from step one, apex by capability."""

import sys
import types

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fastkd.errors import UserError
from fastkd.training.config import OptimConfig
from fastkd.training.optim import apex_missing, build_optimizer, set_lr, skip_aware, spare_norms


def make_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(125, 2))


def give_gradients(net, seed, memory_format=torch.preserve_format):
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if gradient.dim() == 4:
            gradient = gradient.contiguous(memory_format=memory_format)
        parameter.grad = gradient


def state_of(optimizer):
    return [value for state in optimizer.state.values() for value in state.values()]


def build(net, name="sgd", device="cpu", **keys):
    config = OptimConfig(**{"name": name, "lr": 0.1, "weight_decay": 0.0} | keys)
    return build_optimizer([{"params": net.parameters()}], config, device)


def fused_and_plain(name):
    """The optimizer under test on one net and torch's unfused one on its twin."""
    net, twin = make_net(), make_net()
    options = {"lr": 0.1, "weight_decay": 0.01}
    if name == "sgd":
        ours = build(net, momentum=0.9, nesterov=True, weight_decay=0.01)
        return (
            net,
            twin,
            ours,
            torch.optim.SGD(twin.parameters(), momentum=0.9, nesterov=True, fused=False, **options),
        )
    ours = build(net, name, weight_decay=0.01)
    plain = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return net, twin, ours, plain(twin.parameters(), betas=(0.9, 0.999), fused=False, **options)


def assert_close(net, twin):
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_equals_torch_over_steps(name):
    net, twin, ours, plain = fused_and_plain(name)
    for step in range(5):
        give_gradients(net, step)
        give_gradients(twin, step)
        ours.step()
        plain.step()
    assert_close(net, twin)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_state_restored_into_another_memory_order_gives_the_same_numbers(name):
    net, twin, ours, plain = fused_and_plain(name)
    for step in range(4):
        if step == 2:
            saved = ours.state_dict()
            net.to(memory_format=torch.channels_last)
            ours = build(net, name, momentum=0.9, nesterov=name == "sgd", weight_decay=0.01)
            ours.load_state_dict(saved)
        give_gradients(net, step, torch.channels_last if step >= 2 else torch.preserve_format)
        give_gradients(twin, step)
        ours.step()
        plain.step()
    assert_close(net, twin)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("skipped_step", [0, 2])
def test_found_inf_leaves_parameters_and_state_bitwise_alone(name, skipped_step):
    net, twin = make_net(), make_net()
    skipping, reference = build(net, name), build(twin, name)
    for step in range(4):
        give_gradients(net, step)
        if step == skipped_step:
            for parameter in net.parameters():
                parameter.grad.fill_(float("nan"))
            skipping.found_inf = torch.ones(())
            skipping.step()
            del skipping.found_inf
            continue
        skipping.step()
        give_gradients(twin, step)
        reference.step()
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(state_of(skipping), state_of(reference), strict=True):
        assert torch.equal(ours, theirs)


def test_adam_adds_its_decay_to_the_gradient():
    """The first step of Adam goes by the sign of gradient plus decay, whatever their size."""
    net = make_net()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build(net, "adam", lr=0.001, weight_decay=0.1).step()
    for parameter, old in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, old - 0.001 * old.sign(), rtol=0, atol=1e-6)


def test_a_parameter_may_get_its_first_gradient_late():
    net = make_net()
    optimizer = build(net)
    give_gradients(net, 0)
    net[3].weight.grad = None
    before = net[3].weight.detach().clone()
    optimizer.step()
    assert torch.equal(net[3].weight, before)
    give_gradients(net, 1)
    optimizer.step()
    assert torch.allclose(net[3].weight, before - 0.1 * net[3].weight.grad)


def test_groups_scale_the_rate_and_choose_their_decay():
    net = make_net()
    optimizer = build_optimizer(
        [
            {"params": net[0].parameters()},
            {"params": net[3].parameters(), "lr_scale": 10.0, "weight_decay": 0.0, "name": "head"},
        ],
        OptimConfig(lr=0.1, weight_decay=5e-4),
    )
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.5]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 0.0]
    set_lr(optimizer, 1.0, momentum=0.85)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1.0]
    assert {group["momentum"] for group in optimizer.param_groups} == {0.85}


@pytest.mark.parametrize("name", ["adam", "adamw", "lamb"])
def test_scheduled_momentum_is_beta1_of_adam_like_optimizers(name):
    optimizer = build(make_net(), name)
    set_lr(optimizer, 1.0, momentum=0.85)
    assert optimizer.param_groups[0]["betas"] == (0.85, 0.999)


def test_frozen_parameters_are_left_out():
    net = make_net()
    net[0].requires_grad_(False)
    parameters = build(net).param_groups[0]["params"]
    assert len(parameters) == 4
    net.requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"):
        build(net)


def test_skip_awareness_is_that_of_the_fused_kernels():
    net = make_net()
    assert skip_aware(build(net, "sgd"))
    assert skip_aware(build(net, "adam"))
    assert skip_aware(build(net, "adamw"))
    assert not skip_aware(build(net, "lamb"))
    assert not skip_aware(torch.optim.SGD(net.parameters(), lr=0.1))
    assert not skip_aware(torch.optim.RMSprop(net.parameters()))


def test_lamb_takes_a_step():
    net = make_net()
    before = net[3].weight.detach().clone()
    give_gradients(net, 0)
    build(net, "lamb", lr=0.01, weight_decay=0.01).step()
    # The trust ratio makes every layer move by lr times its own norm.
    moved = (net[3].weight - before).norm() / before.norm()
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "adan"}, "name\n  Input should be 'sgd', 'adam', 'adamw' or 'lamb'"),
        ({"impl": "fused"}, "impl\n  Input should be 'torch' or 'apex'"),
    ],
    ids=["name", "impl"],
)
def test_unknown_names_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        OptimConfig(**keys)


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(UserError, match="nesterov needs a momentum above 0"):
        build(make_net(), nesterov=True, momentum=0.0)


def install_fake_apex(monkeypatch, *, available=True, classes=("FusedSGD",), cuda=True):
    """A stand-in with apex's module layout; the real one needs a GPU to be built."""

    class Fused(torch.optim.SGD):
        def __init__(self, params, lr, **options):
            super().__init__(params, lr, fused=False, **options)

    multi_tensor_apply = types.ModuleType("apex.multi_tensor_apply")
    multi_tensor_apply.multi_tensor_applier = types.SimpleNamespace(available=available)
    optimizers = types.ModuleType("apex.optimizers")
    for name in classes:
        setattr(optimizers, name, Fused)
    for module in (types.ModuleType("apex"), multi_tensor_apply, optimizers):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    return Fused


def test_missing_apex_is_an_error_that_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match=r"cannot be imported.*on PyPI is an unrelated project"):
        build(make_net(), impl="apex")


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        ({"available": False}, "built without its CUDA extensions"),
        ({"classes": ("FusedLAMB",)}, "has no FusedSGD"),
        ({"cuda": False}, "torch sees none"),
        ({}, None),
    ],
    ids=["python-only", "old", "no-gpu", "usable"],
)
def test_apex_is_probed_by_capability(monkeypatch, fake, reason):
    install_fake_apex(monkeypatch, **fake)
    missing = apex_missing()
    assert missing is None if reason is None else reason in missing


def test_apex_refuses_bfloat16_and_other_devices(monkeypatch):
    fused_class = install_fake_apex(monkeypatch)
    with pytest.raises(UserError, match="bfloat16"):
        build(make_net().bfloat16(), impl="apex", device="cuda")
    with pytest.raises(UserError, match="CUDA devices only"):
        build(make_net(), impl="apex", device="cpu")
    optimizer = build(make_net(), impl="apex", device="cuda", nesterov=True)
    assert isinstance(optimizer, fused_class)
    assert not skip_aware(optimizer)


class Embedded(nn.Module):
    """Norms of several kinds, biases, and a table that its author wants to keep from decay."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4)])
        self.fc = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(()))
        self.positions = nn.Parameter(torch.ones(1, 5, 4))

    def no_weight_decay(self):
        return {"positions"}


def decayed(optimizer, net):
    """Names of the parameters that shrink where there is no gradient."""
    before = {name: p.detach().clone().fill_(1) for name, p in net.named_parameters()}
    for p in net.parameters():
        p.data.fill_(1)
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return {name for name, p in net.named_parameters() if not torch.equal(p.detach(), before[name])}


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_norms_and_biases_may_go_without_decay(name):
    net, term = Embedded(), nn.Linear(2, 2)
    own = [{"params": list(net.parameters())}, {"params": list(term.parameters()), "lr_scale": 2.0}]
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.1)
    every = build_optimizer(own, config)
    assert decayed(every, net) == {name for name, _ in net.named_parameters()}
    spared = build_optimizer(spare_norms(own, net), config)
    assert decayed(spared, net) == {"conv.weight", "fc.weight"}
    assert decayed(spared, term) == {"weight"}
    # Nothing is lost or doubled, and the rates stay.
    found = [id(p) for group in spared.param_groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for group in every.param_groups for p in group["params"])
    assert [group["base_lr"] for group in spared.param_groups] == [0.1, 0.1, 0.2, 0.2]


def test_a_group_that_says_its_own_decay_keeps_it():
    net = Embedded()
    groups = spare_norms([{"params": list(net.parameters()), "weight_decay": 0.3}], net)
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(12, 0.3)]


def test_the_rule_is_timm_s():
    import timm
    from timm.optim import param_groups_weight_decay

    for name in ("test_vit", "test_resnet", "test_efficientnet"):
        net = timm.create_model(name)
        exempt = getattr(net, "no_weight_decay", set)()
        theirs = param_groups_weight_decay(net, 0.05, no_weight_decay_list=exempt)
        free = {id(p) for group in theirs if not group["weight_decay"] for p in group["params"]}
        _, ours = spare_norms([{"params": list(net.parameters())}], net)
        assert {id(p) for p in ours["params"]} == free
        assert free
