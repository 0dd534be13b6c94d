"""A wrong input ends with one sentence and its exit code, and leaves no half-made run folder."""

import errno
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import fastkd.data.sources.synthetic
import fastkd.output.run_folder
import fastkd.training.checkpointing
import fastkd.training.trainer
from fastkd.compute.ranks import World
from fastkd.errors import UserError
from fastkd.models import create_model
from fastkd.models.card import card_of, sign
from fastkd.output.console import Console
from fastkd.recipes.loading import load_recipe
from fastkd.runs.stages import Session, open_recipe_data
from fastkd.storage.weights import describe, save_weights

NET = ["student.name=resnet8", "student.width=0.5", "epochs=1", "compile=off", "device=cpu"]
ALONE = [*NET, "teacher=null", "losses.kd=null", "losses.ce.weight=1", "baseline.lrs="]
SYNTHETIC = ["data.name=synthetic", "data.train_limit=64", "batch_size=32", "precision=fp32"]
TEACHER = ["teacher.name=resnet8", "teacher.width=0.5", "teacher.train=false", "baseline.lrs="]


@pytest.fixture(autouse=True)
def _few_validation_images(monkeypatch):
    monkeypatch.setitem(fastkd.data.sources.synthetic.NUM_IMAGES, "val", 50)


@pytest.fixture
def expect_refusal(command, tmp_path):
    """Run a command that must fail with this sentence, once, and leave the folder as it was."""

    def check(sentence, *words, code=2):
        before = sorted(tmp_path.rglob("*"))
        said = command(*words)
        assert said.code == code, said
        # A progress line of the decoder may stand before it.
        last = said.err.splitlines()[-1]
        assert last.startswith(f"fastkd: {sentence}")
        assert said.err.count("fastkd: ") == 1
        assert "Traceback" not in said.err + said.out
        assert sorted(tmp_path.rglob("*")) == before
        return said

    return check


@pytest.fixture
def images(tmp_path_factory):
    """An image folder of two classes, and the keys that train on it."""
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(8):
                pixels = noise.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root, [*ALONE, "data.name=folder", f"data.root={root}", "batch_size=8"]


def test_a_missing_data_folder(expect_refusal):
    expect_refusal(
        "data.root=nowhere is not a folder; expected train/ and val/ or test/ in it",
        "train",
        *ALONE,
        "data.name=folder",
        "data.root=nowhere",
    )
    expect_refusal("data.name=cifar10 needs data.root", "train", *ALONE, "data.name=cifar10")
    expect_refusal(
        "cifar10 was not found: looked in nowhere and nowhere/cifar10 for",
        "train",
        "cifar10/resnet20",
        "data.root=nowhere",
    )


def test_an_empty_class_folder(expect_refusal, images):
    root, keys = images
    for file in (root / "train/dog").iterdir():
        file.unlink()
    expect_refusal(f"folder: the class folder {root}/train/dog holds no image", "train", *keys)


def test_a_folder_of_one_class(expect_refusal, images):
    root, keys = images
    for split in ("train", "val"):
        shutil.rmtree(root / split / "dog")
    said = expect_refusal("there is one class only, so every answer is right", "train", *keys)
    assert said.err.endswith("nothing can be learned: add images of another class\n")


def test_a_corrupt_image_is_named_before_the_run_or_in_it(expect_refusal, images):
    root, keys = images
    (root / "train/dog/3.png").write_bytes(b"no picture")
    sentence = f"cannot decode the image {root}/train/dog/3.png: "
    expect_refusal(sentence, "train", *keys)
    # torch workers meet the image when its batch comes: the new run folder goes again.
    late = [*keys, "data.backend=torch", "data.image_size=16", "data.workers=0"]
    said = expect_refusal(sentence, "train", *late)
    assert "run folder runs/quickstart/" in said.out


def test_a_corrupt_image_found_late_keeps_what_was_achieved(command, images, tmp_path):
    root, keys = images
    late = [*keys, "data.backend=torch", "data.image_size=16", "data.workers=0", "out=run"]
    (root / "val/dog/3.png").write_bytes(b"no picture")
    said = command("train", *late, "save_steps=1")
    assert said.code == 2
    assert (tmp_path / "run/last.pt").exists()


def test_an_evaluation_does_not_read_the_training_images(command, images, tmp_path):
    root, keys = images
    assert command("train", *keys, "out=run").code == 0
    (root / "train/dog/3.png").write_bytes(b"no picture")
    cached = tmp_path.parent / f"{tmp_path.name}-cache"
    shutil.rmtree(cached)
    said = command("eval", "run")
    assert said.code == 0
    assert "folder/train" not in said.err


def test_a_run_goes_on_from_another_working_folder(command, images, tmp_path, monkeypatch):
    root, keys = images
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here/data").symlink_to(root)
    keys = [key if not key.startswith("data.root=") else "data.root=data" for key in keys]
    monkeypatch.setattr(
        fastkd.training.trainer.Trainer, "summary", lambda _: signal.raise_signal(2)
    )
    assert command("train", *keys, "out=run").code == 130
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    said = command("train", "--resume", "here/run", "out=run")
    assert said.code == 2
    sentence = (
        "--resume here/run continues in that folder, but out=run names another: leave one out"
    )
    assert said.err.splitlines()[-1] == f"fastkd: {sentence}"
    assert command("train", "--resume", "here/run").code == 0


def test_too_few_images(expect_refusal):
    expect_refusal(
        "batch_size=65, but synthetic/train has 64 images: not one full batch",
        "train",
        *ALONE,
        *SYNTHETIC,
        "batch_size=65",
    )


def test_more_processes_than_images():
    recipe = load_recipe("quickstart", overrides=[*ALONE, *SYNTHETIC])
    world = World(0, 0, 65, torch.device("cpu"), "gloo")
    with pytest.raises(UserError, match=r"^65 processes, but synthetic/train has 64 images"):
        _ = open_recipe_data(recipe, Session(world, Console(enabled=False), None)).train


def test_an_unknown_student_is_found_before_the_teacher_is_trained(expect_refusal):
    words = ["train", *SYNTHETIC, "teacher.name=resnet8", "baseline.lrs="]
    expect_refusal("unknown network 'resnet21'; nearest:", *words, "student.name=resnet21")
    taps = "losses.at={weight: 1, pairs: {stage7: stage1}}"
    expect_refusal("the loss at, of the student: unknown tap 'stage7'; nearest:", *words, taps)
    # What a loss says when it is bound to the networks.
    raw = ["teacher.name=wrn_10_1", "student.name=resnet8", "losses.simkd.weight=1"]
    expect_refusal("losses.simkd reuses the teacher's classifier right behind", *words, *raw)


def save_teacher(path, num_classes=10, normalization=None, **options):
    model = create_model("resnet8", num_classes, width=0.5, **options)
    sign(model, replace(card_of(model), normalization=normalization))
    save_weights(path, model, describe(model))


def test_a_teacher_with_another_class_count(expect_refusal, tmp_path):
    save_teacher(tmp_path / "teacher.safetensors", 100)
    keys = [*NET, *SYNTHETIC, *TEACHER, "teacher.weights=teacher.safetensors"]
    expect_refusal(
        "teacher.safetensors does not fit resnet8 with 10 classes: 2 of wrong shape "
        "(fc.weight: file 100x32, network 10x32",
        "train",
        *keys,
    )
    mapped = f"teacher.class_map={','.join(map(str, range(50, 59)))}"
    expect_refusal("the teacher gives logits of shape (9,) per image but", "train", *keys, mapped)
    mapped = f"teacher.class_map={','.join(map(str, range(91, 101)))}"
    expect_refusal("teacher.class_map names outputs from 91 to 100, but", "train", *keys, mapped)


def test_a_mapped_teacher_keeps_its_own_classes(command, tmp_path):
    save_teacher(tmp_path / "teacher.safetensors", 100)
    keys = [*NET, *SYNTHETIC, *TEACHER, "teacher.weights=teacher.safetensors"]
    mapped = f"teacher.class_map={','.join(map(str, range(50, 60)))}"
    said = command("train", *keys, mapped, "teacher.min_accuracy=0", "--dry-run")
    assert (said.code, said.err) == (0, "")
    assert "32 x 10" in said.out


def test_a_checkpoint_of_another_network_or_of_none(expect_refusal, tmp_path):
    save_teacher(tmp_path / "teacher.safetensors")
    keys = ["train", *NET, *SYNTHETIC, *TEACHER, "teacher.weights=teacher.safetensors"]
    depth = "wrn_15_2: the depth of a wide residual network is 6n + 4, got 15"
    expect_refusal(depth, *keys, "student.name=wrn_15_2")
    said = expect_refusal(
        "teacher.safetensors does not fit wrn_10_1 with 10 classes: ",
        *keys,
        "teacher.name=wrn_10_1",
        "teacher.width=null",
    )
    assert said.err.endswith(
        "The file holds resnet8 with 10 classes: build that one (recipe: teacher.name=resnet8 or "
        "student.name=resnet8)\n"
    )
    (tmp_path / "text.pt").write_text("no weights")
    expect_refusal(
        "text.pt: damaged, or not a PyTorch checkpoint", *keys, "teacher.weights=text.pt"
    )
    expect_refusal("none.pt: no such weight file", *keys, "teacher.weights=none.pt")
    expect_refusal("the teacher resnet8 has no weights: set", *keys, "teacher.weights=null")


def test_a_teacher_no_better_than_chance(expect_refusal, tmp_path):
    torch.manual_seed(0)
    save_teacher(tmp_path / "teacher.safetensors")
    keys = ["train", *NET, *SYNTHETIC, *TEACHER, "teacher.weights=teacher.safetensors"]
    said = expect_refusal("the teacher resnet8 reaches ", *keys)
    assert "teacher.min_accuracy=0 accepts it as it is" in said.err
    expect_refusal("the teacher resnet8 reaches ", *keys, "out=run")


def test_a_run_folder_that_exists(expect_refusal, command, tmp_path):
    assert command("train", *ALONE, *SYNTHETIC, "out=run").code == 0
    sentence = "the run folder run exists and is not empty: resume it with --resume run, or choose"
    expect_refusal(sentence, "train", *ALONE, *SYNTHETIC, "out=run")
    # Also where a teacher would have to be trained first.
    expect_refusal(sentence, "train", *SYNTHETIC, "teacher.name=resnet8", "out=run")
    expect_refusal("run is finished: nothing to resume", "train", "--resume", "run")
    # `auto`, as a scheduler says it again and again, has nothing to do.
    said = command("train", *ALONE, *SYNTHETIC, "--resume", "auto", "out=run")
    assert (said.code, said.out) == (0, "quickstart: finished before, nothing to resume\n")
    (tmp_path / "file").touch()
    expect_refusal("the run folder file cannot be made", "train", *ALONE, *SYNTHETIC, "out=file")


def test_a_folder_to_resume_that_is_missing_foreign_or_of_another_recipe(
    expect_refusal, command, tmp_path
):
    expect_refusal(
        "nowhere is not a run folder: it has no config.yaml", "train", "--resume", "nowhere"
    )
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").touch()
    expect_refusal("photos is not a run folder: it has no", "train", "--resume", "photos")
    named = ["train", "quickstart", *ALONE, *SYNTHETIC, "--resume", "photos"]
    expect_refusal("photos is not a run folder: it has none of config.yaml", *named)
    assert command("train", *ALONE, *SYNTHETIC, "out=run").code == 0
    (tmp_path / "run/summary.json").unlink()
    expect_refusal(
        "run/last.pt belongs to another recipe (digest ", "train", "--resume", "run", "epochs=2"
    )
    (tmp_path / "run/last.pt").unlink()
    expect_refusal(
        "run belongs to another recipe: resume it", "train", "--resume", "run", "epochs=2"
    )
    (tmp_path / "run/last.pt").write_bytes(b"torn")
    expect_refusal("run/last.pt cannot be read as a checkpoint", "train", "--resume", "run")


def test_a_run_to_evaluate_that_is_none_or_has_other_classes(
    expect_refusal, command, images, tmp_path
):
    expect_refusal("nowhere is not a run folder (no config.yaml)", "eval", "nowhere")
    expect_refusal(
        "name the data to evaluate on: data.name=cifar10", "eval", "resnet8", "--weights", "w.pt"
    )
    assert command("train", *ALONE, *SYNTHETIC, "out=run").code == 0
    root, _ = images
    expect_refusal(
        "the network resnet8 learned other classes: it does not know cat, dog of the data's 2, "
        "and of its own 10 the data lack class0, ",
        "eval",
        "run",
        "data.name=folder",
        f"data.root={root}",
    )
    (tmp_path / "run/best.safetensors").unlink()
    expect_refusal("run has no best.safetensors yet", "eval", "run")


def test_hardware_and_packages_that_are_missing(expect_refusal, monkeypatch):
    keys = ["train", *ALONE, *SYNTHETIC]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expect_refusal("device=cuda was requested, but torch sees no CUDA device", *keys, "device=cuda")
    expect_refusal("precision=fp16 needs a GPU", *keys, "precision=fp16")
    monkeypatch.setitem(__import__("sys").modules, "apex", None)
    expect_refusal("optim.impl=apex cannot be used", *keys, "optim.impl=apex")
    expect_refusal(
        "nesterov needs a momentum above 0", *keys, "optim.nesterov=true", "optim.momentum=0"
    )


def full_disk(after):
    """os.fsync that works `after` times, then finds the disk full."""
    calls = iter(range(after + 1))

    def fsync(handle):
        if next(calls, after) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fsync


def test_a_full_disk_before_the_first_file(expect_refusal, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk(after=0))
    expect_refusal(
        "no space left on the disk: runs/quickstart/",
        "train",
        *ALONE,
        *SYNTHETIC,
        "max_skips=3",
        code=1,
    )


def test_a_full_disk_in_the_second_epoch_keeps_the_first(command, monkeypatch):
    saves = []
    original = fastkd.training.checkpointing.save_checkpoint

    def save(path, state):
        saves.append(path)
        if len(saves) == 2:
            # Where torch's own writer meets it, and not the last flush.
            path.with_name(f".{path.name}.tmp").symlink_to("/dev/full")
        original(path, state)

    monkeypatch.setattr(fastkd.training.checkpointing, "save_checkpoint", save)
    said = command("train", *ALONE, *SYNTHETIC, "epochs=2", "out=run")
    assert said.code == 1
    assert said.err.startswith(
        "fastkd: no space left on the disk: run/last.pt could not be written"
    )
    assert said.err.count("\n") == 1
    assert "free some space and continue with --resume run" in said.err
    monkeypatch.setattr(fastkd.training.checkpointing, "save_checkpoint", original)
    said = command("train", "--resume", "run")
    assert said.code == 0
    assert "resumed quickstart at epoch 2 of 2, step 0 of 2" in said.out


def test_a_full_disk_anywhere_else(command, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "cache/images.bin")

    monkeypatch.setattr("fastkd.recipes.listing.overview", full)
    said = command("recipes")
    assert said.code == 1
    assert said.err == (
        "fastkd: no space left on the disk: cache/images.bin could not be written\n"
    )


def test_a_run_that_diverges(expect_refusal):
    keys = ["train", *ALONE, *SYNTHETIC, "data.train_limit=500", "optim.lr=1e30", "max_skips=2"]
    said = expect_refusal("", *keys, code=1)
    assert "steps in a row had a loss or a gradient that was not finite" in said.err


def test_a_folder_with_someone_else_s_files_is_not_removed(command, tmp_path, monkeypatch):
    def broken(self, *_):
        (tmp_path / "run/notes.txt").write_text("mine")
        raise UserError("no")

    monkeypatch.setattr(fastkd.training.trainer.Trainer, "training", broken)
    assert command("train", *ALONE, *SYNTHETIC, "out=run").code == 2
    assert (tmp_path / "run/notes.txt").exists()
