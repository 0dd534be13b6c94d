"""Which launcher a sweep uses: `--jobs N`, `--launcher ray:ADDRESS` or `submitit:key=value,..`."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from fastkd.compute.ranks import DeviceChoice
from fastkd.errors import UserError
from fastkd.printable import shown
from fastkd.runs.stages import Session
from fastkd.runs.sweep.jobs import LocalLauncher
from fastkd.runs.sweep.launching import Launcher
from fastkd.runs.sweep.on_ray import open_ray
from fastkd.runs.sweep.on_submitit import open_submitit

__all__ = ["open_launcher"]


@contextmanager
def open_launcher(
    text: str | None, jobs: int | None, choice: DeviceChoice, session: Session
) -> Iterator[Launcher | None]:
    """What the words of the command line name; None: the runs follow each other in this process.

    text: an engine, and behind a colon what it is told. jobs: most runs at a time. choice: `device`
    of the recipes.

    Raises:
        UserError: no such engine, it is not installed, or this process is one of several.
    """
    if session.world.size > 1 and (text is not None or (jobs or 1) > 1):
        flag = "--jobs" if text is None else "--launcher"
        raise UserError(
            f"{flag} starts its own processes and does not work with torchrun; leave one of them "
            f"out"
        )
    with _opened(text, jobs, choice, session) as launcher:
        yield launcher


def _opened(
    text: str | None, jobs: int | None, choice: DeviceChoice, session: Session
) -> AbstractContextManager[Launcher | None]:
    if text is None:
        here = "cuda" if session.world.device.type == "cuda" else "cpu"
        return nullcontext(LocalLauncher(here, jobs) if jobs and jobs > 1 else None)
    engine, _, told = text.partition(":")
    if engine == "ray":
        return open_ray(told or None, choice, jobs)
    if engine == "submitit":
        has_gpu = torch.cuda.is_available()
        return open_submitit(told, choice, jobs, root=session.root, has_gpu=has_gpu)
    raise UserError(
        f"--launcher {shown(text)}: choose ray, ray:ADDRESS or submitit, such as "
        f"submitit:partition=gpu,timeout_min=600"
    )
