"""Schedules against torch.optim.lr_scheduler, whose classes are the independent truth."""

import warnings

import pytest
import torch
from torch.optim import lr_scheduler

from fastkd.errors import UserError
from fastkd.training.schedules import Schedule

BASE_LR = 0.05


def sgd():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=BASE_LR, momentum=0.9)


def walk(scheduler, optimizer, num_steps):
    """Learning rates and momenta that torch uses at steps 0, 1, ..."""
    rates, momenta = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR calls step(epoch) itself
        for _ in range(num_steps):
            rates.append(optimizer.param_groups[0]["lr"])
            momenta.append(optimizer.param_groups[0]["momentum"])
            optimizer.step()
            scheduler.step()
    return rates, momenta


def ours(schedule, num_steps):
    return [BASE_LR * schedule.lr_factor(step) for step in range(num_steps)]


@pytest.mark.parametrize("milestones", [(2, 4), (1,), (3, 3, 5), ()])
def test_multistep_equals_torch_stepped_once_per_epoch(milestones):
    schedule = Schedule(
        kind="multistep", epochs=6, steps_per_epoch=5, milestones=milestones, gamma=0.2
    )
    optimizer = sgd()
    per_epoch, _ = walk(lr_scheduler.MultiStepLR(optimizer, list(milestones), 0.2), optimizer, 6)
    expected = [rate for rate in per_epoch for _ in range(5)]
    assert ours(schedule, 30) == pytest.approx(expected, rel=1e-12)


def test_exponential_equals_torch_stepped_once_per_epoch():
    schedule = Schedule(kind="exponential", epochs=6, steps_per_epoch=5, gamma=0.98)
    optimizer = sgd()
    per_epoch, _ = walk(lr_scheduler.ExponentialLR(optimizer, 0.98), optimizer, 6)
    expected = [rate for rate in per_epoch for _ in range(5)]
    assert ours(schedule, 30) == pytest.approx(expected, rel=1e-12)


def test_poly_equals_torch_stepped_once_per_epoch():
    schedule = Schedule(kind="poly", epochs=6, steps_per_epoch=5, power=1.5)
    optimizer = sgd()
    per_epoch, _ = walk(lr_scheduler.PolynomialLR(optimizer, 6, power=1.5), optimizer, 6)
    expected = [rate for rate in per_epoch for _ in range(5)]
    assert ours(schedule, 30) == pytest.approx(expected, rel=1e-9)


def test_poly_is_the_schedule_of_erfnet():
    """Its epochs count from 1."""
    schedule = Schedule(kind="poly", epochs=150, steps_per_epoch=4)
    found = [schedule.lr_factor(4 * (e - 1) + step) for e in range(1, 151) for step in range(4)]
    expected = [(1 - (e - 1) / 150) ** 0.9 for e in range(1, 151) for _ in range(4)]
    assert found == pytest.approx(expected, rel=1e-12)
    assert min(found) > 0
    assert schedule.lr_factor(10_000) == found[-1]


def test_poly_warms_up():
    schedule = Schedule(kind="poly", epochs=10, steps_per_epoch=2, warmup_epochs=2)
    expected = [0.25, 0.5, 0.75 * 0.9**0.9, 0.9**0.9, 0.8**0.9]
    assert [schedule.lr_factor(step) for step in range(5)] == pytest.approx(expected)


def test_multistep_drops_in_the_epoch_after_the_milestone():
    schedule = Schedule(
        kind="multistep", epochs=240, steps_per_epoch=10, milestones=(150, 180, 210), gamma=0.1
    )
    values = {
        epoch: schedule.lr_factor((epoch - 1) * 10)
        for epoch in (1, 150, 151, 180, 181, 210, 211, 240)
    }
    assert values == pytest.approx(
        {1: 1, 150: 1, 151: 0.1, 180: 0.1, 181: 0.01, 210: 0.01, 211: 0.001, 240: 0.001}
    )


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_shares_of_a_short_run_are_those_of_its_steps(epochs):
    shares = (0.625, 0.75, 0.875)
    schedule = Schedule(
        kind="multistep", epochs=epochs, steps_per_epoch=40, milestones=[epochs * s for s in shares]
    )
    steps = 40 * epochs
    drops = [s for s in range(1, steps) if schedule.lr_factor(s) != schedule.lr_factor(s - 1)]
    assert drops == [steps * 5 // 8, steps * 6 // 8, steps * 7 // 8]
    assert schedule.lr_factor(0) == 1


def test_a_milestone_that_is_no_binary_fraction_falls_on_its_epoch():
    # 0.7 * 10 is 7.000000000000001.
    schedule = Schedule(kind="multistep", epochs=10, steps_per_epoch=3, milestones=(0.7 * 10,))
    assert [schedule.lr_factor(step) for step in (20, 21)] == pytest.approx([1, 0.1])


def test_cosine_equals_torch_stepped_every_step():
    schedule = Schedule(kind="cosine", epochs=4, steps_per_epoch=7)
    optimizer = sgd()
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 28)
    expected, _ = walk(scheduler, optimizer, 28)
    assert ours(schedule, 28) == pytest.approx(expected, rel=1e-9)


def test_cosine_after_warmup_equals_torch_sequential():
    schedule = Schedule(kind="cosine", epochs=5, steps_per_epoch=6, warmup_epochs=1.5)
    optimizer = sgd()
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=1 / 9, total_iters=8)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, 30 - 9)
    scheduler = lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[9])
    expected, _ = walk(scheduler, optimizer, 30)
    assert ours(schedule, 30) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["constant", "multistep"])
def test_warmup_equals_torch_linear(kind):
    schedule = Schedule(
        kind=kind, epochs=4, steps_per_epoch=6, warmup_epochs=2, milestones=(3,), gamma=0.1
    )
    optimizer = sgd()
    linear = lr_scheduler.LinearLR(optimizer, start_factor=1 / 12, total_iters=11)
    expected, _ = walk(linear, optimizer, 24)
    if kind == "multistep":
        expected[18:] = [rate * 0.1 for rate in expected[18:]]
    assert ours(schedule, 24) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("epochs", "steps_per_epoch"), [(3, 11), (1, 2), (1, 1), (40, 8)])
def test_onecycle_equals_torch(epochs, steps_per_epoch):
    total_steps = epochs * steps_per_epoch
    schedule = Schedule(kind="onecycle", epochs=epochs, steps_per_epoch=steps_per_epoch)
    optimizer = sgd()
    scheduler = lr_scheduler.OneCycleLR(optimizer, BASE_LR, total_steps=total_steps)
    rates, momenta = walk(scheduler, optimizer, total_steps)
    assert ours(schedule, total_steps) == pytest.approx(rates, rel=1e-9)
    assert [schedule.momentum(step) for step in range(total_steps)] == pytest.approx(momenta)


def test_only_onecycle_moves_the_momentum():
    assert Schedule(kind="cosine", epochs=2, steps_per_epoch=3).momentum(1) is None
    onecycle = Schedule(kind="onecycle", epochs=10, steps_per_epoch=10)
    assert onecycle.momentum(0) == pytest.approx(0.95)
    assert onecycle.momentum(29) == pytest.approx(0.85)


@pytest.mark.parametrize("kind", ["constant", "multistep", "cosine", "onecycle"])
def test_steps_past_the_end_keep_the_last_value(kind):
    schedule = Schedule(kind=kind, epochs=2, steps_per_epoch=5, milestones=(1,))
    assert schedule.lr_factor(10) == schedule.lr_factor(1000) == schedule.lr_factor(9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "linear"}, "'linear' is unknown; choose one of constant, multistep"),
        ({"steps_per_epoch": 0}, "is the batch larger than the data set"),
        ({"warmup_epochs": 5}, "a warm-up of 5 epochs does not fit into 4 epochs"),
        ({"kind": "onecycle", "warmup_epochs": 1}, "has its own warm-up"),
    ],
    ids=["kind", "empty", "warmup", "onecycle-warmup"],
)
def test_impossible_schedules_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Schedule(**({"kind": "cosine", "epochs": 4, "steps_per_epoch": 5} | changes))
