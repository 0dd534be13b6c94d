"""Finds chains in the graph of a symbolic trace: 3x3, norm, 1x1 and what fits around them.

A chain is taken only where each value inside it is read by the next layer and by nothing else.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fastkd.kernels.grouped_pointwise import Activation
from fastkd.models.fused.chain import Link, ModuleChain
from fastkd.models.fused.choice import NEVER_FROM
from fastkd.models.planner import KernelChoice
from fastkd.models.tracing import has_activation, has_own_forward

__all__ = ["Found", "chains_in", "holds_layers", "unfit"]

_MODULES: Mapping[type[nn.Module], Activation] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Identity: "none",
}
_FUNCTIONS: Mapping[Any, Activation] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
}
_METHODS: Mapping[str, Activation] = {"relu": "relu", "relu_": "relu"}
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
_DROPOUT_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_STOCHASTIC = ("DropPath", "StochasticDepth")
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_BY_KEYWORD = "is called with keyword arguments, or with more than one"
_NOT_FOLLOWED = "is not followed by batch norm, ReLU and a 1x1 convolution that alone read it"

_Layer = Callable[[Tensor], Tensor]


@dataclass
class Found:
    """A chain and its place in a graph."""

    chain: ModuleChain
    conv: str
    """Path of its 3x3 convolution."""
    x: fx.Node
    residual: fx.Node | None
    nodes: list[fx.Node]
    """Of the chain, in order."""
    idle: list[fx.Node]
    """Calls in between that do nothing in this mode, as dropout in evaluation."""

    def owners(self) -> list[str]:
        """Paths of the modules whose code calls a part of it; "" is the traced module."""
        return [_owner(node) for node in self.nodes]

    def __str__(self) -> str:
        chain = self.chain
        front = "1x1 -> " if chain.expand else "norm -> " if chain.before else ""
        behind = " -> norm" if chain.after else ""
        return f"{front}3x3 -> 1x1{behind}{' + residual' if chain.residual else ''} as one op"


def unfit(conv: nn.Module, choice: KernelChoice) -> str | None:
    """Why a convolution cannot be that of a chain; "" for one that nobody would expect there."""
    if type(conv) is not nn.Conv2d or conv.kernel_size != (3, 3):
        return ""
    cpg = conv.in_channels // conv.groups
    if choice == "auto" and cpg >= NEVER_FROM:
        return "" if conv.groups == 1 else f"has {cpg} channels a group: torch is as fast"
    if conv.in_channels != conv.out_channels:
        return "" if conv.groups == 1 else "changes the number of channels"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"has padding {conv.padding!r}, mode {conv.padding_mode}; expected zeros, a number"
    if any(len(set(one)) > 1 for one in (conv.stride, conv.padding, conv.dilation)):
        return "has other strides, padding or dilation in height than in width"
    return "has a stride above 2" if conv.stride[0] > 2 else None


def chains_in(
    graph: fx.Graph, layers: Mapping[str, nn.Module], choice: KernelChoice
) -> tuple[list[Found], dict[str, str]]:
    """Chains in the order of their 3x3 convolutions, and why others of these stay plain."""
    found: list[Found] = []
    left: dict[str, str] = {}
    view = _View(layers)
    for node in graph.nodes:
        conv = layers[str(node.target)] if node.op == "call_module" else None
        if conv is None or has_own_forward(conv) or unfit(conv, choice) is not None:
            continue
        one = view.chain_of(node, choice) if _takes_one(node) else None
        if one is None:
            left[str(node.target)] = _NOT_FOLLOWED if _takes_one(node) else _BY_KEYWORD
        elif view.is_overwritten(one, graph):
            left[str(node.target)] = "what it reads may be overwritten in place"
        else:
            found.append(one)
            view.taken.update(one.nodes)
    return found, left


class _View:
    """A graph, with the modules that its nodes call, and the nodes that a chain has taken."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self.taken: set[fx.Node] = set()

    def module(self, node: Any) -> nn.Module | None:
        """What a node calls, if that is a module."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        layer = self.layers[str(node.target)]
        return None if has_own_forward(layer) or not _takes_one(node) else layer

    def chain_of(self, conv: fx.Node, choice: KernelChoice) -> Found | None:
        """The longest chain around a 3x3 convolution."""
        idle: list[fx.Node] = []
        nodes = [conv]
        link, last = self._link_behind(nodes, idle)
        if last is None or not _is_pointwise(self.module(last)):
            return None
        nodes.append(last)
        core = len(nodes)
        after, following = self._link_behind(nodes, idle)
        if after.norm is None and after.activation == "none":
            after = None
        residual, acting = self._sum(nodes, following, after, idle)
        front, before, expand = self._front(conv, idle)
        nodes = [*front, *nodes]
        core += len(front)
        layers = [self._callable(node) for node in nodes]
        behind = layers.pop() if acting else None
        if residual is not None:
            layers.pop()
        grouped, pointwise = self.module(conv), self.module(last)
        assert isinstance(grouped, nn.Conv2d) and isinstance(pointwise, nn.Conv2d)
        if acting:
            assert after is not None
            after.activation = self._activation(nodes[-1]) or "none"
        return Found(
            ModuleChain(
                expand=expand,
                before=before,
                grouped=grouped,
                norm=link,
                pointwise=pointwise,
                after=after,
                residual=residual is not None,
                activate_sum=acting,
                branch=layers,
                behind=behind,
                choice=choice,
            ),
            str(conv.target),
            nodes[0].args[0],  # type: ignore[arg-type]
            residual,
            nodes,
            idle,
        )

    def is_overwritten(self, one: Found, graph: fx.Graph) -> bool:
        """Whether other code may change what a chain reads before all of it is read.

        Views and layers that do nothing pass on the same memory, so any change in between counts.
        """
        inside = {*one.nodes, *one.idle}
        order = list(graph.nodes)
        between = order[order.index(one.nodes[0]) : order.index(one.nodes[-1])]
        later = [] if one.residual is None else [*one.residual.users]
        others = [node for node in (*between, *later) if node not in inside]
        return any(map(self.overwrites, (*one.x.users, *others)))

    def overwrites(self, node: fx.Node) -> bool:
        """Whether a node may change what it reads."""
        if node.op == "call_module":
            layer = self.layers[str(node.target)]
            # Those with convolutions or norms inside were looked into by a trace of their own.
            # Norms of timm activate a value of their own.
            whole = not (holds_layers(layer) or has_activation(layer))
            parts = layer.modules() if whole else [layer]
            return any(getattr(one, "inplace", False) is True for one in parts)
        name = str(getattr(node.target, "__name__", node.target))
        of_operator = getattr(operator, name, None) is node.target and name.startswith("i")
        in_place = name.endswith("_") and not name.endswith("__")
        by_keyword = node.kwargs.get("inplace") or node.kwargs.get("out") is not None
        return of_operator or in_place or bool(by_keyword) or True in node.args[1:]

    def _link_behind(
        self, nodes: list[fx.Node], idle: list[fx.Node]
    ) -> tuple[Link, fx.Node | None]:
        """Norm and activation behind the last node, which are appended, and the reader of both."""
        norm, activation = None, "none"
        reader = self._reader(nodes[-1], idle)
        if (own := self._norm(reader)) is not None:
            norm, activation = self.module(reader), own
            nodes.append(reader)  # type: ignore[arg-type]
            reader = self._reader(nodes[-1], idle)
        act = self._activation(reader)
        if activation == "none" and act is not None:
            activation = act
            nodes.append(reader)  # type: ignore[arg-type]
            reader = self._reader(nodes[-1], idle)
        return Link(norm, activation), reader

    def _sum(
        self,
        nodes: list[fx.Node],
        following: fx.Node | None,
        after: Link | None,
        idle: list[fx.Node],
    ) -> tuple[fx.Node | None, bool]:
        """What is added to the last node, and whether an activation that fits follows the sum."""
        if following is None or following.target not in _SUMS or len(following.args) != 2:
            return None, False
        others = [arg for arg in following.args if _unidle(arg, self, nodes[-1]) is not nodes[-1]]
        if len(others) != 1 or not isinstance(others[0], fx.Node) or following.kwargs:
            return None, False
        nodes.append(following)
        reader = self._reader(following, idle)
        if after is None or after.activation != "none" or self._activation(reader) is None:
            return others[0], False
        nodes.append(reader)  # type: ignore[arg-type]
        return others[0], True

    def _front(
        self, conv: fx.Node, idle: list[fx.Node]
    ) -> tuple[list[fx.Node], Link | None, nn.Conv2d | None]:
        """Nodes in front of the 3x3 convolution that only it reads: 1x1, norm, activation."""
        nodes: list[fx.Node] = []
        norm, activation = None, "none"
        node = self._source(conv, idle)
        if (act := self._activation(node)) is not None:
            activation = act
            nodes.insert(0, node)  # type: ignore[arg-type]
            node = self._source(nodes[0], idle)
        own = self._norm(node)
        if own is not None and (own == "none" or activation == "none"):
            norm, activation = self.module(node), activation if own == "none" else own
            nodes.insert(0, node)  # type: ignore[arg-type]
            node = self._source(nodes[0], idle)
        first = self.module(node)
        if nodes and isinstance(first, nn.Conv2d) and _is_pointwise(first):
            return [node, *nodes], Link(norm, activation), first  # type: ignore[list-item]
        # An activation alone is left to whoever computed its input.
        return (nodes, Link(norm, activation), None) if norm is not None else ([], None, None)

    def _reader(self, node: fx.Node, idle: list[fx.Node]) -> fx.Node | None:
        """The only reader of a node, behind layers that do nothing."""
        skipped: list[fx.Node] = []
        while len(node.users) == 1:
            reader = next(iter(node.users))
            if reader in self.taken or reader.op == "output":
                return None
            if not self._is_idle(reader):
                idle += skipped
                return reader
            skipped.append(reader)
            node = reader
        return None

    def _source(self, node: fx.Node, idle: list[fx.Node]) -> fx.Node | None:
        """What a node reads, if nothing else does, in front of layers that do nothing."""
        skipped: list[fx.Node] = []
        while True:
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node) or source in self.taken or len(source.users) != 1:
                return None
            if not self._is_idle(source):
                idle += skipped
                return source
            skipped.append(source)
            node = source

    def _is_idle(self, node: fx.Node) -> bool:
        layer = self.module(node)
        if layer is not None:
            if type(layer) is nn.Identity:
                return True
            if type(layer) in _DROPOUT_LAYERS:
                return not layer.training or float(layer.p) == 0  # type: ignore[arg-type]
            return type(layer).__name__ in _STOCHASTIC and not layer.training
        if node.op != "call_function" or node.target not in _DROPOUTS or not node.args:
            return False
        given = dict(zip(("p", "training"), node.args[1:], strict=False)) | dict(node.kwargs)
        return bool(given.get("p", 0.5) == 0 or given.get("training", True) is False)

    def _norm(self, node: fx.Node | None) -> Activation | None:
        """The activation that a batch norm holds, "none" for torch's; None for other nodes."""
        norm: Any = self.module(node)
        if type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm):
            return "none"
        if norm is None or not has_activation(norm) or not isinstance(norm.drop, nn.Identity):
            return None
        return _MODULES.get(type(norm.act))

    def _activation(self, node: fx.Node | None) -> Activation | None:
        if node is None:
            return None
        layer = self.module(node)
        if layer is not None:
            return _MODULES.get(type(layer))
        if not node.args or not isinstance(node.args[0], fx.Node):
            return None
        tables = {"call_function": _FUNCTIONS, "call_method": _METHODS}
        return tables.get(node.op, {}).get(node.target)  # type: ignore[call-overload]

    def _callable(self, node: fx.Node) -> _Layer:
        """What a node computes from its first argument, for layers with one input."""
        layer = self.module(node)
        if layer is not None:
            return layer
        if node.op == "call_method":
            return torch.relu
        return partial(node.target, *node.args[1:], **node.kwargs)  # type: ignore[arg-type]


def _unidle(arg: Any, view: _View, wanted: fx.Node) -> Any:
    """An argument of a sum, or the node whose value layers that do nothing pass on to it."""
    while arg is not wanted and isinstance(arg, fx.Node) and view._is_idle(arg) and arg.args:
        arg = arg.args[0]
    return arg


def _takes_one(node: fx.Node) -> bool:
    """Whether a layer is called as each layer of a chain is: with one tensor, by position."""
    return len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs


def holds_layers(module: nn.Module) -> bool:
    """Whether it has layers of a chain in it, and is none."""
    return not isinstance(module, (_ConvNd, _BatchNorm)) and any(
        isinstance(one, (_ConvNd, _BatchNorm)) for one in module.modules()
    )


def _is_pointwise(conv: nn.Module | None) -> bool:
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.padding == (0, 0)
        and conv.groups == 1
    )


def _owner(node: fx.Node) -> str:
    """Path of the module whose code made this call."""
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    if node.op == "call_module":
        paths = paths[:-1]
    return paths[-1] if paths else ""
