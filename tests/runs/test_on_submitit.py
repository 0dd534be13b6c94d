"""A sweep on SLURM through submitit: runs that have to make room go on exactly, or are cancelled.

SLURM's commands are those of tests/programs/slurm.py; submitit and the runs are real.
"""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fastkd.runs.sweep.on_submitit import SubmititLauncher

from .watched_runs import ALONE, assert_same_weights, checkpoints, logs, until

pytestmark = pytest.mark.matrix  # each job starts Python twice

SLURM = Path(__file__).parents[1] / "programs/slurm.py"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """SLURM's commands on the path; call the result for another one. Jobs are looked at often."""
    submitit = pytest.importorskip("submitit")
    submitit.SlurmJob.watcher.clear()  # each test counts its jobs anew
    jobs, commands = tmp_path / "slurm/jobs", tmp_path / "slurm/bin"
    jobs.mkdir(parents=True)
    commands.mkdir()
    for name in ("sbatch", "srun", "scontrol", "scancel", "sacct"):
        file = commands / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{SLURM}" {name} "$@"\n')
        file.chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_SLURM", str(jobs))
    monkeypatch.setattr(SubmititLauncher, "look_again_s", 0.2)

    def call(*words):
        subprocess.run([sys.executable, SLURM, *words], check=True)

    call.jobs = jobs
    return call


def test_parameters_reach_the_script_of_the_job(slurm, command, tmp_path):
    words = "submitit:partition=gpu,timeout_min=90,cpus_per_task=2,exclude=n1,n2,setup=export A=1"
    said = command("train", *ALONE, "--sweep", "seed=0;1", "--launcher", words)
    assert (said.code, said.err) == (0, "")
    assert said.out.count(": done\n") == 2
    for number in ("100", "101"):
        script = (slurm.jobs / number / "script").read_text().splitlines()
        for line in ("partition=gpu", "time=90", "cpus-per-task=2", "exclude=n1,n2", "requeue"):
            assert f"#SBATCH --{line}" in script
        assert "export A=1" in script
        assert not any("gpus" in line for line in script)
        assert (tmp_path / f"runs/submitit/{number}_0_log.err").exists()
    machines = tmp_path.glob("runs/quickstart/*/environment.json")
    assert ['"threads": 2' in file.read_text() for file in machines] == [True, True]


def test_a_gpu_is_asked_for_where_the_runs_need_one(slurm, command):
    words = ("device=cuda", "precision=bf16", "--sweep", "seed=0;1", "--launcher", "submitit")
    said = command("train", *ALONE, *words)
    # The job finds none on this host.
    if not torch.cuda.is_available():
        assert said.code == 2
        assert "device=cuda was requested" in said.err
    script = (slurm.jobs / "100/script").read_text()
    assert "#SBATCH --gpus-per-node=1\n" in script
    assert "#SBATCH --time=240\n" in script


def test_a_run_that_makes_room_is_requeued_and_ends_as_if_it_had_not(slurm, command, tmp_path):
    words = [*ALONE, "epochs=12"]
    assert command("train", *words, "seed=0", "out=plain").code == 0
    warned = []

    def warn():
        until(lambda: checkpoints(tmp_path))
        slurm("warn", "100")
        warned.append(True)

    other = threading.Thread(target=warn)
    other.start()
    sweep = ("--sweep", "seed=0;1", "--jobs", "1", "--launcher", "submitit")
    said = command("train", *words, *sweep)
    other.join()
    assert (said.code, said.err, warned) == (0, "", [True])
    assert (slurm.jobs / "100/was_requeued").exists()
    assert not (slurm.jobs / "101/was_requeued").exists()
    log = next(text for text in logs(tmp_path) if "the state is saved" in text)
    assert "resumed quickstart at epoch" in log
    assert_same_weights(tmp_path, tmp_path / "plain")


def test_a_job_that_is_cancelled_by_others_has_failed(slurm, command, tmp_path):
    other = threading.Thread(
        target=lambda: until(lambda: checkpoints(tmp_path)) and slurm("scancel", "100")
    )
    other.start()
    sweep = ("--sweep", "seed=0;1", "--jobs", "1", "--launcher", "submitit")
    said = command("train", *ALONE, "epochs=25", *sweep)
    other.join()
    assert said.code == 1
    assert "sweep 1/2: seed=0: failed (exit code 1): the job ended as CANCELLED, see " in said.out
    assert "sweep 2/2: seed=1: done\n" in said.out


def test_ctrl_c_cancels_the_jobs(slurm, start, tmp_path):
    words = [*ALONE, "epochs=5000", "--sweep", "seed=0;1", "--launcher", "submitit"]
    sweep = start("-m", "fastkd.train", *words, cwd=tmp_path)
    try:
        until(lambda: len(checkpoints(tmp_path)) == 2)
    finally:
        sweep.send_signal(signal.SIGINT)
    _, said = sweep.communicate(timeout=60)
    assert sweep.returncode == 130
    assert said.splitlines()[-1].endswith("run the same command again to resume the whole sweep")
    states = [(slurm.jobs / number / "state").read_text() for number in ("100", "101")]
    assert states == ["CANCELLED"] * 2
    assert ["the state is saved" in log for log in logs(tmp_path)] == [True, True]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("submitit:partition=none", "sbatch: error: invalid partition specified: none"),
        ("submitit:partitoin=gpu", "Unknown argument 'partitoin' for executor 'slurm'"),
        ("submitit:timeout_min=long", 'Parameter "timeout_min" expected type'),
        ("submitit:nodes=2", "a run of a sweep is one process: leave out nodes"),
    ],
)
def test_what_slurm_or_submitit_refuses_is_told_in_a_sentence(slurm, command, words, sentence):
    said = command("train", *ALONE, "--sweep", "seed=0;1", "--launcher", words)
    assert said.code == 2
    assert said.err.splitlines()[-1].startswith(f"fastkd: --launcher submitit: {sentence}")


def test_without_slurm_it_says_so(command, monkeypatch, tmp_path):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    said = command("train", *ALONE, "--sweep", "seed=0;1", "--launcher", "submitit")
    assert said.code == 2
    assert 'fastkd: --launcher submitit: Could not detect "srun"' in said.err


def test_the_local_executor_tries_out_what_slurm_will_do(command, monkeypatch, tmp_path):
    pytest.importorskip("submitit")
    monkeypatch.setattr(SubmititLauncher, "look_again_s", 0.2)
    words = ("--sweep", "seed=0;1", "--launcher", "submitit:cluster=local,partition=gpu")
    said = command("train", *ALONE, *words)
    assert (said.code, said.err) == (0, "")
    assert said.out.count(": done\n") == 2
