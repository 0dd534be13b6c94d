"""A block as an ONNX graph in onnxruntime, which is what people deploy on CPUs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.kernels.grouped_pointwise.inputs import Norm
from fastkd.models.planner.measure import Tensors
from fastkd.models.planner.spec import BlockSpec


def session_of(spec: BlockSpec, given: Tensors) -> Callable[[], np.ndarray]:
    """A call computes the block in eval mode, on torch's number of threads, graph optimised.

    Raises ImportError without onnx or onnxruntime.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(
        graph_of(spec, given), options, providers=["CPUExecutionProvider"]
    )
    feed = {"x": _array(given.x_NCHW)}
    if given.residual is not None:
        feed["residual"] = _array(given.residual)
    return lambda: session.run(None, feed)[0]


def graph_of(spec: BlockSpec, given: Tensors) -> bytes:
    """The serialised model: Conv, BatchNormalization, Relu or Clip, Add, as an export has them."""
    graph = _Graph()
    if given.expand is not None:
        graph.conv(given.expand)
    if given.before is not None:
        graph.normalise(given.before)
        graph.activate(given.before)
    graph.conv(
        given.grouped,
        group=spec.groups,
        pads=[spec.padding] * 4,
        strides=[spec.stride] * 2,
        dilations=[spec.dilation] * 2,
    )
    graph.normalise(given.norm)
    graph.activate(given.norm)
    graph.conv(given.pointwise)
    after = given.after
    if after is not None:
        graph.normalise(after)
    if after is not None and not spec.activate_sum:
        graph.activate(after)
    if given.residual is not None:
        graph.add("Add", "residual")
    if after is not None and spec.activate_sum:
        graph.activate(after)
    inputs = {"x": given.x_NCHW, "residual": given.residual}
    return graph.model({name: x.shape for name, x in inputs.items() if x is not None})


class _Graph:
    """Nodes in a row; each takes the output of the one before."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.last = "x"

    def add(self, kind: str, *more: str, **attributes: Any) -> None:
        from onnx import helper

        out = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, [self.last, *more], [out], **attributes))
        self.last = out

    def constant(self, values: np.ndarray) -> str:
        from onnx import numpy_helper

        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def conv(self, weight: Tensor, **attributes: Any) -> None:
        self.add("Conv", self.constant(_array(weight)), **attributes)

    def normalise(self, norm: Norm) -> None:
        parts = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        names = [self.constant(_array(part)) for part in parts if part is not None]
        self.add("BatchNormalization", *names, epsilon=norm.eps)

    def activate(self, norm: Norm) -> None:
        if norm.activation == "relu":
            self.add("Relu")
        elif norm.activation == "relu6":
            self.add("Clip", *(self.constant(np.array(end, np.float32)) for end in (0, 6)))

    def model(self, shapes: Mapping[str, Sequence[int]]) -> bytes:
        from onnx import TensorProto, helper

        def value(name: str, shape: Sequence[int] | None) -> Any:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        inputs = [value(name, list(shape)) for name, shape in shapes.items()]
        graph = helper.make_graph(
            self.nodes, "block", inputs, [value(self.last, None)], self.constants
        )
        opset = [helper.make_opsetid("", 17)]
        return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def _array(x: Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.detach().float().cpu().numpy())
