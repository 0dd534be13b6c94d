"""Fill a cache of a teacher's answers without training a student: `fastkd cache`.

Flow: `cli` calls this in place of `runs.stages`, whose parts build the run; batches and views are
made as in training, so that what is kept is what a run would have asked for.
"""

import time
from contextlib import closing
from itertools import islice

from fastkd.compute.collectives import on_ranks
from fastkd.errors import Interrupted, RunFailed, UserError
from fastkd.output.console import Console
from fastkd.recipe.schema import Recipe
from fastkd.runs.shared import Shared
from fastkd.runs.stages import Session, build_stage, cache_of, open_recipe_data, prove, try_out
from fastkd.teachers.cache.cached import CachedTeacher
from fastkd.teachers.cache.store import size_in_words
from fastkd.training.ahead import run_ahead
from fastkd.training.interrupt import StopSignal
from fastkd.training.trainer import LOG_STEPS, Trainer
from fastkd.training.trial import errors_as_sentences

__all__ = ["fill_cache"]


def fill_cache(recipe: Recipe, session: Session, epochs: int | None = None) -> None:
    """Ask the teacher for the views of the first `epochs` epochs, by default of all that differ.

    What is there is left out: the same call again resumes. All ranks must call this.

    Raises:
        UserError: no loss of the recipe asks a teacher; a cache of something else; no space.
        RunFailed: the disk took no more.
        Interrupted: Ctrl-C or SIGTERM.
    """
    if recipe.teacher is None:
        raise UserError(f"{recipe.name} has no teacher whose answers could be kept")
    epochs = min(epochs or recipe.shown_epochs, recipe.shown_epochs)
    data = open_recipe_data(recipe, session)
    cache = cache_of(recipe, data, session)
    teachers = try_out(recipe, data, session, cache, Shared(session.console))
    if cache is None or not cache.replaces_teacher:
        teachers, _, cache = prove(recipe, teachers, data, session, cache)
    trainer = build_stage(recipe, data, teachers, session, cache=cache)
    teacher = trainer.teacher
    if not isinstance(teacher, CachedTeacher):
        raise UserError(f"no loss of {recipe.name} asks the teacher for anything")
    lacking = max(on_ranks(teacher.store.lacking_bytes(epochs), session.world))
    if lacking > 0:
        raise UserError(
            f"{teacher.store.folder}: the answers of {epochs} epochs do not fit on the disk, which "
            f"lacks {size_in_words(lacking)}: choose another folder, fewer --epochs, or "
            f"teacher.cache_format=fp16, top16 or top8"
        )
    session.console.stage(
        f"answers of {' + '.join(one.label for one in recipe.teachers().values())}"
    )
    with StopSignal() as stop, closing(teacher), errors_as_sentences():
        for epoch in range(epochs):
            _fill_epoch(trainer, teacher, epoch, epochs, session.console, stop)
    store = teacher.store
    session.console.note(
        f"{store.folder}: {epochs} epochs, {store.written:,} images asked for by this process"
    )
    if (lost := teacher.report().get("kl")) is not None:
        session.console.note(f"KL from the teacher's answers to those that are kept: {lost:.2g}")


def _fill_epoch(
    trainer: Trainer,
    teacher: CachedTeacher,
    epoch: int,
    epochs: int,
    console: Console,
    stop: StopSignal,
) -> None:
    world, steps = trainer.world, trainer.loader.steps_per_epoch
    missing = (step for step in range(steps) if teacher.lacks(epoch, step))
    # Ranks that mix their images must be at the same step.
    start = min(on_ranks(next(missing, steps), world))
    trainer.progress.step = start
    clock, images = time.perf_counter(), 0
    prepared = run_ahead(trainer.prepare(epoch), world.device)
    for step, one in enumerate(islice(prepared, steps - start), start + 1):
        images += one.global_size
        if step % LOG_STEPS[world.device.type] and step < steps:
            continue
        if not all(on_ranks(teacher.store.writes, world)):
            raise RunFailed(
                f"{teacher.store.folder} takes no more answers: what was asked is kept; make room, "
                f"and the same command again resumes"
            )
        if stop.agreed(world):
            raise Interrupted(
                f"stopped at epoch {epoch + 1}, step {step}; what was asked is kept, the same "
                f"command again resumes",
                stop.code or 130,
            )
        console.progress(
            epoch=epoch,
            epochs=epochs,
            step=step,
            steps=steps,
            images_per_s=images / (time.perf_counter() - clock),
            data_wait=0.0,
        )
    teacher.flush()
