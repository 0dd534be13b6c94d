"""Data picking: the pool, the choice, and what the choice leaves alone."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

import fastkd.runs.stages
from fastkd.augment.pick import Pick
from fastkd.augment.views import XPRIMES, ViewMaker
from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision, resolve_precision
from fastkd.compute.ranks import World
from fastkd.data.batch import Batch
from fastkd.errors import UserError
from fastkd.models import create_model
from fastkd.output.console import Console
from fastkd.recipes.loading import load_recipe
from fastkd.runs.stages import Session, open_recipe_data
from fastkd.teachers.loading import load_teacher
from fastkd.testing import sines
from fastkd.training.step import Prepared

CPU = torch.device("cpu")
FP32 = resolve_precision("fp32", CPU)


def student() -> nn.Module:
    torch.manual_seed(0)
    return create_model("resnet8", 7, width=0.5).train()


def pick(net: nn.Module, **options) -> Pick:
    given = {
        "criterion": "kl",
        "temperature": 4.0,
        "images": None,
        "share": 0.5,
        "update_statistics": True,
    }
    return Pick(net, precision=FP32, **given | options)


def pool(num: int = 10):
    torch.manual_seed(1)
    return torch.randn(num, 3, 16, 16), 2 * torch.randn(num, 7)


def scores_of(criterion, student_logits, teacher_logits):
    """In float64, term by term."""
    p_s, p_t = (x.double().softmax(1) for x in (student_logits, teacher_logits))
    if criterion == "student_entropy":
        return -(p_s * p_s.log()).sum(1)
    if criterion == "teacher_entropy":
        return -(p_t * p_t.log()).sum(1)
    q_s, q_t = (x.double().div(4).softmax(1) for x in (student_logits, teacher_logits))
    return (q_t * (q_t / q_s).log()).sum(1)


@pytest.mark.parametrize("criterion", ["kl", "teacher_entropy", "student_entropy"])
@pytest.mark.parametrize("size", [{"share": 0.5}, {"images": 4, "share": None}])
def test_the_hardest_are_chosen_and_their_ratio_is_that_of_equation_4(criterion, size):
    net, (images, teacher) = student(), pool()
    logits = copy.deepcopy(net)(images).detach()
    scores = scores_of(criterion, logits, teacher)
    num = size.get("images") or 5
    expected = scores.argsort(descending=True)[:num]
    found = pick(net, criterion=criterion, **size)(images, teacher)
    assert found.index_K.tolist() == expected.tolist()
    ratio = scores[expected].mean() / scores.mean()
    assert found.ratio.item() == pytest.approx(ratio.item(), rel=1e-5)
    assert not found.ratio.requires_grad


class Answers(nn.Module):
    """A network that says the same to any images."""

    def __init__(self, logits_NC):
        super().__init__()
        self.register_buffer("logits_NC", logits_NC)

    def forward(self, images_NCHW):
        return self.logits_NC


# Of the released code at these logits, ascending there.
ORACLE = {
    "kl": [2, 7, 4, 1],
    "teacher_entropy": [7, 6, 3, 0],
    "student_entropy": [4, 1, 2, 5],
}


@pytest.mark.parametrize("criterion", ORACLE)
def test_the_choice_is_that_of_the_released_code(criterion):
    net = Answers(sines((8, 10), 1, 3))
    found = pick(net, criterion=criterion)(torch.zeros(8, 3, 4, 4), sines((8, 10), 2, 4))
    assert found.index_K.tolist() == ORACLE[criterion][::-1]
    if criterion == "kl":
        assert found.ratio.item() == pytest.approx(1.2877260748025263, rel=1e-6)


def test_of_a_small_pool_all_are_kept():
    images, teacher = pool(3)
    found = pick(student(), images=64, share=None)(images, teacher)
    assert sorted(found.index_K.tolist()) == [0, 1, 2]
    assert found.ratio.item() == pytest.approx(1)


def test_statistics_see_the_pool_only_if_they_may():
    images, teacher = pool()
    net = student()
    before = copy.deepcopy(net.state_dict())
    apart = pick(net, update_statistics=False)(images, teacher)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    seen = pick(net)(images, teacher)
    # The scores come from the statistics of the pool either way.
    assert apart.index_K.tolist() == seen.index_K.tolist()
    moved = [key for key, value in net.state_dict().items() if not torch.equal(value, before[key])]
    assert moved
    assert all("running" in key or "num_batches" in key for key in moved)
    # The teacher's entropy asks the student nothing.
    before = copy.deepcopy(net.state_dict())
    pick(net, criterion="teacher_entropy")(images, teacher)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_it_is_one_graph():
    images, teacher = pool()
    net = student()
    torch.compiler.reset()
    compiled = torch.compile(pick(net), fullgraph=True, dynamic=False, backend="aot_eager")
    expected = pick(copy.deepcopy(net))(images, teacher)
    assert compiled(images, teacher).index_K.tolist() == expected.index_K.tolist()
    other = torch.compile(
        pick(net, update_statistics=False), fullgraph=True, dynamic=False, backend="aot_eager"
    )
    other(images, teacher)


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_the_pool_is_the_batch_mixed_anew_each_time(kind):
    torch.manual_seed(2)
    x = torch.randn(6, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    batch = Batch(x, torch.arange(6), torch.arange(6))

    def views(pool, step):
        placement = Placement(World(0, 0, 1, CPU, None), Precision("fp32", "cpu"))
        maker = ViewMaker(kind, seed=3, placement=placement, layout=torch.channels_last, pool=pool)
        return maker(batch, 1, step)["xprime"]

    found = views(3, 0)
    assert found.shape == (18, 3, 8, 8)
    assert found.is_contiguous(memory_format=torch.channels_last)
    thirds = found.split(6)
    assert torch.equal(thirds[0], views(1, 0))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(thirds, 2))
    assert torch.equal(found, views(3, 0))
    assert not torch.equal(found, views(3, 1))


def test_a_chosen_view_takes_its_rows_of_the_teacher_along():
    x, made = torch.randn(2, 4, 3, 2, 2)
    made = torch.cat([made, made + 1])
    whole = Prepared(
        Batch(x, torch.arange(4), torch.arange(4)),
        {"x": x, "xprime": made},
        {"x/teacher/logits": torch.randn(4, 5), "xprime/teacher/logits": torch.randn(8, 5)},
        4,
        {"x": (4,), "xprime": (8,)},
    )
    index = torch.tensor([7, 0, 3])
    found = whole.chosen("xprime", index, (3,))
    assert torch.equal(found.views["x"], x)
    assert torch.equal(found.views["xprime"], made[index])
    assert torch.equal(found.targets["x/teacher/logits"], whole.targets["x/teacher/logits"])
    expected = whole.targets["xprime/teacher/logits"][index]
    assert torch.equal(found.targets["xprime/teacher/logits"], expected)
    parts = list(found.split(2))
    assert [len(part.views["x"]) for part in parts] == [2, 2]
    assert [len(part.views["xprime"]) for part in parts] == [2, 1]
    assert [part.rows_of_ranks for part in parts] == [
        {"x": (2,), "xprime": (2,)},
        {"x": (2,), "xprime": (1,)},
    ]


def test_a_compiled_pick_is_trained_with(monkeypatch):
    """A module that torch.compile has wrapped has a truth of its own, which is an error."""
    options = {"backend": "aot_eager", "fullgraph": True, "dynamic": False}
    monkeypatch.setattr(
        "fastkd.training.engine.compile_unit",
        lambda unit, **_: torch.compile(unit, **options) if isinstance(unit, Pick) else unit,
    )
    torch.compiler.reset()
    trainer = trainer_of("compile=on", "student.width=0.5", "teacher.name=resnet8", "batch_size=8")
    trainer.runner.train()
    trainer.optimize(next(trainer.prepare(0)), 0, 0)
    values = dict(zip(trainer.metric_names, trainer.totals_M.tolist(), strict=True))
    assert values["images"] == 8
    assert values["pick_ratio"] / 8 > 1


@pytest.mark.parametrize("kind", XPRIMES[1:])
def test_any_second_view_can_be_picked_with_any_target(kind):
    """On either backend, with labels of the images beside: one step, alike."""
    rows = []
    for backend in ("resident", "torch"):
        trainer = trainer_of(
            f"augment.xprime={kind}",
            "losses.mixed_ce.weight=0.5",
            "student.width=0.5",
            "batch_size=8",
            f"data.backend={backend}",
            "data.workers=0",
            "augment.flip=true",
        )
        trainer.runner.train()
        prepared = next(trainer.prepare(0))
        assert len(prepared.views["x"]) == 8 and len(prepared.views["xprime"]) == 16
        assert not torch.equal(prepared.views["x"], prepared.views["xprime"][:8])
        assert prepared.targets["xprime/mixed/labels"].shape == (16, 10)
        trainer.optimize(prepared, 0, 0)
        rows.append(dict(zip(trainer.metric_names, trainer.totals_M.tolist(), strict=True)))
    assert rows[0] == pytest.approx(rows[1], rel=1e-6)
    assert rows[0]["images"] == 8 and rows[0]["mixed_ce"] > 0 and rows[0]["kd_xprime"] > 0
    assert rows[0]["pick_ratio"] / 8 > 1


def test_a_second_crop_needs_something_random():
    words = ("augment.xprime=cropflip", "augment.crop=none", "augment.flip=false")
    with pytest.raises(UserError, match="cropflip would be x again"):
        trainer_of(*words)
    assert trainer_of(*words[:2], "augment.flip=true").views.xprime == "cropflip"


def trainer_of(*words):
    """Of a recipe that picks."""
    recipe = load_recipe(
        "quickstart",
        overrides=[
            "data.name=synthetic",
            "data.train_limit=64",
            "compile=off",
            "precision=fp32",
            "augment.xprime=cutmix",
            "losses.kd.views=x,xprime",
            "augment.pick.criterion=kl",
            *words,
        ],
    )
    session = Session(World(0, 0, 1, CPU, None), Console(enabled=False), Path("unused"))
    data = open_recipe_data(recipe, session)
    teacher = load_teacher(recipe.teacher, data)
    return fastkd.runs.stages.build_stage(recipe, data, teacher, session)


def test_a_whole_step_costs_what_its_definition_says():
    """Forward passes of a step: the student on x, pool and x', the teacher on x and pool only."""
    trainer = trainer_of("batch_size=16", "student.width=0.5")
    seen = {"student": [], "teacher": []}
    for name, net in (("student", trainer.student), ("teacher", trainer.teacher.model)):
        first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
        first.register_forward_hook(
            lambda module, inputs, output, name=name: seen[name].append(len(inputs[0]))
        )
    trainer.runner.train()
    prepared = next(trainer.prepare(0))
    trainer.optimize(prepared, 0, 0)
    assert sorted(seen["student"]) == [16, 16, 32]
    assert sorted(seen["teacher"]) == [16, 16, 16]
    values = dict(zip(trainer.metric_names, trainer.totals_M.tolist(), strict=True))
    assert values["pick_ratio"] / values["images"] > 1
