"""`cheapen`: the 3x3 convolutions of any network replaced by cheap blocks, in a copy.

Called by users, by `fastkd cheapen` and by `create_model(block=..)` for networks that have no
such blocks. In the zoo's residual blocks it builds what their `block=` builds; elsewhere
each eligible convolution is replaced on its own: 3x3, not grouped, neither stem, shortcut nor head.
Moonshine (Crowley, Gray, Storkey 2018, arXiv 1711.02613) section 3, for networks of any kind.
`rewrite.rules` decides what is taken.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from fastkd.errors import UserError
from fastkd.models.blocks.genotype import canonical_blocks
from fastkd.models.blocks.grammar import Block, parse_block
from fastkd.models.blocks.layers import ResidualBlock, init_convs, substitute
from fastkd.models.card import card_of
from fastkd.models.report import RewriteReport, grouped
from fastkd.models.rewrite.result import copied, finish
from fastkd.models.rewrite.rules import KEPT, Eligible, Mapped, Named, Rule, convs_of, size_of
from fastkd.models.rewrite.style import StyleFinder

__all__ = ["cheapen", "replacement"]


def cheapen(
    model: nn.Module,
    block: str | None = None,
    where: str | Sequence[str] | None = None,
    *,
    blocks: Mapping[str, str] | None = None,
) -> nn.Module:
    """A copy of `model` in which cheap blocks replace 3x3 convolutions.

    block: name of the substitute (`blocks.grammar`): `G(4)`, `BG(2,M/8)`, ..
    where: shell patterns of module paths; a module includes everything below it. None means all
        eligible convolutions: 3x3, not grouped, not in stem, shortcut or head. Patterns are taken
        literally: every convolution they name is replaced unless it is 1x1.
    blocks: instead of both, a substitute for each path, stage of the zoo or pattern, such as
        {"layer1": "G(4)", "layer3.*": "BG(2,M/8)"}. A pattern means the eligible convolutions
        below what it names, or just the convolution whose path it is, whatever its kind. Of
        several the one whose convolutions are among the others' wins; what none names stays.

    In residual blocks of the zoo a bottleneck (B, BG) takes the place of both convolutions, exactly
    as with `create_model(.., block=block)`, unless `blocks` or `where` tell them apart. In other
    networks each convolution is replaced alone by one of the same stride, padding, dilation, bias,
    device and dtype, with the norm and activation of the layers around it inside. All other weights
    are those of `model`; new ones are drawn from torch's generator (`init_convs`).
    `result.rewrite_report` lists what changed, what was left and why; print it.

    Raises UserError if nothing can be replaced, if a pattern matches nothing, if two patterns that
    do not contain each other name one convolution, and if groups do not divide the channels of a
    named convolution or of a zoo block.
    """
    if (block is None) == (blocks is None) or (blocks is not None and where is not None):
        raise UserError(
            "cheapen: give block='G(4)', perhaps with where=PATTERN, or blocks={'layer1': 'G(4)'}"
        )
    model = copied(model)
    owners = {path: one for path, one in model.named_modules() if isinstance(one, ResidualBlock)}
    if blocks is not None:
        named = canonical_blocks(blocks)
        rule = Mapped(named, model, bool(owners))
        new_of, changed, left = _replaced(model, owners, rule)
        rule.check(changed, left)
        report = RewriteReport("cheapen layer by layer", changed, left, _dearer(new_of))
        fresh = not {"block", "blocks"} & _options_of(model).keys()
        return finish(model, new_of, report, {"blocks": named} if fresh else None)
    wanted = parse_block(block or "")
    rule = Eligible(wanted, model, bool(owners)) if where is None else Named(wanted, where, model)
    new_of, changed, left = _replaced(model, owners, rule)
    if not new_of and wanted.kind != "S":
        raise UserError(
            f"no convolution of {type(model).__name__} can become {wanted}: "
            f"{'; '.join(grouped(left)) or 'it has none'}. "
            "where=PATTERN selects convolutions by their module names, whatever their kind"
        )
    before = _options_of(model)
    whole = where is None and "blocks" not in before and (bool(owners) or "block" not in before)
    report = RewriteReport(f"cheapen {wanted}", changed, left, _dearer(new_of))
    return finish(model, new_of, report, {"block": str(wanted)} if whole else None)


def _rebuilt(path: str, old: ResidualBlock, block: Block, rule: Rule) -> nn.Module:
    try:
        return old.rebuilt(str(block))
    except UserError as error:
        if isinstance(rule, Eligible):
            raise
        raise UserError(f"{path}: {error}") from None


def _options_of(model: nn.Module) -> Mapping[str, Any]:
    card = card_of(model)
    return card.options if card else {}


class _Replaced(NamedTuple):
    new_of: dict[nn.Module, nn.Module]
    changed: dict[str, str]
    """Path of a convolution -> what became of it."""
    left: dict[str, str]
    """Path -> why it stays."""


def _replaced(model: nn.Module, owners: Mapping[str, ResidualBlock], rule: Rule) -> _Replaced:
    """What the rule takes, with what replaces it; the model is as before."""
    styles = StyleFinder(model)
    new_of: dict[nn.Module, nn.Module] = {}
    changed: dict[str, str] = {}
    left: dict[str, str] = {}
    rebuilt: dict[nn.Module, Block] = {}
    for path, old in owners.items():
        if (whole := rule.of_block(path, old)) is not None:
            new_of[old], rebuilt[old] = _rebuilt(path, old, whole, rule), whole
    for path, conv in convs_of(model).items():
        owner = next((one for at, one in owners.items() if path.startswith(f"{at}.")), None)
        if owner in new_of:
            stays = conv in set(new_of[owner].modules())
            answer: Block | str = KEPT if stays else rebuilt[owner]
        else:
            answer = rule.of_conv(path, conv, owner is not None)
            if isinstance(answer, Block) and answer.kind == "S":
                answer = "S is what it is"
            elif isinstance(answer, Block):
                try:
                    new_of[conv] = replacement(answer, conv, styles)
                except UserError as error:
                    if rule.must(path):
                        raise UserError(f"{path}: {error}") from None
                    answer = str(error)
        if isinstance(answer, Block):
            changed[path] = f"{size_of(conv)}, now {answer}"
        else:
            left[path] = answer
    return _Replaced(new_of, changed, left)


def _dearer(new_of: dict[nn.Module, nn.Module]) -> tuple[str, ...]:
    """A note on substitutes that have more weights than the convolution they replace."""
    count = sum(_weights(new) > _weights(old) for old, new in new_of.items())
    return (f"{count} substitutes have more weights than what they replace",) if count else ()


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def replacement(block: Block, conv: _ConvNd, styles: StyleFinder) -> nn.Module:
    """The substitute for one convolution, with new weights. UserError if it does not divide."""
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
