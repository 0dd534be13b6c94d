"""Processes of srun, mpirun and jsrun train together, or are told that they do not."""

import warnings

import pytest

from fastkd.compute.launchers import take_ranks
from fastkd.errors import UserError

ADDRESS = {"MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
STARTED = {
    "srun": {
        "SLURM_NTASKS": "8",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
    },
    "srun, rank alone": {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"},
    "mpirun": {
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        # Of the batch job around it.
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "0",
    },
    "mpirun of mvapich": {
        "MV2_COMM_WORLD_SIZE": "4",
        "MV2_COMM_WORLD_RANK": "3",
        "MV2_COMM_WORLD_LOCAL_RANK": "1",
    },
    "jsrun": {
        "JSM_NAMESPACE_SIZE": "4",
        "JSM_NAMESPACE_RANK": "3",
        "JSM_NAMESPACE_LOCAL_RANK": "1",
    },
    "mpiexec": {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALRANKID": "1"},
}


@pytest.mark.parametrize("kind", STARTED)
def test_with_an_address_they_join(kind):
    environment = STARTED[kind] | ADDRESS
    assert take_ranks(environment) == kind.split(",")[0].split(" ")[0]
    assert [environment[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")] == ["4", "3", "1"]


@pytest.mark.parametrize("kind", STARTED)
def test_without_one_they_are_refused(kind):
    environment = dict(STARTED[kind])
    with pytest.raises(UserError, match=r"has started 4 processes .* MASTER_ADDR .* torchrun"):
        take_ranks(environment)
    assert environment == STARTED[kind]


@pytest.mark.parametrize("kind", STARTED)
@pytest.mark.parametrize("own", [{"WORLD_SIZE": "1"}, {"WORLD_SIZE": "2", "RANK": "1"}], ids=str)
def test_what_torchrun_or_the_user_says_wins(kind, own):
    environment = STARTED[kind] | own
    assert take_ranks(environment) is None
    assert environment == STARTED[kind] | own


ALONE = {
    "nothing": {},
    "one task": {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"},
    "one task of a larger job": {
        "SLURM_NTASKS": "4",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_STEP_ID": "0",
    },
    "one process of mpirun": {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    "no number": {"PMI_SIZE": "", "PMI_RANK": ""},
}


@pytest.mark.parametrize("kind", ALONE)
def test_a_single_process_is_left_alone(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert take_ranks(dict(ALONE[kind])) is None


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_NTASKS": "2"},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"},
    ],
    ids=["newcomer", "batch-script", "salloc"],
)
def test_the_script_of_a_job_trains_alone_and_says_so(environment):
    with pytest.warns(UserWarning, match=r"srun was to start \d processes.* it trains alone"):
        assert take_ranks(dict(environment)) is None


TINY = ("epochs=1", "teacher=null", "losses.kd=null", "losses.ce.weight=1", "baseline.lrs=")


def test_two_tasks_of_srun_do_not_become_two_runs(command, monkeypatch, tmp_path):
    for name, value in STARTED["srun"].items():
        monkeypatch.setenv(name, value)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    said = command("train", "quickstart", *TINY, "out=shared")
    assert said.code == 2
    assert said.err.startswith("fastkd: srun has started 4 processes that do not know")
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_note_of_a_batch_script_is_one_line(command, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    said = command("train", "quickstart", *TINY, "--dry-run")
    assert said.code == 0
    assert said.err == (
        "fastkd: note: srun was to start 2 processes, but this one was not started by it: it "
        "trains alone\n"
    )
