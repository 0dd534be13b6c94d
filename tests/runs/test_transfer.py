"""A distilled backbone goes on: a linear probe, a fine-tune, two ranks, and a detector.

On real images where FASTKD_TEST_DATA has cifar10/ (a few hundred, as folders), else on drawn ones.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import nn

import fastkd
from fastkd.data.sources.cifar import LAYOUTS
from fastkd.data.sources.synthetic import make_synthetic
from fastkd.models.registry import model_from_file
from fastkd.storage.weights import load_weights
from fastkd.training.trainer import Trainer

DATA = os.environ.get("FASTKD_TEST_DATA")
PROGRAMS = Path(__file__).parents[1] / "programs"
KEYS = [
    "data.name=folder",
    "data.image_size=null",
    "epochs=3",
    "batch_size=20",
    "precision=fp32",
    "compile=off",
    "device=cpu",
    "baseline.lrs=",
    "augment.crop=none",
    "augment.padding=0",
    "optim.schedule=constant",
    "optim.weight_decay=1e-4",
    "data.mean=0.5,0.5,0.5",
    "data.std=0.25,0.25,0.25",
    "student.width=null",
]
ALONE = ["teacher=null", "losses.kd=null", "losses.ce.weight=1"]
TEACHER = [
    "teacher.name=resnet8",
    "teacher.train=true",
    "teacher.epochs=1",
    "teacher.min_accuracy=0",
]
START = ["student.name=resnet20", "student.weights=base", "student.new_head=true"]


def make_folders(root: Path, classes: int, train: int, val: int) -> None:
    """ROOT/train/CLASS/..: photographs of CIFAR-10 by link, or synthetic pictures."""
    for split, num in (("train", train), ("val", val)):
        if DATA:
            of_cifar = Path(DATA) / "cifar10" / {"train": "train", "val": "test"}[split]
            for folder in sorted(of_cifar.iterdir())[-classes:]:
                (root / split / folder.name).mkdir(parents=True)
                for file in sorted(folder.iterdir())[:num]:
                    (root / split / folder.name / file.name).symlink_to(file)
            continue
        drawn = make_synthetic(split)
        for label in range(10 - classes, 10):
            (root / split / f"class{label}").mkdir(parents=True)
            for number, sample in enumerate((drawn.labels_N == label).nonzero()[0][:num]):
                picture = Image.fromarray(drawn.images_NHWC[sample])
                picture.save(root / split / f"class{label}" / f"{number}.png")


def make_archive(root: Path, per_file: int) -> None:
    """CIFAR-10 in its authors' binary layout, of drawn pictures."""
    layout = LAYOUTS["cifar10"]
    folder = root / layout.binary_dir
    folder.mkdir(parents=True)
    for split, files in (("train", layout.binary_train), ("val", layout.binary_val)):
        drawn = make_synthetic(split)
        planes = drawn.images_NHWC.transpose(0, 3, 1, 2).reshape(len(drawn), -1)
        records = np.hstack([drawn.labels_N[:, None].astype(np.uint8), planes])
        for number, file in enumerate(files):
            part = records[per_file * number : per_file * (number + 1)]
            (folder / file).write_bytes(part.tobytes())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Ten and five classes in folders, CIFAR's archive, and a resnet20 distilled on the ten.

    They lie in `ten/`, `five/`, `archive/` and `base/`.
    """
    from fastkd.cli.commands import main

    folder = tmp_path_factory.mktemp("transfer")
    make_folders(folder / "ten", 10, 20, 4)
    make_folders(folder / "five", 5, 20, 8)
    make_archive(folder / "archive", 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("FASTKD_CACHE", str(folder / "cache"))
        words = [
            "train",
            "quickstart",
            *KEYS,
            *TEACHER,
            "data.root=ten",
            "optim.lr=0.02",
            "student.name=resnet20",
            "out=base",
        ]
        code = main(words)
    assert code == 0
    return folder


@pytest.fixture
def train(place, command, monkeypatch):
    """`fastkd train quickstart` on the five classes in that folder."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("FASTKD_CACHE", str(place / "cache"))
    return lambda *words: command("train", "quickstart", *KEYS, "data.root=five", *words)


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    return load_weights(run)[0]


def moved(place: Path, run: str) -> set[str]:
    """Tensors of a run's last step that are not those of base/, besides the head's."""
    last = torch.load(place / run / "last.pt", weights_only=True)["student"]
    base = tensors_of(place / "base")
    assert last.keys() == base.keys()
    return {key for key in last if key[:3] != "fc." and not torch.equal(last[key], base[key])}


def losses_of(place: Path, run: str) -> list[float]:
    lines = (place / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train_loss"] for line in lines]


def test_a_linear_probe(place, train):
    said = train(*ALONE, *START, "student.frozen=backbone", "optim.lr=0.1", "out=probe")
    assert said.code == 0, said.err
    num = len(tensors_of(place / "base"))
    assert f"student resnet20: {num - 2} of {num} tensors from base; new: fc (5 " in said.out
    assert "only fc (5 classes) is trained" in said.out and "note:" not in said.out
    assert moved(place, "probe") == set()
    losses = losses_of(place, "probe")
    assert losses[-1] < losses[0]

    saved = torch.load(place / "probe/last.pt", weights_only=True)
    assert [len(group["params"]) for group in saved["optimizer"]["param_groups"]] == [2]
    sizes = {value["momentum_buffer"].shape for value in saved["optimizer"]["state"].values()}
    assert sizes == {(5, 64), (5,)}
    for model in (
        fastkd.create_model("resnet20", 5, weights=place / "probe"),
        model_from_file(place / "probe"),
    ):
        assert model.num_classes == 5
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_linear_probe_on_cifar_s_archive(place, train):
    words = ("data.name=cifar10", "data.root=archive", "optim.lr=0.1")
    said = train(*ALONE, *START, "student.frozen=backbone", *words, "out=cifar-probe")
    assert said.code == 0, said.err
    assert "only fc (10 classes) is trained" in said.out
    assert moved(place, "cifar-probe") == set()
    losses = losses_of(place, "cifar-probe")
    assert losses[-1] < losses[0]


def test_a_fine_tune_moves_everything(place, train):
    said = train(*ALONE, *START, "optim.lr=0.01", "out=tuned")
    assert said.code == 0, said.err
    state = tensors_of(place / "base")
    assert moved(place, "tuned") == {key for key in state if key[:3] != "fc."}
    losses = losses_of(place, "tuned")
    assert losses[-1] < losses[0]
    assert fastkd.create_model("resnet20", 5, weights=place / "tuned").num_classes == 5


@pytest.mark.parametrize("frozen", ["student.frozen=backbone", "student.frozen=null"])
def test_a_broken_run_goes_on_exactly(place, train, command, monkeypatch, frozen):
    words = (*ALONE, *START, frozen, "optim.lr=0.05", "epochs=2")
    one, two = f"whole-{frozen[-4:]}", f"broken-{frozen[-4:]}"
    assert train(*words, f"out={one}").code == 0
    original = Trainer.end_epoch

    def end_epoch(self):
        original(self)
        if self.progress.epoch == 1:
            raise RuntimeError("the plug is pulled")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "end_epoch", end_epoch)
        with pytest.raises(RuntimeError, match="plug"):
            train(*words, f"out={two}")
    assert command("train", "--resume", two).code == 0
    whole, resumed = tensors_of(place / one), tensors_of(place / two)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    whole, resumed = (torch.load(place / run / "last.pt", weights_only=True) for run in (one, two))
    for key, value in whole["student"].items():
        assert torch.equal(value, resumed["student"][key]), key


def test_a_probe_under_a_teacher(place, train):
    """The teacher of the five classes is a probe of the same backbone, trained first."""
    probe = [*START, "student.frozen=backbone"]
    said = train(*probe, *TEACHER, "epochs=1", "optim.lr=0.1", "out=taught")
    assert said.code == 0, said.err
    assert moved(place, "taught") == set()
    row = json.loads((place / "taught/metrics.jsonl").read_text())
    assert row["train_kd"] > 0


def test_images_normalised_otherwise_are_noted(place, train):
    said = train(*ALONE, *START, "epochs=1", "data.mean=0.2,0.2,0.2", "out=other")
    assert "note: base learned from images normalised by data.mean=0.5,0.5,0.5" in said.out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["student.new_head=true"], "replaces the classifier of a trained network: set weights="),
        (["student.frozen=backbone"], "frozen=backbone keeps the layers of a trained network: set"),
        (["student.weights=base"], "student.new_head=true"),
        (
            [
                *START,
                "student.frozen=backbone",
                "losses.at.weight=1",
                "teacher.weights=base",
                "teacher.name=resnet20",
                "losses.at.pairs={stage1: stage1}",
            ],
            "student.frozen=backbone leaves losses.at nothing to teach: it uses stage1",
        ),
        (["student.frozen=head"], "student.frozen=head: expected one of backbone"),
        (
            [
                "teacher.name=resnet20",
                "teacher.weights=base",
                "teacher.new_head=true",
                "teacher.train=false",
            ],
            "teacher.new_head is for a teacher trained by this recipe",
        ),
    ],
)
def test_what_does_not_fit_is_said(place, train, words, sentence):
    alone = ALONE if not any(word.startswith("teacher.") for word in words) else []
    said = train(*alone, "student.name=resnet20", *words)
    assert said.code == 2
    assert sentence in " ".join(said.err.split())


@pytest.mark.parametrize(
    ("dataset", "name", "root", "classes"),
    [("cub200", "folder", "five", 5), ("cifar10", "cifar10", "archive", 10)],
)
def test_a_named_recipe_takes_a_file_of_others(
    place, command, monkeypatch, dataset, name, root, classes
):
    """The keys of the paper's row, with a smaller network; CIFAR's archive is enlarged."""
    monkeypatch.chdir(place)
    torch.manual_seed(1)
    others = fastkd.create_model("torchvision:resnet18", 1000)
    torch.save({"state_dict": nn.DataParallel(others).state_dict()}, place / "released.pth")
    said = command(
        "train",
        f"transfer/{dataset}/resnet50-meal_v2/linear",
        f"data.name={name}",
        f"data.root={root}",
        f"out=named-{root}",
        "student.name=timm:resnet18",
        "student.weights=released.pth",
        "data.image_size=40",
        "data.train_limit=40",
        "batch_size=16",
        "epochs=1",
        "device=cpu",
        "compile=off",
        "precision=fp32",
        "data.workers=0",
    )
    assert said.code == 0, said.err
    assert "tensors from released.pth; new: fc (" in said.out
    assert f"only fc ({classes} classes) is trained" in said.out
    last = torch.load(place / f"named-{root}/last.pt", weights_only=True)["student"]
    for key, value in others.state_dict().items():
        assert torch.equal(last[key], value) or key.startswith("fc."), key


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_torchvisions_retinanet_takes_the_backbone(place, train, name):
    """The three lines that a detector needs, and that its features are those of the student."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    run = place / name.replace(":", "-")
    words = (f"student.name={name}", "epochs=1", "data.train_limit=20", f"out={run.name}")
    assert train(*ALONE, *words).code == 0

    pyramid = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, **pyramid)
    state = {key: value for key, value in load_weights(run)[0].items() if key[:3] != "fc."}
    backbone.body.load_state_dict(state)
    detector = RetinaNet(backbone, num_classes=4, min_size=64, max_size=64).eval()

    own = detector.backbone.body.state_dict()
    assert own.keys() == {key for key in state if not key.endswith("num_batches_tracked")}
    assert all(torch.equal(own[key], state[key]) for key in own)
    images = torch.rand(2, 3, 64, 64)
    assert [set(found) for found in detector(images)] == [{"boxes", "scores", "labels"}] * 2

    # Bit for bit with live batch norms in evaluation; torchvision's frozen ones round otherwise.
    student = model_from_file(run).eval()
    live = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, **pyramid
    ).eval()
    live.body.load_state_dict(state)
    x = student.maxpool(torch.relu(student.bn1(student.conv1(images))))
    features = live.body(images)
    frozen = detector.backbone.body(images)
    for number in range(1, 5):
        x = student.get_submodule(f"layer{number}")(x)
        if number > 1:
            assert torch.equal(features[str(number - 2)], x)
            assert (frozen[str(number - 2)] - x).norm() < 1e-5 * x.norm()


@pytest.fixture(scope="module")
def on_ranks(program, tmp_path_factory):
    target = tmp_path_factory.mktemp("ranks") / "found.pt"
    program("transfer_ranks.py", target)
    return torch.load(target)


def test_map_on_two_ranks_is_that_of_all_samples(on_ranks):
    """Also where a rank has no sample at all."""
    sys.path.insert(0, str(PROGRAMS))
    try:
        from transfer_ranks import example
    finally:
        sys.path.remove(str(PROGRAMS))
    scores, targets = (part.numpy() for part in example())
    known = targets != -1
    of_class = [
        average_precision_score(targets[known[:, c], c], scores[known[:, c], c]) for c in range(6)
    ]
    for found in on_ranks:
        for first in (10, 23):
            assert found[first]["map"] == pytest.approx(np.mean(of_class), rel=1e-6)
            assert found[first]["samples"] == 23


def test_a_probe_on_two_ranks(on_ranks):
    for found in on_ranks:
        assert found["probe"]["moved"] == ["fc.weight", "fc.bias"]
        assert found["probe"]["alike"]
    assert on_ranks[0]["probe"]["map"] == on_ranks[1]["probe"]["map"]
