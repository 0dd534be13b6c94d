"""Names for the parts of a network: paths of modules, and the stages of the zoo.

A stage of the zoo (`stage2`) stands for its modules. Below it, `stage2.0` is what the path of its
module has there (`layer2.0`), or, where a stage has several modules, its residual block number 0.
Used by the rewrites that take patterns (`rewrite.genotype`, `rewrite.shorten`).
"""

import difflib
import fnmatch
from collections.abc import Iterable

from torch import nn

from fastkd.models.taps import ZooNetwork

__all__ = ["Names", "keeps_shape", "parents"]

SHOWN = 12

_KEEP_SHAPE = {
    "timm.models.vision_transformer.Block",
    "timm.models.swin_transformer.SwinTransformerBlock",
    "torchvision.models.vision_transformer.EncoderBlock",
    "torchvision.models.swin_transformer.SwinTransformerBlock",
    "torchvision.models.convnext.CNBlock",
}
_PROJECTIONS = {
    "torchvision.models.resnet.BasicBlock": "downsample",
    "torchvision.models.resnet.Bottleneck": "downsample",
    "torchvision.models.regnet.ResBottleneckBlock": "proj",
    "timm.models.resnet.BasicBlock": "downsample",
    "timm.models.resnet.Bottleneck": "downsample",
    "timm.models.regnet.Bottleneck": "downsample",
    "timm.models.convnext.ConvNeXtBlock": "shortcut",
}
_SWITCHES = ("use_res_connect", "has_skip")


def keeps_shape(module: nn.Module) -> bool | None:
    """Whether a residual block, of the zoo or of another package, returns the shape that it gets.

    None for what is not known as a residual block.
    """
    said = getattr(module, "keeps_shape", None)
    if isinstance(said, bool):
        return said
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if kind in _KEEP_SHAPE:
        return True
    if kind in _PROJECTIONS:
        return isinstance(getattr(module, _PROJECTIONS[kind]), nn.Identity | None)
    switches = [getattr(module, name) for name in _SWITCHES if hasattr(module, name)]
    return bool(switches[0]) if switches else None


class Names:
    """The spellings of every path in a network."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = {p: one for p, one in model.named_modules() if p}
        self.stages = model.stage_paths() if isinstance(model, ZooNetwork) else {}
        self._also: dict[str, list[str]] = {path: [path] for path in self.modules}
        for stage, paths in self.stages.items():
            roots = {paths[0]: stage}
            if len(paths) > 1:
                blocks = enumerate(self.blocks_of(paths))
                roots = {path: f"{stage}.{number}" for number, path in blocks}
            for path in paths:
                self._also[path].append(stage)
            for root, name in roots.items():
                for path in self.modules:
                    if path.startswith(f"{root}.") or (path == root and name != stage):
                        self._also[path].append(f"{name}{path.removeprefix(root)}")

    def blocks_of(self, paths: Iterable[str]) -> list[str]:
        """The residual blocks that these modules are or contain."""
        wanted = tuple(paths)
        return [
            path
            for path, module in self.modules.items()
            if any(path == one or path.startswith(f"{one}.") for one in wanted)
            and keeps_shape(module) is not None
        ]

    def spellings(self, path: str) -> list[str]:
        """The path, and its names by stage if it has some."""
        return self._also[path]

    def are(self, pattern: str, path: str) -> bool:
        """Whether the pattern is a name of this module or one around it."""
        return any(
            fnmatch.fnmatchcase(name, pattern)
            for one in parents(path)
            for name in self.spellings(one)
        )

    def nearest(self, pattern: str) -> str:
        """For a message: what there is."""
        top = [path for path in self.modules if "." not in path]
        known = [*self.stages, *top]
        near = difflib.get_close_matches(pattern, [*self.stages, *self.modules], n=3, cutoff=0.6)
        more = ", .." if len(known) > SHOWN else ""
        hint = f"; nearest: {', '.join(near)}" if near else ""
        return f"it has {', '.join(known[:SHOWN])}{more} and what is below them{hint}"


def parents(path: str) -> list[str]:
    """`a.b.c` -> a, a.b and the path itself."""
    parts = path.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
