"""A SLURM of one host for the tests: `slurm.py sbatch FILE`, and so for the other commands.

Jobs are folders below $FAKE_SLURM. As SLURM does, `warn` sends the signal that the script
asks for to all processes of a job, and a job that was requeued runs its script again, under the
same number.
"""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

JOBS = Path(os.environ["FAKE_SLURM"])


def sbatch(script: str) -> None:
    text = Path(script).read_text()
    if "--partition=none" in text:
        sys.exit("sbatch: error: invalid partition specified: none")
    number = str(100 + len(list(JOBS.iterdir())))
    (JOBS / number).mkdir()
    (JOBS / number / "script").write_text(text)
    (JOBS / number / "state").write_text("PENDING")
    words = [sys.executable, __file__, "job", number]
    null = subprocess.DEVNULL
    subprocess.Popen(words, stdin=null, stdout=null, stderr=null, start_new_session=True)
    print(f"Submitted batch job {number}")


def job(number: str) -> None:
    """Run the script until it ends without having been requeued."""
    here = JOBS / number
    env = os.environ | {"SLURM_JOB_ID": number, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    while True:
        process = subprocess.Popen(["bash", here / "script"], env=env)
        (here / "pid").write_text(str(process.pid))
        (here / "state").write_text("RUNNING")
        code = process.wait()
        if not (here / "requeued").exists():
            break
        (here / "requeued").rename(here / "was_requeued")
    if (here / "state").read_text() != "CANCELLED":
        (here / "state").write_text("FAILED" if code else "COMPLETED")


def srun(*words: str) -> None:
    rest = list(words)
    files = {}
    while rest[0].startswith("--"):
        option = rest.pop(0)
        if option in ("--output", "--error"):
            path = rest.pop(0).replace("%j", os.environ["SLURM_JOB_ID"]).replace("%t", "0")
            files[option] = open(path, "ab")  # noqa: SIM115 - for the program that follows
    os.dup2(files["--output"].fileno(), 1)
    os.dup2(files["--error"].fileno(), 2)
    os.execvp(rest[0], rest)


def scontrol(action: str, number: str) -> None:
    assert action == "requeue"
    (JOBS / number / "requeued").touch()


def scancel(number: str) -> None:
    here = JOBS / number
    (here / "state").write_text("CANCELLED")
    to_all(number, signal.SIGTERM)
    time.sleep(3)  # KillWait
    to_all(number, signal.SIGKILL)


def sacct(*words: str) -> None:
    print("JobID|State|NodeList")
    for number in re.findall(r"\d+", " ".join(words)):
        if (JOBS / number).exists():
            print(f"{number}|{(JOBS / number / 'state').read_text()}|here")


def warn(number: str) -> None:
    """What SLURM does when the time of a job is nearly over, or its place is needed."""
    (wanted,) = re.findall(r"--signal=(\w+)@", (JOBS / number / "script").read_text())
    to_all(number, signal.Signals[f"SIG{wanted}"])


def to_all(number: str, wanted: signal.Signals) -> None:
    """To the script's descendants; the script itself waits for them."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [int((JOBS / number / "pid").read_text())]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    for pid in found[1:]:
        with suppress(ProcessLookupError):
            os.kill(pid, wanted)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
