"""ERFNet's encoder: the size of its head, its taps, and the whole network that starts from it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastkd.errors import UserError
from fastkd.models import Tapped, count, create_model
from fastkd.models.card import card_of
from fastkd.models.zoo.families import encoder_of
from fastkd.storage.weights import describe, save_weights

CLASSES = 20


def build(name: str, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(name, CLASSES, **options)


def trained(folder: Path, name: str, seed: int = 1, **options: Any) -> tuple[nn.Module, Path]:
    """A network with statistics of its own, and its file."""
    model = build(name, seed, **options)
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 32, 32))
    file = folder / f"{name}.safetensors"
    save_weights(file, model, describe(model))
    return model, file


def params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("block", "whole"), [("S", 2_064_256), ("G(N)", 488_768)])
def test_the_two_heads_make_the_two_numbers_of_parameters(block: str, whole: int) -> None:
    """Table 4 of Moonshine has ERFNet without the head of its encoder: with it, 2.07 M."""
    with torch.device("meta"):
        model, encoder = (build(name, block=block) for name in ("erfnet", "erfnet_encoder"))
    head = 128 * CLASSES + CLASSES
    assert params(model) == whole
    assert params(encoder) - head == sum(params(one) for one in list(model.layers)[:16])
    if block == "S":
        assert whole + head == 2_066_836


def test_the_rules_differ_in_the_decoder_only() -> None:
    """A convolution of the encoder has no output pixels that its input has not."""
    side = (3, 256, 256)
    with torch.device("meta"):
        encoder, whole = build("erfnet_encoder"), build("erfnet")
    assert count(encoder, side, rule="moonshine").macs == count(encoder, side).macs
    assert count(whole, side, rule="moonshine").macs > count(whole, side).macs


def test_logits_are_at_an_eighth_of_the_size() -> None:
    encoder = encoder_of("erfnet")
    assert encoder is not None
    found = Tapped(build("erfnet_encoder").eval(), encoder.taps)(torch.randn(2, 3, 48, 64))
    assert found["logits"].shape == (2, CLASSES, 6, 8)
    assert found["stage3"].shape == (2, 128, 6, 8)
    with pytest.raises(UserError, match="images of 44x64 pixels; height and width must be mul"):
        build("erfnet_encoder")(torch.zeros(1, 3, 44, 64))


@pytest.mark.parametrize("options", [{}, {"block": "G(N)"}], ids=["S", "G(N)"])
def test_the_whole_network_starts_from_its_encoder(tmp_path: Path, options: Any) -> None:
    encoder, file = trained(tmp_path, "erfnet_encoder", **options)
    model = build("erfnet", 5, weights=file, new_head=True, **options)
    fresh = build("erfnet", 5, **options)
    new = ("head.", *(f"layers.{number}." for number in range(16, 22)))
    for key, value in model.state_dict().items():
        source = fresh if key.startswith(new) else encoder
        assert torch.equal(value, source.state_dict()[key]), key
    assert {f"{path}." for path in card_of(model).new} == set(new)
    # Exactly the same features.
    images = torch.randn(2, 3, 32, 32)
    one, other = (Tapped(net.eval(), ["stage1", "stage3"])(images) for net in (encoder, model))
    assert all(torch.equal(one[tap], other[tap]) for tap in ("stage1", "stage3"))


def test_its_options_are_those_of_the_file(tmp_path: Path) -> None:
    _, file = trained(tmp_path, "erfnet_encoder", block="G(N)")
    model = create_model("erfnet", weights=file, new_head=True)
    assert card_of(model).options == {"block": "G(N)"}
    assert card_of(model).num_classes == CLASSES


@pytest.mark.parametrize(
    ("of", "name", "options", "message"),
    [
        (
            "erfnet_encoder",
            "erfnet",
            {},
            "holds erfnet_encoder, the first layers of erfnet: new_head=True .*new decoder",
        ),
        (
            "resnet8",
            "erfnet",
            {"new_head": True},
            "does not fit erfnet with 20 classes, of which head is new: .*The file holds resnet8",
        ),
        (
            "erfnet",
            "erfnet_encoder",
            {"new_head": True},
            "does not fit erfnet_encoder with 20 classes.* unexpected .*The file holds erfnet with",
        ),
        (
            "erfnet_encoder",
            "erfnet",
            {"new_head": True, "block": "G(8)"},
            "does not fit erfnet with 20 classes, of which .* wrong shape|missing",
        ),
    ],
    ids=["no new head", "another network", "the whole", "another block"],
)
def test_any_other_file_is_refused(
    tmp_path: Path, of: str, name: str, options: dict[str, Any], message: str
) -> None:
    _, file = trained(tmp_path, of)
    with pytest.raises(UserError, match=message) as caught:
        create_model(name, CLASSES, weights=file, **options)
    assert "\n" not in str(caught.value)


def test_only_erfnet_has_one() -> None:
    assert encoder_of("erfnet").name == "erfnet_encoder"
    for name in ("erfnet_encoder", "resnet8", "timm:resnet18", "no such network"):
        assert encoder_of(name) is None
