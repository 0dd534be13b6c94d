"""Stochastic depth of other packages' networks by one key, and a sentence where there is none."""

import pytest
from torch import nn

from fastkd.errors import UserError
from fastkd.models import create_model


def rates(model: nn.Module) -> list[float]:
    """Of every block that can be skipped, in order."""
    found = []
    for module in model.modules():
        rate = getattr(module, "drop_prob", None) or getattr(module, "p", None)
        if type(module).__name__ in ("DropPath", "StochasticDepth"):
            found.append(float(rate or 0.0))
    return found


def test_of_timm_it_grows_to_the_last_block() -> None:
    found = rates(create_model("timm:resnet50", 5, drop_path=0.15))
    # 16 blocks, in proportion from 0, which is left out.
    assert found == pytest.approx([0.15 * number / 15 for number in range(1, 16)])
    assert rates(create_model("timm:resnet50", 5)) == []


def test_of_torchvision_it_replaces_the_networks_own() -> None:
    own = max(rates(create_model("torchvision:convnext_tiny", 5)))
    assert own == pytest.approx(0.1)
    assert max(rates(create_model("torchvision:convnext_tiny", 5, drop_path=0.3))) == 0.3
    assert max(rates(create_model("torchvision:convnext_tiny", 5, drop_path=0.0))) == 0.0


@pytest.mark.parametrize("name", ["timm:vgg11", "torchvision:resnet18"])
def test_a_network_without_it_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} has no stochastic depth: leave out drop_path"):
        create_model(name, 5, drop_path=0.1)


def test_the_zoo_has_none() -> None:
    with pytest.raises(UserError, match="drop_path"):
        create_model("resnet20", 5, drop_path=0.1)
