"""Recipes whose networks meet images of another size, or batches of one: right, or one sentence."""

import json
import re

import pytest
import torch

import fastkd.data.sources.synthetic
from fastkd.data.loaders.plan import BatchPlan
from fastkd.models import count, create_model, model_from_file
from fastkd.models.counting.count import cost

VIT, RESNET = "timm:vit_tiny_patch16_224", "timm:test_resnet"
BASE = [
    "quickstart",
    "data.name=synthetic",
    "data.train_limit=24",
    "data.image_size=32",
    "baseline.lrs=",
    "epochs=1",
    "batch_size=8",
    "compile=auto",
    "device=cpu",
]
ALONE = [*BASE, "teacher=null", "losses.kd=null", "losses.ce.weight=1"]


def student(name):
    return [*ALONE, f"student.name={name}", "student.width=null"]


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    monkeypatch.setitem(fastkd.data.sources.synthetic.NUM_IMAGES, "val", 10)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The words for a finished teacher, by network."""
    place = tmp_path_factory.mktemp("teachers")

    def words(name):
        path = place / f"{name.replace(':', '-')}.pt"
        if not path.exists():
            torch.manual_seed(0)
            torch.save(create_model(name, 10).state_dict(), path)
        finished = ["teacher.train=false", "teacher.epochs=null", "teacher.lr=null"]
        return [
            *BASE,
            *finished,
            "teacher.width=null",
            "teacher.min_accuracy=0",
            f"teacher.name={name}",
            f"teacher.weights={path}",
        ]

    return words


@pytest.mark.parametrize(
    ("name", "side", "wanted"),
    [
        # Reported.
        (VIT, 64, 224),
        ("torchvision:alexnet", 32, 64),
        ("torchvision:inception_v3", 32, 299),
        # Others of their kind: fixed sizes, a least size, a head that is there in training only.
        ("timm:vit_tiny_r_s16_p8_224", 64, 224),
        ("timm:deit_tiny_patch16_224", 48, 224),
        ("timm:mixer_s32_224", 64, 224),
        ("torchvision:vgg11", 16, 32),
        ("torchvision:inception_v3", 96, 299),
    ],
)
def test_a_size_that_a_network_does_not_take(command, tmp_path, name, side, wanted):
    said = command("train", *student(name), f"data.image_size={side}")
    assert said.code == 2
    # torchvision warns of Inception's slow initialisation before.
    assert re.search(
        rf"^fastkd: the student {name}(, in training,)? does not take images of {side}x{side} "
        rf"pixels \(.*\), but those of {wanted}x{wanted}: set data.image_size={wanted}\n$",
        said.err,
        re.MULTILINE,
    )
    assert not any(tmp_path.iterdir())


def test_the_advice_is_true(command):
    small = ["data.image_size=224", "data.train_limit=10", "batch_size=2"]
    said = command("train", *student(VIT), *small, "--dry-run")
    assert said.code == 0
    said = command("train", *student(VIT), "data.name=digits", "data.image_size=null")
    assert said.code == 2
    assert "digits has no others, so choose another network or data set" in said.err


def test_a_teacher_is_told_its_own_key(command, taught):
    words = taught(VIT)
    said = command("train", *words)
    assert said.code == 2
    assert "the teacher timm:vit_tiny_patch16_224 does not take images of 32x32" in said.err
    assert said.err.endswith("those of 224x224: set teacher.resolution=224\n")
    learns = ["teacher.weights=null", "teacher.train=true"]
    said = command("train", *words, *learns)
    assert said.code == 2
    assert "the teacher timm:vit_tiny_patch16_224 does not take images" in said.err
    assert said.err.endswith("those of 224x224: set data.image_size=224\n")


@pytest.mark.parametrize(
    ("name", "side"), [(VIT, 224), ("torchvision:resnet18", 64), (RESNET, 112), ("resnet8", 48)]
)
def test_a_teacher_is_counted_at_its_own_size(command, taught, name, side):
    small = [f"teacher.resolution={side}", "data.train_limit=10", "batch_size=5"]
    words = [*taught(name), *small]
    macs = count(create_model(name, 10), (3, side, side)).macs
    said = command("train", *words, "--dry-run")
    assert (said.code, said.err) == (0, "")
    shown = re.search(r"teacher +\S+: .*?, ([\d.]+) ([GM]) multiply-accumulates", said.out)
    size = {"G": 1e9, "M": 1e6}[shown[2]]
    assert float(shown[1]) * size == pytest.approx(macs, rel=1e-3)
    said = command("train", *words, "out=run")
    assert said.code == 0, said.err
    with open("run/summary.json") as file:
        summary = json.load(file)
    assert summary["teacher"]["macs"] == macs
    assert summary["macs"] == count(model_from_file("run"), (3, 32, 32)).macs


def test_evaluation_names_the_key(command, tmp_path):
    path = tmp_path / "vit.pt"
    torch.save(create_model(VIT, 10).state_dict(), path)
    words = ["eval", VIT, "--weights", str(path), "data.name=synthetic"]
    said = command(*words, "data.image_size=64")
    assert said.code == 2
    assert "the network timm:vit_tiny_patch16_224 does not take images of 64x64" in said.err
    assert said.err.endswith("set data.image_size=224\n")
    said = command(*words, "data.image_size=224")
    assert said.code == 0
    macs = count(create_model(VIT, 10), (3, 224, 224)).macs
    assert f"{macs:,}" in said.out


def test_fused_attention_counts_on_a_cpu_as_elsewhere():
    name = VIT
    with torch.device("meta"):
        expected = count(create_model(name, 10), (3, 224, 224)).macs
    model = create_model(name, 10)
    assert count(model, (3, 224, 224)).macs == expected
    tokens, width, blocks = 197, 192, 12
    layers = sum(m.weight.numel() for m in model.blocks.modules() if isinstance(m, torch.nn.Linear))
    patches = model.patch_embed.proj.weight.numel() * 196
    scores_and_values = 2 * tokens**2 * width * blocks
    assert expected == layers * tokens + patches + width * 10 + scores_and_values


class Unknown(torch.nn.Module):
    def forward(self, images_NCHW):
        raise RuntimeError("on another day")


def test_a_count_that_fails_is_none():
    shape = (3, 8, 8)
    conv = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2)
    )
    assert cost(conv, shape) == count(conv, shape)
    for model in (
        Unknown(),
        torch.jit.script(conv),
        torch.jit.trace(conv, torch.zeros(1, *shape)),
        torch.export.export(conv.eval(), (torch.zeros(1, *shape),)).module(),
        torch.ao.quantization.quantize_dynamic(conv, {torch.nn.Linear}),
        create_model(VIT, 10),
    ):
        assert cost(model, shape) is None


@pytest.mark.parametrize(
    ("num", "batch", "ranks", "drop_last", "rows"),
    [
        (24, 23, 1, False, (23, 1)),
        (24, 23, 1, True, (23,)),
        (24, 8, 1, False, (8,)),
        (27, 8, 2, False, (4, 1)),
        (25, 8, 2, False, (4,)),
        (5, 8, 2, False, (2,)),
        (8, 8, 4, False, (2,)),
        (3, 3, 2, True, (1,)),
    ],
)
def test_the_plan_knows_its_smallest_batches(num, batch, ranks, drop_last, rows):
    def plan(rank):
        options = {"drop_last": drop_last, "rank": rank, "world_size": ranks}
        return BatchPlan("test", num, batch, 0, True, **options)

    plans = [plan(rank) for rank in range(ranks)]
    assert {one.batch_rows for one in plans} == {rows}
    taken = [
        min(len(range(*one.part(step).indices(num))) for one in plans)
        for step in range(plans[0].steps_per_epoch)
    ]
    assert set(taken) == set(rows)


LAST = "the last batch of an epoch has one image only"
DROP = r"set data.drop_last=true, or another batch_size\n"
LARGER = r"set a larger batch_size\n"
SMALLER = r"set a larger batch_size, or a smaller accumulate\n"


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        # Reported.
        ("torchvision:resnet18", ["batch_size=23", "data.drop_last=false"], f"{LAST}.*{DROP}"),
        ("torchvision:resnet18", ["batch_size=1"], f"every batch has one image only.*{LARGER}"),
        (
            "torchvision:resnet18",
            ["batch_size=4", "accumulate=4"],
            f"with accumulate=4 a micro-batch of every batch has one image only.*{SMALLER}",
        ),
        # Others.
        ("timm:test_efficientnet", ["batch_size=23", "data.drop_last=false"], f"{LAST}.*{DROP}"),
        (
            "torchvision:shufflenet_v2_x0_5",
            ["batch_size=12", "accumulate=3", "data.drop_last=false"],
            None,
        ),
        (
            "torchvision:shufflenet_v2_x0_5",
            ["data.train_limit=22", "batch_size=9", "accumulate=3", "data.drop_last=false"],
            f"with accumulate=3 a micro-batch of the last batch.*{DROP}",
        ),
        ("torchvision:mobilenet_v3_small", ["batch_size=1"], f"every batch .*{LARGER}"),
        # Batch norm on larger maps, or none.
        ("resnet8", ["batch_size=23", "data.drop_last=false"], None),
        ("timm:test_vit", ["batch_size=1", "data.train_limit=10"], None),
    ],
)
def test_a_batch_of_one_is_known_before_the_run(command, tmp_path, name, words, message):
    said = command("train", *student(name), *words)
    assert said.code == (2 if message else 0), said.err
    if message:
        assert re.search(f"^fastkd: {message}$", said.err, re.MULTILINE)
        assert not any(tmp_path.iterdir())


def test_a_recipe_trains_whatever_grad_mode_its_caller_has(command):
    words = ["train", *student("resnet8")]
    with torch.no_grad():
        assert command(*words, "batch_size=20").code == 0
    with torch.inference_mode():
        said = command(*words, "batch_size=20")
    assert said.code == 2
    assert "torch.inference_mode(): call fastkd outside" in said.err


def test_a_batch_of_one_is_known_before_the_teacher_is_trained(command, tmp_path):
    words = ["batch_size=23", "data.drop_last=false", "teacher.width=null"]
    said = command("train", *BASE, *words, "teacher.name=torchvision:resnet18")
    assert said.code == 2
    assert f"{LAST}, and the teacher torchvision:resnet18 cannot be trained on one" in said.err
    assert not any(tmp_path.iterdir())


def test_a_command_that_only_counts_names_its_option(command):
    said = command("cheapen", "torchvision:vgg11", "--input", "3x16x16", "G:2")
    assert said.code == 2
    assert "torchvision:vgg11 does not take images of 16x16 pixels" in said.err
    assert said.err.endswith("but those of 32x32: give --input=3x32x32\n")
