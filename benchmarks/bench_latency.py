"""`fastkd latency` against the loop that people write by hand, and against itself.

    pytest benchmarks/bench_latency.py [--pairs 20] [--save-results]

A turn measures one file three times, each in a session of its own: twice by `measure`, and once by
`time.perf_counter` around `session.run` with a fixed warm-up, on the same threads and images. Their
order changes from turn to turn. The ratios are of medians (p50) within a turn; the same for plain
torch. The answers are compared before anything is timed.
"""

import statistics
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch

from fastkd.deploy.latency import measure
from fastkd.deploy.latency.backends import torch_threads
from fastkd.deploy.latency.onnx import write_onnx
from fastkd.deploy.latency.runtime import images_like
from fastkd.models import create_model
from fastkd.testing import spread

WARM_UP, CALLS_S = 50, 1.0
CASES = [("wrn_16_2", 32, 1, 1), ("wrn_16_2", 32, 8, 2), ("timm:mobilenetv2_100", 96, 1, 1)]


def plain_loop(call: Callable[[], object]) -> float:
    """Seconds at p50."""
    for _ in range(WARM_UP):
        call()
    found: list[float] = []
    end = time.perf_counter() + CALLS_S
    while len(found) < WARM_UP or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def plain_onnxruntime(file: Path, shape: tuple[int, ...], threads: int) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images_like(shape)}
    return plain_loop(lambda: session.run(None, feed))


def plain_torch(model: torch.nn.Module, shape: tuple[int, ...], threads: int) -> float:
    images = torch.from_numpy(images_like(shape))
    with torch_threads(threads), torch.inference_mode():
        return plain_loop(lambda: model(images))


@pytest.mark.parametrize(("name", "side", "batch", "threads"), CASES)
@pytest.mark.parametrize("on", ["ort-cpu", "eager"])
def bench_against_a_plain_loop(on, name, side, batch, threads, request, table, tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    config = request.config
    torch.manual_seed(0)
    model = create_model(name, 10).eval()
    shape = (batch, 3, side, side)
    file = tmp_path / "network.onnx"
    write_onnx(model, torch.from_numpy(images_like(shape)), file)
    target = file if on == "ort-cpu" else model
    assert measure(target, shape, on, threads=threads).difference is not None
    if config.getoption("benchmark_disable"):
        pytest.skip("the answers agree; --benchmark-disable reads no clock")

    def fastkd() -> float:
        return measure(target, shape, on, threads=threads, check=False).p50_ms / 1e3

    def plain() -> float:
        if on == "eager":
            return plain_torch(model, shape, threads)
        return plain_onnxruntime(file, shape, threads)

    sides = {"fastkd": fastkd, "again": fastkd, "plain": plain}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    pairs = 2 if config.getoption("quick") else int(config.getoption("pairs"))
    for turn in range(pairs):
        # Each side is first, second and third equally often.
        for which in islice(cycle(sides), turn % 3, turn % 3 + 3):
            seconds[which].append(sides[which]())
    row = {"on": on, "network": name, "input": "x".join(map(str, shape)), "threads": threads}
    row |= {f"{side} p50 ms": 1e3 * statistics.median(of) for side, of in seconds.items()}
    for title, one, other in (("to plain", "fastkd", "plain"), ("to again", "fastkd", "again")):
        ratio = spread(a / b for a, b in zip(seconds[one], seconds[other], strict=True))
        row |= {title: ratio.median, f"p10 {title}": ratio.p10, f"p90 {title}": ratio.p90}
    table.rows.append(row)
    table.seconds[request.node.name] = seconds
