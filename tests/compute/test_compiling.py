"""`auto` compiles where it pays, alike on every run, and a compiled unit is the unit itself."""

import functools
import inspect

import pytest
import torch
from torch import nn

from fastkd.compute.compiling import (
    COMPILE_SECONDS,
    MACS_PER_SECOND,
    PAYS_FROM,
    compile_unit,
    worth_compiling,
)
from fastkd.losses.logits import KD, CrossEntropy
from fastkd.models import count, create_model
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.teaching import Teaching
from fastkd.training.engine import decide_compile

CPU = torch.device("cpu")


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_auto_compiles_from_ten_times_the_compile_time_on(device_type):
    seconds = PAYS_FROM * COMPILE_SECONDS[device_type]
    images = 50_000
    macs = seconds * MACS_PER_SECOND[device_type] / images

    def decided(mode, share):
        return worth_compiling(
            mode, macs_per_image=share * macs, images=images, device_type=device_type
        )

    assert [decided("auto", share) for share in (0.99, 1.01)] == [False, True]
    assert [decided("on", share) for share in (0, 10)] == [True, True]
    assert [decided("off", share) for share in (0, 10)] == [False, False]


def chosen(images, mode="auto", terms=None, teachers=()):
    return decide_compile(
        mode,
        student=create_model("resnet8", 10, width=0.5),
        teacher_macs=Teaching(tuple(teachers)).macs((3, 32, 32)),
        terms=terms or [CrossEntropy()],
        image_shape=(3, 32, 32),
        images=images,
        device_type="cpu",
    )


def test_the_work_of_a_run_decides():
    macs = count(create_model("resnet8", 10, width=0.5), (3, 32, 32)).macs
    limit = PAYS_FROM * COMPILE_SECONDS["cpu"] * MACS_PER_SECOND["cpu"] / (3 * macs)
    assert not chosen(0.99 * limit)
    assert chosen(1.01 * limit)
    assert chosen(1, "on")
    assert not chosen(100 * limit, "off")
    # A second view doubles the student's work, a teacher adds its forward pass.
    both = KD(views=("x", "xprime"))
    teacher = create_model("resnet8", 10, width=0.5)
    assert chosen(0.51 * limit, terms=[both])
    assert not chosen(0.49 * limit * 3 / 4, terms=[both], teachers=[LoadedNet(teacher)])
    assert chosen(0.51 * limit * 3 / 4, terms=[both], teachers=[LoadedNet(teacher)])


def test_a_teacher_counts_at_its_own_size():
    model = create_model("resnet8", 10, width=0.5)
    small, large = (count(model, (3, side, side)).macs for side in (32, 64))
    limit = PAYS_FROM * COMPILE_SECONDS["cpu"] * MACS_PER_SECOND["cpu"]
    images = limit / (3 * small + (small + large) / 2)
    assert not chosen(images, terms=[KD()], teachers=[LoadedNet(model)])
    assert chosen(images, terms=[KD()], teachers=[LoadedNet(model, resolution=64)])


def test_what_cannot_be_counted_is_not_compiled_by_itself():
    teacher = LoadedNet(torch.jit.script(nn.Linear(2, 2)))
    assert not chosen(1e15, terms=[KD()], teachers=[teacher])
    assert chosen(1e15, "on", terms=[KD()], teachers=[teacher])


def test_the_recipes_decide_as_meant():
    """On a CPU the quickstart is too short, 240 epochs of CIFAR are not."""
    from fastkd.recipes.loading import find_recipe

    for name, images, size, expected in (
        ("quickstart", 300, 16, False),
        ("cifar10/resnet56--resnet20/kd", 50_000, 32, True),
    ):
        recipe = find_recipe(name)
        options = {} if recipe.student.width is None else {"width": recipe.student.width}
        teacher = LoadedNet(create_model(recipe.teacher.name, 10))
        compiled = decide_compile(
            recipe.compile,
            student=create_model(recipe.student.name, 10, **options),
            teacher_macs=Teaching((teacher,)).macs((3, size, size)),
            terms=[KD()],
            image_shape=(3, size, size),
            images=images * recipe.total_epochs,
            device_type="cpu",
        )
        assert compiled == expected, name


def test_uncompiled_is_the_unit_itself():
    unit = nn.Linear(2, 2)
    assert compile_unit(unit, enabled=False) is unit


@pytest.fixture
def backend(monkeypatch):
    """torch.compile with a backend that runs the graph as it is, and counts graphs."""
    torch.compiler.reset()
    graphs = []

    def counting(graph, example_inputs):
        graphs.append([tuple(x.shape) for x in example_inputs if isinstance(x, torch.Tensor)])
        return graph.forward

    original = torch.compile

    @functools.wraps(original)  # compile_unit looks at the signature
    def compile_for_counting(unit, **options):
        return original(unit, **options | {"backend": counting})

    monkeypatch.setattr(torch, "compile", compile_for_counting)
    yield graphs
    torch.compiler.reset()


def test_one_static_graph_per_batch_shape(backend):
    unit = nn.Linear(3, 2)
    compiled = compile_unit(unit, enabled=True)
    for num in (4, 4, 2, 4, 2):
        images = torch.rand(num, 3)
        torch.testing.assert_close(compiled(images), unit(images))
    assert len(backend) == 2
    assert next(iter(compiled.parameters())) is unit.weight


@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters,
    reason="this torch lets all units of one class share a limit of 8 graphs",
)
def test_many_units_of_one_class_do_not_share_a_recompile_limit(backend):
    units = [nn.Linear(3, width) for width in range(2, 14)]
    # Set here: importing timm.optim raises it to a million for the whole process.
    with torch._dynamo.config.patch(recompile_limit=8):
        for unit in units:
            compiled = compile_unit(unit, enabled=True)
            torch.testing.assert_close(compiled(torch.ones(2, 3)), unit(torch.ones(2, 3)))
    assert len(backend) == len(units) == 12


def test_a_graph_break_is_an_error(backend):
    class Breaking(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        compile_unit(Breaking(), enabled=True)(torch.ones(2))
