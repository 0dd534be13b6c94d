"""Which folder a run or one of its stages writes to: a new one, or an old one to resume.

An old one must have seen the same data (`fastkd.output.run_facts`).

Flow: `stages` calls this, on rank 0, once everything fits; a stage that fails before it has any
result leaves no folder behind.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from fastkd.compute.machine import environment
from fastkd.errors import FastKDError, Interrupted, UserError
from fastkd.output.console import Console
from fastkd.output.run_facts import finished_on, refuse_other_data, write_facts
from fastkd.output.run_folder import RunFolder, find_finished, find_resumable, title_of_run
from fastkd.output.trackers.sink import TrackerName
from fastkd.recipe.parts import part_of
from fastkd.recipe.printing import recipe_to_yaml
from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe
from fastkd.storage.atomic import writing
from fastkd.storage.description import NetworkFacts
from fastkd.storage.facts import DataFacts

__all__ = [
    "RunIdentity",
    "advising",
    "choose_folder",
    "finished_before",
    "stage_folder",
    "with_stages_grouped",
]


@dataclass(frozen=True)
class RunIdentity:
    """What a folder must know about the recipe that writes to it."""

    name: str
    digest: str
    config: str
    """Text of config.yaml."""
    out: Path | None
    """Folder that the user chose."""
    trackers: tuple[TrackerName, ...]
    track_group: str | None
    stage: str
    """Which part of a run it is, for trackers."""
    keys: Mapping[str, Any]
    """Likewise, by dotted name."""
    data: DataFacts
    network: NetworkFacts
    """The network before its training."""

    @classmethod
    def of(cls, recipe: Recipe, data: DataFacts) -> "RunIdentity":
        """The identity of a recipe's runs on this data."""
        # Without `out`: passed back with --config it makes a new run, not one in this folder.
        saved = recipe.absolute().model_copy(update={"out": None})
        return cls(
            name=recipe.name,
            digest=recipe.digest(),
            config=recipe_to_yaml(saved),
            out=Path(recipe.out) if recipe.out else None,
            trackers=recipe.trackers,
            track_group=recipe.track_group,
            stage=part_of(recipe.name),
            keys=saved.dotted(),
            data=data,
            network=NetworkFacts(
                architecture=recipe.student.name,
                num_classes=len(data.classes) if data.classes else None,
                options=recipe.student.options(),
            ),
        )


def choose_folder(
    run: RunIdentity, root: Path, resume: str | None, console: Console
) -> tuple[RunFolder, bool]:
    """The run's folder, and whether it is an old one to resume.

    resume: None, "auto" (the newest unfinished run of this digest, else a new one) or a run folder.
    Raises UserError for a folder that is finished, foreign, or not empty without being resumed, and
    if the data have changed.
    """
    out = run.out
    found = None
    if resume == "auto":
        if out is None:
            found = find_resumable(root, run.name, run.digest)
        elif out.is_dir() and any(out.iterdir()):
            found = RunFolder.open(out)
        if found is None:
            console.note(f"no unfinished run of {run.name} with these keys: starting a new one")
    elif resume is not None:
        if out is not None and out.resolve() != Path(resume).resolve():
            raise UserError(
                f"--resume {resume} continues in that folder, but out={out} names another: "
                f"leave one out"
            )
        found = RunFolder.open(Path(resume))
    if found is None:
        return _new(run, root), False
    if found.summary() is not None:
        raise UserError(f"{found.path} is finished: nothing to resume")
    if not (found.path / "last.pt").exists():
        # If there is a checkpoint, its own digest is compared when it is opened.
        _describe_or_compare(run, found)
    refuse_other_data(found.path, run.data, console.note)
    write_facts(found, run.data, run.network)
    return _equipped(run, found), True


def finished_before(run: RunIdentity, root: Path) -> dict[str, Any] | None:
    """The summary of the run that `--resume auto` means, if it has come to its end; else None.

    A job that a scheduler starts again after its last step has nothing to do. A run on data that
    have changed since is not this one.
    """
    if run.out is None:
        resumable = find_resumable(root, run.name, run.digest)
        found = None if resumable else find_finished(root, run.name, run.digest)
    else:
        found = RunFolder(run.out) if RunFolder(run.out).is_of(run.digest) else None
    return finished_on(found, run.data) if found else None


def stage_folder(run: RunIdentity, path: Path) -> RunFolder:
    """Folder of a teacher or a baseline; an existing one is resumed."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder.open(path)
    if not (path / "config.yaml").exists():
        _describe(run, folder)
    elif folder.summary() is None:
        write_facts(folder, run.data, run.network)
    return _equipped(run, folder)


def _new(run: RunIdentity, root: Path) -> RunFolder:
    folder = RunFolder.create(root, run.name, run.digest, out=run.out)
    try:
        _describe(run, folder)
    except FastKDError:
        folder.discard(root)
        raise
    return _equipped(run, folder)


def _equipped(run: RunIdentity, folder: RunFolder) -> RunFolder:
    return folder.tracked(
        run.trackers,
        name=run.name,
        config={"digest": run.digest, **run.keys},
        stage=run.stage,
        group=run.track_group,
    )


def with_stages_grouped(recipe: Recipe, folder: RunFolder) -> Recipe:
    """The recipe whose teacher and baselines trackers show beside the run itself."""
    if not recipe.trackers or recipe.track_group:
        return recipe
    return recipe.model_copy(update={"track_group": title_of_run(recipe.name, folder.path)})


def _describe_or_compare(run: RunIdentity, folder: RunFolder) -> None:
    config = folder.path / "config.yaml"
    if not config.exists():
        _describe(run, folder)
    elif load_recipe(None, config=config).digest() != run.digest:
        raise UserError(
            f"{folder.path} belongs to another recipe: resume it with its own keys, "
            f"fastkd train --resume {quote(str(folder.path))}"
        )


def _describe(run: RunIdentity, folder: RunFolder) -> None:
    folder.write_text("config.yaml", run.config)
    folder.write_json("environment.json", environment())
    write_facts(folder, run.data, run.network)


@contextmanager
def advising(run: Path) -> Iterator[None]:
    """Add to an interruption how to resume the run."""
    advice = f"Resume it with: fastkd train --resume {quote(str(run))}"
    try:
        yield
    except Interrupted as stopped:
        raise Interrupted(f"{stopped} {advice}", stopped.exit_code) from None
    except KeyboardInterrupt:
        # If another rank failed first, the folder may be gone.
        raise Interrupted(f"stopped. {advice}" if run.exists() else "stopped.", 130) from None
