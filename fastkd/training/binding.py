"""Binds the teachers to what the losses ask of them, and the losses to shapes and data.

Flow: `fastkd.training.build` calls it before the step exists. A teacher is bound to the taps that
the losses need, or a cache of its answers is put around it or in its place.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.data.facts import Facts
from fastkd.errors import UserError
from fastkd.losses.base.needs import Need
from fastkd.losses.base.term import BindContext, LossTerm
from fastkd.teachers.cache.cached import Answering
from fastkd.teachers.cache.opening import AnswerCache, HeadParts
from fastkd.teachers.ensemble import Ensemble, bind_teacher, check_ensemble_needs
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.parts import copy_of_head, last_norm, taps_into_head
from fastkd.teachers.teacher import Teacher
from fastkd.training.engine import Engine
from fastkd.training.matching import refuse_unknown_taps
from fastkd.training.step import needed_taps

__all__ = ["answered_from", "bind_terms", "bound_teacher", "kept_parts", "teacher_parts"]


def bound_teacher(
    teachers: tuple[LoadedNet, ...],
    student: nn.Module,
    terms: Sequence[LossTerm],
    facts: Facts,
    engine: Engine,
) -> Teacher | Ensemble | None:
    """The teachers as one that answers on the views; None if no loss needs an answer."""
    check_ensemble_needs(teachers, terms)
    nets = {"student": student} | ({"teacher": teachers[0].model} if teachers else {})
    refuse_unknown_taps(terms, nets)
    if not teachers or not needed_taps(terms, "teacher"):
        return None
    return _bound(teachers, terms, facts, engine)


def _bound(
    teachers: Sequence[LoadedNet], terms: Sequence[LossTerm], facts: Facts, engine: Engine
) -> Teacher | Ensemble:
    return bind_teacher(
        teachers,
        needed_taps(terms, "teacher"),
        engine.placement,
        data_normalization=facts.normalization,
        layout=engine.layout,
        compiled=engine.compiled,
        fullgraph=engine.fullgraph,
    )


def answered_from(
    cache: AnswerCache,
    bound: Teacher | Ensemble | None,
    parts: Mapping[str, Any],
    terms: Sequence[LossTerm],
    probe: Tensor,
    facts: Facts,
    engine: Engine,
) -> Answering:
    """The teacher that answers from a cache, which keeps its classifier where a loss takes it."""
    head: nn.Linear | None = parts.get("teacher_head")
    takes = any(term.uses_head for term in terms)
    return cache.around(
        bound,
        needed_taps(terms, "teacher"),
        probe,
        bind=lambda nets: _bound(nets, terms, facts, engine),
        parts=HeadParts(head, parts["teacher_pooled"]()) if head is not None and takes else None,
    )


def kept_parts(cache: AnswerCache, terms: Sequence[LossTerm]) -> dict[str, Any]:
    """The parts of a teacher that a cache keeps, for `BindContext`."""
    head, pooled = cache.head(), cache.known.pooled
    if head is None or pooled is None:
        if takers := [term.name for term in terms if term.uses_head]:
            raise UserError(
                f"losses.{takers[0]} takes over the teacher's classifier, and the run that made "
                f"teacher.cache={cache.folder} did not: name another folder"
            )
        return {}
    return {"teacher_head": head, "teacher_pooled": lambda: pooled}


def teacher_parts(
    teachers: tuple[LoadedNet, ...],
    bound: Teacher | Ensemble | None,
    facts: Facts,
    device: torch.device,
) -> dict[str, Any]:
    """The parts of a teacher that a loss may use, for `BindContext`.

    Only of a single teacher: several have no stages, head or norm in common.
    """
    if not isinstance(bound, Teacher):
        return {}
    # As it was loaded: the bound one may be folded and stored in the run's type.
    (loaded,) = teachers
    return {
        "teacher_stages": bound.stages if bound.has_stages else None,
        "teacher_head": copy_of_head(loaded.model, loaded.class_map, device),
        "teacher_norm": last_norm(loaded.model),
        "teacher_pooled": lambda: taps_into_head(loaded, facts.image_shape, device),
    }


def bind_terms(
    terms: Sequence[LossTerm],
    shapes: Mapping[Need, tuple[int, ...]],
    facts: Facts,
    teacher_parts: Mapping[str, Any],
) -> None:
    """Make the losses create their connectors and memory banks."""
    for term in terms:
        term.bind(
            BindContext(
                num_samples=len(facts.labels_N),
                num_classes=facts.num_classes,
                train_labels_N=facts.labels_N,
                shapes={need: shapes[need] for need in term.needs},
                count_pixels=facts.count_pixels,
                **teacher_parts,
            )
        )
