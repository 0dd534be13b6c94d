"""`cheapen`: the 3x3 convolutions of any network replaced by cheap blocks, in a copy.

Called by users, by `fastkd cheapen` and by `create_model(block=..)` for networks that have no
such blocks. In the zoo's residual blocks it builds what their `block=` builds; elsewhere
each eligible convolution is replaced on its own: 3x3, not grouped, neither stem, shortcut nor head.
Moonshine (Crowley, Gray, Storkey 2018, arXiv 1711.02613) section 3, for networks of any kind.
"""

import difflib
import fnmatch
import re
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from fastkd.errors import UserError
from fastkd.models.blocks.grammar import Block, parse_block
from fastkd.models.blocks.layers import ResidualBlock, init_convs, substitute
from fastkd.models.card import card_of
from fastkd.models.report import RewriteReport, grouped
from fastkd.models.rewrite.result import copied, finish
from fastkd.models.rewrite.style import StyleFinder

__all__ = ["cheapen"]

SHORTCUT_NAMES = frozenset({"downsample", "shortcut", "skip"})
HEAD_NAMES = frozenset(
    {
        "head",
        "classifier",
        "fc",
        "logits",
        "pre_logits",
        "aux_classifier",
        "auxlogits",
        "aux1",
        "aux2",
    }
)
STEM_NAME = re.compile(r".*stem.*|conv_?1")


def cheapen(model: nn.Module, block: str, where: str | Sequence[str] | None = None) -> nn.Module:
    """A copy of `model` in which cheap blocks replace 3x3 convolutions.

    block: name of the substitute (`blocks.grammar`): `G(4)`, `BG(2,M/8)`, ..
    where: shell patterns of module paths; a module includes everything below it. None means all
        eligible convolutions: 3x3, not grouped, not in stem, shortcut or head. Patterns are taken
        literally: every convolution they name is replaced unless it is 1x1.

    In residual blocks of the zoo a bottleneck (B, BG) takes the place of both convolutions, exactly
    as with `create_model(.., block=block)`. In other networks each convolution is replaced alone by
    one of the same stride, padding, dilation, bias, device and dtype, with the norm and activation
    of the layers around it inside. All other weights are those of `model`; new ones are drawn from
    torch's generator (`init_convs`). `result.rewrite_report` lists what changed, what
    was left and why; print it.

    Raises UserError if nothing can be replaced, if a pattern matches nothing, and if groups do
    not divide the channels of a named convolution or of a zoo block.
    """
    wanted = parse_block(block)
    model = copied(model)
    blocks = {path: one for path, one in model.named_modules() if isinstance(one, ResidualBlock)}
    rule = _Eligible(model, bool(blocks)) if where is None else _Named(where, model)
    styles = StyleFinder(model)
    new_of: dict[nn.Module, nn.Module] = {}
    changed: dict[str, str] = {}
    left: dict[str, str] = {}
    for path, old in blocks.items():
        if rule.takes_block(path, old):
            new_of[old] = old.rebuilt(str(wanted))
    for path, conv in _convs(model).items():
        owner = next((one for at, one in blocks.items() if path.startswith(f"{at}.")), None)
        if owner in new_of:
            stays = conv in set(new_of[owner].modules())
            reason = "kept by its residual block" if stays else None
        else:
            reason = rule.reason_to_leave(path, conv)
            if reason is None and wanted.kind == "S":
                reason = "S is what it is"
            elif reason is None:
                try:
                    new_of[conv] = _replacement(wanted, conv, styles)
                except UserError as error:
                    if where is not None:
                        raise UserError(f"{path}: {error}") from None
                    reason = str(error)
        if reason is None:
            changed[path] = f"{_size(conv)}, now {wanted}"
        else:
            left[path] = reason
    if not new_of and wanted.kind != "S":
        raise UserError(
            f"no convolution of {type(model).__name__} can become {wanted}: "
            f"{'; '.join(grouped(left)) or 'it has none'}. "
            "where=PATTERN selects convolutions by their module names, whatever their kind"
        )
    card = card_of(model)
    cheap_before = card is not None and "block" in card.options
    whole = where is None and (bool(blocks) or not cheap_before)
    report = RewriteReport(f"cheapen {wanted}", changed, left, _dearer(new_of))
    return finish(model, new_of, report, {"block": str(wanted)} if whole else None)


def _convs(module: nn.Module) -> dict[str, _ConvNd]:
    return {path: one for path, one in module.named_modules() if isinstance(one, _ConvNd)}


def _dearer(new_of: dict[nn.Module, nn.Module]) -> tuple[str, ...]:
    """A note on substitutes that have more weights than the convolution they replace."""
    count = sum(_weights(new) > _weights(old) for old, new in new_of.items())
    return (f"{count} substitutes have more weights than what they replace",) if count else ()


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class _Named:
    """`where=` given: exactly what its patterns name."""

    def __init__(self, where: str | Sequence[str], model: nn.Module) -> None:
        self.patterns = [where] if isinstance(where, str) else list(where)
        paths = [path for path, _ in model.named_modules() if path]
        for pattern in self.patterns:
            if not fnmatch.filter(paths, pattern):
                near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.4)
                hint = f"; nearest: {', '.join(near)}" if near else ""
                raise UserError(f"where={pattern!r} names no module{hint}")

    def takes(self, path: str) -> bool:
        """Whether a pattern matches the path or one of its parents."""
        parts = path.split(".")
        above = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        return any(fnmatch.filter(above, pattern) for pattern in self.patterns)

    def takes_block(self, path: str, block: nn.Module) -> bool:
        """Whether the block is named, or all of it that could be replaced."""
        inside = [f"{path}.{name}" for name, conv in _convs(block).items() if not _unfit(conv)]
        return self.takes(path) or (bool(inside) and all(map(self.takes, inside)))

    def reason_to_leave(self, path: str, conv: _ConvNd) -> str | None:
        """None for a convolution to be replaced."""
        return _unfit(conv) if self.takes(path) else "not named"


class _Eligible:
    """No `where=`: whole residual blocks of the zoo, else every ordinary 3x3 convolution."""

    def __init__(self, model: nn.Module, has_blocks: bool) -> None:
        self.has_blocks = has_blocks
        self.roles = _roles(model)

    def takes_block(self, path: str, block: nn.Module) -> bool:
        return True

    def reason_to_leave(self, path: str, conv: _ConvNd) -> str | None:
        """None for a convolution to be replaced."""
        if (unfit := _unfit(conv)) is not None:
            return unfit
        if conv.groups > 1:
            return "depthwise already" if conv.groups == conv.in_channels else "grouped already"
        if path in self.roles:
            return self.roles[path]
        if conv.kernel_size != (3, 3):
            return f"{_size(conv)}, not 3x3"
        return "outside the residual blocks" if self.has_blocks else None


def _unfit(conv: _ConvNd) -> str | None:
    if type(conv) is not nn.Conv2d:
        return f"a {type(conv).__name__}, not a plain Conv2d"
    return "1x1" if max(conv.kernel_size) == 1 else None


def _size(conv: _ConvNd) -> str:
    return "x".join(map(str, conv.kernel_size))


def _roles(model: nn.Module) -> dict[str, str]:
    """Which convolutions are stem, shortcut or head, by their place and by the usual names."""
    roles: dict[str, str] = {}
    convs = _convs(model)
    first = next(iter(convs), "")
    stem = first.partition(".")[0]
    for path in convs:
        parts = set(path.lower().split("."))
        if path == first or (path.startswith(f"{stem}.") and STEM_NAME.fullmatch(stem.lower())):
            roles[path] = "stem"
        elif parts & SHORTCUT_NAMES:
            roles[path] = "shortcut"
        elif parts & HEAD_NAMES:
            roles[path] = "head"
    # A last layer without a normalisation after it gives the logits, whatever its name.
    ends = [
        (path, layer)
        for path, layer in model.named_modules()
        if isinstance(layer, (_ConvNd, nn.Linear)) or "norm" in type(layer).__name__.lower()
    ]
    if ends and ends[-1][0] in convs:
        roles.setdefault(ends[-1][0], "head")
    return roles


def _replacement(block: Block, conv: _ConvNd, styles: StyleFinder) -> nn.Module:
    assert isinstance(conv, nn.Conv2d)
    with torch.device(conv.weight.device):
        made = substitute(
            block,
            conv.in_channels,
            conv.out_channels,
            style=styles.of(conv),
            bias=conv.bias is not None,
            kernel_size=conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            padding_mode=conv.padding_mode,
        )
    return init_convs(made).to(conv.weight.dtype).train(conv.training)
