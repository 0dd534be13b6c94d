"""`shorten`: residual blocks left out of the stages of a network, in a copy.

A stage keeps its first blocks, which change the shape, under their names; what follows them in it
has an input and an output of one shape, so the network runs on without it. Called by users and by
`create_model(depth=..)`.
"""

from collections.abc import Mapping, Sequence

from torch import nn

from fastkd.errors import UserError
from fastkd.models.blocks.genotype import DEPTH_EXAMPLE, Depth, canonical_depth
from fastkd.models.card import card_of, title_of
from fastkd.models.report import RewriteReport
from fastkd.models.rewrite.paths import Names, keeps_shape
from fastkd.models.rewrite.result import copied, finish

__all__ = ["least_of", "shorten", "stages_of"]


def shorten(model: nn.Module, depth: Depth) -> nn.Module:
    """A copy of `model` whose stages have fewer residual blocks; all other weights are its own.

    depth: how many blocks a stage keeps, by its name or the path of a module ({"stage2": 3},
        {"layer2": 3}), or of every stage in order ([5, 3, 5]). They are the first ones.

    Works on the zoo's residual networks, on ResNet, RegNet, MobileNet, EfficientNet, ConvNeXt, ViT
    and Swin of timm and torchvision. `result.rewrite_report` lists what was left out.

    Raises UserError if a stage has fewer blocks than it is to keep, if a block to be left out
    changes the shape, and for a network without residual blocks.
    """
    wanted = canonical_depth(depth)
    model = copied(model)
    names = Names(model)
    stages = _stages(names)
    if not stages:
        raise UserError(f"depth: {title_of(model)} has no residual blocks that could be left out")
    changed: dict[str, str] = {}
    seen: dict[str, str] = {}
    for stage, number in _by_stage(wanted, stages, model).items():
        blocks = _blocks(stage, stages, names, model)
        if twice := [path for path in blocks if path in seen]:
            raise UserError(f"depth: {stage} and {seen[twice[0]]} both name {twice[0]}")
        seen |= dict.fromkeys(blocks, stage)
        if number > len(blocks):
            raise UserError(
                f"depth: {stage} of {title_of(model)} has {len(blocks)} residual blocks, "
                f"{number} cannot be kept"
            )
        for path in blocks[number:]:
            if not keeps_shape(names.modules[path]):
                above = path.rpartition(".")[0]
                part = f", or name a part of it, such as {above}" if above != stage else ""
                raise UserError(
                    f"depth: {path} of {title_of(model)} changes the shape and cannot be left out: "
                    f"{stage} keeps at least {_needed(blocks, names)} blocks{part}"
                )
            changed[path] = f"left out, {stage} keeps {number} of {len(blocks)}"
    for path in reversed(changed):
        _leave_out(model, path)
    card = card_of(model)
    given = set() if card is None else {"depth", "blocks"} & card.options.keys()
    report = RewriteReport("shorten", changed, {})
    return finish(model, {}, report, None if given else {"depth": wanted})


def stages_of(model: nn.Module) -> dict[str, list[str]]:
    """Every stage that has residual blocks, by its name in `depth`, with their paths in order."""
    found = _stages(Names(model))
    return {stage: blocks for stage, blocks in found.items() if blocks}


def least_of(model: nn.Module, blocks: Sequence[str]) -> int:
    """How many of a stage's residual blocks cannot be left out: the first ones, at least one."""
    return _needed(blocks, Names(model))


def _stages(names: Names) -> dict[str, list[str]]:
    """Every stage with its residual blocks."""
    if names.stages:
        found = {stage: names.blocks_of(paths) for stage, paths in names.stages.items()}
        return found if any(found.values()) else {}
    found = {}
    for path in names.blocks_of(names.modules):
        found.setdefault(path.rpartition(".")[0], []).append(path)
    return {stage: blocks for stage, blocks in found.items() if stage}


def _by_stage(
    wanted: Mapping[str, int] | Sequence[int], stages: Mapping[str, list[str]], model: nn.Module
) -> dict[str, int]:
    if isinstance(wanted, Mapping):
        return dict(wanted)
    if len(wanted) != len(stages):
        has = ", ".join(f"{stage}: {len(blocks)}" for stage, blocks in stages.items())
        raise UserError(
            f"depth={','.join(map(str, wanted))}: {title_of(model)} has {len(stages)} stages "
            f"({has}); give a number for each, or name some: {DEPTH_EXAMPLE}"
        )
    return dict(zip(stages, wanted, strict=True))


def _blocks(
    stage: str, stages: Mapping[str, list[str]], names: Names, model: nn.Module
) -> list[str]:
    """The residual blocks of a stage, or those of a module."""
    if stage in stages:
        return stages[stage]
    beneath = names.blocks_of([stage]) if stage in names.modules else []
    if stage in beneath:  # a block is not a stage
        beneath = []
    if not beneath:
        known = ", ".join(f"{one}: {len(blocks)}" for one, blocks in stages.items())
        raise UserError(
            f"depth: {stage} names no stage of {title_of(model)}, nor a module with residual "
            f"blocks; it has {known}"
        )
    return beneath


def _needed(blocks: Sequence[str], names: Names) -> int:
    """Position, from 1, of the last block that cannot be left out."""
    return max(
        (number for number, path in enumerate(blocks, 1) if not keeps_shape(names.modules[path])),
        default=1,
    )


def _leave_out(model: nn.Module, path: str) -> None:
    """Take a block out of its parent without renaming any other."""
    above, _, name = path.rpartition(".")
    parent = model.get_submodule(above)
    if type(parent) is nn.Sequential and next(reversed(parent._modules)) == name:
        del parent._modules[name]
    else:
        parent.add_module(name, nn.Identity())
