"""facts.json of a run folder: the data that the run sees and the network that it trains.

Written when the run begins and compared when it is resumed, or when a teacher is taken that was
trained before. Folders of fastkd 0.1 have none; nothing is compared then.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastkd.errors import UserError
from fastkd.output.run_folder import FACTS, SUMMARY, WITHOUT_SUMMARY, RunFolder
from fastkd.storage.description import NetworkFacts
from fastkd.storage.facts import DataFacts, parsed
from fastkd.storage.weight_file import WeightFile

__all__ = [
    "data_of",
    "facts_of_run",
    "finished_on",
    "place_for",
    "refuse_other_data",
    "remembered",
    "write_facts",
]


def facts_of_run(data: DataFacts, network: NetworkFacts) -> dict[str, Any]:
    """What facts.json and summary.json say, as plain values."""
    return {"data": data.plain(), "network": network.plain()}


def write_facts(folder: RunFolder, data: DataFacts, network: NetworkFacts) -> None:
    """Write facts.json unless the folder has one."""
    if not (folder.path / FACTS).exists():
        folder.write_json(FACTS, facts_of_run(data, network))


def remembered(folder: Path) -> DataFacts | None:
    """The data that a run saw; None if its folder does not say. UserError if it is unreadable."""
    file = folder / FACTS
    if not file.exists():
        return None
    cure = "Delete it to resume without checking whether the data have changed"
    try:
        facts = parsed(FACTS, file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}). {cure}") from None
    return data_of(facts, file, cure)


def data_of(facts: Any, file: Path, cure: str) -> DataFacts:
    """The data in what `facts_of_run` returned. UserError for anything else.

    file: where it was read, and what to do if it is no use, for the message.
    """
    try:
        return DataFacts.read(facts["data"])
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}). {cure}") from None


def finished_on(
    run: RunFolder, now: DataFacts, say: Callable[[list[str]], None] | None = None
) -> dict[str, Any] | None:
    """The summary of a run that is finished and saw these data; else None.

    say: shows how the data have changed since. A run of fastkd 0.1 does not know its data.
    """
    summary = run.summary()
    if summary is None or "data" not in summary:
        return summary
    changes = data_of(summary, run.path / SUMMARY, WITHOUT_SUMMARY).changes(now)
    if changes and say is not None:
        say(changes)
    return None if changes else summary


def refuse_other_data(folder: Path, now: DataFacts, say: Callable[[str], None]) -> None:
    """UserError if a run began with other data; a sentence if that cannot be excluded."""
    known = remembered(folder)
    if known is None:
        return
    if changes := known.changes(now):
        raise UserError(
            f"the data have changed since {folder} began: {'; '.join(changes)}. Restore "
            f"them, or start a new run (without --resume, or remove that folder); to go on with "
            f"the data as they are, remove {folder / FACTS}"
        )
    if touched := known.touched(now):
        say(
            f"note: files in {' and '.join(touched)} have other modification times than when "
            f"{folder} began; names, sizes and a sample of the contents are the same"
        )


def place_for(
    path: Path, now: DataFacts, say: Callable[[str], None], *, evaluated_anew: bool
) -> Path:
    """`path`, or a folder beside it if what is there learned from other data.

    evaluated_anew: other validation images do not matter, because whoever takes the network
    evaluates it again.
    """
    known = remembered(path) or _classes_of_old(path, now)
    if known is None:
        return path
    changes = known.training_changes(now)
    of_evaluation = known.evaluation_changes(now)
    if not evaluated_anew:
        changes += of_evaluation
    if not changes:
        if of_evaluation:
            say(f"note: since {path} was trained, {'; '.join(of_evaluation)}: evaluated anew")
        return path
    place = path.with_name(f"{path.name}-{now.fingerprint(evaluation=not evaluated_anew)}")
    say(f"{path} was trained on other data ({'; '.join(changes)}): not used, {place} instead")
    return place


def _classes_of_old(path: Path, now: DataFacts) -> DataFacts | None:
    """Placeholder names for what a folder of fastkd 0.1 knows, if the number of classes differs."""
    weights = path / "best.safetensors"
    if not weights.exists() or now.classes is None:
        return None
    count = WeightFile.open(weights).network.num_classes
    if count is None or count == len(now.classes):
        return None
    return DataFacts(classes=tuple(f"class {number}" for number in range(count)))
