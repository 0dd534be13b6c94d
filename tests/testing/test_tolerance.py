"""The rules that tests and benchmarks rely on: tolerances and the order of the sides."""

import pytest
import torch

from fastkd.testing import (
    assert_as_accurate,
    assert_loss_as_accurate,
    assert_mean_as_accurate,
    eager_kd_loss,
    eager_step_rows,
    spread,
    turns,
)


def test_an_error_may_be_twice_that_of_eager_torch() -> None:
    truth = torch.zeros(4, dtype=torch.float64)
    assert_as_accurate("x", truth + 0.2, truth + 0.1, truth)
    with pytest.raises(AssertionError, match=r"x: RMS error 2.010e-01, allowed 2.000e-01"):
        assert_as_accurate("x", truth + 0.201, truth + 0.1, truth)
    assert_as_accurate("x", truth + 0.201, truth + 0.1, truth, floor=0.21)
    with pytest.raises(AssertionError, match="1 of 4 elements are not finite"):
        assert_as_accurate("x", truth / torch.tensor([1.0, 1.0, 0.0, 1.0]), truth, truth)


def test_a_loss_is_held_to_its_value_and_its_gradient() -> None:
    student, teacher = 3 * torch.randn(2, 16, 10)
    labels = torch.randint(0, 10, (16,))

    def wrong_gradient(*batch: torch.Tensor) -> torch.Tensor:
        loss = eager_kd_loss(*batch)
        return loss.detach() + 0.999 * (loss - loss.detach())

    assert_loss_as_accurate("loss", eager_kd_loss, eager_kd_loss, student, teacher, labels)
    with pytest.raises(AssertionError, match="loss, gradient: RMS error"):
        assert_loss_as_accurate("loss", wrong_gradient, eager_kd_loss, student, teacher, labels)
    with pytest.raises(AssertionError, match="loss, loss: RMS error"):
        assert_loss_as_accurate(
            "loss",
            lambda *batch: 1.001 * eager_kd_loss(*batch),
            eager_kd_loss,
            student,
            teacher,
            labels,
        )


def test_a_mean_may_be_off_by_twice_the_error_of_its_terms() -> None:
    truth_N = torch.arange(4).double()
    eager_N = truth_N + torch.tensor([0.1, -0.1, 0.1, -0.1])
    assert_mean_as_accurate("mean", 1.5 + 0.199, eager_N, truth_N)
    for got in (1.5 + 0.201, float("nan")):
        with pytest.raises(AssertionError, match=r"mean: .* allowed 2.000e-01"):
            assert_mean_as_accurate("mean", got, eager_N, truth_N)


def test_the_rows_of_a_step_leave_the_networks_alone() -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.BatchNorm1d(5))
    before = {name: value.clone() for name, value in net.eval().state_dict().items()}
    images, labels = torch.randn(6, 3, 2, 2), torch.arange(6) % 5
    eager = eager_step_rows(net, net, images, labels, torch.float32)
    truth = eager_step_rows(net, net, images, labels, torch.float64)
    assert truth[0].dtype == torch.float64
    for eager_N, truth_N in zip(eager, truth, strict=True):
        torch.testing.assert_close(eager_N.double(), truth_N, rtol=1e-4, atol=1e-5)
    assert not net.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_sides_take_turns_in_alternating_order() -> None:
    assert list(turns(["a", "b", "c"], 3)) == [*"abc", *"cba", *"abc"]


def test_spread_is_median_and_outer_tenths() -> None:
    assert spread(range(20)) == (9.5, 2, 17)
    assert spread([3.0]) == (3.0, 3.0, 3.0)
