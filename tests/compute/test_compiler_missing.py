"""Where torch.compile cannot work: a note and an eager run, or one sentence before training."""

import inspect
import os
import stat
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd.cli.doctor import as_text, facts
from fastkd.compute import compiling
from fastkd.errors import UserError
from fastkd.losses import CrossEntropy
from fastkd.storage.checkpoint import Checkpoint
from fastkd.training.trainer import Trainer


@pytest.fixture
def machine(monkeypatch):
    """Another tool chain for one test: what was found before is forgotten, here and in torch."""
    from torch._inductor import config as inductor
    from torch._inductor import cpp_builder, cpu_vec_isa
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    caches = (
        compiling.compiler_problem,
        compiling.compiler_folder_problem,
        cpp_builder.cpp_compiler_search,
    )

    def forget():
        for cache in caches:
            cache.cache_clear()
        torch.compiler.reset()

    def change(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        if "CXX" in environment:  # inductor reads it when it is imported
            torch_looks_at.enter_context(
                inductor.patch({"cpp.cxx": (None, str(environment["CXX"]))})
            )
        forget()

    # Torch tries its vector instructions with the compiler, once per process: with a broken one it
    # would find none, and later tests could not compile what other processes have cached.
    cpu_vec_isa.pick_vec_isa()
    # A test may take it out of the environment.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", cache_dir())
    forget()
    with ExitStack() as torch_looks_at:
        yield change
    monkeypatch.undo()
    forget()


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def without_compilers(tmp_path):
    return {"PATH": tmp_path}


def compiler_is_no_compiler(tmp_path):
    return {"CXX": "/bin/false"}


def compiler_is_gone(tmp_path):
    return {"CXX": tmp_path / "no-such-g++"}


def compiler_lacks_a_header(tmp_path):
    fails = (
        'case "$*" in *--version*) echo g++ 13.2;; *) echo "x.cpp:1: fatal error: omp.h: No such '
    )
    fails += 'file" >&2; exit 1;; esac'
    return {"CXX": script(tmp_path / "g++", fails)}


def compiler_is_killed(tmp_path):
    dies = 'case "$*" in *--version*) echo g++ 13.2;; *) kill -9 $$;; esac'
    return {"CXX": script(tmp_path / "g++", dies)}


def folder_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    return {"TORCHINDUCTOR_CACHE_DIR": tmp_path / "file"}


def folder_cannot_be_made(tmp_path):
    return {"TORCHINDUCTOR_CACHE_DIR": "/proc/nowhere"}


MACHINES = (
    (without_compilers, "no working C++ compiler: g++", "install g++"),
    (compiler_is_no_compiler, "no working C++ compiler: /bin/false", "CXX"),
    (compiler_is_gone, "no-such-g++", "CXX"),
    (compiler_lacks_a_header, "omp.h: No such file", "install g++"),
    (compiler_is_killed, "torch.compile does not work here", "install g++"),
    (folder_is_a_file, "cannot write to", "set TORCHINDUCTOR_CACHE_DIR"),
    (folder_cannot_be_made, "cannot write to /proc/nowhere", "set TORCHINDUCTOR_CACHE_DIR"),
)
BY_NAME = pytest.mark.parametrize(
    ("broken", "why", "cure"), MACHINES, ids=[broken.__name__ for broken, *_ in MACHINES]
)


@BY_NAME
def test_a_broken_tool_chain_is_found_by_one_probe(machine, tmp_path, broken, why, cure):
    machine(**broken(tmp_path))
    problem = compiling.compiler_problem("cpu")
    assert problem is not None
    assert why in problem
    assert cure in problem
    assert "\n" not in problem
    assert compiling.compiler_problem("cpu") is problem  # asked once per process


def test_the_doctor_lists_it(machine, tmp_path):
    machine(**without_compilers(tmp_path))
    (part,) = (part for part in facts()["parts"] if part["name"] == "torch.compile")
    assert not part["usable"]
    assert "install g++" in part["advice"]
    assert "[missing] torch.compile" in as_text(facts())


def test_another_compiler_is_another_probe(machine, tmp_path, monkeypatch):
    """Or what inductor has kept would answer for a compiler that is gone."""
    seen = compiling._fingerprint_of_compilers()
    assert seen == compiling._fingerprint_of_compilers()
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    assert seen != compiling._fingerprint_of_compilers()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


def loader():
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images, torch.arange(8) % 2), batch_size=4)


def distilled(capsys, *, net=Net, epochs=1, **how):
    """Weights after a short run, and what it printed."""
    torch.manual_seed(0)
    student = net()
    how = {"losses": [CrossEntropy()], "precision": "fp32"} | how
    fastkd.distill(student, None, loader(), loader(), epochs=epochs, **how)
    return student.state_dict(), capsys.readouterr().out


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def pays(monkeypatch):
    """As if the run were long enough for compile=auto to compile it."""
    monkeypatch.setattr(compiling, "PAYS_FROM", 0.0)


def test_auto_runs_eagerly_with_a_note_and_a_resumed_run_keeps_to_it(
    machine, pays, tmp_path, capsys, monkeypatch
):
    eager, _ = distilled(capsys, compile="off", epochs=2)
    out = tmp_path / "run"
    machine(**without_compilers(tmp_path))
    end_epoch = Trainer.end_epoch

    def stop_after_one(self):
        end_epoch(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "end_epoch", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            distilled(capsys, epochs=2, out=out)
    said = capsys.readouterr().out
    assert "note: this run is not compiled: torch.compile does not work here" in said
    assert Checkpoint.open(out / "last.pt").state["decisions"]["compile"] == "off"
    # Back on a machine with a compiler the run stays what it was.
    monkeypatch.setattr(compiling, "compiler_problem", lambda _: None)
    weights, said = distilled(capsys, epochs=2, out=out, resume=True)
    assert "not compiled" not in said
    assert same(weights, eager)
    assert Checkpoint.open(out / "last.pt").state["decisions"]["compile"] == "off"


def test_on_is_refused_before_anything_is_made(machine, tmp_path, capsys):
    machine(**compiler_is_gone(tmp_path))
    with pytest.raises(UserError, match=r"compile=on, but .*g\+\+.* or set compile=off"):
        distilled(capsys, compile="on", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


TWO_RANKS = """
from fastkd.compute import compiling
from fastkd.compute.ranks import open_world
from fastkd.errors import UserError

with open_world("cpu") as world:
    # The second host alone has no compiler.
    compiling.compiler_problem = lambda _: "no g++: install it" if world.rank else None
    print(compiling.compiler_works(world, "auto", print))
    try:
        compiling.compiler_works(world, "key", print)
    except UserError as error:
        print(error)
"""


def test_ranks_agree_on_what_one_of_them_lacks(ranks):
    for said in ranks(2, "-c", TWO_RANKS):
        assert said.out.splitlines() == [
            "note: this run is not compiled: no g++: install it",
            "False",
            "compile=on, but no g++: install it, or set compile=off",
        ]


WORDS = ("teacher=null", "losses.kd=null", "losses.ce.weight=1", "baseline.lrs=", "epochs=1")


@pytest.mark.parametrize("flags", [(), ("--dry-run",)], ids=["run", "dry-run"])
def test_the_command_says_it_in_one_sentence(command, machine, tmp_path, flags):
    machine(**without_compilers(tmp_path))
    said = command("train", "quickstart", *WORDS, "compile=on", *flags)
    assert said.code == 2
    assert said.err.startswith("fastkd: compile=on, but torch.compile does not work here")
    assert said.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_with_auto_shows_what_the_run_would_do(command, machine, pays, tmp_path):
    machine(**without_compilers(tmp_path))
    said = command("train", "quickstart", *WORDS, "--dry-run")
    assert said.code == 0
    assert "note: this run is not compiled" in said.out
    assert "compile             off" in said.out


def test_an_unusable_folder_does_not_hinder_a_run_without_compiling(program, tmp_path):
    """torch makes the folder as soon as there is an optimizer."""
    environment = {"TORCHINDUCTOR_CACHE_DIR": "/proc/nowhere", "FASTKD_CACHE": str(tmp_path / "c")}
    words = ["-m", "fastkd", "train", "quickstart", *WORDS, "compile=off"]
    said = program(*words, cwd=tmp_path, **environment)
    assert "accuracy" in said.out


# A backend that fails, as inductor does on constructs that it does not know, at several moments.


class Broken(Exception):
    pass


def fails_at_once(graph, inputs):
    raise Broken("this graph has an operator that nobody lowers")


def fails_in_backward(graph, inputs):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def backward(graph, inputs):
        raise Broken("no rule for the gradient")

    return aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=backward
    )(graph, inputs)


def fails_when_it_runs(graph, inputs):
    def run(*arguments):
        graph(*arguments)  # batch norms have been updated
        raise Broken("misaligned address")

    return run


@pytest.fixture
def backend(monkeypatch, machine):
    """torch.compile with another backend, on a machine whose compiler works."""
    monkeypatch.setattr(compiling, "compiler_problem", lambda _: None)
    original = compiling.torch.compile

    def use(backend):
        def compile(unit, **options):
            options = {k: v for k, v in options.items() if k != "mode"}
            return original(unit, **options | {"backend": backend})

        compile.__signature__ = inspect.signature(original)
        monkeypatch.setattr(torch, "compile", compile)

    yield use
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("breaks", [fails_at_once, fails_in_backward, fails_when_it_runs])
def test_a_graph_that_does_not_compile_runs_eagerly_with_the_same_numbers(
    backend, pays, breaks, capsys, tmp_path
):
    eager, _ = distilled(capsys, compile="off", epochs=2)
    backend(breaks)
    weights, said = distilled(capsys, epochs=2, out=tmp_path / "run")
    assert said.count("note: this run is not compiled: torch.compile failed") == 1
    assert same(weights, eager)
    assert Checkpoint.open(tmp_path / "run/last.pt").state["decisions"]["compile"] == "off"
    # The finished folder is resumed as the same run.
    again, _ = distilled(capsys, epochs=2, out=tmp_path / "run", resume=True)
    assert again.keys() == eager.keys()


@pytest.mark.parametrize("breaks", [fails_at_once, fails_in_backward, fails_when_it_runs])
def test_with_on_such_a_graph_is_one_sentence_and_nothing_is_written(
    backend, breaks, capsys, tmp_path
):
    backend(breaks)
    with pytest.raises(UserError, match=r"compile=on, but torch.compile failed \(.*compile=off"):
        distilled(capsys, compile="on", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_does_not_compile_runs_eagerly_too(backend, pays, capsys):
    """It answers before the step, outside of it."""
    torch.manual_seed(1)
    teacher = Net()

    def run(**more):
        torch.manual_seed(0)
        student = Net()
        fastkd.distill(student, teacher, loader(), loader(), epochs=1, precision="fp32", **more)
        return student.state_dict(), capsys.readouterr().out

    eager, _ = run(compile="off")
    backend(fails_at_once)
    weights, said = run()
    assert said.count("note: this run is not compiled") == 1
    assert same(weights, eager)


def test_an_error_of_the_network_itself_is_not_blamed_on_the_compiler(backend, pays, capsys):
    class Wrong(Net):
        def forward(self, x):
            if self.training:
                raise ZeroDivisionError("of the network")
            return super().forward(x)

    backend("eager")
    for compile in ("auto", "on"):
        with pytest.raises(
            UserError, match=r"Wrong, in training, fails .*: of the network"
        ) as raised:
            distilled(capsys, net=Wrong, compile=compile)
        assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_later_run_of_the_process_compiles_again(backend, pays, capsys):
    backend(fails_at_once)
    distilled(capsys)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    backend(counting)
    _, said = distilled(capsys)
    assert "not compiled" not in said
    assert graphs


def test_the_student_is_tried_before_the_teacher_is_trained(command, backend, tmp_path):
    backend(fails_at_once)
    said = command("train", "quickstart", "epochs=1", "teacher.epochs=1", "compile=on")
    assert (said.code, "compile=on, but torch.compile failed" in said.err) == (2, True)
    assert not list(tmp_path.glob("runs/**/last.pt"))


@pytest.mark.parametrize(
    ("names", "environment", "runs"),
    [
        ((), {}, False),
        (("gcc",), {}, True),
        (("clang",), {}, True),
        (("gcc",), {"CC": "icx"}, False),
        (("icx",), {"CC": "icx -O2"}, True),
        ((), {"TRITON_INTERPRET": "1"}, True),
    ],
)
def test_triton_kernels_want_a_c_compiler(monkeypatch, names, environment, runs):
    """Without one their first launch would fail; plain torch then runs in their place."""
    from fastkd.kernels import _library

    for name in ("CC", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(_library.shutil, "which", lambda name: name if name in names else None)
    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: object())
    reason = _library.triton_reason.__wrapped__()
    assert (reason is None) == runs
    assert runs or "gcc" in reason


def test_the_question_changes_nothing_and_the_act_drops_the_folder(machine):
    machine(TORCHINDUCTOR_CACHE_DIR="/proc/nowhere")
    problem = compiling.compiler_folder_problem()
    assert "set TORCHINDUCTOR_CACHE_DIR" in problem
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/proc/nowhere"
    compiling.drop_unusable_cache_folder()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    # A run that wants to be compiled is still told why it is not.
    assert compiling.compiler_folder_problem() == problem
