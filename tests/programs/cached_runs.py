"""Runs on one process and on two that share a teacher's answers, some killed: `cached_runs.py DIR`.

Writes DIR/found.json: the facts of each run that came to its end, what it printed, and the exit
codes of its processes. The tests that start it judge.
"""

import json
import sys
from pathlib import Path
from typing import Any

import tiny

import fastkd.training.update

PICKED = ("augment.pick.images=10",)


def run(place: Path, name: str, *words: str, ranks: int = 1, dies_at: int | None = None) -> Any:
    """One run, or one filling of a cache, in a folder of its own."""
    folder = place / name
    if not folder.exists():
        tiny.prepare(folder)
    log = place / f"{name}.log"

    def job() -> int:
        if dies_at is not None:
            tiny.at_call(
                fastkd.training.update.Update, "__call__", dies_at, lambda *_, **__: tiny.die()
            )
        return tiny.command(folder, *words)

    jobs = tiny.as_ranks(ranks, job) if ranks > 1 else [job]
    codes = tiny.forked(*jobs, log=log)
    finished = sorted((folder / "runs" / "tiny" / "kd").glob("*/summary.json"))
    facts = tiny.facts(finished[-1].parent) if finished else None
    return {"codes": codes, "facts": facts, "log": log.read_text()}


def main(place: Path) -> None:
    """All runs, in an order in which each has what it reads."""
    train = ("train", "--config", "recipe.yaml")
    one, two = (f"teacher.cache={place / name}" for name in ("one", "two"))
    found = {
        "live": run(place, "live", *train),
        "live on two": run(place, "live on two", *train, ranks=2),
        "written": run(place, "written", *train, one),
        "written on two": run(place, "written on two", *train, two, ranks=2),
        "read on two": run(place, "read on two", *train, two, ranks=2),
        "read on two what one wrote": run(place, "one by two", *train, one, ranks=2),
        "read on one what two wrote": run(place, "two by one", *train, two),
        "filled on two": run(
            place, "fill", "cache", "--config", "recipe.yaml", f"--out={place / 'filled'}", ranks=2
        ),
        "read what was filled": run(
            place, "filled by two", *train, f"teacher.cache={place / 'filled'}", ranks=2
        ),
    }
    for name, words in (("killed", ()), ("killed, picked", PICKED)):
        cache = f"teacher.cache={place / f'{name} answers'}"
        found[f"{name}, live"] = run(place, f"{name} live", *train, *words)
        run(place, name, *train, cache, *words, dies_at=5)
        found[name] = run(place, name, *train, cache, *words, "--resume", "auto")
    (place / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
