"""Which layers a call spends its time in: torch's modules by hooks, ONNX nodes by a profiler."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastkd.deploy.latency.alone import LAYERS_BY
from fastkd.deploy.latency.backends import Subject, feed, torch_threads
from fastkd.deploy.latency.meter import Rule
from fastkd.deploy.latency.runtime import PROVIDERS, layer_rows, node_rows, session

__all__ = ["layers_of"]

OUTSIDE = "(outside of modules)"
_BY_HOOKS = "modules without children, by a clock before and after each, in eager torch"


def layers_of(
    subject: Subject,
    on: str,
    shape: tuple[int, ...],
    threads: int,
    rule: Rule,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """`layers` and `layers_by` of a row; no layers where the backend shows none."""
    if on == "eager":
        assert subject.model is not None
        rows = _by_hooks(subject.model, subject.images(shape), threads, rule.calls, clock)
        return {"layers": rows, "layers_by": _BY_HOOKS}
    if on in PROVIDERS:
        file = subject.onnx(shape)
        with session(file, "ort-cpu", threads) as opened:
            given = feed(opened, shape)
        rows = node_rows(file, on, threads, given, rule.calls)
        return {"layers": rows, "layers_by": LAYERS_BY}
    return {"layers": [], "layers_by": None}


def _by_hooks(
    model: nn.Module,
    images: torch.Tensor,
    threads: int,
    calls: int,
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """Medians over the calls, in milliseconds; a module that runs twice in a call has both."""
    leaves = {path: one for path, one in model.named_modules() if not any(one.children())}
    spent: dict[str, float] = defaultdict(float)
    begun: dict[str, float] = {}
    hooks = []
    for path, leaf in leaves.items():

        def before(*_: Any, path: str = path) -> None:
            begun[path] = clock()

        def after(*_: Any, path: str = path) -> None:
            spent[path] += clock() - begun[path]

        hooks += [leaf.register_forward_pre_hook(before), leaf.register_forward_hook(after)]
    samples: list[dict[str, float]] = []
    totals: list[float] = []
    warm_up = max(2, calls // 5)
    try:
        with torch_threads(threads), torch.inference_mode():
            for turn in range(warm_up + calls):
                spent.clear()
                start = clock()
                model(images)
                total = clock() - start
                if turn < warm_up:
                    continue
                totals.append(1e3 * total)
                samples.append({path: 1e3 * seconds for path, seconds in spent.items()})
    finally:
        for hook in hooks:
            hook.remove()
    run = {path for one in samples for path in one}
    kinds = {path: type(leaf).__name__ for path, leaf in leaves.items() if path in run}
    return layer_rows(samples, totals, kinds, OUTSIDE)
