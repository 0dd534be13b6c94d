"""Taps: right values, one batch-norm update, no trace on the model, and full-graph tracing."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from fastkd.errors import UserError
from fastkd.models import Tapped, available_taps, create_model

STAGES = {"resnet8": 3, "wrn_10_1": 3, "wrn_16_2": 3, "plain18": 4, "resnet50": 4, "vgg8": 4} | {
    "mobilenetv2": 4,
    "mobilenetv2_half": 4,
    "shufflenetv1": 3,
    "shufflenetv2": 3,
    "erfnet": 5,
    "erfnet_encoder": 3,
}


def all_taps(name: str) -> list[str]:
    stages = [f"stage{number}" for number in range(1, STAGES[name] + 1)]
    pooled = [] if name.startswith("erfnet") else ["pooled"]
    return ["stem", *stages, *(f"{stage}:preact" for stage in stages), *pooled, "logits"]


class Foreign(nn.Module):
    """A network outside the zoo, with the traps of real ones: a shared module, in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.inplace = nn.ReLU(inplace=True)
        self.relu = nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU())
        self.idle = nn.Linear(2, 2)
        self.head = nn.Linear(5, 6)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        stem = self.relu(self.inplace(self.bn(self.conv(images_NCHW))))
        return self.head(self.relu(self.block(stem)).mean((2, 3)))


@pytest.mark.parametrize("name", STAGES)
def test_zoo_offers_the_same_names(name: str) -> None:
    taps = available_taps(create_model(name, 10))
    assert sorted(taps) == sorted(all_taps(name))
    assert taps[0] == "stem" and taps[-1] == "logits"


@pytest.mark.parametrize("name", STAGES)
def test_only_what_is_asked_for_comes_back(name: str) -> None:
    model = create_model(name, 10)
    images = torch.randn(2, 3, 16, 16)
    assert set(Tapped(model)(images)) == {"logits"}
    assert set(Tapped(model, ["stage2", "stage1:preact"])(images)) == {
        "logits",
        "stage2",
        "stage1:preact",
    }
    found = Tapped(model.eval(), all_taps(name))(images)
    assert set(found) == {*all_taps(name)}
    assert torch.equal(found["logits"], model(images))


def test_resnet_preact_is_the_sum_before_the_last_relu() -> None:
    torch.manual_seed(0)
    model = create_model("resnet14", 10)
    taps = [f"stage{number}{suffix}" for number in (1, 2, 3) for suffix in ("", ":preact")]
    found = Tapped(model, taps)(torch.randn(4, 3, 32, 32))
    for number in (1, 2, 3):
        preact = found[f"stage{number}:preact"]
        assert (preact < 0).any()
        assert torch.equal(F.relu(preact), found[f"stage{number}"])


def test_wrn_preact_is_the_next_batch_norm_of_the_raw_sum() -> None:
    torch.manual_seed(0)
    model = create_model("wrn_16_2", 10)
    norms = [model.get_submodule(path) for path in ("layer2.0.bn1", "layer3.0.bn1", "bn1")]
    for norm in norms:  # else the affine part could be forgotten without notice
        nn.init.uniform_(norm.weight, 0.5, 2)  # pyright: ignore[reportArgumentType]
        nn.init.normal_(norm.bias)  # pyright: ignore[reportArgumentType]
    taps = [f"stage{number}{suffix}" for number in (1, 2, 3) for suffix in ("", ":preact")]
    found = Tapped(model, taps)(torch.randn(4, 3, 32, 32))
    for number, norm in enumerate(norms, start=1):
        raw = found[f"stage{number}"]
        assert isinstance(norm, nn.BatchNorm2d)
        by_hand = F.batch_norm(raw, None, None, norm.weight, norm.bias, training=True)
        torch.testing.assert_close(found[f"stage{number}:preact"], by_hand)


@pytest.mark.parametrize("name", STAGES)
def test_preact_taps_move_running_statistics_as_a_plain_pass_does(name: str) -> None:
    torch.manual_seed(0)
    plain = create_model(name, 10)
    tapped = copy.deepcopy(plain)
    images = torch.randn(4, 3, 16, 16)
    for network in (plain, Tapped(tapped, all_taps(name))):
        torch.manual_seed(1)  # of ERFNet's dropout
        network(images)
    moved = 0
    for key, value in plain.state_dict().items():
        assert torch.equal(value, tapped.state_dict()[key]), key
        moved += key.endswith("num_batches_tracked") and int(value) == 1
    assert moved == sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())


@pytest.mark.parametrize("name", STAGES)
def test_forward_between_continues_a_pass(name: str) -> None:
    model = create_model(name, 10).eval()
    images = torch.randn(2, 3, 16, 16)
    found = model.forward_taps(images, all_taps(name))
    raw = [tap for tap in model.tap_names if ":" not in tap]
    found["images"] = images
    for start, after in enumerate(["images", *raw[:-1]]):
        for upto in raw[start:]:
            assert torch.equal(model.forward_between(found[after], after, upto), found[upto])
    features = found["stage2"].detach().requires_grad_()
    model.forward_between(features, "stage2", "logits").sum().backward()
    assert features.grad is not None and features.grad.abs().sum() > 0


def test_forward_between_refuses_wrong_ends() -> None:
    model = create_model("resnet8", 10)
    with pytest.raises(UserError, match="no tap 'stem' after 'stage1'"):
        model.forward_between(torch.zeros(1, 16, 8, 8), "stage1", "stem")
    with pytest.raises(
        UserError, match="cannot start after 'stage1:preact'; expected one of images"
    ):
        model.forward_between(torch.zeros(1, 16, 8, 8), "stage1:preact", "logits")


@pytest.mark.parametrize(
    "name", ["resnet8", "wrn_10_1", "foreign", "torchvision:squeezenet1_1", "timm:test_resnet"]
)
def test_traces_as_one_graph_and_repeats_the_numbers(name: str) -> None:
    torch.manual_seed(0)
    model = Foreign() if name == "foreign" else create_model(name, 10)
    taps = {
        "foreign": ["block", "block.0"],
        "torchvision:squeezenet1_1": ["features.3", "features.12"],
        "timm:test_resnet": ["layer1", "layer3"],
    }.get(name, ["stage1", "stage2:preact", "pooled"])
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # its draws would differ
            module.p = 0.0
    tapped = Tapped(model, taps)
    other = copy.deepcopy(tapped)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True, dynamic=False)
    for _ in range(2):
        images = torch.randn(2, 3, 32, 32)
        eager, traced = tapped(images), compiled(images)
        assert eager.keys() == traced.keys() == {"logits", *taps}
        for key, value in eager.items():
            torch.testing.assert_close(traced[key], value)
        sum(value.square().mean() for value in eager.values()).backward()
        sum(value.square().mean() for value in traced.values()).backward()
    for (key, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        if key.startswith("idle"):
            continue
        torch.testing.assert_close(theirs.grad, mine.grad, rtol=1e-3, atol=1e-5, msg=key)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[key], value)


def test_module_paths_catch_the_outputs_of_those_modules() -> None:
    model = Foreign().eval()
    images = torch.randn(2, 3, 8, 8)
    found = Tapped(model, ["block.0", "block", "logits"])(images)
    stem = F.relu(model.bn(model.conv(images)))
    torch.testing.assert_close(found["block.0"], model.block[0](stem))
    torch.testing.assert_close(found["block"], F.relu(found["block.0"]))
    torch.testing.assert_close(found["logits"], model(images))


def test_instances_on_one_model_are_independent() -> None:
    model = Foreign().eval()
    first, second = Tapped(model, ["conv", "block"]), Tapped(model, ["block"])
    with pytest.raises(UserError):  # a third one, whose failed pass must not disturb the others
        Tapped(model, ["bn"])(torch.randn(1, 3, 8, 8))
    images = torch.randn(2, 3, 8, 8)
    assert set(first(images)) == {"conv", "block", "logits"}
    assert set(second(images)) == {"block", "logits"}
    first.remove()
    assert set(second(images)) == {"block", "logits"}
    with pytest.raises(UserError, match="hooks were removed"):
        first(images)
    assert torch.equal(second(images)["logits"], model(images))


def test_nothing_is_kept_between_passes_nor_left_after_removal() -> None:
    model = resnet18(num_classes=3)
    keys = list(model.state_dict())
    tapped = Tapped(model, ["layer1", "layer4"])
    assert list(model.state_dict()) == keys
    assert [key.removeprefix("model.") for key in tapped.state_dict()] == keys
    model(torch.randn(2, 3, 32, 32))
    tapped(torch.randn(2, 3, 32, 32))
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert len(hooks) == 2
    assert all(not hook.catch.tensors and not hook.catch.active for hook in hooks)
    tapped.remove()
    assert not any(module._forward_hooks for module in model.modules())


def test_an_error_inside_the_model_leaves_no_tensor_behind() -> None:
    model = Foreign()
    tapped = Tapped(model, ["conv"])
    model.head = nn.Linear(50, 6)
    with pytest.raises(RuntimeError):
        tapped(torch.randn(2, 3, 8, 8))
    (hook,) = model.conv._forward_hooks.values()
    assert not hook.catch.tensors and not hook.catch.active


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copies_have_hooks_of_their_own(duplicate) -> None:
    tapped = Tapped(resnet18(num_classes=3).eval(), ["layer1"])
    copied = duplicate(tapped)
    with torch.no_grad():
        copied.model.conv1.weight.zero_()
        images = torch.randn(1, 3, 32, 32)
        assert not torch.equal(copied(images)["layer1"], tapped(images)["layer1"])
    tapped.remove()
    assert set(copied(images)) == {"layer1", "logits"}


def test_output_overwritten_in_place_is_refused() -> None:
    with pytest.raises(UserError, match="tap 'bn': a later layer overwrites this output in place"):
        Tapped(Foreign(), ["bn"])(torch.randn(2, 3, 8, 8))


def test_a_shared_module_reports_its_last_output() -> None:
    model = Foreign().eval()
    found = Tapped(model, ["relu", "block"])(torch.randn(1, 3, 8, 8))
    assert found["relu"].shape == found["block"].shape


def test_works_in_inference_mode() -> None:
    with torch.inference_mode():
        assert set(Tapped(Foreign().eval(), ["block"])(torch.randn(1, 3, 8, 8))) == {
            "block",
            "logits",
        }


def test_a_module_that_does_not_run_is_named() -> None:
    with pytest.raises(UserError, match="tap 'idle': this module did not run"):
        Tapped(Foreign(), ["idle"])(torch.randn(2, 3, 8, 8))


def test_logits_of_tuple_and_mapping_outputs() -> None:
    class Wrap(nn.Module):
        def __init__(self, wrap) -> None:
            super().__init__()
            self.body, self.wrap = nn.Flatten(), wrap

        def forward(self, x: Tensor):
            return self.wrap(self.body(x))

    images = torch.randn(2, 3, 2, 2)
    for wrap in (lambda x: (x, x + 1), lambda x: {"logits": x}, lambda x: {"out": x, "aux": x + 1}):
        assert torch.equal(Tapped(Wrap(wrap))(images)["logits"], images.flatten(1))
    with pytest.raises(UserError, match="the model returned str; expected a tensor"):
        Tapped(Wrap(lambda x: "text"))(images)


@pytest.mark.parametrize(
    ("model", "tap", "message"),
    [
        (
            "zoo",
            "stage4",
            r"unknown tap 'stage4'; nearest: stage.*Taps of CifarResNet: stem, stage1:p",
        ),
        ("zoo", "layer1", r"unknown tap 'layer1'.*pooled, logits"),
        ("foreign", "blok.0", r"unknown tap 'blok.0'; nearest: block.0.*Taps of Foreign: conv, bn"),
    ],
    ids=["zoo", "zoo-by-path", "foreign"],
)
def test_unknown_tap_names_the_nearest(model: str, tap: str, message: str) -> None:
    net = create_model("resnet8", 10) if model == "zoo" else Foreign()
    with pytest.raises(UserError, match=message):
        Tapped(net, [tap])


def test_a_string_is_not_a_list_of_taps() -> None:
    with pytest.raises(TypeError, match=r"write \['stem'\]"):
        Tapped(create_model("resnet8", 10), "stem")
