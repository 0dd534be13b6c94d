"""What the programs of the tests share: a tiny recipe, forked processes, a look into run folders.

A program loads torch and fastkd once and forks a child for every run, which may then be killed;
nothing may compute in parallel before the fork, so programs run with OMP_NUM_THREADS=1.
"""

import hashlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # seconds that every child would spend again
import torch.utils.flop_counter
import yaml

import fastkd.cli.doctor
import fastkd.data.sources.synthetic
import fastkd.losses.logits
import fastkd.recipes
import fastkd.report.plots
import fastkd.runs.stages
from fastkd.cli.commands import main
from fastkd.compute.ranks import World, open_world
from fastkd.data.loaders.resident import ResidentLoader
from fastkd.models import create_model
from fastkd.output.run_folder import RunFolder
from fastkd.storage.weights import describe, load_weights, save_weights

TIMING = ("images_per_s", "data_wait", "seconds", "epoch_s", "wait_s", "train_seconds", "finished")

# 60 images of 8x8 in batches of 16, 16, 16 and 12; two views; every tensor of a step matters.
RECIPE: dict[str, Any] = {
    "name": "tiny/kd",
    "epochs": 2,
    "batch_size": 16,
    "compile": "off",
    "precision": "fp32",
    "device": "cpu",
    "save_steps": 1,
    "data": {"name": "synthetic", "image_size": 8, "train_limit": 60, "drop_last": False},
    "augment": {"padding": 1, "xprime": "cutmix"},
    "student": {"name": "resnet8", "width": 0.5},
    "teacher": {
        "name": "resnet8",
        "width": 0.5,
        "weights": "../teacher.safetensors",
        "min_accuracy": 0,
    },
    "optim": {"lr": 0.05, "schedule": "cosine"},
    "losses": {"kd": {"weight": 0.9, "ce_weight": 0.1, "views": ["x", "xprime"]}},
}


def prepare(folder: Path, recipe: Mapping[str, Any] = RECIPE) -> Path:
    """A working folder with recipe.yaml and few validation images.

    Two teachers' weights lie beside it: where they lie is part of a recipe's digest, and runs in
    several folders are compared.
    """
    # The last batch of 16 has one image: a second rank has none to evaluate there.
    fastkd.data.sources.synthetic.NUM_IMAGES["val"] = 49
    fastkd.report.plots.plot_curves = lambda *_: None  # a second each, and nothing reads them
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(dict(recipe)))
    torch.manual_seed(7)
    teacher = create_model("resnet8", 10, width=0.5)
    save_weights(folder.parent / "teacher.safetensors", teacher, describe(teacher))
    other = create_model("wrn_10_1", 10)
    save_weights(folder.parent / "other.safetensors", other, describe(other))
    return folder


def command(folder: Path, *words: str, fetches: str | None = None) -> int:
    """`fastkd WORDS` in `folder`; the exit code.

    fetches: file in `folder` that takes the sample ids of every training batch, as fetched.
    """
    os.chdir(folder)
    if fetches is not None:
        _record_fetches(folder / fetches)
    return main(words)


def forked(*jobs: Callable[[], int | None], log: Path) -> list[int]:
    """Run every job in a child of its own, all at once; exit codes, or -9 of a killed one."""
    children = [_fork(job, log) for job in jobs]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def as_ranks(num: int, job: Callable[[], int | None]) -> list[Callable[[], int | None]]:
    """`job` once per rank of a group, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def of_rank(rank: int) -> Callable[[], int | None]:
        def run() -> int | None:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num, "MASTER_PORT": port}
            os.environ |= {key: str(value) for key, value in place.items()}
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            return job()

        return run

    return [of_rank(rank) for rank in range(num)]


def in_both_worlds(
    target: Path, cases: Mapping[str, Callable[[World], Any]]
) -> dict[str, list[dict[str, Any]]]:
    """What every case returns on one process, and on each of two ranks: {"one": [..], "two": ..}.

    Files and a log are named after `target`; SystemExit with the log where a process failed.
    """

    def all_cases() -> None:
        with open_world("cpu", timeout_s=60) as world:
            found = {name: case(world) for name, case in cases.items()}
            torch.save(found, f"{target}.{world.size}.{world.rank}")

    log = target.with_suffix(".log")
    codes = forked(all_cases, log=log) + forked(*as_ranks(2, all_cases), log=log)
    if any(codes):
        raise SystemExit(log.read_text())
    worlds = {"one": 1, "two": 2}
    return {
        name: [torch.load(f"{target}.{size}.{rank}") for rank in range(size)]
        for name, size in worlds.items()
    }


def die() -> None:
    """What a crash, a power cut or the kernel's memory killer does."""
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, number: int, then: Callable[..., None]) -> None:
    """Call `then` with the arguments in place of the `number`-th call (from 0) of owner.name."""
    original = getattr(owner, name)
    calls = [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number + 1:
            then(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def facts(run: Path) -> dict[str, Any]:
    """Everything a finished run leaves, by name, but clocks: digests of tensors, plain values."""
    found: dict[str, Any] = {}
    # Not the bytes of the file: safetensors writes its metadata in an order of the moment.
    _flatten("best", load_weights(run / "best.safetensors"), found)
    _flatten("last", torch.load(run / "last.pt", weights_only=True), found)
    _flatten("rows", RunFolder.open(run).metrics(), found)
    _flatten("summary", RunFolder.open(run).summary(), found)
    return found


def digests(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """A short name for the bits of every tensor."""
    found: dict[str, Any] = {}
    _flatten("", state, found)
    return {name.removeprefix("."): digest for name, digest in found.items()}


def different(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names whose facts are not identical."""
    return [key for key in {**one, **other} if one.get(key, "absent") != other.get(key, "absent")]


def _flatten(name: str, value: Any, found: dict[str, Any]) -> None:
    if name.rpartition(".")[2] in TIMING:
        return
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous()
        shape, digest = tuple(value.shape), hashlib.sha256(value.numpy().tobytes()).hexdigest()
        found[name] = f"{value.dtype} {shape} {digest[:16]}"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _flatten(f"{name}.{key}", item, found)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _flatten(f"{name}.{number}", item, found)
    else:
        found[name] = repr(value)


def _record_fetches(target: Path) -> None:
    original = ResidentLoader._crops
    target.touch()

    def crops(self: ResidentLoader, index_N: torch.Tensor, epoch: int, *view: int) -> torch.Tensor:
        if self.plan.train and not any(view):
            with target.open("a") as file:
                file.write(json.dumps([epoch, index_N.tolist()]) + "\n")
        return original(self, index_N, epoch, *view)

    ResidentLoader._crops = crops


def _fork(job: Callable[[], int | None], log: Path) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
        code = job() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
