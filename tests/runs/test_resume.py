"""SIGKILL at every step of a run, inside saves and between files: the resumed run is the same run.

So it is after Ctrl-C, SIGTERM and a closed terminal, which save first. The processes that end early
are children of programs/killed_runs.py, which says where each of them does. The tiny recipe has 2
epochs of 4 batches, the last of which is partial, and saves after every step.
"""

import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from fastkd.data.loaders.plan import BatchPlan

STEPS = 4

# Where the resumed process must go on: (epoch, step), both from 0; None: from the beginning.
RESUMED_AT: dict[str, tuple[int, int] | None] = {
    "before step 0": None,
    **{f"before step {step}": divmod(step, STEPS) for step in range(1, 5)},
    "before save 0": None,
    "before save 3": (0, 3),
    "inside save 0": None,
    **{f"inside save {step}": divmod(step, STEPS) for step in (2, 3)},
    "before rename 2": None,  # of facts.json
    "before rename 3": None,
    "before rename 7": (0, 3),
    "before best": (0, 3),
    "inside row": (1, 3),
    "before config": None,
    "before summary": (2, 0),
    "twice": (1, 1),
    "every second step": (1, 2),
    "every epoch": (1, 0),
    **{f"rich, before step {step}": divmod(step, STEPS) for step in (1, 3, 6)},
    "rich, inside save 2": (0, 2),
    "picked, before step 3": (0, 3),
}
# Steps are counted over all stages, of 4 each; what was resumed, and at which of its steps.
STAGED = {
    2: ("teacher/synthetic/resnet8", 2),
    6: ("tiny/kd/alone-lr0.05", 2),
    9: ("tiny/kd/alone-lr0.1", 1),
    15: ("tiny/kd", 3),
}
# Signal, and where the run that was asked to stop in this step goes on: (epoch, step), from 0.
STOPPED = {
    "stopped by SIGINT in step 1": (signal.SIGINT, 0, 2),
    "stopped by SIGINT in step 3": (signal.SIGINT, 1, 0),
    "stopped by SIGHUP in step 5": (signal.SIGHUP, 1, 2),
    "stopped by SIGTERM in step 6": (signal.SIGTERM, 1, 3),
}
# By default one of each kind of moment; `-m matrix` has the others.
QUICK = {
    "before step 0",
    "before step 2",
    "before save 3",
    "inside save 2",
    "before rename 3",
    "before best",
    "inside row",
    "before summary",
    "twice",
    "rich, before step 3",
    "staged, before step 2",
    "staged, before step 9",
    "stopped by SIGINT in step 3",
    "stopped by SIGHUP in step 5",
}
COMPILED: dict[str, tuple[int, int] | None] = {
    **{f"compiled, before step {step}": (0, step) for step in (1, 2, 3)},
    "compiled, inside save 1": (0, 1),
}


def batches_from(
    epoch: int, step: int, *, epochs: int, cycle: int | None = None
) -> list[list[Any]]:
    """(epoch shown, sample ids) of every batch from there to the end of the run."""
    plan = BatchPlan("tiny", 60, 16, seed=0, train=True, drop_last=False)
    cycle = cycle or epochs
    return [
        [e % cycle, plan.order(e % cycle)[plan.part(s)].tolist()]
        for e in range(epoch, epochs)
        for s in range(step if e == epoch else 0, plan.steps_per_epoch)
    ]


def check_same_end(
    found: dict[str, Any], at: tuple[int, int] | None, *, epochs: int, cycle: int | None = None
) -> None:
    *killed, finished = found["codes"]
    assert all(codes == [-9] for codes in killed)
    assert finished == [0], found["log"]
    if at is None:
        assert "resumed" not in found["log"]
    elif at[0] < epochs:
        line = f"resumed tiny/kd at epoch {at[0] + 1} of {epochs}, step {at[1]} of {STEPS}"
        assert line in found["log"]
    else:
        assert f"resumed tiny/kd after its last epoch, {epochs}" in found["log"]
    assert found["fetched"] == [batches_from(*(at or (0, 0)), epochs=epochs, cycle=cycle)]
    assert found["different"] == []
    whole = ["best.safetensors", "config.yaml", "environment.json", "facts.json", "last.pt"]
    assert found["files"] == [*whole, "metrics.csv", "metrics.jsonl", "summary.json"]


def scenarios(names: Iterable[str]) -> pytest.MarkDecorator:
    """A test for each of these children of programs/killed_runs.py."""
    marks = {name: () if name in QUICK else pytest.mark.matrix for name in names}
    return pytest.mark.parametrize("name", [pytest.param(n, marks=m) for n, m in marks.items()])


@pytest.fixture(scope="module")
def eager(
    request: pytest.FixtureRequest,
    killed_runs: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """What was found in all scenarios of this session."""
    tests = [one for one in request.session.items if "eager" in one.fixturenames]  # type: ignore[attr-defined]
    names = dict.fromkeys(one.callspec.params["name"] for one in tests)  # type: ignore[attr-defined]
    return killed_runs(tmp_path_factory.mktemp("eager"), *names)


@scenarios(RESUMED_AT)
def test_a_killed_run_ends_bit_identical(eager: dict[str, Any], name: str) -> None:
    check_same_end(eager[name], RESUMED_AT[name], epochs=2)


@scenarios(["cycled, before step 9"])
def test_a_run_that_is_killed_in_a_later_cycle_ends_bit_identical(
    eager: dict[str, Any], name: str
) -> None:
    check_same_end(eager[name], (2, 1), epochs=3, cycle=2)


@scenarios(f"staged, before step {step}" for step in STAGED)
def test_every_stage_of_a_killed_run_goes_on(eager: dict[str, Any], name: str) -> None:
    found, step = eager[name], int(name.rpartition(" ")[2])
    stage, at = STAGED[step]
    assert found["codes"] == [[-9], [0]], found["log"]
    assert f"resumed {stage} at epoch 1 of 1, step {at} of {STEPS}" in found["log"]
    assert len(found["fetched"][0]) == 4 * STEPS - step
    assert found["different"] == []


@scenarios(STOPPED)
def test_a_stopped_run_saves_and_its_own_advice_resumes_it(
    eager: dict[str, Any], name: str
) -> None:
    found = eager[name]
    number, epoch, step = STOPPED[name]
    assert found["codes"] == [[128 + number], [0]], found["log"]
    *_, last = found["first_log"].splitlines()
    assert last.startswith(
        f"fastkd: tiny/kd stopped at epoch {epoch + 1}, step {step}; the state is saved. "
        "Resume it with: fastkd train --resume runs/tiny/kd/"
    )
    assert f"resumed tiny/kd at epoch {epoch + 1} of 2, step {step} of 4" in found["log"]
    assert found["fetched"] == [batches_from(epoch, step, epochs=2)]
    assert found["different"] == []


@scenarios(["stopped in the teacher's last step"])
def test_a_stop_at_the_end_of_a_stage_is_not_lost(eager: dict[str, Any], name: str) -> None:
    found = eager[name]
    assert found["codes"] == [[130], [0]], found["log"]
    assert "teacher/synthetic/resnet8 stopped after the last epoch" in found["first_log"]
    assert "resumed teacher/synthetic/resnet8 after its last epoch, 1" in found["log"]
    assert len(found["fetched"][0]) == 3 * STEPS
    assert found["different"] == []


TERMINAL = """
import os, pty, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever started the tests may have used nohup
run, terminal = pty.fork()
if not run:
    os.execv(sys.executable, [sys.executable, "-m", "fastkd.train", *sys.argv[1:]])
while not os.path.exists("run/last.pt"):
    os.read(terminal, 1 << 16)
os.close(terminal)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(run, 0)[1]))
"""


def test_a_run_whose_terminal_is_closed_saves(program: Callable[..., Any], tmp_path: Path) -> None:
    words = (
        "data.name=synthetic",
        "data.train_limit=64",
        "batch_size=16",
        "student.name=resnet8",
        "teacher=null",
        "losses.kd=null",
        "losses.ce.weight=1",
        "baseline.lrs=",
        "epochs=1000",
        "save_steps=1",
        "device=cpu",
        "compile=off",
        "out=run",
    )
    # Not -1, a death by the signal; nor 1, a write to what is no longer there.
    saved = 128 + signal.SIGHUP
    program("-c", TERMINAL, *words, code=saved, cwd=tmp_path, timeout=120)


@pytest.mark.matrix
def test_a_killed_compiled_run_ends_bit_identical(
    killed_runs: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    found = killed_runs(tmp_path, "compiled student")["compiled student"]
    assert found["codes"] == [[-9], [0]], found["log"]
    assert "resumed tiny/kd at epoch 1 of 1, step 2 of 3" in found["log"]
    assert len(found["fetched"][0]) == 1
    assert found["different"] == []


@pytest.fixture(scope="module")
def compiled(
    killed_runs: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return killed_runs(tmp_path_factory.mktemp("compiled"), *COMPILED)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_a_killed_compiled_distillation_ends_bit_identical(
    compiled: dict[str, Any], name: str
) -> None:
    check_same_end(compiled[name], COMPILED[name], epochs=1)
