"""Runs of a sweep as jobs of SLURM, through submitit (`--launcher submitit`).

A job that runs out of time or has to make room is stopped, saves its state, and goes back into the
queue; the run resumes. submitit's own files are in runs/submitit.
"""

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from fastkd.config.plain_yaml import plain_scalar
from fastkd.errors import UserError
from fastkd.printable import first_line, shown
from fastkd.runs.sweep.process import End, Order, RunProcess, refusal

__all__ = ["RequeuedRun", "SubmititLauncher", "open_submitit", "read_parameters"]

_DEFAULTS: dict[str, Any] = {
    "name": "fastkd",
    "timeout_min": 240,
    # How often a job whose time is over goes back into the queue.
    "max_num_timeout": 100,
    # If its host fails, too.
    "slurm_additional_parameters": {"requeue": True},
}
_GENERIC = ("name", "timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node", "stderr_to_stdout")
_OF_EXECUTOR = ("max_num_timeout", "max_pickle_size_gb", "python")
_ONE_PROCESS = ("nodes", "tasks_per_node", "slurm_nodes", "slurm_ntasks_per_node")
_LISTS = ("slurm_setup", "slurm_teardown", "slurm_srun_args")
_GPUS = ("gpus_per_node", "slurm_gpus_per_task", "slurm_num_gpus", "slurm_gres")
_SCHEDULER_DECIDES_S = 600.0


class RequeuedRun:
    """The function that submitit runs: a run, which a new job continues."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._run: RunProcess | None = None

    def __call__(self) -> End:
        """Run it to its end."""
        if why := refusal(self._order):
            return End(UserError.exit_code, why)
        with RunProcess(self._order) as self._run:
            end = self._run.until_end()
        if end.code == 128 + signal.SIGTERM:
            # SLURM ends this job, and has told all its processes: the run has saved its state.
            # What comes next, a place in the queue or the end of this process, is not up to it.
            time.sleep(_SCHEDULER_DECIDES_S)
        return end

    def checkpoint(self) -> Any:
        """What the next job shall do; submitit calls this in a signal handler, then requeues."""
        if self._run:
            self._run.stop()
            self._run.wait()
        return import_module("submitit.helpers").DelayedSubmission(RequeuedRun(self._order))


@dataclass
class _Job:
    submitit: Any
    job: Any
    stopped: bool = False

    @property
    def where(self) -> str:
        return f"job {self.job.job_id}"

    def end(self) -> End | None:
        # Of what was stopped no result may come: ask the scheduler, and not only its cache.
        if not self.job.done(force_check=self.stopped):
            return None
        if self.stopped:
            return End(128 + signal.SIGTERM, "stopped")
        try:
            return End(*self.job.result())
        except self.submitit.core.utils.UncompletedJobError:
            return End(1, f"the job ended as {self.job.state}, see {self.job.paths.stderr}")

    def stop(self) -> None:
        self.job.cancel(check=False)
        self.stopped = True


@dataclass
class SubmititLauncher:
    """Jobs of SLURM, all or `jobs` of them in the queue at a time."""

    submitit: Any
    executor: Any
    device: Literal["cpu", "cuda"]
    jobs: int | None
    variables: Mapping[str, str]
    look_again_s: float = 5.0

    def prepare(self, runs: int) -> int:
        """There is nothing to divide."""
        return min(runs, self.jobs or runs)

    def start(self, order: Order) -> _Job:
        """Submit it; UserError if SLURM refuses."""
        errors = self.submitit.core.utils
        try:
            # The sweep itself may be a job of SLURM, whose variables would bind this one.
            with self.submitit.helpers.clean_env():
                job = self.executor.submit(RequeuedRun(replace(order, variables=self.variables)))
        except (errors.FailedJobError, errors.FailedSubmissionError, OSError) as error:
            raise UserError(f"--launcher submitit: {first_line(error)}") from None
        return _Job(self.submitit, job)


def read_parameters(text: str) -> dict[str, Any]:
    """`partition=gpu,timeout_min=600` -> submitit's parameters; those of SLURM get their prefix.

    A value may have commas itself: `exclude=n1,n2,partition=gpu`.
    """
    found: dict[str, Any] = {}
    name = ""
    for part in text.split(",") if text else ():
        key, equals, value = part.partition("=")
        if equals and key.replace("_", "").isalpha():
            name = key
            found[name] = value
        elif name:
            found[name] += f",{part}"
        else:
            raise UserError(
                f"--launcher submitit:{shown(text)}: expected submitit's parameters, such as "
                f"submitit:partition=gpu,timeout_min=600"
            )
    return {_prefixed(name): plain_scalar(value) for name, value in found.items()}


def _prefixed(name: str) -> str:
    known = (*_GENERIC, *_OF_EXECUTOR, "cluster", "nodes", "tasks_per_node")
    return name if name in known or name.startswith(("slurm_", "local_")) else f"slurm_{name}"


@contextmanager
def open_submitit(
    text: str, choice: str, jobs: int | None, *, root: Path, has_gpu: bool
) -> Iterator[SubmititLauncher]:
    """A launcher with the parameters that `text` names.

    choice: `device` of the recipes; `auto` is the GPU if the parameters ask for one, or if this
    host has one (has_gpu).

    Raises:
        UserError: submitit or SLURM is not installed, or a parameter is wrong.
    """
    given = read_parameters(text)
    try:
        submitit: Any = import_module("submitit")
    except ImportError:
        raise UserError(
            "--launcher submitit needs submitit, which is not installed: "
            'pip install "fastkd[submitit]"'
        ) from None
    if several := [key for key in _ONE_PROCESS if given.get(key, 1) != 1]:
        raise UserError(
            f"--launcher submitit: a run of a sweep is one process: leave out {several[0]}"
        )
    asked = [bool(given[key]) for key in _GPUS if key in given]
    gpu = choice == "cuda" or (choice == "auto" and (any(asked) if asked else has_gpu))
    if gpu and not asked:
        given["gpus_per_node"] = 1
    parameters = _DEFAULTS | given
    for key in _LISTS:
        if key in parameters:
            parameters[key] = [str(parameters[key])]
    cluster = parameters.pop("cluster", "slurm")
    own = {f"{cluster}_{key}": parameters.pop(key) for key in _OF_EXECUTOR if key in parameters}
    try:
        executor = submitit.AutoExecutor(root.absolute() / "submitit", cluster=cluster, **own)
        executor.update_parameters(**parameters)
    except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--launcher submitit: {first_line(error)}") from None
    cpus = given.get("cpus_per_task")
    threads = {"OMP_NUM_THREADS": str(cpus)} if cpus else {}
    yield SubmititLauncher(submitit, executor, "cuda" if gpu else "cpu", jobs, threads)
