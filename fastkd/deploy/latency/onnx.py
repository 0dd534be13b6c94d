"""A network as an ONNX file of one input shape, for the backends that read such files.

The names of its nodes carry the paths of the modules that they come from, for tables of layers.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from fastkd.deploy.latency.runtime import Refused
from fastkd.deploy.onnx_file import converted
from fastkd.deploy.program import captured
from fastkd.deploy.source import Logits
from fastkd.errors import UserError
from fastkd.models.card import title_of

__all__ = ["write_onnx"]

_MERGED = {"BatchNormalization", "Relu", "Clip", "HardSwish", "Sigmoid", "LeakyRelu"}
"""What onnxruntime computes within the convolution before it."""


def write_onnx(model: nn.Module, images_NCHW: Tensor, file: Path) -> None:
    """Write the network in eval mode for this input shape. Refused if torch cannot."""
    try:
        program = captured(Logits(model).eval(), images_NCHW, {}, title_of(model))
        made = converted(program)
    except UserError as error:
        raise Refused(str(error), wrong=True) from error
    _name_nodes(made)
    made.save(str(file), external_data=False)


def _name_nodes(program: torch.onnx.ONNXProgram) -> None:
    """`layer1.0.conv1/conv2d_3`: where in the network a node and its answer come from.

    onnxruntime gives a convolution that it has merged with what follows the name of the answer, so
    a norm or activation behind a convolution has the path of the convolution.
    """
    owner: dict[str, str] = {}
    outputs = {id(value) for value in program.model.graph.outputs}
    for node in program.model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        # "['', 'network', 'network.layer1', .., 'conv2d_3']": module paths, then the operation.
        paths = [one.strip(" '\"") for one in scopes.strip("[]").split(",")][:-1]
        before, *others = [one and one.name for one in node.inputs] or [None]
        # A convolution into which torch has folded the norm behind it has the scope of the norm.
        weights = [one.removesuffix(".weight") for one in others if one and ".weight" in one[-7:]]
        path = (weights or paths or [""])[-1].removeprefix("network").removeprefix(".")
        if node.op_type in _MERGED and before in owner:
            path = owner[before]
        for value in node.outputs:
            if path and value.name and id(value) not in outputs:
                value.name = f"{path}/{value.name}"
                if node.op_type in {"Conv", *_MERGED}:
                    owner[value.name] = path
        if path and node.name:
            node.name = f"{path}/{node.name}"
