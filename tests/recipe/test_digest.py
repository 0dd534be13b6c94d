"""A digest outlives the version that made it: finished runs and checkpoints are found by it."""

import json
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from fastkd.config.section import NoEffect, Section, Since
from fastkd.recipes.loading import find_recipe

FROZEN = json.loads((Path(__file__).parent / "digests.json").read_text())


def test_the_digests_of_all_named_recipes_stay_as_they_are(monkeypatch):
    monkeypatch.chdir("/")  # some recipes name a file of weights, relative to the working folder
    changed = [name for name, digest in FROZEN.items() if find_recipe(name).digest() != digest]
    assert not changed, (
        f"the digests of {len(changed)} recipes have changed, the first is {changed[0]}: their "
        f"finished runs and checkpoints would no longer be found. Mark a new key on its field, "
        f'Annotated[.., Since("0.2")], or Annotated[.., NoEffect] if it cannot change the outcome '
        f"(fastkd/config/section.py). Only where the run itself has become another one, correct "
        f"{Path(__file__).with_name('digests.json')}"
    )


class OldPart(Section):
    a: int = 1
    workers: Annotated[int, NoEffect] = 2


class NewPart(OldPart):
    b: Annotated[float, Since("0.2")] = 0.5


class OldWhole(Section):
    part: OldPart = OldPart()
    several: tuple[OldPart, ...] = ()
    named: dict[str, OldPart] = Field(default_factory=dict)


class NewWhole(Section):
    part: NewPart = NewPart()
    several: tuple[NewPart, ...] = ()
    named: dict[str, NewPart] = Field(default_factory=dict)
    extra: Annotated[NewPart, Since("0.3")] = NewPart()
    maybe: Annotated[NewPart | None, Since("0.3")] = None
    cache: Annotated[str | None, NoEffect] = None


KEYS = {
    "part": {"a": 3, "workers": 0},
    "several": [{"a": 4}, {}],
    "named": {"kd": {"a": 5, "workers": 9}},
}


def test_a_newer_key_at_its_default_is_as_if_it_were_not_there():
    old, new = OldWhole.model_validate(KEYS), NewWhole.model_validate(KEYS)
    found = {"part": {"a": 3}, "several": [{"a": 4}, {"a": 1}], "named": {"kd": {"a": 5}}}
    assert old.outcome() == new.outcome() == found
    written_out = {"extra": {"a": 1, "b": 0.5}, "maybe": None, "part": {"a": 3, "b": 0.5}}
    assert NewWhole.model_validate(KEYS | written_out).outcome() == found


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"part": {"b": 2}}, {"part": {"a": 1, "b": 2.0}, "several": [], "named": {}}),
        (
            {"several": [{"b": 2}, {}]},
            {"part": {"a": 1}, "several": [{"a": 1, "b": 2.0}, {"a": 1}], "named": {}},
        ),
        (
            {"named": {"kd": {"b": 2}}},
            {"part": {"a": 1}, "several": [], "named": {"kd": {"a": 1, "b": 2.0}}},
        ),
        (
            {"extra": {"b": 2}},
            {"part": {"a": 1}, "several": [], "named": {}, "extra": {"a": 1, "b": 2.0}},
        ),
        (
            {"maybe": {}},
            {"part": {"a": 1}, "several": [], "named": {}, "maybe": {"a": 1}},
        ),
    ],
)
def test_a_newer_key_that_is_set_counts(keys, found):
    assert NewWhole.model_validate(keys).outcome() == found


@pytest.mark.parametrize("keys", [{"cache": "x"}, {"part": {"workers": 7}}])
def test_a_key_without_effect_never_counts(keys):
    assert NewWhole.model_validate(keys).outcome() == NewWhole().outcome()
