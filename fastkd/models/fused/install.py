"""`use_kernels`: a network's chains of grouped 3x3 and 1x1 convolutions run as one op.

Called by `create_model`, by users for networks of their own, and after every rewrite.
"""

from dataclasses import replace
from typing import get_args

from torch import nn

from fastkd.errors import UserError
from fastkd.models.card import Card, card_of, sign
from fastkd.models.fused.find import unfit
from fastkd.models.fused.method import FusedMethod, fused_methods, install, remove
from fastkd.models.fused.trace import NotTraceable, look_at
from fastkd.models.planner import KernelChoice
from fastkd.models.report import RewriteReport
from fastkd.models.taps import check_network

__all__ = ["kernels_report", "use_kernels"]

_LEVELS = 4
"""How far around a 3x3 convolution its chain is looked for: a stage, a block, a branch of it, and a
unit of convolution, norm and activation."""
_RESTLESS = "is in code whose attributes change from call to call"
_NOWHERE = "is in no code that calls batch norm, ReLU and a 1x1 convolution"


def use_kernels(model: nn.Module, kernels: KernelChoice = "auto") -> nn.Module:
    """Let a network run its grouped 3x3 -> norm -> 1x1 chains as one op; returns the same network.

    kernels: `auto` uses the op where the planner finds it faster for the shapes that come, `fused`
        wherever it can, `plain` nowhere.

    Works on any network: the chains are found by tracing. Modules, parameters and `state_dict` stay
    what they are, and so do the numbers, within rounding. Plain modules run whenever they must be
    seen: with hooks on one of a chain's modules, in exports and counts, under torch.func, on
    devices or types that the op does not know. `kernels_report(model)` says which chains were found
    and why other 3x3 convolutions stay plain.

    Raises UserError for another word than these.
    """
    check_network("use_kernels", model)
    if kernels not in get_args(KernelChoice):
        raise UserError(f"kernels={kernels!r}; expected one of {', '.join(get_args(KernelChoice))}")
    remove(model)
    changed: dict[str, str] = {}
    left: dict[str, str] = {}
    for path, conv in model.named_modules():
        reason = unfit(conv, kernels)
        if reason != "":
            left[path] = reason or _NOWHERE
    if kernels == "plain":
        left = dict.fromkeys(left, "kernels=plain")
    else:
        _Search(model, kernels, changed, left).install_all()
    report = RewriteReport(f"use kernels ({kernels})", changed, left)
    sign(model, replace(card_of(model) or Card(), kernels=kernels, kernels_report=report))
    return model


def kernels_report(model: nn.Module) -> RewriteReport | None:
    """What `use_kernels` found, by the paths of the 3x3 convolutions; None before it was called.

    Says also where code changes so often that it has to run as it is.
    """
    card = card_of(model)
    report = None if card is None else card.kernels_report
    resting = [one for one in fused_methods(model) if one.rests]
    if report is None or not resting:
        return report
    chains = (one for method in resting for trace in method.traces for one in trace.chains)
    convs = {chain.grouped for chain in chains}
    left = {path: _RESTLESS for path, one in model.named_modules() if one in convs}
    changed = {path: text for path, text in report.changed.items() if path not in left}
    return replace(report, changed=changed, left={**report.left, **left})


class _Search:
    """Looks for chains from the innermost modules outwards.

    A chain belongs to the innermost module that calls all of it, and to the one around that, which
    sees the norms around a block, or its shortcut. Not further: a whole network does not run as a
    trace for the sake of one norm.
    """

    def __init__(
        self,
        model: nn.Module,
        choice: KernelChoice,
        changed: dict[str, str],
        left: dict[str, str],
    ) -> None:
        self.model, self.changed, self.left = model, changed, left
        self.choice: KernelChoice = choice
        self.home: dict[str, str] = {}
        """3x3 convolution -> the innermost module with its chain."""
        self.methods: dict[str, list[FusedMethod]] = {}
        """3x3 convolution -> what runs it; the outermost module's."""

    def install_all(self) -> None:
        """Put a `FusedMethod` in front of every module that has a chain."""
        candidates = [
            path for path, one in self.model.named_modules() if unfit(one, self.choice) is None
        ]
        within: dict[str, list[str]] = {}
        for conv in candidates:
            for above in _above(conv):
                within.setdefault(above, []).append(conv)
        for path in sorted(within, key=lambda path: (-path.count("."), not path)):
            module = self.model.get_submodule(path)
            for name in ("forward", *getattr(type(module), "ways_to_run", ())):
                self._search(path, module, name, within[path])
        for method in {id(one): one for ones in self.methods.values() for one in ones}.values():
            method.learn_other_mode()

    def _search(self, path: str, module: nn.Module, name: str, convs: list[str]) -> None:
        pending = [conv for conv in convs if self._may_extend(path, conv)]
        # A method that somebody has replaced is not that of the class.
        if not pending or name in vars(module):
            return
        method = FusedMethod(module, name, self.choice)
        try:
            look = look_at(module, name, self.choice)
            texts = {_join(path, one.conv): str(one) for one in look.own}
            texts = {conv: text for conv, text in texts.items() if conv in pending}
            taken = bool(texts) and method.learn(look)
        except NotTraceable as error:
            self._leave({conv: f"its {type(module).__name__} {error}" for conv in pending})
            return
        self._leave({_join(path, conv): reason for conv, reason in look.left.items()})
        if not taken:
            return
        install(method)
        for conv, text in texts.items():
            self.home.setdefault(conv, path)
            self.left.pop(conv, None)
            runs = self.methods.get(conv, [])
            if runs and runs[0].module is module:
                runs.append(method)
            else:
                self.methods[conv] = [method]
                self.changed[conv] = text

    def _may_extend(self, path: str, conv: str) -> bool:
        """Whether a module may take the chain of a 3x3 convolution inside it."""
        home = self.home.get(conv)
        return home is None or home == path or home.rpartition(".")[0] == path

    def _leave(self, reasons: dict[str, str]) -> None:
        """Note why convolutions stay plain; the reason found further inside counts."""
        for conv, reason in reasons.items():
            if self.left.get(conv) == _NOWHERE:
                self.left[conv] = reason


def _above(path: str) -> list[str]:
    """The paths of the modules around one, the nearest first; "" is the network."""
    parts = path.split(".")
    return [".".join(parts[:depth]) for depth in reversed(range(len(parts)))][:_LEVELS]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
