"""`fastkd doctor`: what this machine and this installation offer, and what is missing.

The facts come from `fastkd.compute.machine` and are kept in every run folder. Parts are found by
trying them. A broken package must not break the report, so every probe catches
whatever an import may raise and reports it in place.
"""

import argparse
import importlib
import importlib.util
import json
import platform
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

import fastkd
from fastkd.cli.blocks import blocks_of
from fastkd.compute.compiling import compiler_problem
from fastkd.compute.machine import cpu_facts, gpu_facts, kernel_facts, version_of
from fastkd.errors import UserError
from fastkd.output.trackers.opening import TRACKERS
from fastkd.output.trackers.sink import TrackerName
from fastkd.printable import in_words
from fastkd.training.optim import apex_missing

__all__ = ["Part", "as_text", "doctor", "facts"]


@dataclass(frozen=True)
class Part:
    """One optional piece of software."""

    name: str
    found: str
    """Version or state in words; empty if there is none."""
    usable: bool
    """Whether fastkd would use it on this machine."""
    used_for: str
    advice: str
    """How to get it, or why it is not used; empty if there is nothing to do."""


def doctor(options: argparse.Namespace) -> None:
    """Print the report, as text or as JSON; with --blocks the one about a network."""
    if options.blocks is not None:
        blocks_of(options)
        return
    for name in ("input", "batch", "precision"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} says how --blocks measures: add --blocks, or leave it out")
    found = facts()
    print(json.dumps(found, indent=1) if options.json else as_text(found))


def facts() -> dict[str, Any]:
    """The report as plain values."""
    return {
        "fastkd": fastkd.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version_of("torchvision"),
        "timm": version_of("timm"),
        "system": platform.platform(),
        "cpu": cpu_facts(),
        "gpus": gpu_facts(),
        "kernels": kernel_facts(),
        "parts": [asdict(part) for part in _parts()],
    }


def _parts() -> list[Part]:
    engines = [_launcher("Ray", "ray"), _launcher("submitit", "submitit")]
    parts = [_compiled_core(), _triton(), _torch_compile(), _dali(), _apex(), _onnx()]
    return [*parts, *engines, *map(_tracker, TRACKERS)]


def _compiled_core() -> Part:
    used_for = "fused losses and selection on a CPU"
    status = kernel_facts()
    if "error" in status:
        return Part("C++ core", "", False, used_for, status["error"])
    for op in status.values():
        if op["cpu"].startswith("c++"):
            return Part("C++ core", op["cpu"].removeprefix("c++ "), True, used_for, "")
    reasons = dict.fromkeys(op["reason"] for op in status.values() if op["reason"])
    eager = "until then plain torch runs: same numbers, slower"
    return Part("C++ core", "", False, used_for, "; ".join([*reasons, eager]))


def _triton() -> Part:
    used_for = "the same operations on a GPU, and torch.compile there"
    version, problem = _probe("triton", lambda module: module.__version__)
    if problem:
        return Part("Triton", "", False, used_for, f"{problem}; torch's CUDA builds include it")
    if not torch.cuda.is_available():
        return Part("Triton", version, False, used_for, "idle: torch sees no CUDA device")
    return Part("Triton", version, True, used_for, "")


def _torch_compile() -> Part:
    used_for = "long runs (compile=auto), or all with compile=on"
    problem = compiler_problem("cuda" if torch.cuda.is_available() else "cpu")
    if problem is None:
        return Part("torch.compile", "", True, used_for, "")
    eager = "until then runs are not compiled: slower"
    return Part("torch.compile", "", False, used_for, f"{problem}; {eager}")


def _dali() -> Part:
    used_for = "decoding image files by request (data.backend=dali)"
    version, problem = _probe("nvidia.dali", lambda module: module.__version__)
    if not problem:
        return Part("DALI", version, True, used_for, "")
    extra = 'pip install "fastkd[dali]" for CUDA 13 and CPUs, "fastkd[dali-cuda12]" for CUDA 12'
    return Part("DALI", "", False, used_for, f"{problem}; {extra}; without it torch workers decode")


def _apex() -> Part:
    used_for = "other fused optimizers, by request (optim.impl=apex)"
    missing = apex_missing()
    if missing is None:
        return Part("apex", "usable", True, used_for, "")
    return Part(
        "apex",
        "",
        False,
        used_for,
        f"{missing}; fastkd does not need it. It is built from github.com/NVIDIA/apex; the apex "
        "on PyPI is another project",
    )


def _onnx() -> Part:
    used_for = "fastkd export, and fastkd eval of ONNX files"
    names = ("onnxruntime", "onnx", "onnxscript")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if not missing:
        # The build for GPUs is a distribution of another name.
        version = version_of("onnxruntime") or version_of("onnxruntime-gpu") or ""
        return Part("onnxruntime", version, True, used_for, "")
    advice = f'{", ".join(missing)} not installed; pip install "fastkd[export]"'
    return Part("onnxruntime", "", False, used_for, advice)


def _launcher(title: str, name: str) -> Part:
    used_for = f"sweeps over several hosts, by request (--launcher {name})"
    version = version_of(name)
    if version is not None:
        return Part(title, version, True, used_for, "")
    advice = f'not installed; pip install "fastkd[{name}]"; without it --jobs uses one host'
    return Part(title, "", False, used_for, advice)


def _tracker(name: TrackerName) -> Part:
    used_for = f"watching runs, by request (track={name})"
    sink = TRACKERS[name]
    version = version_of(sink.package)
    if version is not None:
        return Part(name, version, True, used_for, "")
    return Part(name, "", False, used_for, f'not installed; pip install "fastkd[{sink.extra}]"')


def _probe(name: str, version: Callable[[Any], str]) -> tuple[str, str]:
    """Version and no problem, or no version and the problem."""
    try:
        return str(version(importlib.import_module(name))), ""
    except ModuleNotFoundError as error:
        # An installed package that lacks one of its parts is broken, not missing.
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return "", "not installed"
        return "", f"broken: {in_words(error)}"
    except (Exception, SystemExit) as error:
        return "", f"broken: {in_words(error)}"


def as_text(found: Mapping[str, Any]) -> str:
    """The report for people, from `facts`."""
    cpu, gpus = found["cpu"], found["gpus"]
    lines = [
        f"fastkd {found['fastkd']}, Python {found['python']}, torch {found['torch']}, "
        f"torchvision {found['torchvision']}, timm {found['timm']}",
        found["system"],
        "",
        "Devices",
        f"  CPU   {cpu['name']}, {cpu['cores']} cores, {cpu['threads']} torch threads, "
        f"{cpu['instructions']}",
    ]
    if cpu["bf16"]:
        lines.append("        computes in bf16, and precision=auto uses it")
    else:
        lines.append(
            "        has no bf16 instructions: precision=auto means fp32, bf16 would be slower"
        )
    for number, gpu in enumerate(gpus):
        lines.append(
            f"  GPU {number} {gpu['name']}, {gpu['memory_gib']} GiB, sm_"
            f"{gpu['capability'].replace('.', '')}"
        )
    if not gpus:
        lines.append("  GPU   none that torch can use: training runs on the CPU")
    lines += ["", "Parts"]
    for part in found["parts"]:
        state = "ok" if part["usable"] else ("found" if part["found"] else "missing")
        title = f"{part['name']} {part['found']}"
        lines.append(f"  [{state:^7}] {title:<16} {part['used_for']}")
        if part["advice"]:
            lines += [f"{'':12}{line}" for line in _wrapped(part["advice"], 80 - 12)]
    lines += ["", "Operations and what runs them"]
    for name, backends in found["kernels"].items():
        if isinstance(backends, Mapping):
            # Why a slower one runs is stated above, once for all operations.
            runs = {device: backends[device].partition(" (C++")[0] for device in ("cpu", "cuda")}
            backends = ", ".join(f"{device}: {what}" for device, what in runs.items())
        lines.append(f"  {name:<22} {backends}")
    return "\n".join(lines)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
