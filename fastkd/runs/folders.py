"""Which folder a run or one of its stages writes to: a new one, or an old one to go on with.

Flow: `run` asks here, on rank 0, once everything fits; a stage that fails before it has achieved
anything leaves no folder behind.
"""

from pathlib import Path

from fastkd.compute.machine import environment
from fastkd.errors import FastKDError, UserError
from fastkd.output.console import Console
from fastkd.output.run_folder import RunFolder, find_resumable
from fastkd.recipe.printing import recipe_to_yaml
from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe
from fastkd.storage.checkpoint import load_checkpoint

__all__ = ["choose_folder", "stage_folder"]


def choose_folder(
    recipe: Recipe, root: Path, resume: str | None, console: Console
) -> tuple[RunFolder, bool]:
    """The run's folder and whether it is an old one to go on with.

    resume: None, "auto" (the newest unfinished run of this digest, else a new one) or a run folder.
    Raises UserError for a folder that is finished, foreign, or not empty without being resumed.
    """
    out = Path(recipe.out) if recipe.out else None
    found = None
    if resume == "auto":
        if out is None:
            found = find_resumable(root, recipe.name, recipe.digest())
        elif out.is_dir() and any(out.iterdir()):
            found = RunFolder.open(out)
        if found is None:
            console.note(f"no unfinished run of {recipe.name} with these keys: starting anew")
    elif resume is not None:
        if out is not None and out.resolve() != Path(resume).resolve():
            raise UserError(
                f"--resume {resume} goes on in that folder, out={out} names another: leave one out"
            )
        found = RunFolder.open(Path(resume))
    if found is None:
        return _new(recipe, out, root), False
    if found.summary() is not None:
        raise UserError(f"{found.path} is finished: nothing to resume")
    config = found.path / "config.yaml"
    if (found.path / "last.pt").exists():
        load_checkpoint(found.path / "last.pt", recipe.digest())
    elif not config.exists():
        _describe(recipe, found)
    elif load_recipe(None, config=config).digest() != recipe.digest():
        raise UserError(
            f"{found.path} belongs to another recipe: resume it with its own keys, "
            f"fastkd train --resume {found.path}"
        )
    return _equipped(recipe, found), True


def stage_folder(recipe: Recipe, path: Path) -> RunFolder:
    """The folder of a teacher or a baseline, which is gone on with wherever it exists."""
    path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder.open(path)
    if not (path / "config.yaml").exists():
        _describe(recipe, folder)
    return _equipped(recipe, folder)


def _new(recipe: Recipe, out: Path | None, root: Path) -> RunFolder:
    folder = RunFolder.create(root, recipe.name, recipe.digest(), out=out)
    try:
        _describe(recipe, folder)
    except FastKDError:
        folder.discard(root)
        raise
    return _equipped(recipe, folder)


def _equipped(recipe: Recipe, folder: RunFolder) -> RunFolder:
    return folder.with_events() if recipe.tensorboard else folder


def _describe(recipe: Recipe, folder: RunFolder) -> None:
    # Without `out`: given back with --config the recipe makes a new run, not one in this folder.
    folder.write_text("config.yaml", recipe_to_yaml(recipe.replace(out=None).absolute()))
    folder.write_json("environment.json", environment())
