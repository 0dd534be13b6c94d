"""torchvision's segmentation networks: built, counted, tapped, rewritten, none of it downloaded."""

from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

from fastkd.models import Tapped, cheapen, count, create_model, fuse
from fastkd.models.card import card_of
from fastkd.models.registry import classifier_paths
from fastkd.models.taps import logits_of
from fastkd.storage.fitting import load_into
from fastkd.storage.weights import describe, save_weights

HEADS = {
    "fcn_resnet50": ["classifier.4"],
    "deeplabv3_resnet50": ["classifier.4"],
    "deeplabv3_mobilenet_v3_large": ["classifier.4"],
    "lraspp_mobilenet_v3_large": ["classifier.low_classifier", "classifier.high_classifier"],
}
NAMES = list(HEADS)
SMALL = NAMES[2:]


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError(f"downloads {args}")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)


def build(name: str, classes: int = 5, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model(f"torchvision:{name}", classes, **options)


@pytest.mark.parametrize("name", SMALL)
def test_one_map_of_logits_at_the_size_of_the_images(name: str) -> None:
    model = build(name).train()
    output = model(torch.randn(2, 3, 48, 64))
    assert list(output) == ["out"]
    assert logits_of(output).shape == (2, 5, 48, 64)
    logits_of(output).square().sum().backward()
    without = [key for key, value in model.named_parameters() if value.grad is None]
    assert not without


@pytest.mark.parametrize("name", NAMES)
def test_the_classifier_is_found(name: str) -> None:
    with torch.device("meta"):
        assert list(classifier_paths(build(name))) == HEADS[name]


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_publishes_the_same_numbers(name: str) -> None:
    published = models.get_model_weights(name).DEFAULT.meta
    auxiliary: dict[str, Any] = {} if "lraspp" in name else {"aux_loss": True}
    with torch.device("meta"):
        whole = create_model(f"torchvision:{name}", 21, **auxiliary)
        plain = create_model(f"torchvision:{name}", 21)
    size = count(whole, (3, 520, 520))
    assert size.params == published["num_params"]
    assert round(size.macs / 1e9, 3) == published["_ops"]
    names = [key for key in whole.state_dict() if not key.startswith("aux_classifier.")]
    assert names == list(plain.state_dict())


def test_their_own_checkpoint_loads_without_its_second_classifier() -> None:
    torch.manual_seed(1)
    theirs = models.get_model(
        "deeplabv3_mobilenet_v3_large", weights_backbone=None, num_classes=5, aux_loss=True
    )
    ours = build("deeplabv3_mobilenet_v3_large").eval()
    report = load_into(ours, theirs.state_dict())
    assert report.complete
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(logits_of(ours(images)), logits_of(theirs.eval()(images)))


def test_published_weights_come_without_their_second_classifier(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What torchvision downloads is stood in for by weights that are known."""
    name = "deeplabv3_mobilenet_v3_large"
    torch.manual_seed(1)
    theirs = models.get_model(name, weights_backbone=None, aux_loss=True).state_dict()
    asked = []

    def known(url: str, **options: Any) -> Any:
        asked.append(url)
        return theirs

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", known)
    torch.manual_seed(2)
    for options in ({}, {"new_head": True}):
        model = create_model(f"torchvision:{name}", 5, pretrained=True, **options)
        assert len(asked) == 1 and name in asked.pop()  # not those of a backbone
        assert not any(key.startswith("aux_classifier.") for key in model.state_dict())
        for key, value in model.state_dict().items():
            assert torch.equal(value, theirs[key]) != key.startswith("classifier.4."), key


@pytest.mark.parametrize("name", SMALL)
def test_a_file_rebuilds_the_network(name: str, tmp_path: Any) -> None:
    model = build(name)
    save_weights(tmp_path / "one.safetensors", model, describe(model))
    again = create_model(f"torchvision:{name}", weights=tmp_path / "one.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


@pytest.mark.parametrize(
    ("name", "taps"),
    [
        ("deeplabv3_mobilenet_v3_large", {"backbone.16": (960, 3, 4), "classifier.0": (256, 3, 4)}),
        ("lraspp_mobilenet_v3_large", {"backbone.4": (40, 6, 8), "classifier.cbr": (128, 3, 4)}),
    ],
)
def test_taps_are_module_paths(name: str, taps: dict[str, tuple[int, ...]]) -> None:
    model = build(name).eval()
    images = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        found = Tapped(model, [*taps, "logits"])(images)
        assert torch.equal(found["logits"], model(images)["out"])
    assert {tap: tuple(found[tap].shape[1:]) for tap in taps} == taps


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_cheap_blocks_replace_what_lies_in_the_backbone(name: str) -> None:
    with torch.device("meta"):
        plain = build(name)
        model = cheapen(plain, "G(N)")
        assert str(model) == str(build(name, block="G(N)"))
    report = card_of(model).report
    assert report is not None and len(report.changed) == 16
    assert all(path.startswith("backbone.layer") for path in report.changed)
    sizes = [count(one, (3, 64, 96)) for one in (model, plain)]
    assert sizes[0].params < sizes[1].params and sizes[0].macs < 0.75 * sizes[1].macs
    # The head is kept, unless it is named.
    with torch.device("meta"):
        head = cheapen(plain, "G(4)", where=["classifier.*"])
    assert card_of(head).report.changed


@pytest.mark.parametrize("name", SMALL)
def test_fused_networks_answer_the_same(name: str) -> None:
    model = build(name).train()
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64))  # running statistics that are not 0 and 1
    model.eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = model(images)["out"], fuse(model)(images)["out"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
