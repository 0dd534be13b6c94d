"""What SimKD leaves can be evaluated, kept, rebuilt and used: by recipe and by `fastkd.distill`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd.errors import UserError
from fastkd.losses import KD, SimKD
from fastkd.losses.base.term import BindContext, LossTerm, TermInputs, TermOutput
from fastkd.models import create_model, model_from_file
from fastkd.models.reused_head import ReusedHead
from fastkd.output.run_folder import RunFolder
from fastkd.runs.evaluate_saved import evaluate_run
from fastkd.storage.weights import load_weights, save_weights
from fastkd.teachers.parts import copy_of_head

RECIPE: dict[str, Any] = {
    "name": "tiny/simkd",
    "epochs": 2,
    "batch_size": 50,
    "compile": "off",
    "precision": "fp32",
    "device": "cpu",
    "data": {"name": "synthetic", "image_size": 8, "train_limit": 100},
    "student": {"name": "resnet8", "width": 0.25},
    "teacher": {"name": "wrn_10_1", "weights": "teacher.safetensors", "min_accuracy": 0},
    "optim": {"lr": 0.05, "schedule": "constant"},
    "losses": {"simkd": {"weight": 1.0, "teacher": "stage3:preact"}},
}


def test_a_finished_run_is_evaluated_and_rebuilt(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    save_weights(tmp_path / "teacher.safetensors", create_model("wrn_10_1", 10))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    said = command("train", "--config", "recipe.yaml", "out=run")
    assert said.code == 0, said.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    row = RunFolder.open(tmp_path / "run").metrics()[summary["best_epoch"] - 1]
    found = evaluate_run("run")
    assert found["accuracy"] == summary["accuracy_best"] == row["val_accuracy"]
    assert found["loss"] == pytest.approx(row["val_loss"], rel=1e-5)
    assert found["params"] == summary["params"]
    kept = model_from_file(tmp_path / "run")
    assert isinstance(kept, ReusedHead)
    assert kept.fastkd_name == "simkd:resnet8"
    assert summary["params"] == sum(p.numel() for p in kept.parameters())
    # The teacher's classifier as it was, and a student that runs by itself.
    state, _ = load_weights(tmp_path / "teacher.safetensors")
    assert torch.equal(kept.head.weight, state["fc.weight"])
    images_NCHW = torch.rand(3, 3, 8, 8)
    kept.eval()
    stage3_NCHW = kept.student.forward_between(images_NCHW, "images", "stage3")
    pooled_ND = kept.projector(stage3_NCHW).mean((2, 3))
    expected_NC = pooled_ND @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(kept(images_NCHW), expected_NC)
    # Beside it a loss on the classifier that is not kept; the run builds its training twice.
    both = ["losses.kd.weight=1", "losses.kd.ce_weight=0"]
    said = command("train", "--config", "recipe.yaml", *both, "epochs=1", "out=kd")
    assert said.out.count("losses.kd=null removes that loss") == 1
    # The same file under the student's name says what it is.
    data = ["data.name=synthetic", "data.image_size=8"]
    said = command(
        "eval", "resnet8", "--weights", "run/best.safetensors", *data, "student.width=0.25"
    )
    assert said.code == 2
    assert "simkd:resnet8" in said.err
    with pytest.raises(UserError, match="comes from training with the SimKD loss"):
        create_model("simkd:resnet8", 10)


@pytest.mark.parametrize("losses", [[SimKD()], [SimKD(), KD()]], ids=["alone", "beside KD"])
def test_a_loss_on_the_classifier_that_goes_is_noted(
    losses: list[LossTerm], capsys: pytest.CaptureFixture[str]
) -> None:
    """KD teaches the student's body, too, but the classifier that it trains is replaced."""
    loader = DataLoader(TensorDataset(*tensors(16, 1)), batch_size=16)
    student, teacher = create_model("resnet8", 4, width=0.25), create_model("resnet8", 4)
    options: dict[str, Any] = {"precision": "fp32", "device": "cpu", "compile": "off"}
    fastkd.distill(student, teacher, loader, loader, epochs=1, losses=losses, **options)
    said = "its own one, which kd trains, is not kept (losses.kd=null removes that loss)"
    assert capsys.readouterr().out.count(said) == len(losses) - 1


def tensors(num: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(0, 4, (num,), generator=generator)
    images_NCHW = torch.randn(num, 3, 8, 8, generator=generator)
    return images_NCHW + labels_N.view(-1, 1, 1, 1), labels_N


def foreign(seed: int, width: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 4),
    )


def test_networks_of_others(tmp_path: Path) -> None:
    train = DataLoader(TensorDataset(*tensors(64, 1)), batch_size=16)
    val = DataLoader(TensorDataset(*tensors(40, 2)), batch_size=16)
    student, teacher = foreign(1, 4), foreign(2, 6)
    result = fastkd.distill(
        student,
        teacher,
        train,
        val,
        epochs=2,
        losses=[SimKD(student="0", teacher="0")],
        out=tmp_path / "run",
        precision="fp32",
        device="cpu",
        compile="off",
        quiet=True,
    )
    assert isinstance(result.student, ReusedHead)
    images_NCHW, labels_N = tensors(40, 2)
    with torch.no_grad():
        hits_N = result.student(images_NCHW).argmax(1) == labels_N
        pooled_ND = result.student.projector(student[0](images_NCHW)).mean((2, 3))
        torch.testing.assert_close(result.student(images_NCHW), teacher[3](pooled_ND))
    assert hits_N.float().mean().item() == pytest.approx(result.metrics["accuracy_last"])
    assert not any(module._forward_hooks for module in result.student.modules())
    # Nobody can rebuild such a network from a file, which then does not name one.
    with pytest.raises(UserError, match="its network is a ReusedHead, which fastkd did not build"):
        model_from_file(tmp_path / "run")


class Normalised(nn.Module):
    """In pre-activation style: BN and ReLU between the last block and the pooling."""

    def __init__(self, *, module: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.block1 = nn.Conv2d(3, 6, 3, 2, 1)
        self.block2 = nn.Conv2d(6, 6, 3, 1, 1)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU() if module else None
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(6, 4))
        self(torch.randn(32, 3, 8, 8))  # running statistics of its own

    def forward(self, images_NCHW: Tensor) -> Tensor:
        normed_NCHW = self.norm(self.block2(self.block1(images_NCHW)))
        active_NCHW = normed_NCHW.relu() if self.act is None else self.act(normed_NCHW)
        return self.classifier(active_NCHW.mean((2, 3)))


def distilled(student: nn.Module, teacher: nn.Module, tap: str, own: str = "stage3") -> nn.Module:
    loader = DataLoader(TensorDataset(*tensors(16, 1)), batch_size=16)
    return fastkd.distill(
        student,
        teacher,
        loader,
        loader,
        epochs=1,
        losses=[SimKD(student=own, teacher=tap)],
        precision="fp32",
        device="cpu",
        compile="off",
        quiet=True,
    ).student


def test_a_classifier_is_reused_only_right_behind_the_pooled_map() -> None:
    """A head on the raw sum would be another one, which no run could notice."""
    teacher = Normalised(module=True)
    for tap in ("block2", "norm"):
        with pytest.raises(UserError, match=r"does more in between.*simkd\.teacher=act, which it"):
            distilled(foreign(1, 4), teacher, tap, "0")
    assert not any(module._forward_hooks for module in teacher.modules())
    distilled(foreign(1, 4), teacher, "act", "0")
    with pytest.raises(UserError, match=r"no tap feeds it through pooling alone"):
        distilled(foreign(1, 4), Normalised(module=False), "norm", "0")


def test_a_wide_resnet_and_a_resnet_as_they_are() -> None:
    student, wide = create_model("resnet8", 4, width=0.25), create_model("wrn_10_1", 4)
    wide(torch.randn(32, 3, 8, 8))
    with pytest.raises(UserError, match=r"simkd\.teacher=stage3:preact, which it pools"):
        distilled(student, wide, "stage3")
    kept = distilled(student, wide, "stage3:preact").eval()
    assert isinstance(kept, ReusedHead)
    distilled(create_model("resnet8", 4, width=0.25), create_model("resnet8", 4), "stage3")


class Noting(LossTerm):
    """KL on the logits, which alone lets the teacher be folded and held in the run's type."""

    def __init__(self) -> None:
        super().__init__("noting", ("x/student/logits", "x/teacher/logits"), {"noting": 1.0})
        self.seen: list[BindContext] = []

    def bind(self, context: BindContext) -> None:
        self.seen.append(context)

    def forward(self, inputs: TermInputs) -> TermOutput:
        student_NC, teacher_NC = (inputs.tensors[need] for need in self.needs)
        return TermOutput({"noting": (student_NC - teacher_NC).square().mean()})


def test_a_term_gets_the_head_and_the_norm_as_they_were_loaded() -> None:
    loader = DataLoader(TensorDataset(*tensors(16, 1)), batch_size=16)
    torch.manual_seed(2)
    teacher = create_model("resnet8", 10)
    weight_CD = teacher.get_submodule("fc").weight.detach().clone()
    term = Noting()
    fastkd.distill(
        create_model("resnet8", 10),
        teacher,
        loader,
        loader,
        epochs=1,
        losses=[term],
        precision="bf16",
        device="cpu",
        compile="off",
        quiet=True,
    )
    (context,) = term.seen
    assert context.teacher_head is not None and context.teacher_norm is not None
    assert torch.equal(context.teacher_head.weight, weight_CD)
    assert context.teacher_head.weight.dtype == torch.float32
    assert context.teacher_norm.weight.dtype == torch.float32


def test_the_classifier_is_in_the_class_order_of_the_data() -> None:
    teacher = create_model("resnet8", 10)
    features_ND = torch.rand(3, 64)
    head = copy_of_head(teacher, (7, 0, 2), torch.device("cpu"))
    assert head is not None
    expected_NC = teacher.get_submodule("fc")(features_ND)[:, [7, 0, 2]]
    torch.testing.assert_close(head(features_ND), expected_NC)
    assert head.out_features == 3
    assert teacher.get_submodule("fc").out_features == 10
