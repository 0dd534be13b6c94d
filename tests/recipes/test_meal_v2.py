"""MEAL V2: pins that are what the paper used, 30 steps with two teachers on photographs, two ranks.

Shen and Savvides 2020, arXiv:2009.08453. The published weights are not needed: the recipe runs with
small networks of timm in their place. Truths: timm's configurations, and the losses written out in
float64.
"""

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.compute.ranks import World
from fastkd.losses.base.term import TermInputs
from fastkd.models import create_model
from fastkd.output.console import Console
from fastkd.recipe.schema import Recipe
from fastkd.recipes.catalogue import all_recipes, find_entry
from fastkd.recipes.loading import build, load_recipe
from fastkd.recipes.missing import missing
from fastkd.report.paper import PaperRow, paper_row
from fastkd.runs.stages import Session, build_stage, open_recipe_data
from fastkd.storage.weights import describe, save_weights
from fastkd.teachers.loading import load_teacher
from fastkd.training.step import Prepared
from fastkd.training.trainer import Trainer

DATA = os.environ.get("FASTKD_TEST_DATA")
NAME = "meal_v2/imagenet/senet154+resnet152s--resnet50/224px"
RECIPES = {name: entry for name, entry in all_recipes().items() if name.startswith("meal_v2/")}

# What the authors' scripts got for their names from timm 0.2, by a part of the name of the file in
# timm's configuration. torchvision has saved its two anew since, under other hashes.
PINS = {
    "senet154.gluon_in1k": "gluon_senet154",
    "resnet152s.gluon_in1k": "gluon_resnet152_v1s",
    "tf_efficientnet_b4.ns_jft_in1k": "tf_efficientnet_b4_ns",
    "tf_efficientnet_b4.aa_in1k": "tf_efficientnet_b4_aa",
    "resnet50.ram_in1k": "resnet50_ram",
    "resnet50.tv_in1k": "resnet50-0676ba61",
    "resnet18.tv_in1k": "resnet18-f37072fd",
    "tf_mobilenetv3_small_075.in1k": "tf_mobilenetv3_small_075",
    "tf_mobilenetv3_small_100.in1k": "tf_mobilenetv3_small_100",
    "tf_mobilenetv3_large_100.in1k": "tf_mobilenetv3_large_100",
    "tf_efficientnet_b0.aa_in1k": "tf_efficientnet_b0_aa",
    "efficientnet_b0.ra_in1k": "efficientnet_b0_ra",
}


def pinned(recipe: Any) -> Iterator[Any]:
    """Sections with pretrained weights."""
    for one in (recipe.student, *recipe.teacher.members().values()):
        if one.pretrained:
            yield one


def test_every_row_runs_given_the_images() -> None:
    assert len(RECIPES) == 22
    for name, entry in RECIPES.items():
        assert missing(entry) == ()
        recipe = build(entry)
        assert len(recipe.teacher.members()) == 2, name
        assert set(recipe.losses) == {"soft_ce", "discriminator"}
        assert recipe.optim.weight_decay == 0
        assert recipe.student.pretrained == ("random" not in name)


@pytest.mark.parametrize("pin", PINS)
def test_pins_are_the_weights_that_the_paper_used(pin: str) -> None:
    found = timm.get_pretrained_cfg(pin, allow_unregistered=False)
    assert found is not None
    assert f"{found.architecture}.{found.tag}" == pin
    assert PINS[pin] in found.url
    assert found.num_classes == 1000


def test_every_pin_is_one_of_them_and_all_are_used() -> None:
    used = {one.name for entry in RECIPES.values() for one in pinned(build(entry))}
    assert used == {f"timm:{pin}" for pin in PINS}


def test_teachers_get_images_of_the_size_they_were_trained_on() -> None:
    for entry in RECIPES.values():
        recipe = build(entry)
        for one in recipe.teacher.members().values():
            wanted = timm.get_pretrained_cfg(one.name.removeprefix("timm:")).input_size[1]
            assert (one.resolution or recipe.data.image_size) == wanted


def beside_paper(recipe: Recipe, summary: dict[str, float]) -> PaperRow:
    found = paper_row(recipe.name, recipe.dotted(), summary)
    assert found is not None
    return found


def test_weights_from_files_are_still_the_paper_s_row() -> None:
    """Where there is no network: as pretrained ones that were fetched by other means."""
    summary = {"accuracy_last": 0.8, "accuracy_best": 0.8}
    files = ("teacher.weights=a.pth", "teacher.ensemble.0.weights=b.pth", "data.root=x")
    found = beside_paper(load_recipe(NAME, overrides=files), summary)
    assert found.facts["changed"] == []
    other = ("teacher.ensemble.0.name=timm:resnet152.tv_in1k",)
    found = beside_paper(load_recipe(NAME, overrides=other), summary)
    assert found.facts["changed"] == [
        "teacher.ensemble.0.name=timm:resnet152.tv_in1k (there timm:resnet152s.gluon_in1k)"
    ]


CLASSES = ("airplane", "automobile", "frog", "truck")
OTHER_ORDER = (2, 0, 5, 3)
"""Where the second teacher, which knows six classes, has ours."""


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """The recipe with small networks, on 120 photographs at 64 pixels."""
    if not DATA:
        pytest.skip("FASTKD_TEST_DATA is not set (folder with cifar10/ in it)")
    folder = tmp_path_factory.mktemp("meal_v2")
    for split, source, num in (("train", "train", 30), ("val", "test", 8)):
        for name in CLASSES:
            target = folder / split / name
            target.mkdir(parents=True)
            for file in sorted((Path(DATA) / "cifar10" / source / name).iterdir())[:num]:
                (target / file.name).symlink_to(file)
    torch.manual_seed(11)
    for name, classes in (("test_resnet", 4), ("test_efficientnet", 6), ("test_byobnet", 4)):
        model: Any = create_model(f"timm:{name}", classes)
        # Sure of something, as no fresh network is.
        head = model.get_classifier()
        with torch.no_grad():
            head.weight.mul_(30 if name != "test_byobnet" else 1)
        save_weights(folder / f"{name}.safetensors", model, describe(model))
    recipe = load_recipe(
        NAME,
        overrides=[
            f"data.root={folder}",
            "data.image_size=64",
            "data.workers=0",
            "batch_size=8",
            "epochs=2",
            "device=cpu",
            "precision=fp32",
            "compile=off",
            "student.name=timm:test_byobnet",
            "student.pretrained=false",
            f"student.weights={folder}/test_byobnet.safetensors",
            "teacher.name=timm:test_resnet",
            f"teacher.weights={folder}/test_resnet.safetensors",
            "teacher.min_accuracy=0",
            "teacher.pretrained=false",
            "teacher.ensemble.0.name=timm:test_efficientnet",
            f"teacher.ensemble.0.weights={folder}/test_efficientnet.safetensors",
            "teacher.ensemble.0.min_accuracy=0",
            "teacher.ensemble.0.pretrained=false",
            "teacher.ensemble.0.resolution=80",
            f"teacher.ensemble.0.class_map={','.join(map(str, OTHER_ORDER))}",
        ],
    )
    session = Session(World(0, 0, 1, torch.device("cpu"), None), Console(enabled=False), folder)
    data = open_recipe_data(recipe, session)
    nets = load_teacher(recipe.teacher, data)
    assert nets is not None
    assert [net.normalization[0][0] for net in nets] == [0.5, 0.485]
    made = build_stage(recipe, data, nets, session)
    made.nets = nets  # type: ignore[attr-defined]
    return made


def fixed_batch(trainer: Trainer) -> Prepared:
    return next(trainer.prepare(0))


def terms_of(trainer: Trainer, batch: Prepared, student: nn.Module) -> dict[str, Tensor]:
    """Every part of the loss, with gradient to the student, in training mode."""
    tensors = batch.targets | {"x/student/logits": student(batch.views["x"])}
    parts: dict[str, Tensor] = {}
    for term in trainer.terms:
        wanted = {need: tensors[need] for need in term.needs}
        inputs = TermInputs(wanted, batch.batch.labels_N, batch.batch.index_N, {})
        parts |= term(inputs).parts
    return parts


def in_float64(trainer: Trainer, batch: Prepared, student: nn.Module) -> dict[str, float]:
    """Both losses from the paper's formulas, nothing of fastkd's but weights and images."""
    (mean, std), sizes = trainer.nets[1].normalization, (None, 80)  # type: ignore[attr-defined]
    plain_NCHW = batch.views["x"].double() * channels(std) + channels(mean)
    answers = []
    for net, side in zip(trainer.nets, sizes, strict=True):  # type: ignore[attr-defined]
        own_mean, own_std = (channels(values) for values in net.normalization)
        seen_NCHW = (plain_NCHW - own_mean) / own_std
        if side:
            seen_NCHW = F.interpolate(seen_NCHW, (side, side), mode="bilinear", antialias=True)
        with torch.no_grad():
            answers.append(copy.deepcopy(net.model).double().eval()(seen_NCHW))
    answers[1] = answers[1][:, list(OTHER_ORDER)]
    with torch.no_grad():
        z_NC = copy.deepcopy(student).double().train()(batch.views["x"].double())
    # Equation 1 and 3: the mean of the probabilities, and the cross entropy with it.
    p_NC = sum(torch.exp(t) / torch.exp(t).sum(1, True) for t in answers) / 2
    log_p_NC = z_NC - torch.logsumexp(z_NC, 1, True)
    # Equation 4: student rows are (1, 0), teacher rows (0, 1), of the mean of the logits.
    (layers,) = (term.layers for term in trainer.terms if term.name == "discriminator")
    rows_MC = torch.cat([z_NC, (answers[0] + answers[1]) / 2])
    for layer in layers:
        rows_MC = (
            layer.weight.double() @ rows_MC.T + layer.bias.double()[:, None]
            if isinstance(layer, nn.Linear)
            else rows_MC.clamp_min(0).T
        )
        rows_MC = rows_MC.T
    guess_M2, num = rows_MC.sigmoid(), len(z_NC)
    right = torch.cat([guess_M2[:num, 0], 1 - guess_M2[:num, 1]])
    right = torch.cat([right, 1 - guess_M2[num:, 0], guess_M2[num:, 1]])
    return {
        "soft_ce": -(p_NC * log_p_NC).sum(1).mean().item(),
        "discriminator": -right.log().mean().item(),
    }


def channels(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1)


def total(trainer: Trainer, batch: Prepared) -> float:
    """Of a fixed batch, with the batch's own statistics; nothing is changed."""
    with torch.no_grad():
        parts = terms_of(trainer, batch, copy.deepcopy(trainer.student).train())
    return sum(parts.values()).item()  # both have weight 1


def test_thirty_steps_on_photographs(trainer: Trainer) -> None:
    batch = fixed_batch(trainer)
    twin = copy.deepcopy(trainer.student).train()
    parts = terms_of(trainer, batch, twin)
    expected = in_float64(trainer, batch, trainer.student)
    assert set(parts) == set(expected)
    for name, value in parts.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-4)
        gradients = torch.autograd.grad(value, list(twin.parameters()), retain_graph=True)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        assert 1e-4 < norm < 1e4, name
    # The two teachers do not agree, so their mean is neither of them.
    first_NC, both_NC = (batch.targets[f"x/teacher/{tap}"] for tap in ("logits", "mean_logits"))
    assert (first_NC.softmax(1) - both_NC.softmax(1)).abs().max() > 0.01
    before = total(trainer, batch)
    steps: list[float] = []
    optimize = trainer.optimize

    def noting(*args: Any) -> None:
        done = trainer.totals_M.clone()
        optimize(*args)
        values = dict(zip(trainer.metric_names, (trainer.totals_M - done).tolist(), strict=True))
        assert values["soft_ce"] > 0
        assert values["discriminator"] > 0
        steps.append(values["loss"] / values["images"])

    trainer.optimize = noting
    trainer.fit()
    assert len(steps) == 30
    assert all(map(torch.isfinite, torch.tensor(steps)))
    assert trainer.guard.counts()[1] == 0
    assert total(trainer, batch) < 0.98 * before


def test_hard_labels_have_no_part(trainer: Trainer) -> None:
    batch = fixed_batch(trainer)
    other = batch._replace(batch=batch.batch._replace(labels_N=batch.batch.labels_N.flip(0)))
    parts = [terms_of(trainer, one, trainer.student.eval()) for one in (batch, other)]
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in parts[0])


def test_the_discriminator_follows_the_rule_of_the_recipe(trainer: Trainer) -> None:
    rates = [(group["base_lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups]
    assert rates == [(0.01, 0.0), (0.01, 0.0)]
    assert not find_entry(NAME).keys.get("losses.discriminator.last_relu")


def test_with_cutmix_the_student_sees_mixed_images_only(tmp_path: Path) -> None:
    """The released code mixes before anybody looks; the target is what the teachers then say."""
    for number, name in enumerate(("resnet8", "wrn_10_1")):
        save_weights(tmp_path / f"{number}.safetensors", create_model(name, 10))
    recipe = load_recipe(
        f"{NAME}-cutmix",
        overrides=[
            "data.name=synthetic",
            "data.train_limit=32",
            "data.image_size=16",
            "batch_size=16",
            "augment.crop=none",
            "epochs=1",
            "device=cpu",
            "precision=fp32",
            "compile=off",
            "student.name=resnet8",
            "student.pretrained=false",
            "teacher.name=resnet8",
            f"teacher.weights={tmp_path}/0.safetensors",
            "teacher.pretrained=false",
            "teacher.ensemble.0.name=wrn_10_1",
            "teacher.ensemble.0.pretrained=false",
            f"teacher.ensemble.0.weights={tmp_path}/1.safetensors",
        ],
    )
    session = Session(World(0, 0, 1, torch.device("cpu"), None), Console(enabled=False), tmp_path)
    data = open_recipe_data(recipe, session)
    nets = load_teacher(recipe.teacher, data)
    assert nets is not None
    made = build_stage(recipe, data, nets, session)
    seen: list[Tensor] = []
    made.student.conv1.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0]) if module.training else None
    )
    shown = list(made.prepare(0))
    made.fit()
    assert [set(prepared.targets) for prepared in shown] == 2 * [
        {"xprime/teacher/logits", "xprime/teacher/mean_logits"}
    ]
    assert len(seen) == 2
    for images_NCHW, prepared in zip(seen, shown, strict=True):
        assert torch.equal(images_NCHW, prepared.views["xprime"])
        assert not torch.equal(images_NCHW, prepared.views["x"])
    (row,) = made.history
    # There is nothing to count where the student is not asked about an image.
    assert "train_accuracy" not in row
    assert row["train_loss"] == pytest.approx(row["train_soft_ce"] + row["train_discriminator"])


def test_two_ranks_with_two_teachers_end_bit_identical_after_a_kill(
    killed_runs: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    name = "meal_v2 on two ranks, before step 5"
    found = killed_runs(tmp_path / "runs", name)[name]
    assert found["codes"] == [[-9, -9], [0, 0]], found["log"]
    assert "resumed tiny/kd at epoch 2 of 2, step 1 of 4" in found["log"]
    assert found["log"].count("the 2 teachers together: accuracy") == 1
    # last.pt of the resumed run and of the run that nobody killed, bit by bit.
    assert found["different"] == []
    assert found["states"][0] == found["states"][1]
    (path,) = (tmp_path / "runs").glob("meal_v2-*/runs/tiny/kd/*/summary.json")
    summary = json.loads(path.read_text())
    assert summary["skipped_steps"] == 0
    assert [one["name"] for one in summary["teacher"]["members"]] == ["resnet8", "wrn_10_1"]
    for row in summary["history"]:
        assert 0 < row["train_soft_ce"] < 10
        assert 0 < row["train_discriminator"] < 10
    saved = torch.load(path.with_name("last.pt"), weights_only=True)
    assert set(saved["terms"]) == {"soft_ce", "discriminator"}
    # Neither teacher is in it.
    assert not any("wrn" in key or "conv4" in key for key in saved["student"])
