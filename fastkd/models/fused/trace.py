"""A method of a module as a Python function in which each chain is one call.

The function is what torch.fx makes of a symbolic trace. Modules that have no part in a chain are
called as they are, so that only the code around the chains is fixed by the trace. A `Trace` knows
which modules, attributes and modes it has seen there; it is used while they are the same.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import BuiltinMethodType, MethodType
from typing import Any

import torch
from torch import fx, nn
from torch._C._autograd import _top_saved_tensors_default_hooks
from typing_extensions import override

from fastkd.models.card import CARD
from fastkd.models.fused.chain import ModuleChain
from fastkd.models.fused.find import Found, chains_in, holds_layers
from fastkd.models.planner import KernelChoice
from fastkd.models.tracing import has_activation, has_own_forward, without_effects, without_hooks

__all__ = ["Look", "NotTraceable", "Trace", "look_at", "trace_of"]

_BY_VALUE = (bool, int, float, complex, str, bytes, range, slice, MethodType, BuiltinMethodType)
_TABLES = vars(nn.Module()).keys() - {"training"} | {CARD, "rewrite_report"}
_MODES = (
    "is_grad_enabled",
    "is_inference_mode_enabled",
    "is_autocast_enabled",
    "is_autocast_cpu_enabled",
)
"""Functions of torch by which a forward may branch."""
_grad_enabled, _autocast_enabled = torch.is_grad_enabled, torch.is_autocast_enabled


class NotTraceable(Exception):
    """Why a method cannot stand as a trace: the end of a sentence."""


@dataclass(eq=False)
class Trace:
    """One method with its chains, for one state of the modules around them."""

    run: Callable[..., Any]
    """Takes the module, its arguments, and the chains."""
    chains: tuple[ModuleChain, ...]
    parts: Sequence[tuple[nn.Module, dict[str, nn.Module | None]]]
    """Every module whose code the trace stands for, with its children."""
    state: Sequence[tuple[nn.Module, str, Any]]
    """Attributes of the modules whose code was traced, and the class of each module."""
    watched: Sequence[nn.Module]
    """The modules that the trace does not call."""
    modes: tuple[bool, ...] | None
    """Gradients, inference mode and autocast, if the code asked for any of them."""

    def is_current(self) -> bool:
        """Whether it is still what the module would do."""
        for parent, children in self.parts:
            if len(parent._modules) != len(children):
                return False
            for name, child in children.items():
                if parent._modules.get(name) is not child:
                    return False
        if self.modes is not None and self.modes != _current_modes():
            return False
        return all(_is_same(getattr(one, name, None), value) for one, name, value in self.state)

    def is_watched(self) -> bool:
        """Whether somebody has hooked, or replaced the code of, a module inside."""
        for one in self.watched:
            if one._forward_hooks or one._forward_pre_hooks:
                return True
            if one._backward_hooks or one._backward_pre_hooks:
                return True
            if has_own_forward(one):
                return True
        return False


@dataclass(frozen=True)
class Look:
    """A method, traced through every module that may hold a part of a chain."""

    graph: fx.Graph
    inlined: frozenset[nn.Module]
    found: list[Found]
    left: dict[str, str]
    """3x3 convolution -> why it stays plain."""
    modes: tuple[bool, ...] | None
    """As of a `Trace`."""

    @property
    def own(self) -> list[Found]:
        """Chains that are not within one of the parts of the module."""
        return [one for one in self.found if _is_own(one)]


def look_at(module: nn.Module, method: str, choice: KernelChoice) -> Look:
    """Find all chains in a method, also those inside the modules that it calls.

    Raises:
        NotTraceable: the method cannot be traced.
    """
    inside = (one for one in module.modules() if one is not module and holds_layers(one))
    inlined = frozenset(inside)
    graph, modes = _graph(module, method, inlined)
    found, left = chains_in(graph, dict(module.named_modules()), choice)
    return Look(graph, inlined, found, left, modes)


def trace_of(module: nn.Module, method: str, choice: KernelChoice, look: Look) -> Trace | None:
    """The method with the chains that go beyond one of its parts, or None if it has none.

    Raises:
        NotTraceable: the method cannot be traced.
    """
    if not look.own:
        return None
    layers = dict(module.named_modules())
    paths = {above for one in look.own for path in one.owners() for above in _upwards(path)}
    inlined = {layers[path] for path in paths}
    graph, found, modes = look.graph, look.found, look.modes
    if inlined != look.inlined:
        graph, modes = _graph(module, method, inlined)
        # What the whole trace has refused, as something inside a part overwrites, stays refused.
        fine = {one.conv for one in look.found}
        found = [one for one in chains_in(graph, layers, choice)[0] if one.conv in fine]
    called = [node for one in found for node in (*one.nodes, *one.idle)]
    members = [str(node.target) for node in called if _is_layer(node)]
    idle = [layers[str(node.target)] for one in found for node in one.idle if _is_layer(node)]
    around = [layers[above] for member in members for above in _upwards(member)]
    # A norm of timm holds its activation.
    watched = dict.fromkeys(one for each in (*around, *inlined) for one in _whole(each))
    traced = dict.fromkeys([module, *inlined, *idle])
    return Trace(
        _function(graph, found),
        tuple(one.chain for one in found),
        [(one, dict(one._modules)) for one in dict.fromkeys([module, *watched]) if one._modules],
        [*_state(traced), *((one, "__class__", type(one)) for one in watched)],
        [*watched],
        modes,
    )


def _is_own(found: Found) -> bool:
    """Whether a chain is not within one of the parts of the traced module."""
    first, *others = (path.split(".") for path in found.owners())
    return not first[0] or any(path[0] != first[0] for path in others)


class _Tracer(fx.Tracer):
    """Traces through `inlined` alone, and refuses code that changes how torch computes."""

    def __init__(self, method: str, inlined: Collection[nn.Module]) -> None:
        super().__init__()
        self.traced_func_name = method
        self.inlined = inlined
        self.modes = _modes()

    @override
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.inlined

    @override
    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        # A trace does not record `with torch.no_grad():`, autocast or checkpointing.
        if _modes() != self.modes:
            raise NotTraceable("switches gradients, autocast or checkpointing in its forward")
        return super().create_node(*args, **kwargs)


def _modes() -> tuple[Any, ...]:
    return (
        _grad_enabled(),
        _autocast_enabled("cpu"),
        _autocast_enabled("cuda"),
        _top_saved_tensors_default_hooks(True),
    )


def _current_modes() -> tuple[bool, ...]:
    on_devices = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *on_devices


@contextmanager
def _noting_questions(asked: set[str]) -> Iterator[None]:
    """Enter in `asked` which of `_MODES` the code inside calls."""
    own = {name: getattr(torch, name) for name in _MODES}

    def noting(name: str) -> Callable[..., Any]:
        def answer(*args: Any) -> Any:
            asked.add(name)
            return own[name](*args)

        return answer

    try:
        for name in own:
            setattr(torch, name, noting(name))
        yield
    finally:
        for name, function in own.items():
            setattr(torch, name, function)


def _graph(
    module: nn.Module, method: str, inlined: Collection[nn.Module]
) -> tuple[fx.Graph, tuple[bool, ...] | None]:
    """What the method does, and the modes for which alone that is known."""
    function = getattr(type(module), method)
    _, *parameters = inspect.signature(function).parameters.values()
    plain = inspect.Parameter.POSITIONAL_OR_KEYWORD
    if any(one.kind is not plain or one.default is not one.empty for one in parameters):
        raise NotTraceable("has a forward with optional arguments")
    effects: list[str] = []
    asked: set[str] = set()
    tracer = _Tracer(method, inlined)
    try:
        undone = without_effects([module, *inlined], effects)
        with undone, without_hooks(module), _noting_questions(asked):
            graph = tracer.trace(module)
    except NotTraceable:
        raise
    except Exception as error:
        # Tracing runs foreign code on proxies for tensors, which can fail in any way.
        raise NotTraceable(f"cannot be traced ({type(error).__name__})") from error
    if effects:
        raise NotTraceable(f"{effects[0]} in its forward")
    return graph, _current_modes() if asked else None


def _upwards(path: str) -> list[str]:
    """The path and those above it, without that of the root."""
    parts = path.split(".") if path else []
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _is_layer(node: fx.Node) -> bool:
    return node.op == "call_module"


def _whole(module: nn.Module) -> Iterable[nn.Module]:
    """With its parts if the trace calls none of them: timm's norms hold their activation."""
    return module.modules() if has_activation(module) else (module,)


def _state(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    return [
        (module, name, _kept(value))
        for module in modules
        for name, value in vars(module).items()
        if name not in _TABLES and not _is_ours(value)
    ]


def _is_ours(value: Any) -> bool:
    """Whether fastkd has put it into a module."""
    value = getattr(value, "__self__", value)
    return hasattr(value, "is_fused_method")


def _kept(value: Any) -> Any:
    """As it is now: lists and dicts may be changed later."""
    if type(value) in (list, tuple):
        return type(value)(map(_kept, value))
    return {key: _kept(one) for key, one in value.items()} if type(value) is dict else value


def _is_same(new: Any, old: Any) -> bool:
    """Whether plain values are equal, and everything else is the same object."""
    if new is old:
        return True
    kind = type(old)
    if type(new) is not kind:
        return False
    if kind in (list, tuple):
        return len(new) == len(old) and all(map(_is_same, new, old))
    if kind is dict:
        same_keys = list(new) == list(old)
        return same_keys and all(_is_same(new[key], one) for key, one in old.items())
    return kind in _BY_VALUE and new == old


def _function(graph: fx.Graph, found: Sequence[Found]) -> Callable[..., Any]:
    """(module, arguments, chains) -> what the method returns."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(placeholders[-1]):
        chains = graph.placeholder("chains")
    call_of: dict[fx.Node, fx.Node] = {}
    for number, one in enumerate(found):
        last = one.nodes[-1]
        given = (one.x,) if one.residual is None else (one.x, one.residual)
        with graph.inserting_before(last):
            tensors = [call_of.get(node, node) for node in given]
            call_of[last] = graph.call_function(_run, (chains, number, *tensors))
        last.replace_all_uses_with(call_of[last])
    # Nodes have side effects in the eyes of fx, so it does not remove those that became useless.
    taken = {node for one in found for node in (*one.nodes, *one.idle)}
    for node in reversed(graph.nodes):
        if not node.users and node in taken:
            graph.erase_node(node)
    graph.lint()
    code = graph.python_code("self")
    names: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, "<fused chains>", "exec"), names)
    return names["forward"]


def _run(chains: tuple[ModuleChain, ...], number: int, *tensors: Any) -> Any:
    return chains[number](*tensors)
