"""Several teachers as one: each sees what it learned from, their mean probability counts."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastkd
import fastkd.teachers.teacher
from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World
from fastkd.errors import UserError
from fastkd.losses import AT, KD, CrossEntropy, Discriminator, JointRD, SoftCE
from fastkd.models import create_model
from fastkd.storage.weights import describe, save_weights
from fastkd.teachers.ensemble import Ensemble, bind_teacher
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.teacher import Teacher
from fastkd.testing.recipes import TINY_QUICKSTART

CPU = torch.device("cpu")
FP32 = Precision("fp32", "cpu")
DATA = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
OWN = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Told(nn.Module):
    """Says what it was told to, and remembers its images."""

    def __init__(self, logits_NC: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits_NC", logits_NC)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        self.seen = images_NCHW
        self.autocast = torch.is_autocast_enabled("cpu")
        return self.logits_NC


def bound(*nets: LoadedNet, taps: Any = None, **options: Any) -> Teacher | Ensemble:
    placement = Placement(World(0, 0, 1, CPU, None), options.pop("precision", FP32))
    options = {"data_normalization": DATA} | options
    return bind_teacher(nets, taps or {"x": ()}, placement, **options)


@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize("size", [1.0, 300.0])
def test_it_says_the_mean_probability_and_the_mean_logits(members: int, size: float) -> None:
    each = [size * torch.randn(5, 7) for _ in range(members)]
    made = bound(*(LoadedNet(Told(z)) for z in each), taps={"x": ("mean_logits",), "xprime": ()})
    found = made({"x": torch.rand(5, 3, 4, 4), "xprime": torch.rand(5, 3, 4, 4)})
    assert set(found) == {"x/teacher/logits", "x/teacher/mean_logits", "xprime/teacher/logits"}
    powers = [torch.exp(z.double() - z.double().amax(1, True)) for z in each]
    mean_NC = sum(power_NC / power_NC.sum(1, True) for power_NC in powers)
    mean_NC = mean_NC / members
    torch.testing.assert_close(
        found["x/teacher/logits"].double().exp(), mean_NC, rtol=2e-5, atol=1e-7
    )
    # Log-probabilities already: their softmax at temperature 1 is the mean itself.
    total_N = found["x/teacher/logits"].double().exp().sum(1)
    torch.testing.assert_close(total_N, torch.ones(5, dtype=torch.float64), rtol=1e-5, atol=0)
    assert torch.isfinite(found["x/teacher/logits"]).all()
    torch.testing.assert_close(
        found["x/teacher/mean_logits"].double(),
        sum(z.double() for z in each) / members,
        rtol=1e-6,
        atol=1e-6 * size,
    )
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in found.values())


def test_another_temperature_softens_the_mean() -> None:
    """p^(1/T) of the mean, not the mean of p^(1/T): what the docstring says of `kd` at T = 4."""
    each = [3 * torch.randn(6, 5) for _ in range(2)]
    logits_NC = bound(*(LoadedNet(Told(z)) for z in each)).logits(torch.rand(6, 3, 2, 2)).double()
    mean_NC = sum(F.softmax(z.double(), 1) for z in each) / 2
    powers_NC = mean_NC**0.25
    torch.testing.assert_close(
        F.softmax(logits_NC / 4, 1), powers_NC / powers_NC.sum(1, True), rtol=1e-5, atol=1e-7
    )
    softened_NC = sum(F.softmax(z.double() / 4, 1) for z in each) / 2
    assert (F.softmax(logits_NC / 4, 1) - softened_NC).abs().max() > 1e-2


def test_of_one_teacher_the_mean_is_what_it_says() -> None:
    made = bound(LoadedNet(Told(torch.randn(4, 3))), taps={"x": ("mean_logits",)})
    assert isinstance(made, Teacher)
    found = made({"x": torch.rand(4, 3, 2, 2)})
    assert found["x/teacher/mean_logits"] is found["x/teacher/logits"]
    # Nothing but logits is tapped, so batch norm may still be folded.
    assert bound(LoadedNet(create_model("resnet8", 3)), taps={"x": ("mean_logits",)}).folded


def by_hand(net: LoadedNet, images_NCHW: Tensor) -> Tensor:
    """Probabilities [N, C] in float64 of one member on images as the data normalises them."""
    (mean, std), (own_mean, own_std) = (
        [torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in each]
        for each in (DATA, net.normalization or DATA)
    )
    plain_NCHW = ((images_NCHW.double() * std + mean) - own_mean) / own_std
    if net.resolution:
        side = (net.resolution, net.resolution)
        plain_NCHW = F.interpolate(plain_NCHW, side, mode="bilinear", antialias=True)
    with torch.no_grad():
        logits_NC = net.model.double().eval()(plain_NCHW)
    net.model.float()
    if net.class_map:
        logits_NC = logits_NC[:, list(net.class_map)]
    return F.softmax(logits_NC, 1)


def test_each_member_has_its_own_normalisation_resolution_and_class_order() -> None:
    nets = [
        LoadedNet(create_model("resnet8", 5, width=0.5)),
        LoadedNet(create_model("timm:test_efficientnet", 9), OWN, 24, (8, 0, 3, 1, 7)),
        LoadedNet(create_model("wrn_10_1", 5), DATA, 8, (4, 3, 2, 1, 0)),
    ]
    images_NCHW = torch.randn(3, 3, 16, 16)
    expected_NC = sum(by_hand(net, images_NCHW) for net in nets) / 3
    made = bound(*nets)
    for logits_NC in (made.logits(images_NCHW), made({"x": images_NCHW})["x/teacher/logits"]):
        torch.testing.assert_close(logits_NC.double().exp(), expected_NC, rtol=1e-4, atol=1e-6)


def test_each_member_has_its_own_type_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def noting(unit: nn.Module, *, enabled: bool, fullgraph: bool) -> nn.Module:
        asked.append(enabled)
        return unit

    monkeypatch.setattr(fastkd.teachers.teacher, "compile_unit", noting)
    models = [Told(torch.randn(2, 3)) for _ in range(3)]
    nets = [
        LoadedNet(models[0]),
        LoadedNet(models[1], precision="fp32", compiled=False, resolution=6),
        LoadedNet(models[2], precision="bf16", normalization=OWN),
    ]
    made = bound(*nets, precision=Precision("bf16", "cpu"), compiled=True)
    made({"x": torch.rand(2, 3, 4, 4).bfloat16()})
    assert asked == [True, False, True]
    # Networks from outside the zoo get fp32 images, whatever autocast makes of them.
    assert {model.seen.dtype for model in models} == {torch.float32}
    assert [model.autocast for model in models] == [True, False, True]


@pytest.mark.slow
def test_compiled_members_say_the_same() -> None:
    nets = [
        LoadedNet(create_model("resnet8", 10)),
        LoadedNet(create_model("wrn_10_1", 10), OWN, 12, precision="bf16"),
        LoadedNet(create_model("resnet8", 10), compiled=False),
    ]
    images_NCHW = torch.randn(4, 3, 16, 16)
    made = bound(*nets, taps={"x": ("mean_logits",)}, compiled=True)
    plain = bound(*nets, taps={"x": ("mean_logits",)})
    for need, tensor in made({"x": images_NCHW}).items():
        torch.testing.assert_close(tensor, plain({"x": images_NCHW})[need], rtol=0.02, atol=0.02)


def test_a_teacher_in_fp32_beside_a_student_in_bf16_is_as_exact_as_alone() -> None:
    model = create_model("resnet8", 10, width=0.5)
    images_NCHW = torch.randn(4, 3, 16, 16).bfloat16()
    own = bound(LoadedNet(model, precision="fp32"), precision=Precision("bf16", "cpu"))
    alone = bound(LoadedNet(model))
    assert torch.equal(own.logits(images_NCHW), alone.logits(images_NCHW.float()))
    with pytest.raises(UserError, match="precision=fp16 needs a GPU"):
        bound(LoadedNet(model, precision="fp16"))


# Runs.


def save(path: Path, name: str, num_classes: int = 10, **options: Any) -> nn.Module:
    model = create_model(name, num_classes, **options)
    save_weights(path, model, describe(model))
    return model


TINY = (
    *TINY_QUICKSTART,
    "teacher.train=false",
    "teacher.min_accuracy=0",
    "teacher.weights=one.safetensors",
    "teacher.ensemble.0.weights=two.safetensors",
    "teacher.ensemble.0.name=resnet8",
    "teacher.ensemble.0.min_accuracy=0",
)


def test_every_member_is_evaluated_and_then_all_together(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    save(tmp_path / "one.safetensors", "wrn_16_2")
    save(tmp_path / "two.safetensors", "resnet8")
    dry = command("train", "--dry-run", *TINY)
    assert (dry.code, dry.err) == (0, "")
    assert "wrn_16_2: 691,674 parameters" in dry.out
    assert "; resnet8: 78," in dry.out.replace("\n", " ")
    said = command("train", *TINY, "out=run")
    assert (said.code, said.err) == (0, "")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["teacher"]
    one, two = summary["members"]
    assert (one["name"], two["name"], summary["name"]) == (
        "wrn_16_2",
        "resnet8",
        "wrn_16_2 + resnet8",
    )
    assert summary["params"] == one["params"] + two["params"]
    lines = [
        f"teacher wrn_16_2: accuracy {one['accuracy']:.2%}",
        f"teacher resnet8: accuracy {two['accuracy']:.2%}",
        f"the 2 teachers together: accuracy {summary['accuracy']:.2%}",
    ]
    places = [said.out.index(line) for line in lines]
    assert places == sorted(places)
    for row in ("teacher wrn_16_2", "teacher resnet8", "teachers together", "student distilled"):
        assert f"\n{row}" in said.out
    poor = command("train", *TINY, "teacher.ensemble.0.min_accuracy=0.9", "out=poor")
    assert poor.code == 2
    assert "teacher.ensemble.0.min_accuracy=0 accepts it as it is" in poor.err
    few = command("train", *TINY, "teacher.ensemble.0.class_map=1,2,3", "out=few")
    assert few.code == 2
    assert "(1: wrn_16_2 (10,), 2: resnet8 (3,)): all need the classes of the data" in few.err


def test_members_are_trained_first_where_they_ask_for_it(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    save(tmp_path / "one.safetensors", "wrn_16_2")
    trained = (
        "teacher.ensemble.0.weights=null",
        "teacher.ensemble.0.train=true",
        "teacher.ensemble.0.epochs=2",
        "teacher.ensemble.0.width=0.5",
    )
    dry = command("train", "--dry-run", *TINY, *trained)
    assert (dry.code, dry.err) == (0, "")
    assert "teacher.ensemble.0 resnet8" in dry.out
    assert "teacher wrn_16_2 " not in dry.out
    said = command("train", *TINY, *trained, "out=run")
    assert (said.code, said.err) == (0, "")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["teacher"]
    assert "training" not in summary["members"][0]
    assert summary["members"][1]["training"]["epochs"] == 2
    (lesson,) = (tmp_path / "runs" / "teachers").iterdir()
    assert lesson.name.startswith("resnet8-")


@pytest.mark.parametrize(
    ("loss", "tap"),
    [(AT(pairs={"stage2": "stage1"}), "stage1"), (JointRD(("stage1", "stage2")), "pooled")],
    ids=["at", "jointrd"],
)
def test_a_loss_that_wants_more_than_logits_is_told_so(loss: Any, tap: str) -> None:
    student, one = (create_model("resnet8", 10, width=width) for width in (0.25, 0.5))
    with pytest.raises(UserError) as caught:
        distill(student, [one, nn.Sequential(nn.Flatten(), nn.Linear(192, 10))], losses=[loss])
    assert str(caught.value).startswith(
        f"the loss {loss.name} needs {tap} of the teacher, but there are 2 teachers (resnet8, "
        f"Sequential), which only have logits in common: drop that loss, or "
    )


def batches() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    images_NCHW = torch.rand(48, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images_NCHW, torch.arange(48) % 10), batch_size=16)


def distill(student: nn.Module, teacher: Any, **options: Any) -> Any:
    quiet: dict[str, Any] = {"precision": "fp32", "device": "cpu", "quiet": True, "epochs": 2}
    loader = batches()
    return fastkd.distill(student, teacher, loader, loader, **{**quiet, **options})


class MeanProbability(nn.Module):
    """The ensemble as somebody would write it for himself."""

    def __init__(self, nets: list[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Log-probabilities."""
        return (sum(F.softmax(net(images_NCHW), 1) for net in self.nets) / len(self.nets)).log()


def test_distill_takes_a_list_of_teachers() -> None:
    def nets() -> list[nn.Module]:
        torch.manual_seed(5)
        # Zoo, timm, and with far from equal logits.
        made = [create_model("resnet8", 10), create_model("timm:test_byobnet", 10)]
        made[0].fc.weight.data *= 10
        return made

    students = []
    for teacher in (nets(), MeanProbability(nets())):
        torch.manual_seed(1)
        student = create_model("resnet8", 10, width=0.5)
        result = distill(student, teacher, losses=[KD(), SoftCE()])
        assert math.isfinite(result.metrics["history"][-1]["train_loss"])
        students.append(student.state_dict())
    for name, value in students[0].items():
        torch.testing.assert_close(value, students[1][name], rtol=1e-4, atol=1e-5)


def test_a_resumed_distill_wants_as_many_teachers_as_before(tmp_path: Path) -> None:
    def nets() -> list[nn.Module]:
        torch.manual_seed(5)
        return [create_model("resnet8", 10, width=width) for width in (0.5, 1)]

    losses = [SoftCE(), Discriminator()]
    distill(create_model("resnet8", 10, width=0.25), nets(), losses=losses, out=tmp_path / "run")
    with pytest.raises(UserError, match=r"with other arguments \(teachers.1: there, not here\)"):
        distill(
            create_model("resnet8", 10, width=0.25),
            nets()[:1],
            losses=[SoftCE(), Discriminator()],
            out=tmp_path / "run",
            resume=True,
        )


def test_a_module_list_of_teachers_is_a_list_of_teachers() -> None:
    nets = [create_model("resnet8", 10, width=width) for width in (0.5, 1)]
    totals = []
    for teacher in (nets, nn.ModuleList(nets)):
        torch.manual_seed(1)
        result = distill(create_model("resnet8", 10, width=0.25), teacher)
        totals.append(result.metrics["history"][-1]["train_kd"])
    assert totals[0] == totals[1]


def test_no_teacher_is_still_no_teacher() -> None:
    student = create_model("resnet8", 10, width=0.25)
    with pytest.raises(UserError, match="needs a teacher but teacher is None"):
        distill(student, [])
    assert distill(student, [], losses=[CrossEntropy()]).metrics["epochs"] == 2
