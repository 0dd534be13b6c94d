"""Options that a recipe brings for its own networks and that another network does not take.

Flow: `loading` asks, once the user has put another network into a named recipe.
"""

from typing import Any

from fastkd.errors import UserError
from fastkd.models.config import NETWORK_OPTIONS, StudentConfig
from fastkd.models.registry import without_memory
from fastkd.printable import shown
from fastkd.recipe.schema import Recipe

__all__ = ["check_brought"]


def check_brought(recipe: Recipe, base: Recipe, given: frozenset[str]) -> None:
    """UserError for an option of `base` that the network in its place in `recipe` refuses.

    given: dotted keys that the user has set.
    """
    before = {"student": base.student, **base.teachers()}
    for role, net in {"student": recipe.student, **recipe.teachers()}.items():
        old = before.get(role)
        if old is None or old.name == net.name:
            continue
        brought = {
            option: getattr(net, option)
            for option in NETWORK_OPTIONS
            if getattr(net, option) not in (None, False) and f"{role}.{option}" not in given
        }
        wrong = [option for option in brought if _refuses(net, option)]
        if wrong:
            keys = ", ".join(f"{role}.{option}={brought[option]}" for option in wrong)
            remedy = " ".join(f"{role}.{option}=null" for option in wrong)
            comes, it = ("comes", "it") if len(wrong) == 1 else ("come", "them")
            raise UserError(
                f"{keys} {comes} from the recipe {base.name}, and {shown(net.name)} does not take "
                f"{it}: set {remedy}"
            )


def _refuses(net: StudentConfig, option: str) -> bool:
    """Whether the network can be built without the option and not with it."""
    return _builds(net.name) and not _builds(net.name, **{option: getattr(net, option)})


def _builds(name: str, **options: Any) -> bool:
    try:
        without_memory(name, 10, **options)
    except UserError:
        return False
    return True
