"""How long a network takes: one case for code, a whole report for the command.

`measure` is what other code calls, thousands of times if need be; `measure_all` is `fastkd
latency`.
"""

import difflib
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastkd
from fastkd.compute.machine import version_of
from fastkd.deploy.latency.alone import UNOPTIMIZED, Asked, fill, start_of_report
from fastkd.deploy.latency.backends import BACKENDS, Subject
from fastkd.deploy.latency.host import Neighbours
from fastkd.deploy.latency.layers import layers_of
from fastkd.deploy.latency.meter import RULE, Rule, time_calls
from fastkd.deploy.latency.record import Latency, LatencyReport
from fastkd.deploy.latency.runtime import Refused, compare
from fastkd.errors import RunFailed, UserError
from fastkd.printable import in_words

__all__ = ["check_names", "measure", "measure_all"]

Clock = Callable[[], float]


def measure(
    network: nn.Module | str | os.PathLike[str] | bytes,
    shape: Sequence[int],
    on: str = "eager",
    *,
    threads: int = 1,
    rule: Rule = RULE,
    clock: Clock = time.perf_counter,
    layers: bool = False,
    check: bool = True,
) -> Latency:
    """Time one network or layer on one backend.

    network: a module on the CPU, in any mode; a file in ONNX, or the bytes of one. shape: of its
        input, the batch first. on: eager, compile, ort-cpu, openvino, ort-cuda or tensorrt.
    threads: set for this backend, and restored.
    rule: when it is warm and how many calls are timed; `QUICK` is for one of thousands.
    clock: seconds, rising.
    layers: also time each layer, where the backend can.
    check: compare the answer with plain torch's first (with onnxruntime's without graph
        optimisation for a file).
    Raises UserError where something is missing on this machine, RunFailed for an answer that
    differs, or a network that the backend cannot run.
    """
    check_names([on])
    if reason := BACKENDS[on].missing():
        raise UserError(f"{on}: {reason}")
    with tempfile.TemporaryDirectory(prefix="fastkd-latency-") as folder:
        place = Path(folder)
        modes: dict[nn.Module, bool] = {}
        if isinstance(network, nn.Module):
            modes = {one: one.training for one in network.modules()}
            subject = Subject(type(network).__name__, place, model=network.eval())
        else:
            file = place / "network.onnx" if isinstance(network, bytes) else Path(network)
            if isinstance(network, bytes):
                file.write_bytes(network)
            subject = Subject(file.name, place, file=file)
        try:
            row = _row(subject, on, tuple(shape), threads, rule=rule, clock=clock, check=check)
            if layers:
                row |= layers_of(subject, on, tuple(shape), threads, rule, clock)
        except Refused as error:
            kind = RunFailed if error.wrong else UserError
            raise kind(f"{on}: {error}") from error
        finally:
            for one, training in modes.items():
                one.training = training
    return Latency.model_validate(row)


def check_names(names: Sequence[str]) -> None:
    """UserError for a backend that does not exist."""
    for name in names:
        if name not in BACKENDS:
            near = difflib.get_close_matches(name, BACKENDS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(BACKENDS)}"
            raise UserError(f"there is no backend {name!r}: {hint}")


def measure_all(
    subject: Subject,
    asked: Asked,
    *,
    size: tuple[int, int] | None,
    layers: bool = False,
    rule: Rule | None = None,
    clock: Clock = time.perf_counter,
    begin: Callable[[dict[str, Any]], None] = lambda report: None,
    say: Callable[[dict[str, Any]], None] = lambda row: None,
) -> LatencyReport:
    """Every backend with every batch and number of threads.

    begin: is told the report before the first row is measured; say: each row.
    """
    check_names(asked.on)
    rule = rule or RULE
    reference = UNOPTIMIZED if subject.model is None else "plain torch"
    report = start_of_report(subject.title, rule, _versions(asked.on), reference)
    begin(report)

    def lacks(on: str) -> str | None:
        if subject.model is None and not BACKENDS[on].takes_files:
            return "an ONNX file has no torch network: name the network or the run instead"
        return BACKENDS[on].missing()

    def row_of(on: str, batch: int, threads: int, neighbours: Neighbours) -> dict[str, Any]:
        shape = subject.shape(batch, size)
        how: dict[str, Any] = {"rule": rule, "clock": clock, "neighbours": neighbours}
        row = _row(subject, on, shape, threads, **how)
        return row | (layers_of(subject, on, shape, threads, rule, clock) if layers else {})

    fill(report, asked, lacks, row_of, say)
    return LatencyReport.model_validate(report)


def _row(
    subject: Subject,
    on: str,
    shape: tuple[int, ...],
    threads: int,
    *,
    rule: Rule,
    clock: Clock,
    check: bool = True,
    neighbours: Neighbours | None = None,
) -> dict[str, Any]:
    """One case, as plain values. Refused if it cannot be measured."""
    backend = BACKENDS[on]
    truth = subject.answer(shape) if check else None
    with backend.open(subject, shape, threads) as call:
        try:
            found = call()
        except Exception as error:  # of the network, or of any runtime
            raise Refused(f"it cannot run the network ({in_words(error)})", wrong=True) from error
        difference = None if truth is None else compare(found, truth, backend.device)
        with neighbours or Neighbours():
            timing = time_calls(call, rule, clock)
    return {
        "on": on,
        "input": shape,
        "threads": threads,
        **timing.plain(),
        "difference": difference,
        "layers": [],
        "layers_by": None,
    }


def _versions(names: Sequence[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "fastkd": fastkd.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if any(BACKENDS[name].takes_files for name in names):
        runtimes = ("onnxruntime", "onnxruntime-gpu")
        found["onnxruntime"] = next(filter(None, map(version_of, runtimes)), None)
    if "openvino" in names:
        found["openvino"] = version_of("openvino")
    return found
