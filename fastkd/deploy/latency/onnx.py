"""A network as an ONNX file of one input shape, for the backends that read such files.

The names of its nodes carry the paths of the modules that they come from, for tables of layers.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fastkd.deploy.latency.runtime import Refused
from fastkd.models.taps import logits_of
from fastkd.printable import in_words

__all__ = ["Logits", "export_missing", "write_onnx"]


_MERGED = {"BatchNormalization", "Relu", "Clip", "HardSwish", "Sigmoid", "LeakyRelu"}
"""What onnxruntime computes within the convolution before it."""


class Logits(nn.Module):
    """A network whose answer is what fastkd counts as its logits."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        return logits_of(self.body(x))


def export_missing() -> str | None:
    """What writing ONNX lacks here."""
    for name in ("onnx", "onnxscript"):
        try:
            __import__(name)
        except ImportError:
            return f"{name} is not installed: pip install onnx onnxscript onnxruntime"
    return None


def write_onnx(model: nn.Module, images_NCHW: Tensor, file: Path) -> None:
    """Write the network in eval mode for this input shape. Refused if torch cannot."""
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                Logits(model).eval(), (images_NCHW,), dynamo=True, input_names=["images"]
            )
            assert program is not None
            _name_nodes(program)
            program.save(str(file), external_data=False)
    except Exception as error:  # of torch, of the network, of onnxscript
        raise Refused(f"torch cannot write it as ONNX ({in_words(error)})", wrong=True) from error


def _name_nodes(program: torch.onnx.ONNXProgram) -> None:
    """`layer1.0.conv1/conv2d_3`: where in the network a node and its answer come from.

    onnxruntime gives a convolution that it has merged with what follows the name of the answer, so
    a norm or activation behind a convolution has the path of the convolution.
    """
    owner: dict[str, str] = {}
    outputs = {id(value) for value in program.model.graph.outputs}
    for node in program.model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        # "['', 'body', 'body.layer1', .., 'conv2d_3']": module paths, then the operation.
        paths = [one.strip(" '\"") for one in scopes.strip("[]").split(",")][:-1]
        before, *others = [one and one.name for one in node.inputs] or [None]
        # A convolution into which torch has folded the norm behind it has the scope of the norm.
        weights = [one.removesuffix(".weight") for one in others if one and ".weight" in one[-7:]]
        path = (weights or paths or [""])[-1].removeprefix("body").removeprefix(".")
        if node.op_type in _MERGED and before in owner:
            path = owner[before]
        for value in node.outputs:
            if path and value.name and id(value) not in outputs:
                value.name = f"{path}/{value.name}"
                if node.op_type in {"Conv", *_MERGED}:
                    owner[value.name] = path
        if path and node.name:
            node.name = f"{path}/{node.name}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress and the warnings of torch's exporter."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
