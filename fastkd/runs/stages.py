"""A recipe as a whole: data, teacher, baselines, distilled student, comparison, report.

Every stage is one training in its own run folder (`runs.one_stage`), so each can be resumed and
reused separately: the teacher below runs/teachers, the baselines below the run's own folder. Runs
that are trained together (`fastkd.runs.sweep.together`) take turns in `run_in_turns`.
"""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastkd.compute.ranks import on_main
from fastkd.data import DataPair
from fastkd.evaluation.headline import headline
from fastkd.output.console import Console
from fastkd.output.occupancy import occupied, tidy
from fastkd.output.run_facts import place_for
from fastkd.recipe.parts import ALONE
from fastkd.recipe.schema import Recipe
from fastkd.report.comparison import finish_report
from fastkd.report.paper import paper_row
from fastkd.runs.folders import advising, choose_folder, finished_before, with_stages_grouped
from fastkd.runs.one_stage import (
    Session,
    build_encoder_stage,
    build_stage,
    encoder_first,
    facts_of_stage,
    fit,
    go_on,
    identity_of,
    open_recipe_data,
    train_stage,
)
from fastkd.runs.pictures import draw_pictures
from fastkd.runs.shared import Shared
from fastkd.runs.teacher_cache import find_cache, keeping, seen_in
from fastkd.teachers.cache.cached import answers_to
from fastkd.teachers.cache.opening import AnswerCache
from fastkd.teachers.cache.store import TeacherFacts
from fastkd.teachers.ensemble import Ensemble
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.loading import chance_in, load_teacher, prove_teacher
from fastkd.teachers.teacher import Teacher
from fastkd.teachers.teaching import Teaching
from fastkd.training.arguments import check_mode
from fastkd.training.checkpointing import open_checkpoint
from fastkd.training.progress import Position
from fastkd.training.turns import to_its_end

__all__ = [
    "Session",
    "build_encoder_stage",
    "build_stage",
    "cache_of",
    "open_recipe_data",
    "prove",
    "run_in_turns",
    "run_recipe",
    "teacher_folder",
    "try_out",
]


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
    identity = identity_of(recipe, data, session)
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
    recipe = with_stages_grouped(recipe, folder)
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
        alone, alone_at = _train_alone(recipe, data, session, folder.path / "alone")
        start = encoder_first(recipe, data, session, folder.path, teachers)
        trainer = build_stage(recipe, data, teachers, session, folder, checkpoint, cache, start)
        if resumed:
            go_on(trainer, folder, checkpoint, session)
        del checkpoint  # as large as the student and its optimizer
        trainer.shared = shared.batches
        trained = yield from fit(trainer, recipe, data, shared.stop)
        summary = trained | {"teacher": teacher_summary} | alone | start.summary
        if session.world.is_main:
            summary |= facts_of_stage(trainer, data)
            pictures = ""
            if data.facts.label_kind == "pixel":
                # First, because what is reported as finished is never drawn again.
                placement = session.placement(recipe)
                pictures = draw_pictures(
                    folder.path, recipe, data, placement, alone=alone_at, teachers=teachers
                )
            finish_report(
                summary,
                folder,
                session.console,
                teachers=[one.label for one in recipe.teachers().values()],
                block=recipe.student.genotype,
                paper=paper_row(recipe.name, recipe.dotted(), summary),
                chance=None if data.facts.label_kind == "multi" else chance_in(data, summary),
            )
            if pictures:
                session.console.note(pictures)
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
                lesson = recipe.as_teacher(one)
                build_stage(lesson, data, (), silent)
                build_encoder_stage(lesson, data, (), silent)
        return load_teacher(recipe.teacher, data)

    replaced = cache is not None and cache.replaces_teacher
    teachers = () if replaced else shared.once("loaded teachers", load)
    build_encoder_stage(recipe, data, teachers, silent)
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


def _train_alone(
    recipe: Recipe, data: DataPair, session: Session, path: Path
) -> tuple[dict[str, Any], Path | None]:
    """The baselines below `path`, for summary.json: the best one, and what every rate reached; and
    the folder of the best one."""
    runs: list[dict[str, Any]] = []
    places: list[Path] = []
    for lr in recipe.baseline.lrs:
        alone = recipe.without_teacher(f"{recipe.name}/{ALONE}{lr:g}", lr)
        place = on_main(
            session.world,
            lambda own=path / f"lr-{lr:g}": place_for(
                own, data.remembered, session.console.note, evaluated_anew=False
            ),
        )
        runs.append(train_stage(alone, data, session, place))
        places.append(place)
    last = f"{headline(runs[0])}_last" if runs else ""
    best = max(range(len(runs)), key=lambda number: runs[number][last], default=None)
    return {
        "alone": None if best is None else runs[best],
        "alone_tried": [{"lr": run["lr"], last: run[last]} for run in runs],
    }, None if best is None else places[best]


def _teach(data: DataPair, session: Session, lesson: Recipe) -> tuple[Path, dict[str, Any]]:
    """Train a teacher, or find it already trained: its run folder and summary."""
    path = teacher_folder(lesson, data, session)
    return path, train_stage(lesson, data, session, path)


def teacher_folder(lesson: Recipe, data: DataPair, session: Session) -> Path:
    """Where a teacher is trained once for all recipes that need the same one, from the same data.

    The digest knows the place of the data, not what lies there.
    """
    path = session.root / "teachers" / f"{lesson.student.name}-{lesson.digest()[:8]}"
    return on_main(
        session.world,
        lambda: place_for(path, data.remembered, session.console.note, evaluated_anew=True),
    )
