"""Steps and epochs of KD from a cache of the teacher's answers, against asking the teacher.

    pytest benchmarks/bench_teacher_cache.py [--pairs 20] [--save-results]

Three pairs at 32 px, batch 64, 100 classes, from an image set in memory with crop and flip, in the
default precision, compiled; beside them the student alone, which no cache can be faster than, and
for the first pair also the loop as RepDistiller writes it (eager, fp32, NCHW). A step is everything
for one batch; an epoch has 512 images and its loader. Beside each ratio is what the arithmetic
allows where all of it runs at one speed: (teacher + 3 student) / (3 student).

Checked before the clock starts: an epoch from the cache has the loss of the epoch that asked, and
no teacher was asked in it.

`--part formats`: bytes of an image's logits in each format, and how fast an epoch of them is read.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from fastkd import count
from fastkd.compute.precision import resolve_precision
from fastkd.data import ResidentLoader
from fastkd.losses import CrossEntropy
from fastkd.teachers.cache.cached import CachedTeacher, Keeping
from fastkd.teachers.cache.codec import FORMATS, Column
from fastkd.teachers.cache.identity import Identity
from fastkd.teachers.cache.opening import AnswerCache
from fastkd.teachers.cache.store import AnswerStore, Manifest, TeacherFacts
from fastkd.training.trainer import Trainer

sys.path.append(str(Path(__file__).parent))
from bench_step import (
    BATCH,
    CLASSES,
    SIDE,
    Engine,
    Setting,
    fastkd_trainer,
    pictures_in_memory,
    plain_loop,
    resident_loader,
)

IMAGES = 512
PAIRS = {
    "wrn_40_2 -> wrn_16_2": ("wrn_40_2", "wrn_16_2"),
    "resnet32x4 -> resnet8x4": ("resnet32x4", "resnet8x4"),
    "resnet50 -> vgg8": ("resnet50", "vgg8"),
}
CACHED = "from the cache"
NOTHING = Identity(shared={}, views={})


def cache_in(folder: Path, setting: Setting, loader: ResidentLoader) -> AnswerCache:
    return AnswerCache(
        folder=folder,
        identity=NOTHING,
        manifest=Manifest.read(folder),
        facts=TeacherFacts(summary={}),
        believed=False,
        load=lambda: pytest.fail("the teacher was built"),
        part=loader.part,
        places=IMAGES,
        epochs=1,
        keeping=Keeping(),
        world=setting.world,
        say=lambda _: None,
    )


def epoch_of(trainer: Trainer, steps: int) -> Callable[[], float]:
    """The first steps of an epoch; returns the mean loss."""
    trainer.runner.train()

    def run() -> float:
        before = trainer.totals_M.clone()
        for step, prepared in enumerate(islice(trainer.prepare(0), steps)):
            trainer.optimize(prepared, 0, step)
        images, loss = (trainer.totals_M - before)[:2].tolist()
        return loss / images

    return run


def allowed(teacher: torch.nn.Module, student: torch.nn.Module) -> float:
    """How much less there is to compute without the teacher."""
    of_teacher, of_student = (count(net, (3, SIDE, SIDE)).macs for net in (teacher, student))
    return (of_teacher + 3 * of_student) / (3 * of_student)


@pytest.mark.parametrize("steps", [1, IMAGES // BATCH], ids=["step", "epoch"])
@pytest.mark.parametrize("pair", PAIRS)
def bench_training(pair: str, steps: int, table, race) -> None:
    teacher, student = PAIRS[pair]
    engine = Engine(resolve_precision("auto", torch.device("cpu")), compiled=True)
    setting = Setting(student, (teacher,), batch=BATCH, classes=CLASSES)
    loader = resident_loader(pictures_in_memory(IMAGES), setting, engine)
    with tempfile.TemporaryDirectory() as folder:
        asked = fastkd_trainer(setting, engine, loader)
        written = fastkd_trainer(setting, engine, loader, cache_in(Path(folder), setting, loader))
        read = fastkd_trainer(setting, engine, loader, cache_in(Path(folder), setting, loader))
        losses = [epoch_of(trainer, IMAGES // BATCH)() for trainer in (asked, written, read)]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-3), losses
        store = read.teacher.store if isinstance(read.teacher, CachedTeacher) else None
        assert store is not None
        assert (store.read, store.written) == (IMAGES, 0)
        by_arithmetic = allowed(setting.teacher, setting.student)
        alone = fastkd_trainer(setting, engine, loader, terms=[CrossEntropy()])
        sides = {
            CACHED: epoch_of(read, steps),
            "teacher": epoch_of(asked, steps),
            "student alone": epoch_of(alone, steps),
        }
        if pair == next(iter(PAIRS)) and steps == 1:
            sides["plain loop (eager, fp32, NCHW)"] = plain_loop(setting)
        found = race(sides, of=CACHED)
        what = "step" if steps == 1 else "epoch"
        for side in sides:
            ratio = found.ratio(side, CACHED)
            table.rows.append(
                {
                    "case": f"{pair}, {what}, {engine.precision.name} compiled",
                    "side": side,
                    "ms": found.ms(side),
                    "time / from the cache": ratio.median,
                    "p10": ratio.p10,
                    "by arithmetic": by_arithmetic if side == "teacher" else None,
                }
            )


@pytest.mark.parametrize("classes", [100, 1000])
def bench_formats(classes: int, table, race) -> None:
    noise = torch.Generator().manual_seed(0)
    logits_NC = 4 * torch.randn(IMAGES, classes, generator=noise)
    need = "x/teacher/logits"
    with tempfile.TemporaryDirectory() as folder:
        stores = {}
        for format in FORMATS:
            column = Column.of(logits_NC, format=format, top=10)
            manifest = Manifest(
                identity=NOTHING,
                places=IMAGES,
                columns={need: column},
                teacher=TeacherFacts(summary={}),
            )
            store = AnswerStore(Path(folder) / format, manifest, (need,))
            encoded = store.codecs[need].encode(logits_NC)
            for first in range(0, IMAGES, BATCH):
                rows = slice(first, first + BATCH)
                store.write(0, rows, {need: encoded[rows]})
            store.close()
            stores[format] = replace(store, _epoch=None, _writer=None)

        def reading(store: AnswerStore) -> Callable[[], float]:
            def run() -> float:
                store._epoch = None  # its files are opened and checked again
                last = None
                for first in range(0, IMAGES, BATCH):
                    rows = store.rows(0, slice(first, first + BATCH))
                    assert rows is not None
                    last = store.codecs[need].decode(rows[need])
                return float(last[-1, 0])

            return run

        sides = {format: reading(store) for format, store in stores.items()}
        assert sides["full"]() == float(logits_NC[-1, 0])
        found = race(sides, of="full")
        for format, store in stores.items():
            table.rows.append(
                {
                    "case": f"{classes} classes",
                    "side": format,
                    "bytes an image": store.place_bytes,
                    "us an image": 1e3 * found.ms(format) / IMAGES,
                    "MB/s": store.epoch_bytes / 1e3 / found.ms(format),
                }
            )
