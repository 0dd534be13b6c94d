"""The knapsack against brute force, and what a pick costs against the network that it makes."""

import itertools
import random

import pytest
import torch

from fastkd.compress.scaled import depth_scaled, depths, width_scaled
from fastkd.compress.search import Prices, best, capacity, draws, smallest, uniform
from fastkd.compress.space import CANDIDATES, Space, space_of
from fastkd.compress.student import Student, narrower
from fastkd.models import create_model
from fastkd.models.counting.count import count

SHAPE = (3, 16, 16)


def all_picks(prices: Prices):
    """Every student, by brute force."""

    def of_stage(stage):
        for depth in range(stage.least, len(stage.parts) + 1):
            parts = stage.parts[:depth]
            yield from itertools.product(
                *(itertools.product(*(prices.allowed(s) for s in part.slots)) for part in parts)
            )

    return itertools.product(*(list(of_stage(stage)) for stage in prices.space.stages))


def value(prices: Prices, pick, exponent: float) -> float:
    total = 0.0
    for stage, kept in zip(prices.space.stages, pick, strict=True):
        for part, numbers in zip(stage.parts, kept, strict=False):
            total += 0.0 if part.slots else 1.0
            total += sum(
                capacity(slot, number, exponent)
                for slot, number in zip(part.slots, numbers, strict=True)
            )
    return total


def with_costs(space: Space, seed: int) -> Prices:
    """Whole numbers at random, a residual block at least as dear as what is in it."""
    rng = random.Random(seed)
    of = {
        graph.key: float(rng.randint(1, 30) + 20 * (block == "S"))
        for graph, block in space.graphs()
    }
    for stage in space.stages:
        for part in stage.parts:
            if part.whole is not None and len(part.slots) > 1:
                own = sum(of[slot.choices[0].graph.key] for slot in part.slots)
                of[part.whole.key] = own + rng.randint(0, 5)
    prices = Prices(space, of, 0.0)
    return Prices(space, of, prices.parts(space.original) + 7)


@pytest.fixture(scope="module", params=["resnet14", "timm:test_resnet"])
def small(request) -> Space:
    """Few enough students to look at all."""
    space = space_of(request.param, 10, (3, 32, 32), {})
    stages = [
        type(stage)(
            stage.name,
            tuple(
                type(part)(
                    part.path,
                    tuple(type(s)(s.path, s.choices[:3]) for s in part.slots),
                    part.whole,
                )
                for part in stage.parts[:2]
            ),
            stage.least,
        )
        for stage in space.stages[:3]
    ]
    return Space(space.name, space.options, 10, space.shape, tuple(stages))


@pytest.mark.parametrize("seed", range(3))
def test_the_knapsack_is_exact(small, seed):
    prices = with_costs(small, seed)
    every = list(all_picks(prices))
    assert 20 < len(every) < 200_000
    for share in (0.3, 0.5, 0.8):
        limit = float(round(prices.whole * share))
        bins = round(prices.room(limit))
        under = [pick for pick in every if prices.estimate(pick) <= limit]
        found = best(prices, limit, 0.5, bins=max(1, bins)) if bins >= 0 else None
        if not under:
            assert found is None
            continue
        assert found is not None and prices.estimate(found) <= limit + 1e-6
        most = max(value(prices, pick, 0.5) for pick in under)
        assert value(prices, found, 0.5) == pytest.approx(most)
    least = min(map(prices.estimate, every))
    assert prices.estimate(smallest(prices)) == pytest.approx(least)
    assert best(prices, least - 0.5) is None


def counted(space: Space, quantity: str) -> Prices:
    of = {graph.key: float(getattr(graph.count, quantity)) for graph, _ in space.graphs()}
    model = create_model(space.name, 10, **space.options)
    return Prices(space, of, float(getattr(count(model, space.shape), quantity)))


@pytest.mark.parametrize("quantity", ["macs", "params"])
@pytest.mark.parametrize("name", ["wrn_16_1", "resnet14", "vgg8", "timm:test_resnet"])
def test_macs_and_parameters_add_up_exactly(name, quantity):
    space = space_of(name, 10, (3, 32, 32), {})
    prices = counted(space, quantity)
    for pick in [smallest(prices), *draws(prices, 0.7 * prices.whole, 3, seed=1)]:
        model = create_model(name, 10, **space.options_of(pick))
        assert getattr(count(model, (3, 32, 32)), quantity) == prices.estimate(pick)


def test_draws_follow_the_seed_and_fill_the_limit():
    prices = counted(space_of("resnet20", 10, SHAPE, {}), "macs")
    limit = 0.5 * prices.whole
    found = list(draws(prices, limit, 12, seed=3))
    assert len(set(found)) == len(found) == 12
    assert found == list(draws(prices, limit, 12, seed=3))
    assert found != list(draws(prices, limit, 12, seed=4))
    assert all(0.9 * limit < prices.estimate(pick) <= limit for pick in found)
    least = prices.estimate(smallest(prices))
    assert list(draws(prices, least - 1, 12, seed=3)) == []


def test_uniform_students_have_one_block():
    prices = counted(space_of("resnet20", 10, SHAPE, {}), "macs")
    for pick in uniform(prices, 0.5 * prices.whole):
        blocks = prices.space.genotype(pick).get("blocks", {})
        assert len(set(blocks.values())) <= 1
        assert prices.estimate(pick) <= 0.5 * prices.whole


def test_a_scale_is_fitted_to_whole_networks():
    prices = counted(space_of("resnet14", 10, SHAPE, {}), "macs")
    picks = list(draws(prices, 0.6 * prices.whole, 3, seed=0))
    measured = {pick: prices.whole - 0.7 * prices.saved(pick) for pick in picks}
    fitted = prices.fitted(measured)
    assert fitted.scale == pytest.approx(0.7)
    limit = 0.6 * prices.whole
    found = best(fitted, limit)
    assert found is not None and fitted.estimate(found) <= limit < prices.whole
    # Students that measure slower than the original say nothing of the parts.
    assert prices.fitted({picks[0]: 2 * prices.whole}).scale == 1.0


def test_the_space_of_a_network_without_ordinary_convolutions_is_its_depth():
    space = space_of("timm:mobilenetv2_100", 10, (3, 32, 32), {})
    assert list(space.slots()) == []
    assert [len(stage.parts) for stage in space.stages] == [1, 2, 3, 4, 3, 3, 1]
    assert all(stage.least == 1 for stage in space.stages)


def test_only_blocks_that_divide_are_offered():
    space = space_of("resnet8", 10, SHAPE, {"width": 0.375})  # 6, 6, 12 and 24 channels
    blocks = {slot.path: {one.block for one in slot.choices} for slot in space.slots()}
    assert blocks["layer1.0"] == {"S", "G(2)", "G(N)", "B(2)", "BG(2,M)"}
    assert "G(4)" in blocks["layer3.0"] and "G(16)" not in blocks["layer3.0"]
    assert set().union(*blocks.values()) <= {"S", *CANDIDATES}


def test_building_a_space_leaves_the_generator_alone():
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    space_of("resnet8", 10, SHAPE, {})
    assert torch.rand(1) == wanted


def macs_of(student: Student) -> float:
    return float(count(student.build(10), SHAPE).macs)


def test_the_shallower_baseline_is_the_nearest_below():
    space = space_of("resnet20", 10, SHAPE, {})
    prices = counted(space, "macs")
    every = [macs_of(Student("resnet20", space.options_of(pick), "")) for pick in depths(space)]
    assert len(every) == 26
    limit = 0.7 * prices.whole
    found = depth_scaled(prices, limit, macs_of)
    assert found is not None and "blocks" not in found.options
    assert 0.95 * limit - 0.05 * limit <= macs_of(found) <= limit
    assert macs_of(found) >= max(one for one in every if one <= limit) - 0.05 * limit
    assert depth_scaled(prices, 0.01 * prices.whole, macs_of) is None


@pytest.mark.parametrize("factor", [0.6, 0.8, 1.3])
def test_wrong_prices_make_no_weak_baseline(factor):
    """Networks that measure other than their parts say: the nearest that was measured counts."""
    space = space_of("resnet20", 10, SHAPE, {})
    prices = counted(space, "macs")
    limit = 0.6 * prices.whole

    def clock(student: Student) -> float:
        return prices.whole - factor * (prices.whole - macs_of(student))

    every = [clock(Student("resnet20", space.options_of(pick), "")) for pick in depths(space)]
    found = depth_scaled(prices, limit, clock)
    assert found is not None
    nearest = max(one for one in every if one <= limit)
    assert nearest - 0.05 * limit <= clock(found) <= limit


def test_the_narrower_baseline_is_the_widest_below():
    limit = 0.5 * macs_of(Student("resnet20", {}, ""))
    found = width_scaled("resnet20", {}, limit, macs_of)
    every = narrower("resnet20", {})
    assert found is not None and macs_of(found) <= limit
    assert found == next(one for one in every if macs_of(one) <= limit)
    assert width_scaled("resnet20", {}, 1.0, macs_of) is None


def test_narrower_networks_of_every_source():
    assert [one.name for one in narrower("wrn_40_4", {})] == ["wrn_40_3", "wrn_40_2", "wrn_40_1"]
    names = [one.name for one in narrower("timm:mobilenetv2_100", {})]
    assert names == [f"timm:mobilenetv2_0{width}" for width in (75, 50, 35)]
    assert narrower("timm:resnet18", {}) == []
    half = narrower("resnet20", {"width": 0.5, "shortcuts": False})
    assert half[0].options == {"width": 0.46875, "shortcuts": False}
