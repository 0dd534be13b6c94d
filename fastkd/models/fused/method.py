"""A method of one module that runs its chains by the op, in place of the code of its class.

It is an attribute of the module and not a module: parameters, buffers, submodules and their names
stay as they are. The code of the class runs whenever plain modules must be seen: in exports and
symbolic traces, under transforms of torch.func and modes that count, with hooks on a module of a
chain.
"""

from collections.abc import Callable, Iterable
from copy import copy, deepcopy
from types import CodeType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from fastkd.kernels._library import is_exporting
from fastkd.models.fused.trace import Look, NotTraceable, Trace, look_at, trace_of
from fastkd.models.planner import KernelChoice

__all__ = ["FusedMethod", "fused_methods", "install", "remove"]

_KEPT_TRACES = 4
_FREE_TRACES, _CALLS_PER_TRACE = 16, 16
_REPLICATE, _SCRIPT = "_replicate_for_data_parallel", "__prepare_scriptable__"
_REDUCE, _DEEPCOPY = "__reduce_ex__", "__deepcopy__"


class FusedMethod:
    """`module.forward`, or another method through which the module is run.

    Made anew for a module whose parts have been exchanged, or whose attributes have changed.
    """

    is_fused_method = True
    """By which `has_own_forward` knows it."""

    def __init__(self, module: nn.Module, name: str, choice: KernelChoice) -> None:
        self.module = module
        self.name = name
        self.choice: KernelChoice = choice
        self.traces: list[Trace] = []
        self.traced = 0
        """How often it was traced."""
        self.calls = 0
        """How often a trace was looked for outside compilers."""

    @property
    def rests(self) -> bool:
        """Whether it was traced so often for its calls that the code of the class runs for now."""
        return self.traced >= _FREE_TRACES + self.calls // _CALLS_PER_TRACE

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method's result."""
        if kwargs or _wants_plain(args):
            return self.plain(*args, **kwargs)
        trace = self._trace()
        if trace is None or trace.is_watched():
            return self.plain(*args)
        return trace.run(self.module, *args, trace.chains)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The code of the class."""
        return self.__wrapped__(*args, **kwargs)

    @property
    def __wrapped__(self) -> Any:
        """For `inspect.signature`: exporters ask for the names of the arguments."""
        return MethodType(getattr(type(self.module), self.name), self.module)

    @property
    def __code__(self) -> CodeType:
        """For torch.export, which says where a network's code is."""
        return self.__wrapped__.__code__

    def learn(self, look: Look | None = None) -> bool:
        """Trace it as the module is now; False if it has no chain.

        Raises:
            NotTraceable: it cannot be traced.
        """
        self.traced += 1
        look = look or look_at(self.module, self.name, self.choice)
        trace = trace_of(self.module, self.name, self.choice, look)
        if trace is not None:
            self.traces = [*self.traces, trace][-_KEPT_TRACES:]
        return trace is not None

    def _trace(self) -> Trace | None:
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self.calls += 1
        for trace in self.traces:
            if trace.is_current():
                return trace
        # A compiler cannot trace inside; code that changes with every call is left alone.
        if compiling or self.rests:
            return None
        try:
            return self.traces[-1] if self.learn() else None
        except NotTraceable:
            return None

    def learn_other_mode(self) -> None:
        """Trace it in evaluation if it is in training, or the reverse: a compiler cannot."""
        modes = [(one, one.training) for one in self.module.modules()]
        other = not self.module.training
        try:
            for one, _ in modes:
                one.training = other
            self.learn()
        except NotTraceable:
            pass
        finally:
            for one, training in modes:
                one.training = training

    def replica(self) -> Any:
        """For nn.DataParallel: a copy whose parameters are on another device, without this."""
        replica = nn.Module._replicate_for_data_parallel(self.module)
        _strip(replica)
        return replica

    def scriptable(self) -> nn.Module:
        """For TorchScript, which compiles the code of the class: the module without this."""
        plain = copy(self.module)
        vars(plain)["_modules"] = dict(self.module._modules)
        _strip(plain)
        return plain

    def reduced(self, protocol: Any) -> tuple[Any, ...]:
        """For copy.copy and pickle: a module with methods of its own, which do not run this one."""
        given: Any = type(self.module).__reduce_ex__(self.module, protocol)
        made, args, state, *rest = given
        own = [(one.name, one.choice) for one in _own(self.module)]
        if isinstance(state, dict):
            state = _without_own(state)
        return _remade, (own, made, args), state, *rest

    def deepcopied(self, memo: dict[int, Any]) -> nn.Module:
        """For copy.deepcopy, which copies the traces too: a compiler cannot make new ones."""
        module, kind = self.module, type(self.module)
        of_class: Callable[..., nn.Module] | None = getattr(kind, _DEEPCOPY, None)
        if of_class is not None:
            return of_class(module, memo)
        given: Any = kind.__reduce_ex__(module, 4)
        made, args, state, *_ = given
        memo[id(module)] = new = made(*deepcopy(args, memo))
        new.__setstate__(deepcopy(state, memo))
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedMethod":
        new = FusedMethod(deepcopy(self.module, memo), self.name, self.choice)
        new.traces = deepcopy(self.traces, memo)
        new.traced, new.calls = self.traced, self.calls
        return new


def install(one: FusedMethod) -> None:
    """Put it in front of the module's own method."""
    vars(one.module)[one.name] = one
    vars(one.module)[_REPLICATE] = one.replica
    vars(one.module)[_SCRIPT] = one.scriptable
    vars(one.module)[_REDUCE] = one.reduced
    vars(one.module)[_DEEPCOPY] = one.deepcopied


def fused_methods(model: nn.Module) -> Iterable[FusedMethod]:
    """All that are installed in a network."""
    for module in model.modules():
        yield from _own(module)


def remove(model: nn.Module) -> None:
    """Leave only plain modules."""
    for module in model.modules():
        _strip(module)


def _own(module: nn.Module) -> list[FusedMethod]:
    return [one for one in vars(module).values() if isinstance(one, FusedMethod)]


def _remade(
    own: list[tuple[str, KernelChoice]], made: Callable[..., nn.Module], args: tuple[Any, ...]
) -> nn.Module:
    """A copy of a module, before its attributes are set."""
    module = made(*args)
    for name, choice in own:
        install(FusedMethod(module, name, choice))
    return module


def _strip(module: nn.Module) -> None:
    for name in vars(module).keys() - _without_own(vars(module)).keys():
        vars(module).pop(name)


def _without_own(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes of a module, less those that `install` puts there."""
    return {
        name: one
        for name, one in attributes.items()
        if not isinstance(getattr(one, "__self__", one), FusedMethod)
    }


def _wants_plain(args: tuple[Any, ...]) -> bool:
    """Whether plain modules must be seen, or the arguments are not plain tensors."""
    if torch.compiler.is_compiling():
        return is_exporting()
    return (
        not args
        or any(type(one) is not Tensor for one in args)
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or bool(nn_module._has_any_global_hook())
    )
