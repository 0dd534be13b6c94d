"""An ONNX file in onnxruntime: sessions, inputs, answers, and its profiler.

Part of the script for other devices: onnxruntime and numpy only. What cannot be measured is
`Refused`, whose text completes "BACKEND: ..".
"""

import bisect
import json
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "PROVIDERS",
    "TOLERANCES",
    "Refused",
    "answer_of",
    "compare",
    "device_of",
    "feed_of",
    "images_like",
    "layer_rows",
    "node_rows",
    "own_size",
    "provider_missing",
    "runs",
    "session",
]

PROVIDERS = {
    "ort-cpu": ("CPUExecutionProvider",),
    "ort-cuda": ("CUDAExecutionProvider",),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider"),
}
"""Execution providers of onnxruntime by the name of the backend; the first must be what runs."""

TOLERANCES = {"cpu": 1e-3, "cuda": 1e-2}
"""How far an answer may be from the reference, as a share of the largest |reference|. GPUs multiply
in TF32 by default, with 10 bits behind the point."""
HALF_TOLERANCE = 1e-2
"""For answers in 16 bits."""

NUMBERS = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}
"""Types of an input for images."""

OUTSIDE = "(between the nodes)"


def device_of(name: str) -> str:
    """Where a backend of `PROVIDERS` computes."""
    return "cpu" if name == "ort-cpu" else "cuda"


class Refused(Exception):
    """A backend cannot measure this. wrong: it should have been able to."""

    def __init__(self, reason: str, *, wrong: bool = False) -> None:
        super().__init__(reason)
        self.wrong = wrong


def provider_missing(name: str) -> str | None:
    """What a backend of `PROVIDERS` lacks on this machine, and how to get it."""
    try:
        import onnxruntime
    except ImportError as error:
        broken = "" if isinstance(error, ModuleNotFoundError) else f" is broken ({error})"
        return f"onnxruntime{broken or ' is not installed'}: pip install onnxruntime"
    wanted, there = PROVIDERS[name][0], onnxruntime.get_available_providers()
    if wanted in there:
        return None
    return (
        f"this onnxruntime {onnxruntime.__version__} has no {wanted} (it has {', '.join(there)}): "
        "a machine with an NVIDIA GPU needs pip install onnxruntime-gpu"
    )


@contextmanager
def session(
    file: Path, name: str, threads: int, *, optimized: bool = True, profile: str | None = None
) -> Iterator[Any]:
    """A session of its own for one number of threads, which end with its last reference.

    profile: the beginning of the name of a file into which the profiler writes.
    """
    if reason := provider_missing(name):
        raise Refused(reason)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # warnings of a provider that is not used
    levels = onnxruntime.GraphOptimizationLevel
    level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.graph_optimization_level = level
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    if not file.is_file():
        raise Refused(f"{file}: no such file", wrong=True)
    try:
        opened = onnxruntime.InferenceSession(str(file), options, providers=[*PROVIDERS[name]])
    except Exception as error:  # its errors have no common class
        raise Refused(f"onnxruntime cannot open {file} ({_reason(error)})", wrong=True) from error
    if opened.get_providers()[0] != PROVIDERS[name][0]:
        raise Refused(
            f"{PROVIDERS[name][0]} did not start, and onnxruntime would compute on the CPU: see "
            "that its CUDA, cuDNN and TensorRT are the versions that it was built for"
        )
    yield opened


def own_size(opened: Any) -> tuple[int, int] | None:
    """Height and width that a file fixes; None if it takes any, or no images."""
    shape = opened.get_inputs()[0].shape
    if len(shape) != 4 or not all(isinstance(side, int) for side in shape[2:]):
        return None
    return shape[2], shape[3]


def feed_of(opened: Any, batch: int, size: tuple[int, int] | None) -> dict[str, np.ndarray]:
    """The same random images for the same shape, in what the file asks for."""
    inputs = opened.get_inputs()
    first = inputs[0] if len(inputs) == 1 else None
    if first is None or first.type not in NUMBERS:
        asked = ", ".join(f"{one.name} {one.type}" for one in inputs)
        raise Refused(f"the file has inputs {asked}; expected one input of images", wrong=True)
    shape = _filled(first.name, list(first.shape), batch, size)
    dtype = NUMBERS[first.type]
    return {first.name: images_like(shape, dtype)}


def _filled(name: str, shape: list[Any], batch: int, size: tuple[int, int] | None) -> list[int]:
    """The shape of an input with numbers for what a file leaves open."""
    if isinstance(shape[0], int) and shape[0] != batch:
        raise Refused(f"the file takes batches of {shape[0]} only")
    shape[0] = batch
    if len(shape) == 4:
        fixed = [isinstance(side, int) for side in shape[2:]]
        if size is None and not all(fixed):
            raise Refused("the file takes images of any size: name one, --size 224", wrong=True)
        if size is not None:
            clash = any(f and a != b for f, a, b in zip(fixed, shape[2:], size, strict=True))
            if clash:
                raise Refused(f"the file takes images of {shape[2]}x{shape[3]} only", wrong=True)
            shape[2:] = size
    if unknown := [side for side in shape if not isinstance(side, int)]:
        raise Refused(f"the input {name} has open sizes {unknown}", wrong=True)
    return shape


def images_like(shape: Sequence[int], dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    """Random images as after normalisation; bytes for an input of bytes."""
    random = np.random.default_rng(seed)
    if dtype == np.uint8:
        return random.integers(0, 256, shape, np.uint8)
    return random.standard_normal(shape, np.float32).astype(dtype)


def compare(answer: Sequence[np.ndarray], truth: Sequence[np.ndarray], device: str) -> float:
    """The largest difference of two answers, as a share of the largest |truth|.

    Refused if it is above the tolerance, so that nobody times a network that computes something
    else.
    """
    shapes = [[list(one.shape) for one in each] for each in (answer, truth)]
    if shapes[0] != shapes[1]:
        raise Refused(f"its answer has shapes {shapes[0]}, expected {shapes[1]}", wrong=True)
    worst, half = 0.0, False
    for one, other in zip(answer, truth, strict=True):
        half = half or one.dtype == np.float16
        exact = other.astype(np.float64)
        off = np.abs(one.astype(np.float64) - exact)
        scale = float(np.abs(exact).max(initial=0.0)) or 1.0
        finite = bool(np.isfinite(off).all())
        worst = max(worst, float(off.max(initial=0.0)) / scale) if finite else float("inf")
    limit = max(TOLERANCES[device], HALF_TOLERANCE if half else 0.0)
    if not worst <= limit:
        raise Refused(
            f"its answer differs by {worst:.1g} of the largest value, allowed is {limit:g}: it is "
            "not timed",
            wrong=True,
        )
    return worst


def node_rows(
    file: Path, name: str, threads: int, feed: dict[str, np.ndarray], calls: int
) -> list[dict[str, Any]]:
    """Milliseconds of each node of the optimised graph, by onnxruntime's profiler.

    The first fifth of the calls warms up.
    """
    warm_up = max(2, calls // 5)
    with tempfile.TemporaryDirectory() as folder:
        with session(file, name, threads, profile=os.path.join(folder, "profile")) as opened:
            for _ in range(warm_up + calls):
                opened.run(None, feed)
            written = opened.end_profiling()
        events = json.loads(Path(written).read_text())
    return rows_of_events(events, warm_up)


def rows_of_events(events: list[dict[str, Any]], warm_up: int) -> list[dict[str, Any]]:
    """Medians over the runs behind the warm-up, slowest first, and what lies between the nodes."""
    ended: list[float] = []
    kinds: dict[str, str] = {}
    nodes: list[tuple[float, str, float]] = []
    totals = []
    for event in events:
        end = event.get("ts", 0) + event.get("dur", 0)
        if event.get("name") == "model_run":
            ended.append(end)
            totals.append(event["dur"] / 1e3)
        elif event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            node = event["name"][: -len("_kernel_time")]
            nodes.append((end, node, event["dur"] / 1e3))
            kinds[node] = event["args"].get("op_name", "")
    spent: list[dict[str, float]] = [defaultdict(float) for _ in totals]
    for end, node, ms in nodes:
        spent[min(bisect.bisect_left(ended, end), len(ended) - 1)][node] += ms
    return layer_rows(spent[warm_up:], totals[warm_up:], kinds, OUTSIDE)


def layer_rows(
    spent: Sequence[dict[str, float]], totals: Sequence[float], kinds: dict[str, str], outside: str
) -> list[dict[str, Any]]:
    """Medians over calls, slowest first, and their share of the sum of all medians.

    spent: milliseconds by layer in each call. totals: of each whole call; `outside` gets what the
    layers leave of it. The medians of a disturbed machine do not add up to that of the whole call,
    so shares are of their own sum.
    """
    samples = {name: [one.get(name, 0.0) for one in spent] for name in kinds}
    samples[outside] = [
        max(0.0, total - sum(one.values())) for one, total in zip(spent, totals, strict=True)
    ]
    medians = {name: statistics.median(ms) for name, ms in samples.items()}
    total = sum(medians.values()) or 1.0
    rows = [
        {"name": name, "kind": kinds.get(name, ""), "ms": ms, "share": ms / total}
        for name, ms in medians.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def answer_of(opened: Any, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """One answer. Refused if the file cannot be run on such images."""
    try:
        return opened.run(None, feed)
    except Exception as error:  # its errors have no common class
        raise Refused(f"onnxruntime cannot run it ({_reason(error)})", wrong=True) from error


def runs(opened: Any, feed: dict[str, np.ndarray]) -> Callable[[], list[np.ndarray]]:
    """A call computes the answer."""
    return lambda: opened.run(None, feed)


def _reason(error: BaseException) -> str:
    """The first line of an error."""
    text = str(error).strip().splitlines()
    return text[0][:300].rstrip(".") if text else type(error).__name__
