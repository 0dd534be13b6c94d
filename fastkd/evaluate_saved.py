"""`fastkd eval`: the accuracy of a finished run or of any weight file, on the whole validation set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastkd.distributed import open_world
from fastkd.errors import UserError
from fastkd.evaluate import evaluate, evaluating
from fastkd.models import count, create_model
from fastkd.models.registry import model_from_file
from fastkd.precision import resolve_precision
from fastkd.recipe.loading import load_recipe
from fastkd.recipe.schema import Recipe
from fastkd.run import open_recipe_data

__all__ = ["evaluate_model", "evaluate_run"]


def evaluate_run(run: str, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate the best weights of a run folder on its own data (or that of the given keys)."""
    folder = Path(run)
    if not (folder / "config.yaml").exists():
        raise UserError(
            f"{run} is not a run folder (no config.yaml). To evaluate a network by name, give its "
            f"weights: fastkd eval NAME --weights FILE data.name=... data.root=..."
        )
    weights = folder / "best.safetensors"
    if not weights.exists():
        raise UserError(f"{run} has no best.safetensors yet: its first evaluation is still to come")
    recipe = load_recipe(None, config=folder / "config.yaml", overrides=keys)
    return _evaluate(recipe, model_from_file(weights))


def evaluate_model(name: str, weights: str, keys: Sequence[str]) -> dict[str, Any]:
    """Evaluate a network with weights from a file on the data that the keys name."""
    if not any(key.startswith("data.name=") for key in keys):
        raise UserError(
            "say on which data: data.name=cifar10 data.root=FOLDER (or data.name=digits)"
        )
    blank = {
        "name": "eval",
        "data": {"name": "digits"},
        "student": {"name": name},
        "losses": {"ce": {"weight": 1.0}},
    }
    recipe = load_recipe(None, values=blank, overrides=keys)
    with open_world(recipe.device) as world:
        from fastkd.report.console import Console
        from fastkd.run import Session

        session = Session(world, Console(enabled=False), Path("runs"))
        data = open_recipe_data(recipe, session)
        options = {} if recipe.student.width is None else {"width": recipe.student.width}
        model = create_model(name, len(data.classes), weights=weights, **options)
        return _accuracy(recipe, model, session, data)


def _evaluate(recipe: Recipe, model: Any) -> dict[str, Any]:
    with open_world(recipe.device) as world:
        from fastkd.report.console import Console
        from fastkd.run import Session

        session = Session(world, Console(enabled=False), Path("runs"))
        return _accuracy(recipe, model, session, open_recipe_data(recipe, session))


def _accuracy(recipe: Recipe, model: Any, session: Any, data: Any) -> dict[str, Any]:
    device = session.world.device
    precision = resolve_precision(recipe.precision, device)
    model = model.to(device)
    with evaluating(model):
        found = evaluate(model, data.val, precision, session.world)
    size = count(model, (3, data.image_size, data.image_size))
    return found | {"params": size.params, "macs": size.macs, "precision": precision.name}
