"""The runs of a sweep: `--sweep key=a;b;c` makes one for every combination of values."""

import itertools
import re
from collections.abc import Mapping, Sequence

from fastkd.errors import UserError
from fastkd.models.registry import model_options, without_memory
from fastkd.printable import shown
from fastkd.recipe.schema import Recipe
from fastkd.report.labels import Choice

__all__ = ["Choice", "check_networks", "check_sweep", "combinations"]


def combinations(sweeps: Sequence[str]) -> list[Choice]:
    """["optim.lr=0.1;0.2", "seed=0;1"] -> the four choices, the last key changing fastest.

    A semicolon inside a value is written twice: `student.weights=a;;b.pt;c.pt`.
    """
    axes: dict[str, list[str]] = {}
    for text in sweeps:
        key, _, joined = text.partition("=")
        values = _values(joined)
        if not key or len(values) < 2 or not all(values):
            raise UserError(
                f"--sweep {shown(text)}: expected a key and at least two values, in quotes because "
                f"of the semicolon: --sweep 'optim.lr=0.05;0.1'; a semicolon inside a value is "
                f"written twice"
            )
        if key in axes:
            raise UserError(f"--sweep names {key} twice: join the values by semicolons")
        axes[key] = [f"{key}={value}" for value in values]
    return list(itertools.product(*axes.values()))


def _values(joined: str) -> list[str]:
    """`a;;b;c` -> ["a;b", "c"]."""
    parts = re.split(r"(;;|;)", joined)
    values = [""]
    for part in parts:
        if part == ";":
            values.append("")
        else:
            values[-1] += ";" if part == ";;" else part
    return values


def check_sweep(recipes: Mapping[Choice, Recipe]) -> None:
    """UserError if two choices would be the same run or share a folder."""
    if len({(recipe.device, recipe.deterministic) for recipe in recipes.values()}) > 1:
        raise UserError("--sweep cannot change device or deterministic: they apply per process")
    seen: dict[str, Choice] = {}
    for choice, recipe in recipes.items():
        if recipe.out is not None:
            raise UserError("a sweep makes a run folder for each value: remove out=")
        if (digest := recipe.digest()) in seen:
            both = f"{' '.join(seen[digest])} and {' '.join(choice)}"
            raise UserError(f"--sweep: {both} are the same run; sweep over keys that change it")
        seen[digest] = choice


def check_networks(recipes: Mapping[Choice, Recipe]) -> None:
    """UserError for a network that cannot be built; zoo networks are built, without memory."""
    seen = set()
    for choice, recipe in recipes.items():
        for net in (recipe.student, *recipe.teachers().values()):
            if (key := repr((net.name, net.options()))) in seen:
                continue
            seen.add(key)
            if ":" in net.name and model_options(net.name) is not None:
                continue
            try:
                without_memory(net.name, 10, **net.options())
            except UserError as error:
                raise UserError(f"--sweep: {' '.join(choice)}: {error}") from None
