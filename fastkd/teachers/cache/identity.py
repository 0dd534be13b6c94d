"""What decides the answers of a teacher: the key of a cache.

`fastkd.runs.teacher_cache` makes one of a recipe. Two are compared fact by fact, so that a cache
that does not belong is refused with what differs.
"""

import hashlib
import json
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from fastkd.errors import UserError
from fastkd.printable import brief

__all__ = ["Identity", "refuse"]


class Identity(BaseModel):
    """Plain JSON values by recipe key, or by a name that reads like one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shared: Mapping[str, Any]
    """What decides the answers to every view: teacher, data, order, how x is changed."""
    views: Mapping[str, Mapping[str, Any]]
    """What else decides those to one view, by its name."""

    @field_validator("shared", "views", mode="before")
    @classmethod
    def _as_written(cls, value: Any) -> Any:
        """As JSON gives them back: what is read is compared with what was not written yet."""
        return json.loads(json.dumps(value))

    def of_views(self, views: Iterable[str]) -> dict[str, Any]:
        """All facts that decide the answers to some views; those of a view begin with its name."""
        found = dict(self.shared)
        for view in views:
            found |= {f"{view}: {key}": value for key, value in self.views.get(view, {}).items()}
        return found

    def without(self, keys: Container[str]) -> "Identity":
        """What is left without some of the shared facts."""
        kept = {key: value for key, value in self.shared.items() if key not in keys}
        return Identity(shared=kept, views=self.views)

    def digest(self) -> str:
        """Sixteen hex digits."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self, now: "Identity", views: Iterable[str]) -> list[str]:
        """What differs for these views, a few words each: this identity's value, then now's."""
        views = tuple(views)
        before, after = self.of_views(views), now.of_views(views)
        keys = [*before, *(key for key in after if key not in before)]
        return [
            f"{key} was {_shown(before.get(key))}, is {_shown(after.get(key))}"
            for key in keys
            if before.get(key) != after.get(key)
        ]


def refuse(folder: Path, kept: Identity, now: Identity, views: Iterable[str]) -> None:
    """UserError if what a cache holds belongs to something else than a run asks for."""
    changed = kept.differences(now, views)
    if changed:
        raise UserError(
            f"teacher.cache={folder} holds the answers of another teacher, or to other images: "
            f"{'; '.join(changed)}. Name another folder, or teacher.cache=auto, which has one for "
            f"each"
        )


def _shown(value: Any) -> str:
    return "not set" if value is None else brief(value)
