"""Processes that another launcher than torchrun has started: srun, mpirun, jsrun.

Each of them sees how many they are, and would otherwise train on its own, all into one folder.
"""

import warnings
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from fastkd.errors import UserError

__all__ = ["take_ranks"]


@dataclass(frozen=True)
class _Launcher:
    """The variables by which a launcher tells a process which of how many it is; the first set."""

    name: str
    size: tuple[str, ...]
    rank: tuple[str, ...]
    local_rank: tuple[str, ...]


def _mpi(name: str, prefix: str) -> _Launcher:
    return _Launcher(name, (f"{prefix}_SIZE",), (f"{prefix}_RANK",), (f"{prefix}_LOCAL_RANK",))


_LAUNCHERS = (
    _mpi("mpirun", "OMPI_COMM_WORLD"),
    _mpi("mpirun", "MV2_COMM_WORLD"),
    _mpi("jsrun", "JSM_NAMESPACE"),
    _Launcher("mpiexec", ("PMI_SIZE",), ("PMI_RANK",), ("MPI_LOCALRANKID", "PALS_LOCAL_RANKID")),
    _Launcher(
        "srun", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), ("SLURM_PROCID",), ("SLURM_LOCALID",)
    ),
)


def take_ranks(environment: MutableMapping[str, str]) -> str | None:
    """Give this process the rank that a launcher other than torchrun gave it; the launcher's name.

    Where it also knows the address of rank 0 (MASTER_ADDR, MASTER_PORT), torchrun's variables are
    added to the environment. None for a single process, and where they are set already.

    Raises:
        UserError: several processes were started that do not know of each other.
    """
    if "WORLD_SIZE" in environment or "RANK" in environment:
        return None
    for launcher in _LAUNCHERS:
        size, rank, local_rank = (
            next((environment[name] for name in names if name in environment), "")
            for names in (launcher.size, launcher.rank, launcher.local_rank)
        )
        if not size.isdecimal() or int(size) < 2:
            continue
        if not rank.isdecimal() or (launcher.name == "srun" and _is_batch_script(environment)):
            warnings.warn(
                f"{launcher.name} was to start {size} processes, but this one was not started by "
                f"it: it trains alone",
                stacklevel=2,
            )
            continue
        if not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
            raise UserError(
                f"{launcher.name} has started {size} processes that do not know of each other: to "
                f"train one network together, set MASTER_ADDR to the host of the first and "
                f"MASTER_PORT to a free port, or let torchrun start them; to train one each, set "
                f"WORLD_SIZE=1"
            )
        own = {"WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": local_rank or rank}
        environment.update(own)
        return launcher.name
    return None


def _is_batch_script(environment: Mapping[str, str]) -> bool:
    """Whether this is the script of a SLURM job, which runs once, and not a task of srun."""
    in_step = "SLURM_STEP_ID" in environment or "SLURM_STEPID" in environment
    return not in_step and environment.get("SLURM_PROCID", "0") == "0"
