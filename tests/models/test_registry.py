"""Names, options, class counts and normalisation of the zoo, timm and torchvision."""

from collections.abc import Callable
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from torch import nn

from fastkd.errors import UserError
from fastkd.models import create_model, list_models
from fastkd.models.card import card_of
from fastkd.models.hub import BARE_IN_TIMM_0_2
from fastkd.models.registry import without_memory

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_every_listed_name_builds() -> None:
    names = list_models()
    assert {"wrn_40_2", "wrn_16_2", "resnet8", "resnet110", "resnet8x4", "resnet32x4"} <= set(names)
    with torch.device("meta"):
        for name in names:
            assert card_of(create_model(name, 3)).name == name


def test_patterns() -> None:
    assert list_models("resnet*x4") == ["resnet8x4", "resnet32x4"]
    assert list_models("nothing") == []
    assert "timm:test_resnet" in list_models("timm:test_*")
    assert "timm:resnet50.a1_in1k" in list_models("timm:resnet50.*")
    assert "torchvision:resnet18" in list_models("torchvision:resnet*")
    assert "torchvision:lraspp_mobilenet_v3_large" in list_models("torchvision:")


@pytest.mark.parametrize(
    ("name", "classes", "options", "normalization"),
    [
        ("wrn_10_1", 7, {}, None),
        ("resnet8", 7, {"width": 0.5}, None),
        ("timm:test_resnet", 7, {"drop_rate": 0.1}, ((0.5,) * 3, (0.5,) * 3)),
        ("timm:resnet10t", None, {}, IMAGENET),
        ("torchvision:squeezenet1_1", 7, {}, None),
        ("torchvision:resnet18", None, {}, None),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_a_network_carries_what_rebuilds_it(name, classes, options, normalization) -> None:
    model = create_model(name, classes, **options)
    assert (card_of(model).name, card_of(model).options) == (name, options)
    assert model.num_classes == (classes or 1000)
    assert card_of(model).normalization == normalization
    again = create_model(card_of(model).name, model.num_classes, **card_of(model).options)
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, classes or 1000)


def test_torchvision_segmentation_builds_without_a_download() -> None:
    model = create_model("torchvision:lraspp_mobilenet_v3_large", 5).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64))["out"].shape == (1, 5, 64, 64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrn_40-2", "unknown network 'wrn_40-2'; nearest: wrn_40_2"),
        ("resnet21", "unknown network 'resnet21'; nearest: .*resnet20"),
        ("wrn_41_2", "is 6n [+] 4, got 41; use wrn_40_2 or wrn_46_2"),
        ("wrn_4_2", "got 4; use wrn_10_2 or wrn_16_2"),
        ("wrn_16_0", "width factor must be at least 1; use wrn_16_1"),
        ("timm:resnet5O", "timm has no network 'resnet5O'; nearest: timm:resnet50"),
        ("timm:resnet50.a1_in2k", "timm has no network .*nearest: timm:resnet50.a1_in1k"),
        ("torchvision:resnet17", "torchvision has no network 'resnet17'; nearest: torchvision:"),
        ("torchvision:fasterrcnn_resnet50_fpn", "torchvision has no network 'fasterrcnn"),
        ("hub:resnet18", "unknown source 'hub' in 'hub:resnet18'; expected timm:NAME"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model(name, 10)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: create_model("resnet8", 10, widht=2), "no option 'widht'; nearest: width"),
        (
            lambda: create_model("wrn_10_1", 10, width=2),
            r"no option 'width'; its options: block, shortcuts, dropout, depth, blocks\.",
        ),
        (lambda: create_model("resnet8", 10, width=0.01), "leaves no channels"),
        (
            lambda: create_model("timm:test_resnet", 10, widht=2),
            "does not take these options.*widht",
        ),
        (lambda: create_model("torchvision:resnet18", 10, wd=2), "does not take these options.*wd"),
        (lambda: create_model("resnet8"), "num_classes is missing"),
        (lambda: create_model("resnet8", 0), "expected a positive integer, got 0"),
        (lambda: create_model("resnet8", "10"), "expected a positive integer, got '10'"),  # type: ignore
        (lambda: create_model("resnet8", 10, pretrained=True), "no pretrained weights"),
        (
            lambda: create_model("timm:resnet18", pretrained=True, weights="x.pt"),
            "exclude each other",
        ),
        (lambda: list_models("hub:*"), "unknown source 'hub'"),
    ],
)
def test_wrong_options(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet50",
            r"in timm 0\.2 it was ram_in1k, in \S+ it is \w+\): name the weights, "
            r"timm:resnet50\.ram_in1k or timm:resnet50\.\w+ \(fastkd models 'timm:resnet50\.\*'",
        ),
        ("resnet34", r"has \d+ pretrained weights.* name the weights, timm:resnet34\.\w+ \("),
    ],
)
def test_bare_timm_names_of_many_weights_are_refused(name: str, message: str) -> None:
    assert len(list_models(f"timm:{name}.*")) > 1
    with pytest.raises(UserError, match=message):
        create_model(f"timm:{name}", 10, pretrained=True)


def test_what_bare_timm_names_once_meant() -> None:
    for name, tag in BARE_IN_TIMM_0_2.items():
        assert timm.is_model_pretrained(f"{name}.{tag}")
        # Else there would be nothing to say of it.
        assert timm.get_pretrained_cfg(name).tag != tag


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:test_resnet"])
def test_offline_says_what_to_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("Name or service not known")

    # Their own download functions: neither library can be told from outside to be offline.
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", offline)
    message = f"{name}: no pretrained weights .*Name or service not known.*weights=FILE"
    with pytest.raises(UserError, match=message):
        create_model(name, 10, pretrained=True)


@pytest.mark.parametrize(
    ("name", "head"),
    [("resnet18", "fc"), ("squeezenet1_1", "classifier.1"), ("mobilenet_v3_small", "classifier.3")],
)
def test_torchvision_pretrained_keeps_all_but_the_head(
    name: str, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = torchvision.models.get_model(name).state_dict()
    # Its own download function: nothing public takes its place.
    monkeypatch.setattr(
        torchvision.models._api, "load_state_dict_from_url", lambda *args, **kwargs: published
    )
    own = create_model(f"torchvision:{name}", pretrained=True)
    assert card_of(own).normalization == IMAGENET
    assert all(torch.equal(value, published[key]) for key, value in own.state_dict().items())

    model = create_model(f"torchvision:{name}", 7, pretrained=True)
    assert (model.num_classes, card_of(model).normalization) == (7, IMAGENET)
    for key, value in model.state_dict().items():
        if key.startswith(f"{head}."):
            assert value.shape[0] == 7
        else:
            assert torch.equal(value, published[key]), key
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_import_is_light(program: Callable[..., Any]) -> None:
    code = (
        "import sys, fastkd.models, fastkd.storage.weights\n"
        "fastkd.models.create_model('resnet8', 10)\n"
        "print([m for m in ('timm', 'torchvision', 'triton', 'sklearn', 'matplotlib') "
        "if m in sys.modules])"
    )
    assert program("-c", code).out.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "options", "device"),
    [
        ("resnet8", {"width": 0.5}, "meta"),
        ("timm:test_resnet", {}, "meta"),
        # Its constructor computes with tensors.
        ("torchvision:regnet_x_400mf", {}, "cpu"),
    ],
)
def test_a_network_without_memory_leaves_the_random_state_alone(name, options, device):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = without_memory(name, 7, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert {one.device.type for one in found.parameters()} == {device}
    assert card_of(found).num_classes == 7
    shapes = {key: one.shape for key, one in found.state_dict().items()}
    real = create_model(name, 7, **options).state_dict()
    assert shapes == {key: one.shape for key, one in real.items()}
    with pytest.raises(UserError):
        without_memory(name, 7, wdith=2)
