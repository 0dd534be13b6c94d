"""Runs that read a teacher's answers from a cache are, bit for bit, those that ask the teacher."""

import json
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastkd.data.sources.synthetic
import fastkd.report.plots
import fastkd.runs.stages
import fastkd.runs.teacher_cache
from fastkd.compute.ranks import World
from fastkd.errors import RunFailed, UserError
from fastkd.models import create_model
from fastkd.output.console import Console
from fastkd.recipes.loading import load_recipe
from fastkd.runs.fill_cache import fill_cache
from fastkd.runs.stages import Session, run_recipe
from fastkd.storage.weights import describe, save_weights
from fastkd.teachers.cache.store import AnswerStore
from tests.programs.tiny import RECIPE, different, facts

SUMMARY = "summary.answers"
CPU = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"), backend=None)


class Runs:
    """Recipes that are run in one folder, and what they said."""

    def __init__(self, place, world):
        self.place, self.world = place, world
        self.said = []
        for name, made in (("one", 7), ("two", 8)):
            torch.manual_seed(made)
            teacher = create_model("resnet8", 10, width=0.5)
            save_weights(place / f"{name}.safetensors", teacher, describe(teacher))
        self.weights = f"teacher.weights={place / 'one.safetensors'}"
        self.cache = place / "answers"

    def recipe(self, *words):
        config = self.place / "recipe.yaml"
        config.write_text(json.dumps(RECIPE))
        return load_recipe(None, config=config, overrides=[self.weights, *words])

    def session(self):
        console = Console(enabled=True)
        console.note = self.said.append
        return Session(self.world, console, self.place / "runs")

    def run(self, *words):
        """Facts of the finished run."""
        self.said.clear()
        before = set(self.place.glob("runs/tiny/kd/*"))
        run_recipe(self.recipe(*words), self.session())
        (folder,) = set(self.place.glob("runs/tiny/kd/*")) - before
        return facts(folder)

    def cached(self, *words):
        return self.run(f"teacher.cache={self.cache}", *words)

    def fill(self, *words, epochs=None):
        self.said.clear()
        recipe = self.recipe(f"teacher.cache={self.cache}", *words)
        fill_cache(recipe, self.session(), epochs)

    def files(self):
        return sorted(self.cache.glob("epoch-*/*.answers"))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setitem(fastkd.data.sources.synthetic.NUM_IMAGES, "val", 20)
    monkeypatch.setattr(fastkd.report.plots, "plot_curves", lambda *_: None)
    return Runs(tmp_path, CPU)


@pytest.fixture
def no_teacher(monkeypatch):
    """From now on a teacher that is built is an error."""

    def forbid():
        def refuse(*_):
            raise AssertionError("a teacher was built")

        monkeypatch.setattr(fastkd.runs.stages, "load_teacher", refuse)
        monkeypatch.setattr(fastkd.runs.teacher_cache, "load_teacher", refuse)

    return forbid


def unlike(one, other):
    """What differs between two runs except for what summary.json says of the cache."""
    return [key for key in different(one, other) if not key.startswith(SUMMARY)]


X_ALONE = ("augment.xprime=none", "losses.kd.views=x")
METHODS = {
    "kd": X_ALONE,
    "kd with cutmix": (),
    "kd with mixup of x": (
        *X_ALONE,
        "augment.mixup=0.4",
        "losses.kd.ce_weight=0",
        "losses.ce.weight=1",
    ),
    "kd with a second view": ("augment.xprime=cropflip",),
    "repeats": (*X_ALONE, "augment.repeats=3"),
    "pick": ("augment.pick.pool=3", "augment.pick.images=10"),
    "an ensemble of two": ("teacher.ensemble={TWO}",),
    "dkd": (*X_ALONE, "losses.kd=null", "losses.dkd.weight=1"),
    "accumulate": ("accumulate=2",),
    "smaller images first": (*X_ALONE, "augment.sizes=6,8", "teacher.resolution=8"),
    "simkd": (
        "augment.xprime=none",
        "losses.kd=null",
        "losses.simkd.weight=1",
        "teacher.cache_maps=stage3",
    ),
}


def some(cases, *quick):
    """All cases, of which only `quick` ones are not left to the exhaustive run."""
    marks = [() if case in quick else pytest.mark.matrix for case in cases]
    return [pytest.param(case, marks=mark) for case, mark in zip(cases, marks, strict=True)]


def words_of(runs, method):
    two = json.dumps(
        [
            {
                "name": "resnet8",
                "width": 0.5,
                "weights": str(runs.place / "two.safetensors"),
                "min_accuracy": 0,
            }
        ]
    )
    return [word.replace("{TWO}", two) for word in METHODS[method]]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("teacher=null", "losses.kd=null", "losses.ce.weight=1"), "no teacher"),
        (("losses.kd=null", "losses.jointrd.weight=1"), "which no cache can keep"),
        (("teacher.cache_format=top99",), "teacher.cache_format=top99"),
    ],
)
def test_a_command_that_cannot_fill_says_so_in_one_sentence(command, words, says):
    said = command("cache", "quickstart", "augment.xprime=none", "--out=answers", *words)
    assert said.code == 2
    assert says in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    "method", some(METHODS, "kd with cutmix", "pick", "an ensemble of two", "simkd")
)
def test_a_run_from_the_cache_is_the_run_with_the_teacher(runs, no_teacher, method):
    words = words_of(runs, method)
    live_words = [word for word in words if not word.startswith("teacher.cache")]
    live = runs.run(*live_words)
    said = [line for line in runs.said if line.startswith("teacher ")]
    assert not unlike(live, runs.cached(*words))
    no_teacher()
    read = runs.cached(*words)
    assert not unlike(live, read)
    assert said == [line for line in runs.said if line.startswith("teacher ")] != []
    assert read[f"{SUMMARY}.images_written"] == "0"
    assert read[f"{SUMMARY}.images_read"] == "120"


OTHERWISE = (
    ("student.width=1",),
    ("optim.lr=0.01",),
    ("losses.kd.temperature=2",),
    ("losses.kd.weight=0.5", "losses.ce.weight=0.5", "losses.kd.ce_weight=0"),
    ("losses.kd=null", "losses.dist.weight=1"),
    ("epochs=1",),
    ("data.drop_last=true",),
    ("ema=0.9",),
    ("accumulate=2",),
)


@pytest.mark.parametrize("words", some(OTHERWISE, OTHERWISE[0], OTHERWISE[4]), ids=" ".join)
def test_what_decides_no_answer_belongs(runs, no_teacher, words):
    runs.fill(*X_ALONE)
    live = runs.run(*X_ALONE, *words)
    no_teacher()
    assert not unlike(live, runs.cached(*X_ALONE, *words))


@pytest.mark.parametrize("batch", some((7, 20, 60), 7))
def test_another_batch_size_belongs_where_each_image_is_changed_alone(runs, no_teacher, batch):
    """The teacher rounds otherwise in other batches: what is stored is what is trained on."""
    words = (*X_ALONE, f"batch_size={batch}")
    runs.fill(*X_ALONE)
    live = runs.run(*words)
    no_teacher()
    read = runs.cached(*words)
    assert read[f"{SUMMARY}.images_read"] == "120"
    losses = [[float(one[f"rows.{epoch}.train_loss"]) for epoch in (0, 1)] for one in (live, read)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_view_less_than_is_kept_belongs(runs, no_teacher):
    runs.fill()
    live = runs.run(*X_ALONE)
    no_teacher()
    assert not unlike(live, runs.cached(*X_ALONE))


@pytest.mark.parametrize(
    ("words", "differs"),
    [
        (("teacher.weights={place}/two.safetensors",), "teacher.weights"),
        (("teacher.resolution=16",), "teacher.resolution was not set, is 16"),
        (("teacher.class_map=1,0,2,3,4,5,6,7,8,9",), "teacher.class_map"),
        (("teacher.mean=0.5,0.5,0.5", "teacher.std=0.2,0.2,0.2"), "teacher.mean"),
        (("teacher.cache_format=fp16",), "teacher.cache_format was 'full', is 'fp16'"),
        (("seed=1",), "data.seed was 0, is 1"),
        (("data.train_limit=50",), "training images was '60, "),
        (("data.mean=0.5,0.5,0.5", "data.std=0.2,0.2,0.2"), "data.mean and data.std was"),
        (("augment.padding=2",), "augment.padding was 1, is 2"),
        (("augment.flip=false",), "augment.flip was True, is False"),
        (("augment.policy=trivial",), "augment.policy"),
        (("augment.erasing=0.5",), "augment.erasing"),
        (("augment.repeats=2",), "augment.repeats"),
        (("augment.sizes=8,8",), "augment.sizes"),
        (("augment.xprime=cutout",), "xprime: augment.xprime was 'cutmix', is 'cutout'"),
        (("augment.pick.pool=2",), "xprime: augment.pick.pool was 1, is 2"),
        (("batch_size=20",), "xprime: batch_size was 16, is 20"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.matrix
def test_a_cache_of_something_else_is_refused_with_what_differs(runs, words, differs):
    runs.fill(epochs=1)
    with pytest.raises(UserError, match="holds the answers of another teacher") as refused:
        runs.cached(*(word.format(place=runs.place) for word in words))
    assert differs in str(refused.value)
    assert not list(runs.place.glob("runs/tiny/kd/*"))  # nothing was begun


def test_a_cache_of_other_images_is_refused_in_one_sentence(runs):
    runs.fill(epochs=1)
    with pytest.raises(UserError) as refused:
        runs.cached("seed=1", "batch_size=20")
    assert str(refused.value) == (
        f"teacher.cache={runs.cache} holds the answers of another teacher, or to other images: "
        f"data.seed was 0, is 1; xprime: batch_size was 16, is 20. Name another folder, or "
        f"teacher.cache=auto, which has one for each"
    )


def test_auto_has_a_folder_for_each(runs, no_teacher):
    first = runs.run("teacher.cache=auto")
    runs.run("teacher.cache=auto", "augment.flip=false")
    folders = list(runs.place.glob("runs/teachers/resnet8-answers-*"))
    assert len(folders) == 2
    no_teacher()
    assert not unlike(first, runs.run("teacher.cache=auto"))


def test_auto_has_another_folder_for_other_answers(runs):
    runs.run("teacher.cache=auto", *X_ALONE)
    maps = ("losses.at.weight=1", "losses.at.pairs.stage3=stage3", "teacher.cache_maps=stage3")
    runs.run("teacher.cache=auto", *X_ALONE, *maps)
    runs.run("teacher.cache=auto", *X_ALONE, "losses.kd=null", "losses.dist.weight=1")
    assert len(list(runs.place.glob("runs/teachers/resnet8-answers-*"))) == 2


def test_an_ensemble_and_one_teacher_do_not_share_a_folder(runs):
    runs.fill(epochs=1)
    with pytest.raises(UserError, match=r"teacher\.ensemble\.0\.name was not set, is 'resnet8'"):
        runs.cached(*words_of(runs, "an ensemble of two"))


def test_the_teacher_of_a_file_counts_and_not_what_else_it_holds(runs):
    """A checkpoint of distillation has the student too, which is not what answers."""
    one, two = (load_file(runs.place / f"{name}.safetensors") for name in ("one", "two"))
    both = runs.place / "both.pt"
    words = (f"teacher.weights={both}", "teacher.weights_key=teacher", *X_ALONE)
    torch.save({"student": one, "teacher": one}, both)
    runs.cached(*words)
    torch.save({"student": one, "teacher": two}, both)
    with pytest.raises(UserError, match=r"teacher\.weights was"):
        runs.cached(*words)


def test_a_teacher_at_chance_is_refused_from_a_cache_too(runs):
    words = (*X_ALONE, f"teacher.weights={runs.place / 'two.safetensors'}")
    runs.fill(*words)
    for run in (runs.run, runs.cached):
        with pytest.raises(UserError, match="clearly above chance"):
            run(*words, "teacher.min_accuracy=null")


def test_what_a_cache_cannot_keep_is_refused_before_a_teacher_is_trained(runs):
    trained = ("teacher.weights=null", "teacher.train=true", "augment.xprime=none")
    maps = ("losses.kd=null", "losses.at.weight=1", "losses.at.pairs.stage3=stage3")
    with pytest.raises(UserError, match=r"teacher\.cache_maps=stage3"):
        runs.cached(*trained, *maps)
    with pytest.raises(UserError, match=r"teacher\.cache_top=10 of 10 classes"):
        runs.cached(*trained, "losses.kd.views=x", "teacher.cache_format=top8")
    with pytest.raises(UserError, match="no loss asks the teacher for it"):
        runs.cached(*trained, "losses.kd.views=x", "teacher.cache_maps=stage1")
    assert not list(runs.place.glob("runs/teachers/*"))


def test_a_teacher_that_was_trained_is_found_from_its_cache(runs, no_teacher):
    words = (*X_ALONE, "teacher.weights=null", "teacher.train=true")
    first = runs.cached(*words)
    no_teacher()
    assert not unlike(first, runs.cached(*words))


def test_what_is_missing_is_asked_and_kept(runs, no_teacher):
    whole = runs.run()
    runs.fill(epochs=1)
    assert not unlike(whole, runs.cached())
    # Of the second epoch nothing is there: an epoch that is only begun would be said.
    assert not [line for line in runs.said if "answers are missing" in line]
    no_teacher()
    read = runs.cached()
    assert not unlike(whole, read)
    assert read[f"{SUMMARY}.images_read"] == "120"


def damaged(runs, change):
    """The first file, changed as bytes."""
    path = runs.files()[0]
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))
    return path


def _flipped(place):
    def change(data):
        data[place] ^= 4
        return data

    return change


DAMAGE = {
    "cut in a block": lambda data: data[:-100],
    "cut in the head": lambda data: data[:20],
    "empty": lambda data: b"",
    "of zeros": lambda data: bytes(len(data)),
    "a bit of the last answers": _flipped(-70),
    "a bit of the first answers": _flipped(900),
    "a bit of the head": _flipped(30),
    "a bit of a block's place": lambda data: _flipped(data.index(b"answers1") + 8)(data),
    "a bit of a block's length": lambda data: _flipped(data.index(b"answers1") + 16)(data),
    "something behind": lambda data: data + b"answers1" + bytes(range(200)),
}


@pytest.mark.parametrize(
    "damage", some(DAMAGE, "cut in a block", "a bit of a block's place", "empty")
)
def test_nothing_wrong_is_trained_on(runs, damage):
    live = runs.run()
    runs.fill()
    damaged(runs, DAMAGE[damage])
    assert not unlike(live, runs.cached())
    assert len([line for line in runs.said if "asked" in line]) <= 2
    assert not unlike(live, runs.cached())


def test_damage_is_said_once_and_mended(runs, no_teacher):
    runs.fill()
    path = damaged(runs, _flipped(-70))
    again = runs.cached()
    said = [line for line in runs.said if "checksum" in line]
    assert said == [
        f"{path}: the answers to images 49 to 60 are damaged (checksum): the teacher is asked again"
    ]
    assert again[f"{SUMMARY}.images_written"] == "12"
    no_teacher()
    assert runs.cached()[f"{SUMMARY}.images_read"] == "120"


def test_answers_of_another_cache_in_the_folder_are_not_read(runs):
    runs.fill("seed=1")
    strange = runs.files()[0]
    kept = runs.place / "kept.answers"
    shutil.move(strange, kept)
    shutil.rmtree(runs.cache)
    live = runs.run()
    runs.fill()
    shutil.copy(kept, runs.files()[0].with_name("zzz.answers"))
    assert not unlike(live, runs.cached())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "its text"),
        ("{}", "identity"),
        ('{"format": 2}', "identity"),
        ("[1, 2]", "its text"),
        ("\0\0", "its text"),
    ],
)
def test_a_damaged_manifest_is_one_sentence(runs, text, why):
    runs.fill(epochs=1)
    (runs.cache / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="manifest") as refused:
        runs.cached()
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


def changed_head(change):
    """A file whose head names other columns, with the right checksum."""

    def changed(data):
        magic, length, _ = struct.unpack_from("<8sII", data)
        head = json.loads(data[16 : 16 + length])
        change(head["columns"])
        text = json.dumps(head).encode()
        new = struct.pack("<8sII", magic, len(text), zlib.crc32(text)) + text
        start = 16 + length + -(16 + length) % 64
        return new + bytes(-len(new) % 64) + data[start:]

    return changed


WIDTHS = (-43, -64, 0, -(10**9), 10**30, None, "abc", True, 1.5, [1])


@pytest.mark.parametrize("width", some(WIDTHS, -43, None))
def test_a_head_with_impossible_columns_is_as_if_it_was_not_there(runs, width):
    live = runs.run(*X_ALONE)
    runs.fill(*X_ALONE)
    damaged(runs, changed_head(lambda columns: columns.update(q=width)))
    assert not unlike(live, runs.cached(*X_ALONE))


def test_a_file_that_is_cut_while_it_is_read_is_asked_again(runs, monkeypatch):
    """Mapped into memory it would end the process."""
    live = runs.run()
    runs.fill()
    rows, calls = AnswerStore.rows, iter(range(100))

    def cuts(self, epoch, part):
        if next(calls) == 2:
            os.truncate(runs.files()[0], 1000)
        return rows(self, epoch, part)

    monkeypatch.setattr(AnswerStore, "rows", cuts)
    assert not unlike(live, runs.cached())


def _in_column(**values):
    def change(manifest):
        for column in manifest["columns"].values():
            column.update(values)

    return change


def _in(name, value):
    return lambda manifest: manifest.update({name: value})


MANIFESTS = {
    "a huge shape": _in_column(shape=[10**12]),
    "a shape beyond any number": _in_column(shape=[10**30]),
    "a large shape": _in_column(shape=[1 << 20, 1 << 20]),
    "a negative shape": _in_column(shape=[-10]),
    "another layout": _in_column(channels_last=True),
    "more classes than there are": _in_column(format="top16", top=1000),
    "top without a format of it": _in_column(top=3),
    "another pool": _in_column(images=7),
    "no images": _in("places", 0),
    "too few images": _in("places", 10),
    "too many images": _in("places", 10**12),
    "a negative number of images": _in("places", -5),
    "too deep": lambda manifest: manifest["teacher"].update(said=[[[[]]]]),
}


@pytest.mark.parametrize("name", some(MANIFESTS, "a huge shape", "another pool", "no images"))
def test_an_impossible_manifest_is_one_sentence(runs, name):
    runs.fill(*X_ALONE, epochs=1)
    path = runs.cache / "manifest.json"
    manifest = json.loads(path.read_text())
    MANIFESTS[name](manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"damaged|expected|answers in the cache") as refused:
        runs.cached(*X_ALONE)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "summary", [{}, {"name": 3}, {"name": "x", "accuracy": []}, {"members": 1}]
)
def test_a_summary_that_cannot_be_told_is_made_anew(runs, summary):
    live = runs.run(*X_ALONE)
    runs.fill(*X_ALONE)
    path = runs.cache / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["teacher"]["summary"] = summary
    path.write_text(json.dumps(manifest))
    assert not unlike(live, runs.cached(*X_ALONE))


@pytest.mark.parametrize("word", ["none", "off", "AUTO", "' '"])
def test_a_folder_that_is_meant_as_a_word_is_refused(runs, word):
    with pytest.raises(UserError, match="or null for no cache"):
        runs.recipe(f"teacher.cache={word.strip(chr(39))}")


def test_a_file_in_place_of_the_folder_is_refused(runs):
    runs.cache.write_text("mine")
    with pytest.raises(UserError, match="is a file, or lies below one: name a folder"):
        runs.cached()
    assert runs.cache.read_text() == "mine"


def test_a_full_disk_ends_no_run(runs, monkeypatch):
    live = runs.run()
    number = iter(range(100))

    def full(self, *_):
        if next(number) > 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastkd.teachers.cache.segments.SegmentWriter.write", full)
    found = runs.cached()
    assert not unlike(live, found)
    said = [line for line in runs.said if "disk is full" in line]
    assert len(said) == 1
    assert found[f"{SUMMARY}.images_written"] == "48"


def test_a_folder_that_cannot_be_written_ends_no_run(runs):
    live = runs.run()
    runs.cache = Path("/proc/nowhere")
    assert not unlike(live, runs.cached())
    assert any("asked in every step" in line for line in runs.said)


def test_filling_goes_on_where_it_ended(runs, monkeypatch, no_teacher):
    asked = []
    write = AnswerStore.write

    def dies(self, epoch, part, rows):
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append((epoch, part.start))
        write(self, epoch, part, rows)

    monkeypatch.setattr(AnswerStore, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        runs.fill()
    monkeypatch.setattr(AnswerStore, "write", write)
    runs.fill()
    # Five batches were kept, 16, 16, 16, 12 and 16 images.
    assert "44 images asked for" in runs.said[-1]
    live = runs.run()
    no_teacher()
    assert not unlike(live, runs.cached())


def test_the_size_that_is_announced_is_the_size_on_the_disk(runs, monkeypatch):
    monkeypatch.setattr("fastkd.teachers.cache.opening.size_in_words", str)
    runs.fill()
    announced = r": (\d+) an epoch, (\d+) in all, (\d+) on the disk$"
    ((epoch, whole, before),) = (
        found.groups() for line in runs.said if (found := re.search(announced, line))
    )
    assert (int(whole), before) == (2 * int(epoch), "0")
    assert int(whole) == sum(file.stat().st_size for file in runs.files())


def test_a_cache_that_does_not_fit_is_refused_before_it_is_filled(runs, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 100))
    with pytest.raises(UserError, match="do not fit on the disk"):
        runs.fill()
    assert not runs.files()


def test_filling_a_disk_that_takes_no_more_fails(runs, monkeypatch):
    def full(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastkd.teachers.cache.segments.SegmentWriter.write", full)
    with pytest.raises(RunFailed, match="takes no more answers"):
        runs.fill()


def test_maps_are_refused_with_the_size_they_would_take(runs):
    words = (
        "augment.xprime=none",
        "losses.kd=null",
        "losses.at.weight=1",
        "losses.at.pairs.stage3=stage3",
    )
    # Four bytes for each number, 60 images and 2 epochs.
    sizes = r"stage3 of \[32, 2, 2\] for every image, 512 B each and 60 KiB for this run"
    with pytest.raises(UserError, match=sizes) as refused:
        runs.cached(*words)
    assert "teacher.cache_maps=stage3" in str(refused.value)


def test_losses_on_the_teachers_stages_are_refused_by_name(runs):
    with pytest.raises(UserError, match=r"losses\.jointrd .* leave out teacher\.cache"):
        runs.recipe("teacher.cache=auto", "losses.kd=null", "losses.jointrd.weight=1", *X_ALONE[:1])


@pytest.mark.parametrize(
    "word", ["teacher.cache_format=fp16", "teacher.cache_maps=stage3", "teacher.cache_top=3"]
)
def test_keys_of_a_cache_without_one_are_refused(runs, word):
    with pytest.raises(UserError, match=r"teacher\.cache=DIR"):
        runs.recipe(word)


@pytest.mark.parametrize("format", some(("fp16", "bf16", "top16", "top8"), "fp16", "top8"))
def test_lossy_formats_train_on_what_they_keep_and_say_what_it_costs(runs, no_teacher, format):
    words = (*X_ALONE, f"teacher.cache_format={format}")
    words += ("teacher.cache_top=4",) if format.startswith("top") else ()
    written = runs.cached(*words)
    assert 0 < float(written[f"{SUMMARY}.kl"]) < (0.05 if format.startswith("top") else 1e-4)
    no_teacher()
    assert not unlike(written, runs.cached(*words))


def test_another_validation_set_evaluates_the_teacher_anew_once(runs, monkeypatch, no_teacher):
    runs.fill(*X_ALONE)
    monkeypatch.setitem(fastkd.data.sources.synthetic.NUM_IMAGES, "val", 30)
    live = runs.run(*X_ALONE)
    assert not unlike(live, runs.cached(*X_ALONE))
    no_teacher()
    assert not unlike(live, runs.cached(*X_ALONE))


def test_an_accuracy_that_is_too_low_is_refused_as_with_the_teacher(runs):
    runs.fill()
    with pytest.raises(UserError, match=r"at least 99\.00%"):
        runs.cached("teacher.min_accuracy=0.99")


@pytest.mark.parametrize("cycle", [1, 2])
def test_a_cycle_asks_the_teacher_once(runs, no_teacher, cycle):
    words = ("epochs=5", f"augment.cycle={cycle}")
    live, wrote = runs.run(*words), runs.cached(*words)
    assert not unlike(live, wrote)
    assert wrote[f"{SUMMARY}.images_written"] == str(60 * cycle)
    assert wrote[f"{SUMMARY}.images_read"] == str(60 * (5 - cycle))
    no_teacher()
    # A longer run of the same cycle, and a run as short as the cycle that has none.
    read = runs.cached("epochs=7", f"augment.cycle={cycle}")
    assert read[f"{SUMMARY}.images_read"] == str(60 * 7)
    assert runs.cached(f"epochs={cycle}")[f"{SUMMARY}.images_written"] == "0"


def test_a_cycle_is_filled_once(runs, no_teacher):
    runs.fill("epochs=5", "augment.cycle=2")
    assert sorted(path.parent.name for path in runs.files()) == ["epoch-00000", "epoch-00001"]
    no_teacher()
    read = runs.cached("epochs=5", "augment.cycle=2")
    assert read[f"{SUMMARY}.images_written"] == "0"


def test_runs_of_several_seeds_share_the_answers_of_one_seed_of_the_data(runs, no_teacher):
    live = runs.run("seed=2", "data.seed=5")
    runs.fill("seed=1", "data.seed=5")
    no_teacher()
    read = runs.cached("seed=2", "data.seed=5")
    assert not unlike(live, read)
    assert read[f"{SUMMARY}.images_written"] == "0"
