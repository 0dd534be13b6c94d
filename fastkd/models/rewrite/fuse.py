"""`fuse`: batch norm folded into the preceding convolutions, in a copy for evaluation.

Called by users before deployment and by `fastkd.teachers.teacher`. A symbolic trace of the forward
pass (torch.fx) shows which batch norm reads one convolution and nothing else; the arithmetic is
torch's own (`torch.nn.utils.fusion`). Unlike `torch.fx.experimental.optimization.fuse` the network
keeps its class, its module names and its taps, batch norms that hold an activation fold too, and
what cannot be traced as a whole is traced in parts.
"""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastkd.models.report import RewriteReport
from fastkd.models.rewrite.result import copied, finish
from fastkd.models.tracing import PLAIN_NORMS, has_activation, without_hooks

__all__ = ["fuse"]

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
CONVS += (nn.ConvTranspose3d,)


def fuse(model: nn.Module) -> nn.Module:
    """A copy of `model` in evaluation mode, with the same outputs and fewer layers.

    A batch norm whose input is one convolution's output, read by nothing else, is multiplied into
    that convolution and replaced by nn.Identity or its activation. The others stay:
    `result.rewrite_report` lists both. The copy is for inference: in training mode it would no
    longer normalise, a tap on a folded convolution returns its batch norm's output, and its weights
    fit only a fused network. A network that cannot be traced as a whole is folded part by part,
    assuming that each part is used through its forward pass.

    Raises UserError if the network cannot be copied.
    """
    model = copied(model)
    model.eval()  # an overridden train() may not return the model
    norms = {path: one for path, one in model.named_modules() if isinstance(one, _BatchNorm)}
    new_of: dict[nn.Module, nn.Module] = {}
    with without_hooks(model):
        pairs = list(_pairs(model))
    with torch.no_grad():
        for conv, norm in pairs:
            if conv not in new_of and norm not in new_of and _foldable(conv, norm):
                new_of[conv] = fuse_conv_bn_eval(
                    conv, norm, transpose=isinstance(conv, _ConvTransposeNd)
                )
                new_of[norm] = _behind(norm)
    changed = {path: "folded into its convolution" for path, one in norms.items() if one in new_of}
    left = {path: "does not follow a single convolution" for path in norms if path not in changed}
    return finish(model, new_of, RewriteReport("fuse batch norm", changed, left), None)


class _Tracer(fx.Tracer):
    """Traces through everything but convolutions and batch norms, also those derived from them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (_ConvNd, _BatchNorm)) or super().is_leaf_module(
            m, module_qualified_name
        )


def _pairs(model: nn.Module) -> Iterator[tuple[_ConvNd, _BatchNorm]]:
    """Batch norms that read a convolution which nothing else reads; each runs once in the trace."""
    try:
        graph = _Tracer().trace(model)
    except Exception:
        # Tracing runs foreign code on proxies for tensors, which can fail in any way. Then the
        # parts are traced one by one; nothing between them is folded.
        for child in model.children():
            yield from _pairs(child)
        return
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    layers = dict(model.named_modules())
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        conv, norm = layers[str(source.target)], layers[str(node.target)]
        if (
            isinstance(conv, _ConvNd)
            and isinstance(norm, _BatchNorm)
            and len(source.users) == 1
            and calls[source.target] == calls[node.target] == 1
        ):
            yield conv, norm


def _foldable(conv: _ConvNd, norm: _BatchNorm) -> bool:
    """Whether torch's fusion applies: kinds it knows, running statistics, no hooks."""
    plain = type(norm) in PLAIN_NORMS or has_activation(norm)
    hooks = (conv._forward_hooks, conv._forward_pre_hooks, norm._forward_hooks)
    return (
        type(conv) in CONVS
        and plain
        and norm.running_mean is not None
        and not any((*hooks, norm._forward_pre_hooks))
        and not (isinstance(conv, _ConvTransposeNd) and conv.groups > 1)
    )


def _behind(norm: _BatchNorm) -> nn.Module:
    """The replacement for a folded batch norm."""
    act = getattr(norm, "act", None) if has_activation(norm) else None
    return act if isinstance(act, nn.Module) else nn.Identity()
