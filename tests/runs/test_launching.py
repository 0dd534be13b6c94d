"""What all launchers share: which runs they get, what their ends mean, how they are stopped.

The engine here is a stand-in; tests/runs/test_on_ray.py and test_on_submitit.py have real ones.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import yaml

import fastkd.cli.running
import fastkd.runs.sweep.running
from fastkd.compute.ranks import World
from fastkd.errors import Interrupted, UserError
from fastkd.output.console import Console
from fastkd.recipes.loading import load_recipe
from fastkd.runs.stages import Session
from fastkd.runs.sweep.launchers import open_launcher
from fastkd.runs.sweep.launching import launch
from fastkd.runs.sweep.on_ray import cpus_each
from fastkd.runs.sweep.on_submitit import read_parameters
from fastkd.runs.sweep.process import End, Order, RunProcess, refusal, run_to_end
from fastkd.testing.recipes import TINY

ALONE = [*TINY, "teacher=null", "losses.kd=null", "losses.ce.weight=1", "baseline.lrs="]
SWEEP = [*ALONE, "--sweep", "seed=0;1;2"]


@dataclass
class Run:
    """Under way for some questions, then it has ended like this."""

    ending: End
    asked: int = 1
    stopped: bool = False
    where: str = "somewhere"

    def end(self):
        self.asked -= 1
        return self.ending if self.asked < 0 or self.stopped else None

    def stop(self):
        self.stopped = True


@dataclass
class Engine:
    """Runs nothing; the ends are given by the seed of the recipe."""

    ends: dict
    room: int = 9
    device: str = "cpu"
    look_again_s: float = 0.0
    orders: list = field(default_factory=list)
    runs: list = field(default_factory=list)
    most: int = 0
    on_start: object = None

    def prepare(self, runs):
        self.told = runs
        return self.room

    def start(self, order):
        assert order.token.exists()
        self.orders.append(order)
        self.runs.append(Run(*self.ends[seed_of(order)]))
        self.most = max(self.most, sum(run.asked >= 0 for run in self.runs))
        if self.on_start:
            self.on_start(order)
        return self.runs[-1]


DONE = End(0, "all is well")


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Session(World(0, 0, 1, torch.device("cpu"), None), Console(), Path("runs"))


def recipes(*seeds, words=()):
    return {
        f"run {seed}": load_recipe("quickstart", overrides=[*ALONE, f"seed={seed}", *words])
        for seed in seeds
    }


def seed_of(order):
    return yaml.safe_load(order.recipe)["seed"]


def test_no_more_runs_than_there_is_room_for(session):
    engine = Engine({seed: (DONE, seed % 2) for seed in range(5)}, room=2)
    assert launch(recipes(*range(5)), session, engine) == {f"run {seed}" for seed in range(5)}
    assert (engine.told, engine.most, len(engine.orders)) == (5, 2, 5)


def test_what_is_handed_over_means_the_same_in_every_folder(session, tmp_path):
    words = ("data.name=folder", "data.root=images", "student.weights=here/net.pt")
    engine = Engine({0: (DONE,)})
    ((name, recipe),) = recipes(0, words=words).items()
    launch({name: recipe}, session, engine)
    (order,) = engine.orders
    sent = yaml.safe_load(order.recipe)
    assert sent["data"]["root"] == str(tmp_path / "images")
    assert sent["student"]["weights"] == str(tmp_path / "here/net.pt")
    assert order.root == tmp_path / "runs"
    assert order.log == tmp_path / f"runs/quickstart/sweep-{recipe.digest()[:8]}.log"
    assert order.log.exists()
    # The token belongs to the sweep.
    assert order.token.parent == order.root
    assert not order.token.exists()


def test_one_that_fails_does_not_stop_the_others(session, capsys):
    killed = End(-9, "loss 1.2")
    engine = Engine({0: (DONE,), 1: (killed,), 2: (DONE, 5)})
    assert launch(recipes(0, 1, 2), session, engine) == {"run 0", "run 2"}
    said = capsys.readouterr().out
    assert "run 0, somewhere, runs/quickstart/sweep-" in said
    assert "run 1: failed (exit code -9): loss 1.2\n" in said
    assert "run 2: done\n" in said


def test_a_mistake_stops_what_is_under_way(session):
    wrong = End(UserError.exit_code, "fastkd: data.root=none is not a folder")
    engine = Engine({0: (DONE, 10**9), 1: (wrong,), 2: (DONE,)}, room=2)
    with pytest.raises(UserError, match=r"^run 1: data\.root=none is not a folder$"):
        launch(recipes(0, 1, 2), session, engine)
    assert [run.stopped for run in engine.runs] == [True, False]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_what_is_under_way_and_says_how_to_resume(session, number):
    engine = Engine({seed: (DONE, 10**9) for seed in range(3)}, room=2)
    engine.on_start = lambda _: len(engine.runs) == 2 and os.kill(os.getpid(), number)
    with pytest.raises(Interrupted, match="2 runs under way; run the same command again") as error:
        launch(recipes(0, 1, 2), session, engine)
    assert error.value.exit_code == 128 + number
    assert [run.stopped for run in engine.runs] == [True, True]
    assert not list(Path("runs").glob(".*"))


def with_engine(monkeypatch, engine):
    """Every sweep of the command line uses it."""

    monkeypatch.setattr(fastkd.cli.running, "open_launcher", lambda *words: nullcontext(engine))
    return engine


def finish(order, accuracy=0.5):
    """What a run leaves behind."""
    recipe = load_recipe(None, config=recipe_file(order))
    folder = order.root / recipe.name / f"20260101T000000Z-{recipe.digest()[:8]}"
    folder.mkdir(parents=True)
    summary = {"digest": recipe.digest(), "accuracy_last": accuracy, "accuracy_best": accuracy}
    (folder / "summary.json").write_text(json.dumps(summary))


def recipe_file(order):
    file = order.root.parent / "recipe.yaml"
    file.write_text(order.recipe)
    return file


def test_the_table_is_made_of_what_the_runs_wrote(command, monkeypatch):
    engine = with_engine(monkeypatch, Engine({0: (DONE,), 1: (End(1, "it diverged"),), 2: (DONE,)}))
    engine.on_start = lambda order: seed_of(order) != 1 and finish(order)
    said = command("train", *SWEEP, "--launcher", "ray")
    assert said.code == 1
    assert "sweep 2/3: seed=1: failed (exit code 1): it diverged\n" in said.out
    rows = [line.split()[:3] for line in said.out[said.out.rindex("\nrun ") :].splitlines()]
    for seed in (0, 2):
        assert [f"seed={seed}", "50.00%", "50.00%"] in rows
    assert ["seed=1", "failed"] in rows


def test_a_summary_that_this_host_sees_late_is_waited_for(command, monkeypatch):
    """A network file system may show a new file later to hosts that have not written it."""
    engine = with_engine(monkeypatch, Engine({seed: (DONE,) for seed in range(3)}))
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        if naps.count(1) == 2:
            for order in engine.orders:
                finish(order)

    monkeypatch.setattr(time, "sleep", sleep)
    said = command("train", *SWEEP, "--launcher", "ray")
    assert (said.code, said.err) == (0, "")
    assert naps.count(1) == 2


def test_a_mistake_leaves_the_table_of_what_is_finished(command, monkeypatch):
    wrong = End(UserError.exit_code, "fastkd: unknown tap 'stage9'")
    engine = with_engine(monkeypatch, Engine({0: (DONE,), 1: (wrong, 5), 2: (DONE, 10**9)}))
    engine.on_start = lambda order: seed_of(order) == 0 and finish(order)
    said = command("train", *SWEEP, "--launcher", "ray")
    assert said.code == 2
    assert said.err == "fastkd: sweep 2/3: seed=1: unknown tap 'stage9'\n"
    assert said.out.count("not run") == 2


def test_gpus_of_other_hosts_need_a_precision_that_was_named(command, monkeypatch):
    engine = with_engine(monkeypatch, Engine({seed: (DONE,) for seed in range(3)}, device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = command("train", *SWEEP, "precision=auto", "--launcher", "ray")
    assert said.code == 2
    assert said.err.startswith("fastkd: precision=auto is decided where the sweep starts, and ")
    engine.on_start = finish
    assert command("train", *SWEEP, "precision=fp16", "--launcher", "ray").code == 0
    assert {yaml.safe_load(order.recipe)["precision"] for order in engine.orders} == {"fp16"}


@pytest.mark.parametrize("words", [("--jobs", 2), ("--launcher", "ray")])
def test_a_rank_of_torchrun_starts_no_sweep(session, words):
    several = replace(session, world=World(0, 0, 2, torch.device("cpu"), "gloo"))
    text, jobs = (words[1], None) if words[0] == "--launcher" else (None, words[1])
    with (
        pytest.raises(UserError, match=f"{words[0]} starts its own processes and does not"),
        open_launcher(text, jobs, "cpu", several),
    ):
        pytest.fail("opened")


@pytest.mark.parametrize("engine", ["ray", "submitit"])
def test_an_engine_that_is_not_installed_is_named(command, monkeypatch, engine):
    monkeypatch.setitem(sys.modules, engine, None)
    said = command("train", *SWEEP, "--launcher", engine)
    assert said.code == 2
    assert "which is not installed: pip install" in said.err
    assert f'"fastkd[{engine}]"' in said.err


def test_without_words_the_runs_follow_each_other(session):
    for jobs in (None, 1):
        with open_launcher(None, jobs, "cpu", session) as launcher:
            assert launcher is None


@pytest.fixture
def order(tmp_path):
    (tmp_path / "runs").mkdir()
    token = tmp_path / "runs/.sweep-1"
    token.touch()
    return Order("a run", "{}", tmp_path / "runs", tmp_path / "runs/sweep.log", token)


def test_a_host_that_does_not_see_the_folder_refuses(order):
    assert refusal(order) == ""
    order.token.unlink()
    code, said = run_to_end(order)
    assert code == UserError.exit_code
    here = socket.gethostname()
    assert said.startswith(f"{here} does not see the run folders of {here}, {order.root}: start")
    assert not order.log.exists()


def test_a_host_with_another_fastkd_refuses(order):
    code, said = run_to_end(replace(order, version="0.0.1"))
    assert code == UserError.exit_code
    assert "where the sweep was started, 0.0.1: install the same on all hosts" in said


def test_the_end_of_a_process_is_its_code_and_the_last_line_of_this_time(order):
    order.log.write_text("of an earlier time\n")
    code, said = run_to_end(order)
    assert code == UserError.exit_code
    before, *now = order.log.read_text().splitlines()
    assert before == "of an earlier time"
    assert now[0].startswith("fastkd: ")
    assert said == now[-1]


BOUND = """
import os, signal, subprocess, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
say = "import signal as s, time; print(s.pthread_sigmask(s.SIG_BLOCK, {}), flush=True)"
words = ["-c", f"{say}; time.sleep(60)"]
bound = [sys.executable, "-m", "fastkd.runs.sweep.bound", str(os.getpid()), *words]
process = subprocess.Popen(bound, stdout=subprocess.PIPE, text=True, start_new_session=True)
print(process.pid, process.stdout.readline(), flush=True)
time.sleep(60)
"""


def test_a_run_ends_with_the_process_that_started_it(start):
    parent = start("-c", BOUND)
    pid, *mask = parent.stdout.readline().split()
    # What Ray blocks in its workers is let through, what SLURM sends to all processes is not.
    assert "SIGINT" not in " ".join(mask)
    assert "SIGUSR2" in " ".join(mask)
    os.kill(int(pid), 0)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while alive(int(pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_run_whose_starter_is_already_gone_does_not_begin():
    words = ["-m", "fastkd.runs.sweep.bound", "1", "-c", "print('began')"]
    said = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (1, "")


def test_a_run_has_its_own_service_of_wandb(order, monkeypatch):
    given = []
    start = subprocess.Popen
    monkeypatch.setenv("WANDB_SERVICE", "of this process")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(
        subprocess, "Popen", lambda *words, **how: given.append(how["env"]) or start(*words, **how)
    )
    with RunProcess(order):
        pass
    (env,) = given
    assert "WANDB_SERVICE" not in env
    assert env["WANDB_MODE"] == "offline"


def test_a_signal_handler_may_wait_for_a_run_that_it_has_interrupted(order):
    """As submitit's does: what it interrupts is `end`, which holds a lock of Popen."""
    run = RunProcess(order)
    with run._process._waitpid_lock:
        run.stop()
        run.wait()
        assert run.end() is None
    assert run.end() is not None


@pytest.mark.parametrize(
    ("cpus", "runs", "each"),
    [
        ((16, 16), 6, 5),
        # Ten each would leave the third one waiting.
        ((16, 16), 3, 8),
        ((16, 16), 1, 16),
        ((16, 4), 2, 8),
        ((2,), 5, 1),
        ((), 5, 1),
    ],
)
def test_all_runs_fit_beside_each_other_with_as_many_cpus_as_there_are(cpus, runs, each):
    nodes = [{"CPU": float(num), "memory": 1e9} for num in cpus]
    assert cpus_each(nodes, runs, gpu=False) == each


def test_a_run_on_a_gpu_has_the_cpus_that_belong_to_it():
    nodes = [{"CPU": 64.0, "GPU": 8.0}, {"CPU": 12.0, "GPU": 4.0}, {"CPU": 1.0}]
    assert cpus_each(nodes, 2, gpu=True) == 3
    assert cpus_each([{"GPU": 8.0}], 2, gpu=True) == 1
    assert cpus_each([{"CPU": 64.0}], 2, gpu=True) == 1


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        ("", {}),
        ("partition=gpu,timeout_min=600", {"slurm_partition": "gpu", "timeout_min": 600}),
        ("exclude=n1,n2,qos=low", {"slurm_exclude": "n1,n2", "slurm_qos": "low"}),
        ("slurm_mem_per_gpu=16G,mem_gb=1.5", {"slurm_mem_per_gpu": "16G", "mem_gb": 1.5}),
        ("gres=gpu:a100:1,cluster=local", {"slurm_gres": "gpu:a100:1", "cluster": "local"}),
        ("setup=export A=1", {"slurm_setup": "export A=1"}),
        ("exclusive=true", {"slurm_exclusive": True}),
    ],
)
def test_parameters_are_submitits_own(text, parameters):
    assert read_parameters(text) == parameters
