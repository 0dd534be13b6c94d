"""Everything that only a GPU can show, in one command; docs/gpu.md explains the results.

    python benchmarks/gpu.py [--part N ...] [--assets FOLDER] [--out FOLDER] [--rehearse]

Parts: 1 proof (all tests marked gpu, every kernel against float64), 2 ops, 3 whole steps, 4 a short
training, 5 loaders. Each runs in its own process with a time limit and writes its findings case by
case to OUT/gpu_<part>_<device>.jsonl and .md, so that a run that is cut short loses nothing. The
last lines of output list every bar that was missed. No network is needed. --rehearse runs the same
lines on CPU tensors, the Triton kernels in the interpreter, at sizes that test the program but
measure nothing.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Number -> module and seconds it may take: 22 minutes together, none above 8.
PARTS = {
    1: ("proof", 300),
    2: ("ops", 200),
    3: ("steps", 460),
    4: ("training", 240),
    5: ("loaders", 120),
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--part", type=int, action="append", choices=PARTS, help="all by default")
    parser.add_argument("--seconds", type=int, help="limit per part instead of its own")
    parser.add_argument("--assets", type=Path, help="wheels, checkouts of peers, data archives")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    parser.add_argument("--rehearse", action="store_true", help="on CPU tensors, tiny")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the parts one after the other; 0 unless something failed (a missed bar is no failure)."""
    asked = arguments()
    if asked.child is not None:
        return child(asked)
    if asked.rehearse and asked.out is None:
        asked.out = HERE.parent / "build" / "gpu-rehearsal"
    out = (asked.out or HERE / "results").resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    sys.path.insert(0, str(HERE))
    assets = import_module("gpu_parts.assets")
    if asked.assets:
        wheels = assets.unpacked_wheels(asked.assets)
        sys.path += wheels
        paths = [*wheels, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if lacks := assets.lacking(HERE.parent):
        # Some parts may not need them.
        print(f"== MISSING, put wheels into --assets: {' '.join(lacks)}", flush=True)
    if asked.rehearse:
        environment |= {"FASTKD_REHEARSE": "1", "TRITON_INTERPRET": "1"}
        environment["CUDA_VISIBLE_DEVICES"] = ""
    worst = 0
    for part in asked.part or list(PARTS):
        limit = asked.seconds or PARTS[part][1]
        words = [sys.executable, str(HERE / "gpu.py"), "--child", str(part), "--out", str(out)]
        words += ["--seconds", str(limit)]
        words += ["--rehearse"] if asked.rehearse else []
        words += ["--assets", str(asked.assets.resolve())] if asked.assets else []
        print(f"== part {part}, {PARTS[part][0]}: at most {limit} s", flush=True)
        worst = max(worst, limited(words, environment, limit + 15))
    print(shortfalls(out))
    return worst


def limited(words: list[str], environment: dict[str, str], seconds: float) -> int:
    """Exit code of a command; it and its children are killed when the time is up."""
    running = subprocess.Popen(words, env=environment, start_new_session=True)
    try:
        code = running.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"== cut after {seconds:.0f} s; what was found so far is written", flush=True)
        code = 124
    finally:
        # Children that a finished part may have left behind, too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    return code


def child(asked: argparse.Namespace) -> int:
    """Run one part in this process."""
    sys.path.insert(0, str(HERE))
    import torch
    from gpu_parts.record import Job, Record

    if not asked.rehearse and not torch.cuda.is_available():
        print("torch sees no CUDA device: use --rehearse to run the same lines on the CPU")
        return 2
    device = torch.device("cpu" if asked.rehearse else "cuda")
    name = PARTS[asked.child][0]
    record = Record(asked.out, name, asked.rehearse)
    deadline = time.monotonic() + asked.seconds
    job = Job(device, asked.rehearse, asked.assets, record, deadline)
    import_module(f"gpu_parts.{name}").run(job)
    record.done()
    return 1 if record.failed else 0


def shortfalls(out: Path) -> str:
    """Failures, what could not be run, and missed bars from all result files in the folder."""
    lines: dict[str, list[str]] = {"failed": [], "missing": [], "short": []}
    for file in sorted(out.glob("gpu_*.jsonl")):
        for line in file.read_text().splitlines():
            found = json.loads(line)
            if found["kind"] in lines:
                lines[found["kind"]].append(f"  {file.stem}: {found['kind']}: {found['text']}")
    told = [text for kind in lines.values() for text in kind] or ["  nothing"]
    return "\n".join(["== short of a bar, failed or not run:", *told])


if __name__ == "__main__":
    sys.exit(main())
