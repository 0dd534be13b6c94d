"""The classifier of a network: found in every kind, renewed by `new_head`, trained alone."""

import pytest
import torch
from torch import nn

import fastkd
from fastkd.compute.precision import Precision
from fastkd.errors import UserError
from fastkd.losses import KD, CrossEntropy
from fastkd.models.head import freeze_backbone
from fastkd.models.registry import classifier_paths
from fastkd.storage.weights import describe, load_weights, save_weights
from fastkd.training.step import DistillStep

HEADS = {
    "resnet20": ["fc"],
    "wrn_16_2": ["fc"],
    "timm:resnet18": ["fc"],
    "timm:deit_tiny_distilled_patch16_224": ["head", "head_dist"],
    "torchvision:regnet_x_400mf": ["fc"],  # cannot be built on the meta device
    "torchvision:squeezenet1_1": ["classifier.1"],
    "torchvision:mobilenet_v3_small": ["classifier.3"],
    "erfnet_encoder": ["head"],
}
FP32 = Precision("fp32", "cpu")


@pytest.mark.parametrize("name", HEADS)
def test_the_classifier_of_every_source_is_found(name):
    model = fastkd.create_model(name, 7)
    before = torch.get_rng_state()
    assert list(classifier_paths(model)) == HEADS[name]
    assert torch.equal(torch.get_rng_state(), before)


def test_of_an_unknown_network_it_is_not_guessed():
    with pytest.raises(UserError, match="not built by create_model"):
        classifier_paths(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 2)))


@pytest.mark.parametrize("classes", [3, 10])
@pytest.mark.parametrize("name", ["resnet8", "timm:resnet18", "torchvision:squeezenet1_1"])
def test_a_new_head_on_an_old_body(tmp_path, name, classes):
    """Also where the class counts agree: other classes may be meant."""
    old = fastkd.create_model(name, 10)
    save_weights(tmp_path / "old.safetensors", old, describe(old))
    torch.manual_seed(5)
    fresh = fastkd.create_model(name, classes)
    torch.manual_seed(5)
    new = fastkd.create_model(name, classes, weights=tmp_path / "old.safetensors", new_head=True)
    for key, value in new.state_dict().items():
        in_head = key.startswith(tuple(f"{path}." for path in HEADS.get(name, ["fc"])))
        source = (fresh if in_head else old).state_dict()[key]
        assert torch.equal(value, source), key
    assert new.num_classes == classes


def test_a_new_head_on_pretrained_weights(monkeypatch):
    """What timm downloads is stood in for by weights that are known."""
    import timm

    real, donors = timm.create_model, []

    def create(name, pretrained=False, **options):
        model = real(name, False, **options)
        if pretrained:
            donors.append(model)
        return model

    monkeypatch.setattr(timm, "create_model", create)
    name = "timm:resnet18.tv_in1k"
    model = fastkd.create_model(name, 1000, pretrained=True, new_head=True)
    (donor,) = donors
    assert torch.equal(model.conv1.weight, donor.conv1.weight)
    assert not torch.equal(model.fc.weight, donor.fc.weight)
    assert model.normalization is not None


def test_errors_say_what_is_new_and_what_does_not_fit(tmp_path):
    old = fastkd.create_model("resnet8", 10)
    save_weights(tmp_path / "old.safetensors", old, describe(old))
    with pytest.raises(UserError, match=r"student\.new_head=true"):
        fastkd.create_model("resnet8", 3, weights=tmp_path / "old.safetensors")
    with pytest.raises(UserError, match=r"resnet8 with 3 classes, of which fc is new: .*wrong sha"):
        fastkd.create_model(
            "resnet8", 3, weights=tmp_path / "old.safetensors", new_head=True, width=2.0
        )
    with pytest.raises(UserError, match="give weights=FILE or pretrained=True"):
        fastkd.create_model("resnet8", 3, new_head=True)
    state = load_weights(tmp_path / "old.safetensors")[0]
    del state["layer1.0.conv1.weight"]
    save_weights(tmp_path / "hole.safetensors", state)
    with pytest.raises(UserError, match=r"fc is new: 1 missing \(layer1\.0\.conv1\.weight\)"):
        fastkd.create_model("resnet8", 3, weights=tmp_path / "hole.safetensors", new_head=True)


def step_of(name, losses=(), **options):
    student = fastkd.create_model(name, 5, **options)
    freeze_backbone(student, classifier_paths(student))
    step = DistillStep(student, [*losses] or [CrossEntropy()], FP32)
    step.train()
    return student, step


def run(step, images, teacher=None):
    labels = torch.arange(len(images)) % 5
    return step({"x": images}, labels, labels, teacher or {}, {})


@pytest.mark.parametrize("name", ["wrn_10_1", "timm:resnet18", "torchvision:mobilenet_v3_small"])
def test_only_the_head_learns_and_the_rest_computes_as_in_evaluation(name):
    """Batch norm keeps its statistics, dropout is off (MobileNet's is next to the classifier)."""
    options = {"dropout": 0.5} if name.startswith("wrn") else {}
    student, step = step_of(name, **options)
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    images = torch.randn(4, 3, 32, 32)
    out = run(step, images)
    out.loss.backward()
    (head,) = HEADS.get(name, ["fc"])
    trained = [key for key, value in student.named_parameters() if value.grad is not None]
    assert trained == [f"{head}.weight", f"{head}.bias"]
    assert student.get_submodule(head).training
    for key, value in student.state_dict().items():
        assert torch.equal(value, before[key]), key
    with torch.no_grad():
        in_training = step.student(images)["logits"]
        assert torch.equal(in_training, student.eval()(images))


def test_no_graph_is_built_through_the_frozen_part():
    """What autograd keeps for the backward pass is the input of the head and the head itself."""
    _, step = step_of("resnet8")
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(step, torch.randn(16, 3, 32, 32))
    # Of 16 rows: 64 features; log probabilities of 5 classes; labels; the head's 64 x 5 weights.
    assert max(kept) <= 16 * 64
    assert sum(kept) < 2 * (16 * 64 + 64 * 5 + 16 * 5 + 16)


def test_frozen_under_the_compiler():
    student, step = step_of("resnet8")
    images = torch.randn(6, 3, 16, 16)
    eager = run(step, images).loss
    eager.backward()
    wanted = student.fc.weight.grad.clone()
    student.fc.weight.grad = None
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=False)
    compiled.train()
    assert not student.bn1.training
    loss = run(compiled, images).loss
    loss.backward()
    torch.testing.assert_close(loss, eager)
    torch.testing.assert_close(student.fc.weight.grad, wanted)
    assert student.conv1.weight.grad is None


def test_a_probe_can_be_taught(tmp_path):
    student, step = step_of("resnet8", [KD()])
    out = run(step, torch.randn(4, 3, 32, 32), {"x/teacher/logits": torch.randn(4, 5)})
    out.loss.backward()
    assert student.fc.weight.grad.abs().sum() > 0
    assert student.conv1.weight.grad is None


def test_a_head_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="no layer 'head'"):
        freeze_backbone(fastkd.create_model("resnet8", 3), ["head"])
