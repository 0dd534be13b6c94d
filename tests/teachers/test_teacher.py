"""The teacher sees what it was trained on, speaks the data's class order, and is never trained."""

import pytest
import torch
from torch import nn

from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision, resolve_precision
from fastkd.compute.ranks import World
from fastkd.data import open_data
from fastkd.data.config import AppearanceConfig, DataConfig
from fastkd.models import create_model
from fastkd.models.rewrite.fuse import fuse
from fastkd.output.console import Console
from fastkd.output.run_folder import RunFolder
from fastkd.recipes.loading import load_recipe
from fastkd.runs.stages import Session, build_stage, open_recipe_data
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.teacher import Teacher, freeze

CPU = torch.device("cpu")
WORLD = World(0, 0, 1, CPU, None)
PLACEMENT = Placement(WORLD, Precision("fp32", "cpu"))
DATA = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
OWN = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalised(images, mean_std):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in mean_std)
    return (images - mean) / std


def teacher(model, taps=None, **options):
    wanted = ("normalization", "resolution", "class_map")
    loaded = LoadedNet(model, **{key: options.pop(key) for key in wanted if key in options})
    return Teacher(loaded, taps or {}, PLACEMENT, **{"data_normalization": DATA} | options)


def net(num_classes=10):
    return create_model("resnet8", num_classes, width=0.5)


def test_it_is_frozen_and_in_evaluation_mode():
    model = freeze(net().train())
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_its_images_are_normalised_as_it_wants_them():
    images = torch.rand(4, 3, 16, 16)
    model = net()
    found = teacher(model, normalization=OWN).logits(normalised(images, DATA))
    with torch.no_grad():
        expected = model(normalised(images, OWN))
        wrong = model(normalised(images, DATA))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("own", [None, DATA], ids=["unknown", "the same"])
def test_without_a_normalisation_of_its_own_the_images_are_untouched(own):
    images = torch.rand(2, 3, 16, 16)
    model = net()
    made = teacher(model, normalization=own, fold_batch_norm=False)
    with torch.no_grad():
        assert torch.equal(made.logits(images), model(images))


def test_the_class_map_brings_its_outputs_into_the_order_of_the_data():
    images = torch.rand(2, 3, 16, 16)
    model = net(7)
    found = teacher(model, class_map=(3, 0, 6), fold_batch_norm=False).logits(images)
    with torch.no_grad():
        assert torch.equal(found, model(images)[:, [3, 0, 6]])


def test_the_class_map_leaves_features_alone():
    images = torch.rand(2, 3, 16, 16)
    taps = {"x": ("stage3", "pooled")}
    plain, mapped = (teacher(net(), taps, class_map=order) for order in (None, (1, 0)))
    mapped.model.load_state_dict(plain.model.state_dict())
    one, other = (each({"x": images}) for each in (plain, mapped))
    assert torch.equal(one["x/teacher/pooled"], other["x/teacher/pooled"])
    assert torch.equal(one["x/teacher/logits"][:, [1, 0]], other["x/teacher/logits"])


def trained(model):
    """Running statistics, scales and shifts as no fresh network has them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def batch_norms(made):
    return sum(isinstance(module, nn.BatchNorm2d) for module in made.unit.modules())


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_2", "timm:test_resnet"])
def test_batch_norm_is_folded_in_a_teacher_that_nobody_taps(name):
    model = trained(create_model(name, 10))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.randn(4, 3, 32, 32)
    made = teacher(model, {"x": ("logits",), "xprime": ()})
    assert batch_norms(made) < batch_norms(teacher(model, fold_batch_norm=False))
    found = made({"x": images, "xprime": images})
    with torch.no_grad():
        expected = model(images)
    for logits_NC in (made.logits(images), *found.values()):
        torch.testing.assert_close(logits_NC, expected, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in made.unit.parameters())
    # The network itself keeps its layers and weights, whoever saves it.
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # A loss that runs stages of it must tap it.
    assert not made.has_stages


def test_nothing_is_folded_in_a_teacher_that_is_tapped():
    model = trained(net())
    made = teacher(model, {"x": ("logits",), "xprime": ("stage1:preact",)})
    assert made.model is model
    assert batch_norms(made) == batch_norms(teacher(model, fold_batch_norm=False))


class Uncopiable(nn.Module):
    """A network that can be neither copied nor traced."""

    def __init__(self):
        super().__init__()
        self.scale = torch.ones(1, requires_grad=True) * 2
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images_NCHW):
        sign = 1 if images_NCHW.sum() > 0 else -1
        return sign * (self.scale * self.norm(images_NCHW)).mean((2, 3))


def test_a_teacher_that_cannot_be_folded_is_used_as_it_is():
    model = Uncopiable()
    made = teacher(model)
    assert made.model is model
    assert made.logits(torch.rand(2, 3, 8, 8)).shape == (2, 3)


class Looking(nn.Module):
    """A network that remembers its images."""

    def forward(self, images_NCHW):
        self.seen = images_NCHW
        return images_NCHW.mean((2, 3))


@pytest.mark.parametrize(("resolution", "side"), [(20, 20), (4, 4), (None, 8)])
def test_its_images_have_the_resolution_it_wants(resolution, side):
    model = Looking()
    flat = torch.full((1, 3, 8, 8), 0.7)
    teacher(model, resolution=resolution).logits(flat)
    torch.testing.assert_close(model.seen, torch.full((1, 3, side, side), 0.7))


def test_its_images_are_made_smaller_without_aliasing():
    model = Looking()
    stripes = torch.arange(16.0).remainder(2).expand(1, 3, 16, 16)
    teacher(model, resolution=4).logits(stripes)
    # Every fourth pixel alone would be all black.
    torch.testing.assert_close(model.seen, torch.full((1, 3, 4, 4), 0.5), atol=0.07, rtol=0)


def test_only_what_is_asked_for_comes_and_without_gradient():
    found = teacher(net(), {"x": ("stage1",), "xprime": ()})(
        {"x": torch.rand(2, 3, 16, 16), "xprime": torch.rand(2, 3, 16, 16), "other": None}
    )
    assert set(found) == {"x/teacher/logits", "x/teacher/stage1", "xprime/teacher/logits"}
    for tensor in found.values():
        assert not tensor.requires_grad
        # Tensors of inference mode could not enter a differentiated loss.
        assert not tensor.is_inference()
    weight = torch.ones((), requires_grad=True)
    (weight * found["x/teacher/logits"]).sum().backward()
    assert weight.grad is not None


def test_its_statistics_do_not_move():
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    teacher(model, {"x": ("stage1:preact",)})({"x": torch.rand(8, 3, 16, 16)})
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_features_go_through_its_stages_with_gradient():
    model = net()
    images = torch.rand(2, 3, 16, 16)
    made = teacher(model, {"x": ("stage1", "stage2")})
    found = made({"x": images})
    features = found["x/teacher/stage1"].clone().requires_grad_()
    on = made.stages(features, "stage1", ("stage2", "logits"))
    assert on.keys() == {"stage2", "logits"}
    torch.testing.assert_close(on["stage2"], found["x/teacher/stage2"])
    torch.testing.assert_close(on["logits"], found["x/teacher/logits"])
    on["stage2"].sum().backward()
    assert features.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_foreign_teacher_has_no_stages():
    foreign = teacher(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))
    assert not foreign.has_stages
    assert teacher(net(), {"x": ("pooled",)}).has_stages


def test_its_stages_answer_in_the_class_order_of_the_data():
    model = net()
    made = teacher(model, {"x": ("pooled",)}, class_map=(3, 0, 1))
    found = made({"x": torch.rand(2, 3, 16, 16)})
    behind = made.stages(found["x/teacher/pooled"], "pooled", ("logits",))
    torch.testing.assert_close(behind["logits"], found["x/teacher/logits"])


def tensors(state):
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list):
        for part in state.values() if isinstance(state, dict) else state:
            yield from tensors(part)


def test_it_is_neither_trained_nor_saved(tmp_path):
    recipe = load_recipe(
        "quickstart",
        overrides=[
            "data.name=synthetic",
            "data.train_limit=64",
            "batch_size=32",
            "epochs=1",
            "student.width=0.5",
            "precision=fp32",
            "compile=off",
            "device=cpu",
        ],
    )
    session = Session(WORLD, Console(enabled=False), tmp_path)
    data = open_recipe_data(recipe, session)
    model = net()
    made = build_stage(recipe, data, (LoadedNet(model),), session, RunFolder(tmp_path))
    before = [parameter.clone() for parameter in model.parameters()]
    made.fit()
    assert all(map(torch.equal, before, model.parameters()))
    own = {id(parameter) for parameter in model.parameters()}
    trained = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert trained
    assert not own & (trained | {id(parameter) for parameter in made.runner.parameters()})
    saved = list(tensors(torch.load(tmp_path / "last.pt", weights_only=True)))
    stem = made.student.conv1.weight
    assert any(torch.equal(tensor, stem) for tensor in saved)
    assert not any(torch.equal(tensor, model.conv1.weight) for tensor in saved)


def test_accuracy_through_a_teacher_is_that_of_the_network():
    data = open_data(
        DataConfig(name="synthetic", image_size=16),
        AppearanceConfig(crop="none", flip=False),
        batch_size=50,
        seed=0,
        placement=Placement(World(0, 0, 1, CPU, None), resolve_precision("fp32", CPU)),
    )
    model = net()
    from fastkd.evaluation.evaluate import evaluate

    made = teacher(model, data_normalization=data.facts.normalization)
    found = evaluate(made.logits, data.val, resolve_precision("fp32", CPU), WORLD)
    with torch.no_grad():
        hits = sum(
            int((model(batch.images_NCHW).argmax(1) == batch.labels_N).sum())
            for batch in data.val.epoch(0)
        )
    assert found["accuracy"] == hits / 500


@pytest.mark.parametrize("name", ["wrn_16_2", "resnet20", "timm:test_resnet"])
def test_weights_held_in_bf16_give_the_logits_of_autocast(name):
    torch.manual_seed(0)
    model = create_model(name, 10)
    images = torch.randn(4, 3, 32, 32)
    held = Teacher(
        LoadedNet(model),
        {"x": ("logits",)},
        Placement(WORLD, Precision("bf16", "cpu")),
        data_normalization=((0.0,) * 3, (1.0,) * 3),
    )
    kinds = {type(m): m.weight.dtype for m in held.model.modules() if hasattr(m, "weight")}
    assert kinds[nn.Conv2d] == kinds[nn.Linear] == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = fuse(model)(images.contiguous(memory_format=torch.channels_last))
    assert torch.equal(held({"x": images})["x/teacher/logits"], expected)


def test_a_pool_passes_in_batches_as_large_as_x():
    """Each image is answered by itself, so what comes out is that of one pass, taps included."""
    model = net()
    whole = teacher(model, {"x": ("logits", "stage3"), "xprime": ("logits", "stage3")})
    x_NCHW, pool_PCHW = torch.randn(6, 3, 32, 32), torch.randn(15, 3, 32, 32)
    sizes = []
    whole.unit.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    found = whole({"x": x_NCHW, "xprime": pool_PCHW})
    assert sizes == [6, 6, 6, 3]
    expected = whole.features(pool_PCHW)
    for tap in ("logits", "stage3"):
        torch.testing.assert_close(found[f"xprime/teacher/{tap}"], expected[tap])
