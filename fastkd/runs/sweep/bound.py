"""`python -m fastkd.runs.sweep.bound PARENT WORDS`: `python WORDS`, which does not outlive PARENT.

What a process changes about itself before it becomes another program, and what that one keeps. Not
`preexec_fn`, which runs between fork and exec, where a process with threads may hang.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(parent: int, words: list[str]) -> None:
    """Replace this process by `python WORDS`."""
    # An engine starts a run again when its worker has died, and would find the folder in use.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)  # it died before
    # Ray blocks SIGINT in its workers, which would never reach the run. The signal by which SLURM
    # warns submitit goes to all processes of a job, and would end a run that does not know it.
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGUSR1, signal.SIGUSR2})
    os.execv(sys.executable, [sys.executable, *words])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
