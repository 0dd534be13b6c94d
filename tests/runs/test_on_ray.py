"""A sweep on a Ray cluster of two nodes: it uses both, outlives its workers, and stops exactly."""

import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from .watched_runs import ALONE, assert_same_weights, checkpoints, logs, until

pytestmark = pytest.mark.matrix  # a cluster takes ten seconds to start


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


def runs_below(folder):
    """The processes of runs that were started there, and what started them."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes()
            if b"fastkd.train\0--config" in words and (place / "cwd").resolve() == folder:
                parent = (place / "stat").read_text().rpartition(")")[2].split()[1]
                found[int(place.name)] = int(parent)
        except OSError:
            pass  # it has ended
    return found


def test_each_node_has_a_run(cluster, command, tmp_path):
    words = ("epochs=20", "--sweep", "seed=0;1", "--launcher", f"ray:{cluster}")
    said = command("train", *ALONE, *words)
    assert (said.code, said.err) == (0, "")
    assert said.out.count(": done\n") == 2
    ends = [file.stat().st_mtime for file in tmp_path.glob("runs/quickstart/*/summary.json")]
    begins = [file.stat().st_mtime for file in tmp_path.glob("runs/quickstart/*/config.yaml")]
    # Each of them takes the only CPU of a node.
    assert max(begins) < min(ends)
    again = command("train", *ALONE, *words)
    assert again.out.count("finished before\n") == 2
    assert again.out[again.out.index("\nrun ") :] == said.out[said.out.index("\nrun ") :]


def test_a_run_whose_worker_is_killed_goes_on_and_ends_as_if_it_had_not(cluster, command, tmp_path):
    words = [*ALONE, "epochs=12"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a task on one CPU; sums of more threads are rounded otherwise
    plain = command("train", *words, "seed=0", "out=plain")
    torch.set_num_threads(threads)
    assert plain.code == 0
    killed = []

    def kill():
        until(lambda: checkpoints(tmp_path))
        ((run, worker),) = runs_below(tmp_path).items()
        os.kill(worker, signal.SIGKILL)
        killed.append(run)
        until(lambda: run not in runs_below(tmp_path), 10)

    killer = threading.Thread(target=kill)
    killer.start()
    said = command(
        "train", *words, "--sweep", "seed=0;1", "--jobs", "1", "--launcher", f"ray:{cluster}"
    )
    killer.join()
    assert said.code == 0
    assert killed
    first, second = sorted(logs(tmp_path), key=lambda log: "resumed" not in log)
    assert "resumed" in first
    assert "resumed" not in second
    assert len(list(tmp_path.glob("runs/quickstart/*/summary.json"))) == 2
    assert_same_weights(tmp_path, tmp_path / "plain")


def test_ctrl_c_saves_the_runs_on_all_nodes(cluster, start, tmp_path):
    words = [*ALONE, "epochs=5000", "--sweep", "seed=0;1;2", "--launcher", "ray"]
    sweep = start("-m", "fastkd.train", *words, cwd=tmp_path, RAY_ADDRESS=cluster)
    try:
        until(lambda: len(checkpoints(tmp_path)) == 2)
    finally:
        sweep.send_signal(signal.SIGINT)
    _, said = sweep.communicate(timeout=60)
    assert sweep.returncode == 130
    assert said.splitlines()[-1] == (
        "fastkd: stopped with 3 runs under way; run the same command again to resume the whole "
        "sweep"
    )
    assert runs_below(tmp_path) == {}
    assert sorted("the state is saved" in log for log in logs(tmp_path)) == [False, True, True]


def test_no_cluster_at_the_address_is_told_in_a_sentence(command):
    pytest.importorskip("ray")
    said = command("train", *ALONE, "--sweep", "seed=0;1", "--launcher", "ray:127.0.0.1:1")
    assert said.code == 2
    assert said.err.startswith("fastkd: --launcher ray: there is no Ray at 127.0.0.1:1 (")
    assert said.err.count("\n") == 1
