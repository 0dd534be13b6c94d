"""Counts of foreign networks against the numbers their own authors publish, and side effects."""

import pytest
import torch
from torch import nn
from torchvision import models

from fastkd.models import count


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "vit_b_16", "shufflenet_v2_x0_5"]
)
def test_torchvision_publishes_the_same_numbers(name: str) -> None:
    published = models.get_model_weights(name).DEFAULT.meta
    with torch.device("meta"):  # no memory, no arithmetic: the shapes are enough
        model = models.get_model(name)
    size = count(model, (3, 224, 224))
    assert size.params == published["num_params"]
    assert round(size.macs / 1e9, 3) == published["_ops"]


def test_shared_weights_count_once_and_their_work_twice() -> None:
    layer = nn.Linear(4, 4, bias=False)
    size = count(nn.Sequential(nn.Flatten(), layer, layer), (4, 1, 1))
    assert (size.params, size.params_conv_linear, size.macs) == (16, 16, 32)


def test_only_convolutions_and_linear_layers_in_the_papers_count() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 4, 5))
    size = count(model, (3, 4, 4))
    assert size.params_conv_linear == (8 * 27 + 8) + (5 * 32 + 5)
    assert size.params == size.params_conv_linear + 16
    assert size.macs == 8 * 27 * 4 + 5 * 32


def test_the_model_is_as_before() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Flatten())
    model.train()
    model[2].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    count(model, (3, 8, 8))
    assert [module.training for module in model.modules()] == [True, True, True, False, True]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_error_of_the_network_restores_the_model_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    with pytest.raises(RuntimeError):
        count(model, (3, 1, 1))
    assert all(module.training for module in model.modules())


def test_half_precision_networks_get_half_precision_images() -> None:
    assert count(nn.Conv2d(3, 4, 1).to(torch.bfloat16), (3, 2, 2)).macs == 48


def test_readable_line() -> None:
    size = count(nn.Sequential(nn.Flatten(), nn.Linear(3000, 1000)), (3000, 1, 1))
    assert str(size) == (
        "3,001,000 parameters (3,001,000 in convolutions and linear layers), "
        "3 M multiply-accumulates per image"
    )
