"""Runs a program as several ranks, which share the imports: `forked_ranks.py NUM FOLDER WORDS`.

WORDS are those that Python itself takes: a file, `-m MODULE` or `-c CODE`, then arguments. What
rank N prints goes to FOLDER/N.out and FOLDER/N.err. The ranks find their group in the environment.
If one of them fails, the others end soon: they would wait for it.
"""

import atexit
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import fastkd.api  # noqa: F401 - what most programs import, once for all ranks

PATIENCE_S = 30
"""For the others, when a rank has failed."""


def run(words: Sequence[str]) -> None:
    """Run a program as Python would."""
    first, *rest = words
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


def of_rank(rank: int, folder: Path, words: Sequence[str]) -> int:
    """The exit code of a rank, in a process of its own."""
    os.environ["RANK"] = str(rank)
    os.environ.setdefault("LOCAL_RANK", str(rank))
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    code = 0
    try:
        run(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


def main() -> int:
    """1 if a rank has failed."""
    num, folder, words = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    running = set()
    for rank in range(num):
        child = os.fork()
        if not child:
            os._exit(of_rank(rank, folder, words))
        running.add(child)
    deadline, code = None, 0
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            running.discard(child)
            if status:
                code, deadline = 1, deadline or time.monotonic() + PATIENCE_S
        elif deadline and time.monotonic() > deadline:
            for other in running:
                os.kill(other, signal.SIGKILL)
            deadline = None
        else:
            time.sleep(0.02)
    return code


if __name__ == "__main__":
    sys.exit(main())
