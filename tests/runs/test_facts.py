"""What a run remembers about its data, and what it does where they have changed since."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.models import create_model
from fastkd.models.card import card_of
from fastkd.models.registry import classifier_paths, model_from_file
from fastkd.recipes.loading import load_recipe
from fastkd.storage.weights import load_weights, save_weights

NAMES = ("apple", "banana", "cherry", "date")
KEYS = (
    "quickstart",
    "data.name=folder",
    "data.root=set",
    "data.image_size=8",
    "student.name=resnet8",
    "student.width=0.25",
    "epochs=1",
    "batch_size=8",
    "baseline.lrs=",
    "precision=fp32",
    "compile=off",
    "device=cpu",
    "optim.lr=0.05",
)
ALONE = (*KEYS, "teacher=null", "losses.kd=null", "losses.ce.weight=1")
TAUGHT = (
    *KEYS,
    "teacher.name=resnet8",
    "teacher.width=0.25",
    "teacher.epochs=1",
    "teacher.min_accuracy=0",
)
GIVEN = (
    *KEYS,
    "teacher.name=resnet8",
    "teacher.width=0.25",
    "teacher.train=false",
    "teacher.epochs=null",
    "teacher.lr=null",
    "teacher.min_accuracy=0",
    "teacher.weights=known",
)


def make_set(root: Path) -> None:
    """ROOT/train and ROOT/val: four colours, one per class, in pictures of two shapes."""
    rng = np.random.default_rng(0)
    for split, num in (("train", 6), ("val", 3)):
        for label, name in enumerate(NAMES):
            (root / split / name).mkdir(parents=True)
            for number in range(num):
                pixels = rng.integers(0, 40, (12 + number % 2, 11, 3))
                pixels[..., label % 3] += 60 + 50 * label
                picture = Image.fromarray(pixels.astype(np.uint8))
                picture.save(root / split / name / f"{number}.bmp")


def rename(old: str, new: str) -> None:
    for split in ("train", "val"):
        Path("set", split, old).rename(Path("set", split, new))


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a run on it in known/, and one that trained its teacher first, in taught/."""
    from fastkd.cli.commands import main

    folder = tmp_path_factory.mktemp("facts")
    make_set(folder / "set")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("FASTKD_CACHE", str(folder / "cache"))
        assert main(["train", *ALONE, "epochs=4", "out=known"]) == 0
        assert main(["train", *TAUGHT, "out=taught"]) == 0
    return folder


@pytest.fixture
def here(past: Path, tmp_path: Path, command: Any) -> Path:
    """A copy of it as the working folder, where `command` runs, with the same times."""
    shutil.copytree(past, tmp_path, dirs_exist_ok=True)
    for teacher in (tmp_path / "runs/teachers").iterdir():
        text = (teacher / "config.yaml").read_text().replace(str(past), str(tmp_path))
        (teacher / "config.yaml").write_text(text)
    return tmp_path


@pytest.fixture
def taught(here: Path, command: Callable[..., Any]) -> Callable[..., str]:
    """Train the teacher in this folder, whose path is in its digest, then run again."""
    shutil.rmtree(here / "runs")
    assert command("train", *TAUGHT).code == 0

    def run() -> str:
        said = command("train", *TAUGHT)
        assert said.code == 0, said
        return said.out

    return run


def unfinished(run: Path) -> None:
    """As after a kill between the last checkpoint and the summary."""
    (run / "summary.json").unlink()


def test_a_run_remembers_its_data_in_every_file(past: Path) -> None:
    folder = json.loads((past / "known/facts.json").read_text())
    summary = json.loads((past / "known/summary.json").read_text())
    metadata = load_weights(past / "known")[1]
    data = folder["data"]
    assert data == summary["data"]
    assert data["classes"] == json.loads(metadata["classes"]) == list(NAMES)
    assert (data["name"], data["image_size"], metadata["image_size"]) == ("folder", 8, "8")
    shown = {"resize": 9, "crop": 8, "interpolation": "bilinear", "mode": "center"}
    assert data["evaluation"] == json.loads(metadata["evaluation"]) == shown
    imagenet = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
    assert data["normalization"] == json.loads(metadata["normalization"]) == imagenet
    assert data["train"]["counts"] == [6] * 4 and data["val"]["counts"] == [3] * 4
    assert json.loads(metadata["data"]) == {key: data[key] for key in ("name", "train", "val")}
    network = {"architecture": "resnet8", "num_classes": 4, "options": {"width": 0.25}}
    assert folder["network"] == summary["network"] == network
    card = card_of(model_from_file(past / "known"))
    assert card is not None and card.data is not None and card.data.plain() == data
    # Once, not again with every stage.
    nested = json.loads((past / "taught/summary.json").read_text())
    assert "data" in nested and "data" not in nested["teacher"]["training"]
    (teacher,) = (past / "runs/teachers").iterdir()
    assert json.loads((teacher / "facts.json").read_text())["data"] == data


def replaced(size_kept: bool) -> None:
    file = Path("set/train/cherry/0.bmp")
    time, size = file.stat().st_mtime_ns, Image.open(file).size
    Image.new("RGB", size if size_kept else (40, 40), (1, 2, 3)).save(file)
    os.utime(file, ns=(time, time))


def one_class_more() -> None:
    for split in ("train", "val"):
        shutil.copytree(f"set/{split}/date", f"set/{split}/elder")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: replaced(True), "other pictures in train under the same names"),
        (lambda: Path("set/train/date/5.bmp").unlink(), "23 images in train, 24 before"),
        (one_class_more, "new class elder"),
        (lambda: rename("banana", "zebra"), "new class zebra; missing class banana"),
    ],
    ids=["replaced", "removed", "a class more", "a class renamed"],
)
def test_a_teacher_of_other_data_is_trained_anew(
    here: Path, taught: Callable[..., str], change: Callable[[], None], words: str
) -> None:
    (old,) = (here / "runs/teachers").iterdir()
    before = (old / "best.safetensors").read_bytes()
    change()
    out = taught()
    assert f"runs/teachers/{old.name} was trained on other data ({words}" in out
    assert "finished before" not in out
    (new,) = set((here / "runs/teachers").iterdir()) - {old}
    assert f"not used, runs/teachers/{new.name} instead" in out
    assert (old / "best.safetensors").read_bytes() == before
    # The next run finds it: two runs share a teacher as before.
    assert f"finished before, runs/teachers/{new.name}" in taught()
    assert len(list((here / "runs/teachers").iterdir())) == 2


def test_a_teacher_of_the_same_training_data_is_taken(
    here: Path, taught: Callable[..., str]
) -> None:
    (old,) = (here / "runs/teachers").iterdir()
    for file in Path("set").rglob("*.bmp"):
        os.utime(file)
    out = taught()
    assert f"finished before, runs/teachers/{old.name}" in out and "note: since" not in out
    Path("set/val/date/2.bmp").unlink()
    out = taught()
    assert f"finished before, runs/teachers/{old.name}" in out
    assert f"note: since runs/teachers/{old.name} was trained, 11 images in val, 12 before" in out
    # Begun by fastkd 0.1: nothing to compare but the number of classes.
    (old / "facts.json").unlink()
    Path("set/train/date/5.bmp").unlink()
    assert f"finished before, runs/teachers/{old.name}" in taught()
    one_class_more()
    assert f"runs/teachers/{old.name} was trained on other data (new" in taught()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: replaced(False), "other files in train, by their names, sizes or labels"),
        (lambda: Path("set/val/apple/1.bmp").unlink(), "11 images in val, 12 before"),
        (lambda: rename("date", "elder"), "new class elder; missing class date"),
        (
            lambda: shutil.copy("set/train/date/0.bmp", "set/train/date/9.bmp"),
            "25 images in train, 24 before",
        ),
    ],
    ids=["replaced", "validation alone", "a class renamed", "added"],
)
def test_a_run_on_other_data_is_not_resumed(
    here: Path, command: Callable[..., Any], change: Callable[[], Any], words: str
) -> None:
    shutil.rmtree(here / "known")
    assert command("train", *ALONE).code == 0
    (run,) = (here / "runs/quickstart").iterdir()
    place = run.relative_to(here)
    unfinished(run)
    change()
    kept = {file: file.read_bytes() for file in run.iterdir()}
    for words_of_resume in ((str(place),), ("auto", *ALONE)):
        said = command("train", "--resume", *words_of_resume)
        assert said.code == 2
        last = said.err.splitlines()[-1]
        assert last.startswith(f"fastkd: the data have changed since {place} began: {words}")
    assert {file: file.read_bytes() for file in run.iterdir()} == kept
    # Both ways that the sentence names.
    assert command("train", *ALONE).code == 0
    assert f"remove {place}/facts.json" in last
    (run / "facts.json").unlink()
    said = command("train", "--resume", str(place))
    assert said.code == 0 and "after its last epoch" in said.out
    assert json.loads((run / "facts.json").read_text()) != json.loads(kept[run / "facts.json"])


def test_a_copy_of_the_data_is_resumed(here: Path, command: Callable[..., Any]) -> None:
    shutil.rmtree("known")
    assert command("train", *ALONE, "out=known").code == 0
    unfinished(here / "known")
    shutil.copytree("set", "copy", copy_function=shutil.copyfile)
    shutil.rmtree("set")
    Path("copy").rename("set")
    said = command("train", "--resume", "known")
    assert said.code == 0 and "note:" not in said.out
    unfinished(here / "known")
    Path("known/facts.json").write_text('{"data": {"classes": 3}}')
    said = command("train", "--resume", "known")
    assert said.code == 2 and "known/facts.json is damaged (classes: " in said.err
    Path("known/facts.json").unlink()
    assert command("train", "--resume", "known").code == 0


def accuracy(out: str) -> float:
    return float(next(line for line in out.splitlines() if "accuracy" in line).split()[-1])


def test_classes_in_another_order_are_matched_by_name(
    here: Path, command: Callable[..., Any]
) -> None:
    told = accuracy(command("eval", "known").out)
    assert told > 0.7  # else the order could not show
    # The same pictures, but all names sort the other way round: known to the teacher as they were.
    metadata = load_weights("known")[1]
    renamed = {"apple": "z", "banana": "y", "cherry": "x", "date": "w"}
    for old, new in renamed.items():
        rename(old, new)
    classes = json.dumps([renamed[name] for name in NAMES])
    model = model_from_file("known")
    save_weights("known/best.safetensors", model, metadata | {"classes": classes})
    said = command("eval", "resnet8", "--weights", "known", "data.name=folder", "data.root=set")
    assert accuracy(said.out) == told
    said = command("train", *GIVEN)
    assert said.code == 0, said
    assert "teacher resnet8: its classes are matched by name (known)" in said.out
    assert f"teacher resnet8: accuracy {told:.2%}" in said.out


def test_a_part_of_the_classes_is_matched_by_name(here: Path, command: Callable[..., Any]) -> None:
    for split in ("train", "val"):
        shutil.rmtree(f"set/{split}/banana")
    said = command("train", *GIVEN)
    assert said.code == 0, said
    model = model_from_file("known").eval()
    files = sorted(Path("set/val").rglob("*.bmp"))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    hits = 0
    for file in files:
        picture = Image.open(file)
        side = (9, int(9 * picture.size[1] / picture.size[0]))
        pixels = np.asarray(picture.resize(side, Image.Resampling.BILINEAR)) / 255
        top = round((side[1] - 8) / 2)
        image = ((pixels[top : top + 8, 0:8] - mean) / std).transpose(2, 0, 1)
        with torch.no_grad():
            logits = model(torch.tensor(image, dtype=torch.float32)[None])[0]
        own = [NAMES.index(name) for name in ("apple", "cherry", "date")]
        hits += NAMES[own[int(logits[own].argmax())]] == file.parent.name
    assert f"teacher resnet8: accuracy {hits / len(files):.2%}" in said.out


def test_classes_that_a_teacher_does_not_know_are_refused(
    here: Path, command: Callable[..., Any]
) -> None:
    rename("banana", "zebra")
    said = command("train", *GIVEN)
    assert said.code == 2
    sentence = said.err.splitlines()[-1]
    assert sentence.startswith(
        "fastkd: the teacher resnet8 (known) learned other classes: it does not know zebra of the "
        "data's 4, and of its own 4 the data lack banana. "
    )
    assert "set teacher.class_map" in sentence and "apple, cherry, date, zebra" in sentence
    # As it says: apple, cherry, date, and what the teacher calls banana.
    said = command("train", *GIVEN, "teacher.class_map=0,2,3,1")
    assert said.code == 0, said
    assert command("eval", "known", "data.root=set").code == 2
    said = command("train", *GIVEN, "teacher.class_map=0,2,3,1", "data.image_size=16")
    assert "note: known learned from images of 8 pixels and is shown 16; teacher.res" in said.out
    # A student that starts from it is told.
    said = command("train", *ALONE, "student.weights=known")
    assert said.code == 0
    assert "the classifier of known is for the classes apple, banana, cherry, date" in said.out


def test_a_file_without_names_is_taken_as_before(here: Path, command: Callable[..., Any]) -> None:
    torch.save(model_from_file("known").state_dict(), "known.pt")
    foreign = (*GIVEN, "teacher.weights=known.pt")
    said = command("train", *foreign)
    assert said.code == 0 and "note: known.pt" not in said.out
    # Folders that timm sorts otherwise.
    for old, new in (("apple", "1"), ("banana", "10"), ("cherry", "2"), ("date", "20")):
        rename(old, new)
    said = command("train", *foreign)
    assert said.code == 0
    assert "if timm trained it, set teacher.class_map=0,2,1,3" in said.out


def test_an_evaluation_shows_what_the_network_is_used_to(
    here: Path, command: Callable[..., Any]
) -> None:
    shown = "  shown      short side to {} (bilinear), central {}\n"
    words = ("data.name=folder", "data.root=set")
    assert shown.format(9, 8) in command("eval", "known").out
    assert shown.format(9, 8) in command("eval", "resnet8", "--weights", "known", *words).out
    out = command("eval", "known", "data.eval_resize=8").out
    assert shown.format(8, 8) in out
    assert shown.format(18, 16) in command("eval", "known", "data.image_size=16").out
    # timm's own network and a file of another program: 160 pixels of 168, bicubic or not.
    torch.save(create_model("timm:test_resnet", 4).state_dict(), "timm.pt")
    timms = ("eval", "timm:test_resnet", "--weights", "timm.pt", *words)
    said = command(*timms)
    assert said.code == 0 and shown.format(168, 160) in said.out
    assert said.err.count("note:") == 0
    for old, new in (("apple", "class1"), ("banana", "class10"), ("cherry", "class2")):
        rename(old, new)
    assert "timm sorts them by number: if timm trained timm.pt" in command(*timms).err
    for old, new in (("class1", "class01"), ("class2", "class02")):
        rename(old, new)
    assert "note:" not in command(*timms).err
    assert shown.format(33, 32) in command(*timms, "data.image_size=32").out
    assert shown.format(40, 32) in command(*timms, "data.image_size=32", "data.eval_resize=40").out


def test_a_sweep_runs_again_what_saw_other_data(here: Path, command: Callable[..., Any]) -> None:
    sweep = ("train", *ALONE, "--sweep", "seed=0;1")
    assert command(*sweep).code == 0
    assert command(*sweep).out.count("finished before") == 2
    replaced(True)
    said = command(*sweep)
    assert said.code == 0 and "finished before" not in said.out
    assert said.out.count("quickstart is run again: other pictures in train") == 2
    assert command(*sweep).out.count("finished before") == 2


DAMAGED = {
    "no json": "{",
    "a list": "[1]",
    "deep": "[" * 100_000,
    "data of another kind": {"data": []},
    "data without sense": {"data": {"image_size": -1}},
    "data of nothing": {"data": None},
}


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("how", ["resume", "sweep", "out"])
def test_a_damaged_summary_is_one_sentence_with_a_cure(
    kind: str, how: str, tmp_path: Path, command: Callable[..., Any]
) -> None:
    make_set(tmp_path / "set")
    words = ["train", *ALONE, "--resume", "auto"] + (["out=done"] if how == "out" else [])
    if how == "sweep":
        words = ["train", *ALONE, "--sweep", "seed=0;1"]
    own = [*ALONE[1:], *(["seed=0"] if how == "sweep" else [])]
    digest = load_recipe("quickstart", overrides=own).digest()
    dated = f"runs/quickstart/20260101T000000Z-{digest[:8]}"
    folder = tmp_path / ("done" if how == "out" else dated)
    folder.mkdir(parents=True)
    damage = DAMAGED[kind]
    text = damage if isinstance(damage, str) else json.dumps({"digest": digest} | damage)
    (folder / "summary.json").write_text(text)
    said = command(*words)
    assert said.code == 2
    *_, sentence = said.err.splitlines()
    assert "Traceback" not in said.err and sentence.startswith("fastkd: ")
    assert "summary.json" in sentence
    assert sentence.endswith("Remove it, and the resumed run writes it anew")


def test_the_cure_for_a_damaged_summary_is_true(here: Path, command: Callable[..., Any]) -> None:
    summary = here / "known/summary.json"
    before = json.loads(summary.read_text())
    summary.write_text("{")
    assert command("train", "--resume", "known").code == 2
    summary.unlink()
    assert command("train", "--resume", "known").code == 0
    after = json.loads(summary.read_text())
    assert after["accuracy_best"] == before["accuracy_best"] and after["data"] == before["data"]


def test_an_evaluation_looks_at_no_training_image(
    here: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    monkeypatch.setattr(
        "fastkd.data.loaders.open.survey", lambda index: looked.append(index.name) or []
    )
    assert command("eval", "known").code == 0
    assert looked == []
    assert command("train", *ALONE, "--dry-run").code == 0
    assert looked == ["folder/train", "folder/val"]


HOSTILE = {
    "deep": "[" * 5000,
    "deep mapping": "{a: " * 5000,
    "python tag": "!!python/object/apply:os.system [ls]",
    "laughs": "a: &a [1,1]\n"
    + "".join(
        f"{after}: &{after} [{', '.join(['*' + one] * 40)}]\n"
        for one, after in zip("abcdef", "bcdefg", strict=True)
    ),
    "a date": "made_by: 2001-99-99",
    "long": "a: " + "x" * 2_000_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("words", [["eval"], ["table"], ["train", "--resume"]], ids=" ".join)
def test_a_hostile_config_is_one_sentence(
    kind: str, words: list[str], here: Path, command: Callable[..., Any]
) -> None:
    Path("known/config.yaml").write_text(HOSTILE[kind])
    if "train" in words:
        unfinished(here / "known")
    said = command(*words, "known")
    assert said.code == 2
    assert len(said.err.splitlines()) == 1 and "config.yaml" in said.err


def test_a_teacher_that_always_names_the_commonest_class_is_refused(
    tmp_path: Path, command: Callable[..., Any]
) -> None:
    make_set(tmp_path / "set")
    for name in NAMES[1:]:
        for number in (1, 2):
            (tmp_path / "set/val" / name / f"{number}.bmp").unlink()
    for extra in range(9):
        shutil.copy(tmp_path / "set/val/apple/0.bmp", tmp_path / f"set/val/apple/more{extra}.bmp")
    teacher = create_model("resnet8", 4, width=0.25)
    with torch.no_grad():
        teacher.get_submodule(classifier_paths(teacher)[0]).weight.zero_()
        teacher.get_submodule(classifier_paths(teacher)[0]).bias.copy_(torch.eye(4)[0])
    save_weights(tmp_path / "constant.safetensors", teacher)
    # 12 of 15 images are of its class: far more than one in four.
    given = [*GIVEN, "teacher.weights=constant.safetensors", "out=run"]
    said = command("train", *given, "teacher.min_accuracy=null")
    assert said.code == 2 and "clearly above chance (80.00%), was expected" in said.err
    assert "the teacher resnet8 reaches 80.00% on the validation images, more than 93.3" in said.err
    said = command("train", *given, "teacher.min_accuracy=0.81")
    assert said.code == 2 and "at least 81.00% was expected" in said.err
    assert command("train", *given).code == 0
