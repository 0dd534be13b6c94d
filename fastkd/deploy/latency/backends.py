"""What a network can run on, by name: what is missing, how it is opened, which device it is.

Each is opened as a context that yields a call without arguments. A call returns the answer when it
is there; within the context the number of threads is really the one that was asked for.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastkd.compute.compiling import compile_unit, compiler_problem
from fastkd.deploy.latency.onnx import write_onnx
from fastkd.deploy.latency.runtime import (
    PROVIDERS,
    Refused,
    answer_of,
    device_of,
    feed_of,
    images_like,
    provider_missing,
    runs,
    session,
)
from fastkd.deploy.onnx_file import packages_missing
from fastkd.deploy.source import Logits
from fastkd.printable import in_words

__all__ = ["BACKENDS", "Backend", "Call", "Subject", "feed", "torch_threads"]

Call = Callable[[], list[np.ndarray]]
"""Computes the answer."""


@dataclass(frozen=True)
class Subject:
    """What is measured: a network, or an ONNX file that somebody wrote."""

    title: str
    folder: Path
    """For ONNX files that are written on the way."""
    model: nn.Module | None = None
    """In eval mode, on the CPU."""
    file: Path | None = None
    _written: dict[tuple[int, ...], Path] = field(default_factory=dict)

    def shape(self, batch: int, size: tuple[int, int] | None) -> tuple[int, ...]:
        """The input's shape for a batch of images of this height and width."""
        if self.file is not None:
            with session(self.file, "ort-cpu", 1, optimized=False) as opened:
                (images,) = feed_of(opened, batch, size).values()
            return images.shape
        assert size is not None
        return batch, 3, *size

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        """The same random images for the same shape, of the type that the network takes."""
        if self.file is not None:
            with session(self.file, "ort-cpu", 1, optimized=False) as opened:
                (images,) = feed(opened, shape).values()
            return images
        return images_like(shape)

    def images(self, shape: tuple[int, ...]) -> Tensor:
        """The same, for torch."""
        return torch.from_numpy(self.array(shape))

    def onnx(self, shape: tuple[int, ...]) -> Path:
        """The ONNX file: its own, or one written for this input shape, once."""
        if self.file is not None:
            return self.file
        assert self.model is not None
        if shape not in self._written:
            if reason := packages_missing(["onnx", "onnxscript"]):
                raise Refused(reason)
            file = self.folder / f"{'x'.join(map(str, shape))}.onnx"
            write_onnx(self.model, self.images(shape), file)
            self._written[shape] = file
        return self._written[shape]

    def answer(self, shape: tuple[int, ...]) -> list[np.ndarray]:
        """The right answer, by plain torch, or by onnxruntime without graph optimisation."""
        if self.model is None:
            with session(self.onnx(shape), "ort-cpu", 1, optimized=False) as opened:
                return answer_of(opened, feed(opened, shape))
        try:
            with torch.inference_mode():
                return [Logits(self.model)(self.images(shape)).float().numpy()]
        except Exception as error:  # foreign code can fail in any way
            images = "x".join(map(str, shape))
            reason = f"the network fails on an input of {images} ({in_words(error)})"
            raise Refused(reason, wrong=True) from error


@dataclass(frozen=True)
class Backend:
    """One way to run a network."""

    device: str
    missing: Callable[[], str | None]
    """What it lacks on this machine, with its cure."""
    open: Callable[[Subject, tuple[int, ...], int], AbstractContextManager[Call]]
    """(subject, input shape, threads) -> a context with the call."""
    takes_files: bool = True
    """Whether it runs an ONNX file; others need the network itself."""


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch computes on so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _eager(subject: Subject, shape: tuple[int, ...], threads: int) -> Iterator[Call]:
    net, images = Logits(_model(subject)).eval(), subject.images(shape)
    with torch_threads(threads), torch.inference_mode():
        yield lambda: [net(images).numpy()]


@contextmanager
def _compiled(subject: Subject, shape: tuple[int, ...], threads: int) -> Iterator[Call]:
    images = subject.images(shape)
    # Compiled anew within the block: the code that torch writes has the number of threads in it.
    with torch_threads(threads), torch.inference_mode():
        net = compile_unit(Logits(_model(subject)).eval(), enabled=True, fullgraph=False)
        try:
            net(images)
        except Exception as error:  # of dynamo, inductor or the C++ compiler
            raise Refused(f"torch.compile fails ({in_words(error)})", wrong=True) from error
        yield lambda: [net(images).numpy()]


def _model(subject: Subject) -> nn.Module:
    assert subject.model is not None
    return subject.model


def _compiler_missing() -> str | None:
    return compiler_problem("cpu")


def _onnxruntime(name: str) -> Callable[..., AbstractContextManager[Call]]:
    @contextmanager
    def opened(subject: Subject, shape: tuple[int, ...], threads: int) -> Iterator[Call]:
        with session(subject.onnx(shape), name, threads) as one:
            yield runs(one, feed(one, shape))

    return opened


def feed(opened: Any, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What a session is given, for an input of this shape."""
    size = (shape[2], shape[3]) if len(shape) == 4 else None
    return feed_of(opened, shape[0], size)


def _openvino_missing() -> str | None:
    try:
        importlib.import_module("openvino")
    except ModuleNotFoundError:
        return 'openvino is not installed: pip install "fastkd[openvino]"'
    except Exception as error:  # a broken package fails in any way
        return f"openvino is broken: {in_words(error)}"
    return None


@contextmanager
def _openvino(subject: Subject, shape: tuple[int, ...], threads: int) -> Iterator[Call]:
    openvino: Any = importlib.import_module("openvino")
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # it would compute in bf16 where the processor can
    }
    try:
        network = openvino.Core().read_model(str(subject.onnx(shape)))
        network.reshape(list(shape))
        request = openvino.Core().compile_model(network, "CPU", settings).create_infer_request()
    except RuntimeError as error:
        raise Refused(f"openvino cannot open it ({in_words(error)})", wrong=True) from error
    images = subject.array(shape)
    outputs = range(len(network.outputs))

    def call() -> list[np.ndarray]:
        request.infer([images])
        return [request.get_output_tensor(number).data for number in outputs]

    yield call


def _provider(name: str) -> Backend:
    return Backend(device_of(name), lambda: provider_missing(name), _onnxruntime(name))


BACKENDS: dict[str, Backend] = {
    "eager": Backend("cpu", lambda: None, _eager, takes_files=False),
    "compile": Backend("cpu", _compiler_missing, _compiled, takes_files=False),
    "openvino": Backend("cpu", _openvino_missing, _openvino),
    **{name: _provider(name) for name in PROVIDERS},
}
"""By name."""
