"""Part 1, correctness: the tests marked gpu, the tests of every op on the chip, the sanitizer.

FASTKD_TEST_DEVICE makes the kernel launches in the tests of the ops run on the GPU
(tests/ops/conftest.py). In a rehearsal the interpreter runs a share of them.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu_parts.record import Job

__all__ = ["run"]

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Each in a process of its own; a folder runs without what is listed before it.
MARKED = (
    "tests/ops/test_cuda.py",
    "tests/training/test_gpu_step.py",
    "tests/training/test_gpu_ranks.py",
    "tests/ops",
    "tests/data",
    "tests",
)


def run(job: Job) -> None:
    """Kernels first: everything else depends on them."""
    where = "cpu" if job.rehearse else "cuda"
    # Compiling the matrix takes longer than running it: as many at once as half the cores allow.
    at_once = max(1, (os.cpu_count() or 2) // 2)
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    with ThreadPoolExecutor(at_once) as pool:
        waiting = []
        for op, files in ops_and_files().items():
            tests = [f"tests/ops/{file}" for file in files]
            name, environment = f"{op} against float64", {"FASTKD_TEST_DEVICE": where}
            waiting.append(pool.submit(suite, job, name, tests, environment))
        seen: list[str] = []
        for target in MARKED:
            ignored = [f"--ignore={path}" for path in seen if path.startswith(target)]
            words, environment = ["-m", "gpu", target, *ignored], {"TRITON_INTERPRET": "0"}
            waiting.append(pool.submit(suite, job, f"marked gpu: {target}", words, environment))
            seen.append(target)
        for one in waiting:
            one.result()
    sanitizer(job)
    job.record.missing("NCCL with more than one rank: it needs a GPU for each")


def ops_and_files() -> dict[str, list[str]]:
    """OPS of tests/ops/test_triton.py, read without importing the test."""
    source = (ROOT / "tests" / "ops" / "test_triton.py").read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OPS":
            return {op: files for op, (files, _) in ast.literal_eval(node.value).items()}
    raise AssertionError("tests/ops/test_triton.py has no OPS")


def suite(job: Job, name: str, words: list[str], environment: dict[str, str]) -> None:
    """One pytest process; its failures by name."""
    if not job.in_time(name, 10):
        return
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider"]
    # A file that needs a package this machine lacks must not keep the others from running.
    command += ["--continue-on-collection-errors"]
    try:
        done = subprocess.run(
            [*command, *words],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=max(10.0, job.seconds_left()),
        )
    except subprocess.TimeoutExpired:
        job.record.fail(f"{name}: cut, the part's time was up")
        return
    last = [done.stderr[-300:], *done.stdout.strip().splitlines()][-1]
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", last)}
    outcomes = {kind: counts.get(kind, 0) for kind in ("passed", "failed", "skipped")}
    row = {"suite": name, **outcomes, "seconds": time.monotonic() - start}
    job.record.row("tests", row)
    if done.returncode == 5:  # nothing was collected: no test of the folder is marked gpu
        return
    if done.returncode != 0:
        told = re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE)[:20]
        job.record.fail(f"{name}: " + ("; ".join(told) or done.stdout[-600:] + done.stderr[-600:]))


def sanitizer(job: Job) -> None:
    """Out of bounds, races in shared memory, uninitialised reads: each kernel once per tool."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or job.rehearse:
        job.record.missing("compute-sanitizer: not installed here")
        return
    for name in TOOLS:
        if not job.in_time(f"compute-sanitizer {name}", 60):
            continue
        words = ["tests/ops/test_cuda.py", "-m", "gpu", "-k", "agree and bfloat16"]
        command = [tool, f"--tool={name}", "--error-exitcode=9", sys.executable, "-m", "pytest"]
        try:
            done = subprocess.run(
                [*command, "-q", *words],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=min(90.0, max(10.0, job.seconds_left())),
            )
        except subprocess.TimeoutExpired:
            job.record.missing(f"compute-sanitizer {name}: took longer than 90 s")
            continue
        found = re.findall(r"ERROR SUMMARY: .*", done.stdout + done.stderr)
        if done.returncode == 0 and found:
            job.record.row("compute-sanitizer", {"tool": name, "found": found[-1]})
        elif "passed" in done.stdout and not found:
            job.record.missing(f"compute-sanitizer {name}: cannot watch this machine's GPU")
        else:
            job.record.fail(f"compute-sanitizer {name}: {(done.stdout + done.stderr)[-600:]}")
