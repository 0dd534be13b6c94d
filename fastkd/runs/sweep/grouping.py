"""Which runs of a sweep can share every batch and every answer of their teacher, and why not more.

Flow: `running` asks for the groups of `--together`; `together` trains each of them in one process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastkd.config.values import dotted
from fastkd.losses.base.registry import build_terms
from fastkd.recipe.schema import Recipe
from fastkd.runs.stages import Session
from fastkd.runs.sweep.grid import Choice
from fastkd.training.step import needed_taps

__all__ = ["Group", "grouped", "in_words"]

_TEACHERS_TAPS, _TEACHERS_TRAINING = "teacher's taps", "teacher's training"


@dataclass(frozen=True)
class Group:
    """Runs that share, in the order of the sweep."""

    choices: tuple[Choice, ...]
    apart: str
    """What keeps them from the earlier group that is most alike; empty for the first group."""


def grouped(recipes: Mapping[Choice, Recipe], session: Session) -> list[Group]:
    """The runs in as few groups as they can share in."""
    groups: list[tuple[dict[str, Any], list[Choice]]] = []
    for choice, recipe in recipes.items():
        own = _shared_facts(recipe, session)
        members = next((members for facts, members in groups if facts == own), None)
        if members is None:
            groups.append((own, members := []))
        members.append(choice)
    every = [facts for facts, _ in groups]
    return [
        Group(tuple(members), _apart(facts, every[:number]))
        for number, (facts, members) in enumerate(groups)
    ]


def in_words(groups: Sequence[Group], named: Mapping[Choice, str]) -> list[str]:
    """A line for each group. named: labels of the runs."""
    num = sum(len(group.choices) for group in groups)
    said = [f"together: {num} runs in {len(groups)} group{'s' if len(groups) > 1 else ''}"]
    for number, group in enumerate(groups, 1):
        runs = "; ".join(named[choice] for choice in group.choices)
        apart = f" ({group.apart})" if group.apart else ""
        said.append(f"  group {number}: {runs}{apart}")
    return said


def _shared_facts(recipe: Recipe, session: Session) -> dict[str, Any]:
    """By name, all that runs must agree in to see the same batches and the same answers."""
    recipe = recipe.absolute()
    terms = build_terms(recipe.losses)
    data, augment = recipe.data.outcome(), recipe.augment.outcome()
    # One fact, whichever of the two keys says it.
    data["seed"] = recipe.data_seed
    # The pool is shared, and each student chooses from it in its own way.
    pick = augment.pop("pick")
    augment["pick"] = pick and {"pool": pick["pool"]}
    placement = session.placement(recipe)
    facts = {
        "batch_size": recipe.batch_size,
        "precision": placement.precision.name,
        "channels_last": recipe.channels_last,
        "compile": recipe.compile,
        "networks from outside the zoo": placement.foreign,
        "students see": list(needed_taps(terms, "student")),
    }
    if recipe.augment.sizes:
        facts["epochs"] = recipe.total_epochs
    facts |= dotted({"data": data, "augment": augment})
    facts["teacher.name"] = recipe.teacher and recipe.teacher.name
    if recipe.teacher:
        facts |= dotted({"teacher": recipe.teacher.outcome()})
        # Without effect on the outcome, but the folder is of one run of the group for all.
        facts["teacher.cache"] = recipe.teacher.cache
        facts["teacher.cache_maps"] = list(recipe.teacher.cache_maps)
        taps = needed_taps(terms, "teacher")
        facts[_TEACHERS_TAPS] = [f"{view}: {' '.join(sorted(own))}" for view, own in taps.items()]
        lessons = (recipe.as_teacher(one) for one in recipe.teachers().values() if one.trains)
        facts[_TEACHERS_TRAINING] = [lesson.digest() for lesson in lessons]
    return facts


def _apart(own: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> str:
    """In what a group differs from the earlier one that is most alike."""
    differences = [_differences(own, other) for other in earlier]
    names = min(differences, key=len, default=[])
    return ", ".join(_word(name, own.get(name)) for name in names)


def _differences(own: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**own, **other} if own.get(name) != other.get(name)]
    if "teacher.name" in names:
        # What else is said of another teacher follows from that, and of none there is nothing.
        names = [name for name in names if not name.startswith("teacher")]
        names.append("teacher.name")
    return names


def _word(name: str, value: Any) -> str:
    if name == "data.seed":
        return f"images in the order of seed {value}: data.seed gives all seeds the same"
    if name == _TEACHERS_TRAINING:
        return "another training of the teacher: teacher.seed, .lr, .epochs or .weights fix it"
    if name == _TEACHERS_TAPS:
        return f"losses that ask the teacher for {'; '.join(value) or 'nothing'}"
    if name == "students see":
        return f"losses that show the student {' and '.join(value)}"
    if name == "teacher.name" and value is None:
        return "no teacher"
    if isinstance(value, bool):
        value = str(value).lower()
    return f"{name}={'null' if value is None else value}"
