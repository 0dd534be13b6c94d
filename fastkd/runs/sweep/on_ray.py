"""Runs of a sweep as tasks of Ray, which places them on its hosts (`--launcher ray`).

A task declares one GPU, or a share of CPUs. If its worker or its host dies, Ray runs it again, on
another host if need be, where the run resumes.
"""

import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Literal

from fastkd.errors import UserError
from fastkd.printable import first_line
from fastkd.runs.sweep.process import End, Order, run_to_end

__all__ = ["RETRIES", "RayLauncher", "cpus_each", "open_ray", "run_in_worker"]

RETRIES = 10
"""How often a run is started again whose worker or host has died."""

_ANSWERS_WITHIN_S = 10.0


def run_in_worker(order: Order) -> End:
    """Run it in a worker of Ray, whose `cancel` stops it."""
    # Where the sweep was started in the background of a script, SIGINT is ignored, and so would be
    # the KeyboardInterrupt by which Ray cancels.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return run_to_end(order)


@dataclass(frozen=True)
class _Task:
    ray: Any
    ref: Any
    where: str = "task of Ray"

    def end(self) -> End | None:
        ready, _ = self.ray.wait([self.ref], timeout=0)
        if not ready:
            return None
        try:
            return End(*self.ray.get(self.ref))
        except self.ray.exceptions.RayError as error:
            # Its last line says what happened; a remote traceback comes before it.
            said = str(error).strip().rpartition("\n")[2].strip()
            return End(1, f"{type(error).__name__}: {said}".rstrip(": "))

    def stop(self) -> None:
        self.ray.cancel(self.ref)


@dataclass
class RayLauncher:
    """Tasks of the Ray cluster that this process is connected to, all or `jobs` at a time."""

    ray: Any
    choice: str
    """`device` of the recipes."""
    jobs: int | None
    look_again_s: float = 0.5
    _cpus: int = 1

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """`auto` is the GPU where the cluster has any."""
        if self.choice == "auto":
            return "cuda" if any(node.get("GPU") for node in self._nodes()) else "cpu"
        return "cpu" if self.choice == "cpu" else "cuda"

    def prepare(self, runs: int) -> int:
        """Divide the CPUs."""
        at_once = min(runs, self.jobs or runs)
        self._cpus = cpus_each(self._nodes(), at_once, gpu=self.device == "cuda")
        return at_once

    def start(self, order: Order) -> _Task:
        """Hand it to Ray."""
        task = self.ray.remote(run_in_worker).options(
            name=order.title,
            num_cpus=self._cpus,
            num_gpus=1 if self.device == "cuda" else 0,
            max_retries=RETRIES,
        )
        threads = {"OMP_NUM_THREADS": str(self._cpus)}
        return _Task(self.ray, task.remote(replace(order, variables=threads)))

    def _nodes(self) -> list[Mapping[str, float]]:
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]


def cpus_each(nodes: Sequence[Mapping[str, float]], runs: int, *, gpu: bool) -> int:
    """CPUs of a run: as many as leave room for all runs at once, or those that a GPU has to itself.

    nodes: what each host has, CPU and GPU.
    """
    if gpu:
        beside = [int(node.get("CPU", 0) / node["GPU"]) for node in nodes if node.get("GPU")]
        return max(1, min(beside, default=1))
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    shares = range(max(cpus, default=1), 1, -1)
    return next((each for each in shares if sum(own // each for own in cpus) >= runs), 1)


def _refuse_silence(address: str) -> None:
    """UserError if nobody answers at `host:port`, for which Ray itself would wait for minutes.

    Ray's other forms of an address, such as auto, are left to it.
    """
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWERS_WITHIN_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--launcher ray: there is no Ray at {address} ({first_line(error)})"
        ) from None


@contextmanager
def open_ray(address: str | None, choice: str, jobs: int | None) -> Iterator[RayLauncher]:
    """Connect to Ray at the address; None: where RAY_ADDRESS says, or on this host.

    Raises:
        UserError: Ray is not installed, or not there.
    """
    try:
        ray: Any = import_module("ray")
    except ImportError:
        raise UserError(
            '--launcher ray needs Ray, which is not installed: pip install "fastkd[ray]"'
        ) from None
    if ray.is_initialized():
        yield RayLauncher(ray, choice, jobs)
        return
    if address is not None:
        _refuse_silence(address)
    # Ray takes SIGTERM for itself.
    before = signal.getsignal(signal.SIGTERM)
    try:
        # What runs print is in their logs.
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--launcher ray: there is no Ray at {address or 'this host'} ({first_line(error)})"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    try:
        yield RayLauncher(ray, choice, jobs)
    finally:
        ray.shutdown()
