"""A bad step changes nothing, on the host path and on the one without host reads; EMA with it.

The device path runs here on CPU tensors: it is the same code, and the fused CPU kernels honour
`found_inf` as the CUDA ones do. The case of one bad rank is in tests/compute/test_ranks.py.
"""

import copy

import pytest
import torch
from torch import nn

from fastkd.errors import RunFailed
from fastkd.training.config import OptimConfig
from fastkd.training.ema import EMA
from fastkd.training.guard import Guard, keep_where_
from fastkd.training.optim import build_optimizer

NAN, INF = float("nan"), float("inf")
OPTIMIZERS = ["sgd", "adam", "adamw", "lamb"]


class Net(nn.Module):
    """Batch norm statistics, an integer counter, a half precision bank and a boolean mask."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.register_buffer("bank", torch.zeros(5, dtype=torch.bfloat16))
        self.register_buffer("seen", torch.zeros(5, dtype=torch.bool), persistent=False)

    def forward(self, x):
        self.bank += 1
        self.seen = ~self.seen  # replaced, not written to
        return self.body(x)


def make(name="sgd", *, on_device=False, max_skips=3):
    torch.manual_seed(0)
    net = Net()
    config = OptimConfig(name=name, lr=0.1, momentum=0.9, weight_decay=0.0)
    optimizer = build_optimizer([{"params": net.parameters()}], config)
    guard = Guard(net, optimizer, max_skips=max_skips, on_device=on_device)
    return net, optimizer, guard


def train_step(net, optimizer, guard, seed=0, *, poison=None, value=NAN, clip_norm=None):
    """One step; `poison` puts `value` into the input, the loss or one gradient."""
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
    if poison == "input":
        x[2, 1] = value
    optimizer.zero_grad()
    guard.before_step()
    loss = net(x).square().mean()
    loss.backward()
    loss = loss.detach()
    if poison == "loss":
        loss = torch.full_like(loss, value)
    if poison == "gradient":
        net.body[2].weight.grad[1, 2] = value
    ok = guard.judge(loss, [p.grad for p in net.parameters()], clip_norm)
    guard.apply(ok)
    return ok


def everything(net, optimizer):
    state = {f"net.{name}": value for name, value in net.named_parameters()}
    state |= {f"buffer.{name}": value for name, value in net.named_buffers()}
    for index, group in enumerate(optimizer.param_groups):
        if "step" in group:  # LAMB keeps its step count there
            state[f"group{index}.step"] = torch.as_tensor(group["step"])
        for number, parameter in enumerate(group["params"]):
            for key, value in optimizer.state.get(parameter, {}).items():
                state[f"state{index}.{number}.{key}"] = torch.as_tensor(value)
    return copy.deepcopy({name: value.detach() for name, value in state.items()})


def differences(before, after):
    """Names whose bits differ; optimizer state that a skipped step made must be all zero."""
    return [
        name
        for name, value in after.items()
        if (value.any() if name not in before else not torch.equal(before[name], value))
    ]


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("good_steps", [0, 2], ids=["first-step", "third-step"])
@pytest.mark.parametrize(
    ("poison", "value"),
    [("input", NAN), ("loss", NAN), ("loss", INF), ("gradient", NAN), ("gradient", -INF)],
    ids=["input-nan", "loss-nan", "loss-inf", "gradient-nan", "gradient-inf"],
)
def test_a_bad_step_changes_nothing(name, on_device, good_steps, poison, value):
    net, optimizer, guard = make(name, on_device=on_device)
    for seed in range(good_steps):
        assert train_step(net, optimizer, guard, seed)
    before = everything(net, optimizer)
    assert not train_step(net, optimizer, guard, poison=poison, value=value)
    assert differences(before, everything(net, optimizer)) == []
    assert guard.counts() == (1, 1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_after_a_skip_is_training_without_it(name):
    net, optimizer, guard = make(name, on_device=True)
    twin, twin_optimizer, twin_guard = make(name, on_device=True)
    for seed in range(4):
        if seed in (0, 2):
            train_step(net, optimizer, guard, seed, poison="gradient")
        train_step(net, optimizer, guard, seed)
        train_step(twin, twin_optimizer, twin_guard, seed)
    assert differences(everything(twin, twin_optimizer), everything(net, optimizer)) == []


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_good_step_is_the_optimizer_s_own(name, on_device):
    net, optimizer, guard = make(name, on_device=on_device)
    twin, twin_optimizer, _ = make(name)
    for seed in range(3):
        train_step(net, optimizer, guard, seed)
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        twin_optimizer.zero_grad()
        twin(x).square().mean().backward()
        twin_optimizer.step()
    assert differences(everything(twin, twin_optimizer), everything(net, optimizer)) == []
    assert guard.counts() == (0, 0)


def test_ignored_buffers_are_left_to_their_owner():
    net, optimizer, _ = make()
    guard = Guard(net, optimizer, max_skips=3, ignore_buffers=["bank"])
    train_step(net, optimizer, guard, poison="loss")
    assert net.bank.tolist() == [1.0] * 5
    assert net.body[1].num_batches_tracked == 0
    with pytest.raises(ValueError, match=r"not buffers of the module: body\.1\.mean"):
        Guard(net, optimizer, max_skips=3, ignore_buffers=["bank", "body.1.mean"])


def test_clipping_equals_torch():
    net, optimizer, guard = make()
    twin, twin_optimizer, twin_guard = make()
    train_step(twin, twin_optimizer, twin_guard)
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1e-3)
    train_step(net, optimizer, guard, clip_norm=1e-3)
    assert norm > 1e-3
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_counts_consecutive_and_total():
    net, optimizer, guard = make()
    seen = []
    for bad in (True, True, False, True, False):
        train_step(net, optimizer, guard, poison="loss" if bad else None)
        seen.append(guard.counts())
    assert seen == [(1, 1), (2, 2), (0, 2), (1, 3), (0, 3)]


def test_too_many_skips_fail_the_run_however_late_it_is_asked():
    net, optimizer, guard = make(max_skips=2)
    for _ in range(2):
        train_step(net, optimizer, guard, poison="loss")
    assert guard.check() == (2, 2)
    train_step(net, optimizer, guard, poison="loss")
    train_step(net, optimizer, guard)
    with pytest.raises(RunFailed, match=r"3 steps in a row .*\(at most 2 are skipped; 3 so far"):
        guard.check()


def test_the_counters_travel_with_the_checkpoint():
    net, optimizer, guard = make()
    train_step(net, optimizer, guard, poison="loss")
    restored = Guard(net, optimizer, max_skips=3)
    restored.load_state_dict(guard.state_dict())
    train_step(net, optimizer, restored, poison="loss")
    assert restored.counts() == (2, 2)


def test_works_beside_a_gradient_scaler():
    net, optimizer, guard = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    for poison, expected_scale in ((None, 8.0), ("gradient", 4.0), (None, 4.0)):
        before = everything(net, optimizer)
        optimizer.zero_grad()
        guard.before_step()
        loss = net(torch.ones(4, 3)).square().mean()
        scaler.scale(loss).backward()
        if poison:
            net.body[0].weight.grad[0, 0] = INF
        scaler.unscale_(optimizer)
        guard.apply(guard.judge(loss, [p.grad for p in net.parameters()]))
        scaler.update()
        assert scaler.get_scale() == expected_scale
        changed = differences(before, everything(net, optimizer))
        assert bool(changed) == (poison is None)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.int64, torch.bool],
    ids=str,
)
def test_selection_is_bitwise_for_every_dtype(dtype):
    bits = torch.tensor([[0, -1, 2**31 - 1, -(2**31)], [7, 1, -5, 1 << 30]], dtype=torch.int32)
    if dtype == torch.bool:
        one, other = bits[0] > 0, bits[1] > 0
    else:
        one, other = (row.repeat(4).view(dtype) for row in bits)
    for keep, expected in ((True, one), (False, other)):
        target = one.clone()
        keep_where_(torch.tensor(keep), [target], [other])
        assert torch.equal(target.view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_the_average_follows_its_formula_and_ignores_bad_steps(on_device):
    net, optimizer, guard = make(on_device=on_device)
    ema = EMA(net, decay=0.9, on_device=on_device)
    expected = {name: value.clone() for name, value in net.state_dict().items()}
    for seed, poison in enumerate([None, "input", None, "gradient"]):
        ok = train_step(net, optimizer, guard, seed, poison=poison)
        before = copy.deepcopy(ema.state_dict())
        ema.update(ok)
        if poison:
            assert all(torch.equal(before[name], v) for name, v in ema.state_dict().items())
            continue
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                expected[name] = 0.9 * expected[name] + 0.1 * value
            else:
                expected[name] = value.clone()
    for name, value in ema.state_dict().items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-2 if "bank" in name else 1e-6, atol=1e-7
        )


def test_the_average_survives_even_where_the_weights_did_not():
    net, _, _ = make()
    ema = EMA(net, decay=0.5, on_device=True)
    before = copy.deepcopy(ema.state_dict())
    with torch.no_grad():
        net.body[0].weight.fill_(NAN)
    ema.update(torch.tensor(False))
    assert all(torch.equal(before[name], value) for name, value in ema.state_dict().items())


def test_the_average_is_a_frozen_network_in_eval_mode():
    net, optimizer, guard = make()
    ema = EMA(net, decay=0.0)
    ema.update(train_step(net, optimizer, guard))
    assert ema.module is not net
    assert not ema.module.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    x = torch.randn(4, 3)
    assert torch.equal(ema.module(x), net.eval()(x))
    other = EMA(Net(), decay=0.0)
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.module(x), ema.module(x))
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got 1"):
        EMA(net, decay=1.0)
