"""The recipe keys of a loss, made from the arguments of its constructor."""

import functools
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, create_model

from fastkd.config.section import Section
from fastkd.losses.base.arguments import STATED, Argument, arguments_of
from fastkd.losses.base.needs import Need
from fastkd.losses.base.term import LossTerm

__all__ = ["LossKeys", "keys_of"]


class LossKeys(Section):
    """Base of the recipe keys of one loss."""

    # The meaning of a key is in the `Args:` of the term.
    model_config = ConfigDict(use_attribute_docstrings=False)
    term: ClassVar[type[LossTerm]]

    def needs(self) -> tuple[Need, ...]:
        """What the term will need."""
        return self.term.needs_of(**dict(self))

    def weights(self, name: str) -> dict[str, float]:
        """Parts of the term and their factors in the total."""
        return self.term.weights_of(name, **dict(self))

    def build(self, name: str) -> LossTerm:
        """The term itself, not yet bound."""
        return self.term(name=name, **dict(self))  # type: ignore[call-arg]


@functools.cache
def keys_of(term: type[LossTerm]) -> type[LossKeys]:
    """One key for each argument except `name`, the weight first."""
    arguments = arguments_of(term)
    del arguments["name"]
    ordered = sorted(arguments.values(), key=lambda argument: argument.name != "weight")
    fields: dict[str, Any] = {argument.name: _field(argument) for argument in ordered}
    made = create_model(
        f"{term.__name__}Keys", __base__=LossKeys, __module__=term.__module__, **fields
    )
    made.term = term
    return made


def _field(argument: Argument) -> tuple[Any, Any]:
    kind = _of_recipe(argument.kind)
    for bound in argument.metadata:
        if bound is not STATED:
            kind = Annotated[kind, bound]
    default = ... if argument.is_stated else argument.default
    return kind, Field(default, description=argument.meaning)


def _of_recipe(kind: Any) -> Any:
    """Its type in a recipe file: lists become tuples, mappings dictionaries."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is Sequence:
        return tuple[inner[0], ...]
    return dict[inner[0], inner[1]] if typing.get_origin(kind) is Mapping else kind
