"""A recipe as a whole: data, teacher, baselines, distilled student, comparison, report.

Every stage is one training in its own run folder, so each can be resumed and reused separately:
the teacher below runs/teachers, the baselines below the run's own folder. Runs that are trained
together (`fastkd.runs.sweep.together`) take turns in `run_in_turns`.
"""

import sys
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastkd.compute.placement import Placement
from fastkd.compute.precision import resolve_precision
from fastkd.compute.ranks import World, on_main
from fastkd.data import DataPair, open_data
from fastkd.evaluation.headline import headline
from fastkd.losses.base.registry import build_terms
from fastkd.models.registry import is_of_zoo
from fastkd.output.console import Console
from fastkd.output.occupancy import occupied, tidy
from fastkd.output.run_facts import facts_of_run, place_for
from fastkd.output.run_folder import RunFolder
from fastkd.recipe.schema import TEACHES, Recipe
from fastkd.report.comparison import finish_report
from fastkd.report.paper import paper_row
from fastkd.runs.folders import (
    RunIdentity,
    advising,
    choose_folder,
    finished_before,
    stage_folder,
)
from fastkd.runs.shared import Shared
from fastkd.runs.teacher_cache import find_cache, keeping, seen_in
from fastkd.storage.checkpoint import Checkpoint
from fastkd.storage.description import facts_of
from fastkd.teachers.cache.cached import CachedTeacher, answers_to
from fastkd.teachers.cache.opening import AnswerCache
from fastkd.teachers.cache.store import TeacherFacts
from fastkd.teachers.ensemble import Ensemble
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.loading import (
    chance_in,
    load_net,
    load_teacher,
    of_images,
    prove_teacher,
    size,
    start_of,
)
from fastkd.teachers.teacher import Teacher
from fastkd.teachers.teaching import Teaching
from fastkd.training.arguments import check_mode
from fastkd.training.build import build_trainer
from fastkd.training.checkpointing import keep_plain, open_checkpoint
from fastkd.training.interrupt import StopSignal
from fastkd.training.progress import Plan, Position
from fastkd.training.settings import Output, Remedies, TrainData, TrainingSettings
from fastkd.training.trainer import Trainer
from fastkd.training.turns import to_its_end

__all__ = [
    "Session",
    "build_stage",
    "cache_of",
    "open_recipe_data",
    "prove",
    "run_in_turns",
    "run_recipe",
    "teacher_folder",
    "try_out",
]


_OF_THE_FOLDER = ("data", "network")
"""Entries of summary.json that every stage of a run would repeat."""


@dataclass(frozen=True)
class Session:
    """What all stages of a run share."""

    world: World
    console: Console
    root: Path
    """Where run folders go unless `out` says otherwise."""

    def placement(self, recipe: Recipe) -> Placement:
        """Where and how a recipe of this session computes."""
        precision = resolve_precision(recipe.precision, self.world.device)
        networks = (recipe.student, *recipe.teachers().values())
        foreign = not all(is_of_zoo(one.name) for one in networks)
        return Placement(self.world, precision, recipe.channels_last, foreign)


@torch.enable_grad()
def run_recipe(recipe: Recipe, session: Session, *, resume: str | None = None) -> dict[str, Any]:
    """Train everything in the recipe and return its summary.

    resume: None, "auto" (the newest unfinished run of this digest, else a finished one, else a new
    one) or a run folder.
    """
    return to_its_end(run_in_turns(recipe, session, Shared(session.console), resume=resume))


def run_in_turns(
    recipe: Recipe, session: Session, shared: Shared, *, resume: str | None = None
) -> Generator[Position | None, None, dict[str, Any]]:
    """`run_recipe`, step by step.

    Yields None when everything was tried, then where the student is before its first step and after
    each one; its teacher and baselines are trained in between, without a stop.
    """
    check_mode()
    of_all = replace(session, console=shared.console)
    data = shared.once("data", lambda: open_recipe_data(recipe, of_all))
    identity = _identity(recipe, data, session)
    if resume == "auto" and (
        finished := on_main(session.world, lambda: finished_before(identity, session.root))
    ):
        session.console.note(f"{recipe.name}: finished before, nothing to resume")
        return finished
    cache = shared.once("cache", lambda: cache_of(recipe, data, of_all))
    teachers = try_out(recipe, data, session, cache, shared)
    yield None
    folder, resumed = on_main(
        session.world, lambda: choose_folder(identity, session.root, resume, session.console)
    )
    session.console.note(f"run folder {folder.path}")
    if announced := _baselines(recipe):
        session.console.note(announced)
    with (
        advising(folder.path),
        occupied(folder.path, session.world),
        tidy(folder, session.root, session.world),
    ):
        # Under the lock: until then another process may have continued this run.
        checkpoint = (
            open_checkpoint(folder.path, identity.digest, session.world) if resumed else None
        )
        if cache and cache.replaces_teacher:
            teacher_summary = cache.known.summary
            shared.once("said", lambda: [of_all.console.note(one) for one in cache.known.said])
        else:
            teachers, teacher_summary, cache = shared.once(
                "teachers", lambda: prove(recipe, teachers, data, of_all, cache)
            )
        alone = _train_alone(recipe, data, session, folder.path / "alone")
        trainer = build_stage(recipe, data, teachers, session, folder, checkpoint, cache)
        if resumed:
            _go_on(trainer, folder, checkpoint, session)
        del checkpoint  # as large as the student and its optimizer
        trainer.shared = shared.batches
        trained = yield from _fit(trainer, recipe, data, shared.stop)
        summary = trained | {"teacher": teacher_summary} | alone
        if session.world.is_main:
            summary |= _facts(trainer, data)
            finish_report(
                summary,
                folder,
                session.console,
                teachers=[one.label for one in recipe.teachers().values()],
                block=recipe.student.block,
                paper=paper_row(recipe.name, recipe.dotted(), summary),
                chance=None if data.facts.multilabel else chance_in(data),
            )
    return summary


def _baselines(recipe: Recipe) -> str:
    """What the comparison with the student alone will cost; empty if there is none."""
    rates = recipe.baseline.lrs
    if not rates:
        return ""
    runs = "1 more run" if len(rates) == 1 else f"{len(rates)} more runs"
    return (
        f"{runs} of the student alone, {recipe.total_epochs} epochs each (lr "
        f"{', '.join(f'{rate:g}' for rate in rates)}): baseline.lrs= leaves them out"
    )


def cache_of(recipe: Recipe, data: DataPair, session: Session) -> AnswerCache | None:
    """The cache of the teacher's answers; see `find_cache`."""
    return find_cache(
        recipe,
        data,
        session.placement(recipe),
        session.root,
        folder_of=lambda member: teacher_folder(recipe.as_teacher(member), data, session),
        say=session.console.note,
    )


def prove(
    recipe: Recipe,
    teachers: tuple[LoadedNet, ...],
    data: DataPair,
    session: Session,
    cache: AnswerCache | None,
) -> tuple[tuple[LoadedNet, ...], dict[str, Any] | None, AnswerCache | None]:
    """The teachers with their weights, what summary.json says of them, and their cache.

    cache: as `cache_of` found it; of a teacher that is trained here it could not be found yet.
    """
    said = list[str]()

    def say(sentence: str) -> None:
        said.append(sentence)
        session.console.note(sentence)

    teachers, summary, evaluations = prove_teacher(
        recipe.teacher,
        teachers,
        data,
        session.placement(recipe),
        say=say,
        train=lambda member: _teach(data, session, recipe.as_teacher(member)),
    )
    cache = cache or cache_of(recipe, data, session)
    if cache is None or summary is None:
        return teachers, summary, None
    facts = TeacherFacts(
        summary=summary,
        said=tuple(said),
        evaluations=evaluations,
        validation=seen_in(data),
        macs=Teaching(teachers).macs(data.facts.image_shape),
    )
    return teachers, summary, replace(cache, facts=facts)


def try_out(
    recipe: Recipe, data: DataPair, session: Session, cache: AnswerCache | None, shared: Shared
) -> tuple[LoadedNet, ...]:
    """Build every training and drop it, but keep the loaded teachers, unless a cache replaces them.

    Mismatches are found before the teacher is trained, and leave no folder behind.
    """
    silent = replace(session, console=Console(enabled=False))

    def load() -> tuple[LoadedNet, ...]:
        for one in recipe.teachers().values():
            if one.trains:
                build_stage(recipe.as_teacher(one), data, (), silent)
        return load_teacher(recipe.teacher, data)

    replaced = cache is not None and cache.replaces_teacher
    teachers = () if replaced else shared.once("loaded teachers", load)
    # Nothing is written before the folder of the run is.
    kept = None
    if cache and cache.manifest:
        kept = replace(cache, say=silent.console.note, writes=False)
    trainer = build_stage(recipe, data, teachers, silent, cache=kept)
    if recipe.teacher and recipe.teacher.cache and isinstance(trainer.teacher, Teacher | Ensemble):
        probe = torch.zeros(2, *data.facts.image_shape, device=session.world.device)
        probe = probe.to(trainer.placement.dtype)
        keeping(recipe, data).columns(answers_to(probe, trainer.teacher))
    trains_first = any(one.trains for one in recipe.teachers().values()) or recipe.baseline.lrs
    if recipe.compile == "on" and trains_first:
        # Whether the student's step compiles would come out only after those.
        trainer.compile_one_step()
    return teachers


def _train_alone(recipe: Recipe, data: DataPair, session: Session, path: Path) -> dict[str, Any]:
    """The baselines below `path`, for summary.json: the best one, and what every rate reached."""
    runs: list[dict[str, Any]] = []
    for lr in recipe.baseline.lrs:
        alone = recipe.without_teacher(f"{recipe.name}/alone-lr{lr:g}", lr)
        place = on_main(
            session.world,
            lambda own=path / f"lr-{lr:g}": place_for(
                own, data.remembered, session.console.note, evaluated_anew=False
            ),
        )
        runs.append(_train(alone, data, session, place))
    last = f"{headline(runs[0])}_last" if runs else ""
    return {
        "alone": max(runs, key=lambda run: run[last], default=None),
        "alone_tried": [{"lr": run["lr"], last: run[last]} for run in runs],
    }


def open_recipe_data(recipe: Recipe, session: Session) -> DataPair:
    """Both splits as the recipe describes them, this rank's share; says what they hold."""
    data = _open_data(recipe, session)
    # Images are opened for the remarks: only where somebody reads them.
    for remark in data.remarks if session.console.enabled else ():
        session.console.note(remark)
    return data


def _open_data(recipe: Recipe, session: Session) -> DataPair:
    return open_data(
        recipe.data,
        recipe.augment,
        batch_size=recipe.batch_size,
        seed=recipe.data_seed,
        placement=session.placement(recipe),
    )


def build_stage(
    recipe: Recipe,
    data: DataPair,
    teachers: tuple[LoadedNet, ...],
    session: Session,
    folder: RunFolder | None = None,
    checkpoint: Checkpoint | None = None,
    cache: AnswerCache | None = None,
) -> Trainer:
    """The recipe's own training, in a folder or without one.

    checkpoint: the checkpoint that the caller will resume. cache: of the teachers' answers.
    """
    # Graphs of earlier stages are no longer needed, and a long sweep would reach the limit of 256.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    torch.manual_seed(recipe.seed)
    net = load_net(recipe.student, data, recipe.student.weights)
    if checkpoint:
        keep_plain(checkpoint, [net.model, *(one.model for one in teachers)])
    # What compile=auto resolved to when the run began: on another device it could differ. The
    # precision need not be stored: its name is in the saved recipe.
    compile = checkpoint.state["decisions"]["compile"] if checkpoint else recipe.compile
    if folder and session.world.is_main:
        role = "teacher" if recipe.name.startswith(TEACHES) else "student"
        for fact in start_of(recipe.student, net, data, role):
            session.console.note(fact)
    return build_trainer(
        _plan(recipe, data, session.world),
        student=net.model,
        teaching=Teaching(teachers, cache),
        terms=build_terms(recipe.losses),
        data=TrainData(
            data.train, data.val, data.facts, data.train.num_samples, _remedies(recipe, data)
        ),
        settings=TrainingSettings(
            optim=recipe.scaled_optim(),
            xprime=recipe.augment.xprime,
            mixing=recipe.augment.mixing,
            sizes=recipe.augment.sizes,
            pick=recipe.augment.pick,
            ema=recipe.ema,
            sync_bn=recipe.sync_bn,
            max_skips=recipe.max_skips,
            compile=compile,
            compile_reason="checkpoint" if checkpoint else "key",
        ),
        placement=session.placement(recipe),
        output=Output(folder, session.console),
    )


def _remedies(recipe: Recipe, data: DataPair) -> Remedies:
    return Remedies(
        called="the teacher" if recipe.name.startswith(TEACHES) else "the student",
        student=of_images(data),
        last_batch="set data.drop_last=true, or another batch_size",
        every_batch="set a larger batch_size",
    )


def _plan(recipe: Recipe, data: DataPair, world: World) -> Plan:
    digest = recipe.digest()
    # Rank 0 alone writes weights.
    remembered = data.remembered.to_metadata() if world.is_main else {}
    return Plan(
        stage=recipe.name,
        digest=digest,
        seed=recipe.seed,
        data_seed=recipe.data_seed,
        epochs=recipe.total_epochs,
        accumulate=recipe.accumulate,
        save_steps=recipe.save_steps,
        eval_epochs=recipe.eval_epochs,
        epoch_factor=recipe.epoch_factor,
        cycle=recipe.augment.cycle,
        metadata=remembered | {"recipe": recipe.name, "digest": digest},
    )


def _identity(recipe: Recipe, data: DataPair, session: Session) -> RunIdentity:
    return on_main(session.world, lambda: RunIdentity.of(recipe, data.remembered))


def _facts(trainer: Trainer, data: DataPair) -> dict[str, Any]:
    """What summary.json says of data and network."""
    return facts_of_run(data.remembered, facts_of(trainer.kept()))


def _train(recipe: Recipe, data: DataPair, session: Session, path: Path) -> dict[str, Any]:
    """Train a teacher or a baseline in `path`, or resume it; a finished one's summary is read."""
    identity = _identity(recipe, data, session)

    def prepare() -> tuple[RunFolder, dict[str, Any] | None]:
        folder = stage_folder(identity, path)
        return folder, folder.summary()

    def waiting() -> None:
        session.console.note(f"{recipe.name}: another run is using {path}, waiting for it")

    with occupied(path, session.world, waiting):
        folder, finished = on_main(session.world, prepare)
        if finished is not None:
            session.console.note(f"{recipe.name}: finished before, {path}")
            return {key: value for key, value in finished.items() if key not in _OF_THE_FOLDER}
        if data.seed != recipe.data_seed:
            # Without data.seed a teacher's own seed also decides how it sees the images.
            data = _open_data(recipe, session)
        with tidy(folder, session.root, session.world):
            checkpoint = open_checkpoint(folder.path, identity.digest, session.world)
            trainer = build_stage(recipe, data, (), session, folder, checkpoint)
            _go_on(trainer, folder, checkpoint, session)
            del checkpoint  # as large as the student and its optimizer
            summary = to_its_end(_fit(trainer, recipe, data))
        on_main(session.world, lambda: folder.finish(summary | _facts(trainer, data)))
    return summary


def _teach(data: DataPair, session: Session, lesson: Recipe) -> tuple[Path, dict[str, Any]]:
    """Train a teacher, or find it already trained: its run folder and summary."""
    path = teacher_folder(lesson, data, session)
    return path, _train(lesson, data, session, path)


def _fit(
    trainer: Trainer, recipe: Recipe, data: DataPair, stop: StopSignal | None = None
) -> Generator[Position, None, dict[str, Any]]:
    """Train, step by step; returns the entries of summary.json that every stage has."""
    summary = yield from trainer.training(stop)
    return summary | {
        "recipe": recipe.name,
        "digest": recipe.digest(),
        "student": recipe.student.name,
        "lr": recipe.optim.lr,
        **_kept_answers(trainer),
        **size(trainer.kept(), data.facts.image_shape),
        "history": trainer.history,
    }


def _kept_answers(trainer: Trainer) -> dict[str, Any]:
    """For summary.json, if the teacher's answers are kept."""
    if not isinstance(trainer.teacher, CachedTeacher):
        return {}
    return {"answers": trainer.teacher.report()}


def _go_on(
    trainer: Trainer, folder: RunFolder, checkpoint: Checkpoint | None, session: Session
) -> None:
    """Continue an unfinished folder; one without a checkpoint yet starts over."""
    if checkpoint is not None:
        trainer.resume(checkpoint)
    elif session.world.is_main:
        folder.set_metrics(())


def teacher_folder(lesson: Recipe, data: DataPair, session: Session) -> Path:
    """Where a teacher is trained once for all recipes that need the same one, from the same data.

    The digest knows the place of the data, not what lies there.
    """
    path = session.root / "teachers" / f"{lesson.student.name}-{lesson.digest()[:8]}"
    return on_main(
        session.world,
        lambda: place_for(path, data.remembered, session.console.note, evaluated_anew=True),
    )
