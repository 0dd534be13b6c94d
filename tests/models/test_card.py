"""The card of a network: one attribute with what fastkd knows of it."""

import copy

import pytest
import timm
import torch
from torch import nn

from fastkd.models import cheapen, create_model, fuse
from fastkd.models.card import Card, card_of, sign
from fastkd.models.head import freeze_backbone, has_frozen_backbone
from fastkd.models.registry import classifier_paths


def test_the_card_goes_with_copies_and_rewrites() -> None:
    model = create_model("resnet8", 7, width=0.5)
    card = Card(name="resnet8", options={"width": 0.5}, num_classes=7, head=("fc",))
    assert card_of(model) == card_of(copy.deepcopy(model)) == card
    cheap = card_of(cheapen(model, "G(2)"))
    assert cheap is not None and cheap.report is not None
    assert (cheap.name, cheap.options) == ("resnet8", {"width": 0.5, "block": "G(2)"})
    fused = card_of(fuse(model))
    assert fused is not None and (fused.name, fused.num_classes, fused.head) == (None, 7, ("fc",))
    assert card_of(model) == card


def test_a_network_of_others_has_none_until_it_is_changed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    assert card_of(model) is None and not has_frozen_backbone(model)
    freeze_backbone(model, ["2"])
    assert card_of(model) == Card(trained=("2",))
    assert has_frozen_backbone(model)


def test_its_facts_are_readable_under_their_old_names() -> None:
    model = create_model("timm:test_resnet", 7)
    normalization = ((0.5,) * 3, (0.5,) * 3)
    assert (model.fastkd_name, model.num_classes) == ("timm:test_resnet", 7)
    assert model.normalization == normalization
    sign(model, Card())
    assert not hasattr(model, "fastkd_name")


def test_the_classifier_is_found_once_and_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    real, devices = timm.create_model, []

    def create(*args: object, **options: object) -> nn.Module:
        made = real(*args, **options)
        devices.append(next(made.parameters()).device.type)
        return made

    monkeypatch.setattr(timm, "create_model", create)
    model = create_model("timm:test_resnet", 7)
    assert devices == ["cpu"]
    before = torch.get_rng_state()
    assert classifier_paths(model) == classifier_paths(model) == ("fc",)
    assert devices == ["cpu", "meta"]
    assert torch.equal(torch.get_rng_state(), before)
    zoo = create_model("erfnet", 3)
    assert classifier_paths(zoo) == ("head",)
