"""Counts of foreign networks against the numbers their own authors publish, and side effects."""

import pytest
import torch
from torch import nn
from torchvision import models

from fastkd.errors import UserError
from fastkd.models import cheapen, count, create_model, fuse, remove_shortcuts


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


def test_channels_stand_in_front() -> None:
    model = create_model("resnet8", 10)
    with pytest.raises(UserError, match=r"\(32, 30, 3\); .*channels first, \(3, 32, 30\)"):
        count(model, (32, 30, 3))
    with pytest.raises(RuntimeError):  # another mistake comes through
        count(model, (4, 32, 32))


def test_a_name_is_no_network() -> None:
    for refuses in (count, fuse, remove_shortcuts, lambda name: cheapen(name, "G(4)")):
        with pytest.raises(UserError, match=r"got 'resnet8'; expected a network .*create_model"):
            refuses("resnet8")  # type: ignore[arg-type]


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
        "3 M multiply-accumulates per image, 16 kB of activations per image in training, 16 kB in "
        "inference"
    )


def test_memory_of_a_network_counted_by_hand() -> None:
    """Float32; image 3x8x8, convolution and BN and ReLU 8x6x6, five logits."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 5),
    )
    image, map_, logits = 4 * 3 * 64, 4 * 8 * 36, 4 * 5
    size = count(model, (3, 8, 8))
    # The convolution keeps the image, BN its input, ReLU and the linear layer the same output.
    assert size.training_bytes == image + 2 * map_ + logits
    # While BN or ReLU runs, the caller still holds the image.
    assert size.inference_bytes == image + 2 * map_


def test_memory_in_place_in_half_precision_and_of_a_frozen_network() -> None:
    def network(inplace: bool) -> nn.Sequential:
        conv = nn.Conv2d(3, 8, 3, padding=1)
        return nn.Sequential(conv, nn.ReLU(inplace), nn.ReLU(inplace))

    image, map_ = 4 * 3 * 64, 4 * 8 * 64
    apart, in_place = count(network(False), (3, 8, 8)), count(network(True), (3, 8, 8))
    assert apart.training_bytes == image + 2 * map_
    assert in_place.training_bytes == image + map_
    assert count(network(False).half(), (3, 8, 8)).training_bytes == apart.training_bytes // 2
    assert count(network(False).requires_grad_(False), (3, 8, 8)) == apart


def test_views_of_weights_are_no_activations() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1000, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) @ self.weight.t()

    size = count(Tied(), (3, 1, 1))
    assert size.training_bytes == size.inference_bytes == 4 * (3 + 1000)


def test_a_tap_that_nobody_wants_is_freed_on_the_way() -> None:
    image, map_ = 4 * 3 * 32 * 32, 4 * 64 * 32 * 32
    # The input of a block and three steps of its branch, as its code names them.
    assert count(create_model("resnet18", 10)).inference_bytes == image + 4 * map_
