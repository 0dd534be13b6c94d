"""Recorded runs that end by SIGKILL in epoch 2 of 3: `recorded_runs.py DIR KEY..`.

Children of this process, one for each of MOMENTS, in folders killed-0, killed-1, ..
"""

import os
import signal
import sys
from typing import Any

import fastkd.data.sources.synthetic
from fastkd.cli.commands import main
from fastkd.output.run_folder import RunFolder
from fastkd.training.trainer import Trainer

MOMENTS = ("records written", "row written", "inside the epoch")


def _end(moment: str) -> None:
    """Make this process end itself there."""
    append, update = RunFolder.append_metrics, Trainer.optimize

    def appending(self: RunFolder, row: Any) -> None:
        ends = row["epoch"] == 2 and self.path.name.startswith("killed")
        if ends and moment == "records written":
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, row)
        if ends:
            os.kill(os.getpid(), signal.SIGKILL)

    def optimizing(self: Trainer, prepared: Any, epoch: int, step: int) -> None:
        update(self, prepared, epoch, step)
        if self.recorder is not None and (epoch, step) == (1, 3):
            self.progress.step = step + 1
            self.save()
            os.kill(os.getpid(), signal.SIGKILL)

    if moment == "inside the epoch":
        Trainer.optimize = optimizing  # type: ignore[method-assign]
    else:
        RunFolder.append_metrics = appending  # type: ignore[method-assign]


if __name__ == "__main__":
    fastkd.data.sources.synthetic.NUM_IMAGES["val"] = 49
    os.chdir(sys.argv[1])
    for number, moment in enumerate(MOMENTS):
        child = os.fork()
        if child == 0:
            _end(moment)
            main(["train", *sys.argv[2:], f"out=killed-{number}"])
            os._exit(3)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), moment
        assert os.WTERMSIG(status) == signal.SIGKILL
