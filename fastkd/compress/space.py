"""What may become of a network: a block for each 3x3 convolution, fewer residual blocks in a stage.

    Space > Stage > Part (a residual block, may be left out) > Slot (a place for a block) > Choice

In residual blocks of the zoo a slot is the whole block, as with `student.block`; in other networks
it is one convolution. A `Subgraph` is what is measured or counted: the residual block, or the
convolution with its norm and activation, at the shape that it sees in the network. Two that are
built alike and see the same shape have one key and are measured once.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.models import create_model
from fastkd.models.blocks.grammar import Block, parse_block
from fastkd.models.blocks.layers import ResidualBlock
from fastkd.models.counting.count import Count, count
from fastkd.models.rewrite.cheapen import replacement
from fastkd.models.rewrite.rules import Eligible, convs_of
from fastkd.models.rewrite.shorten import least_of, stages_of
from fastkd.models.rewrite.style import StyleFinder
from fastkd.models.taps import ZooNetwork
from fastkd.printable import in_words

__all__ = [
    "CANDIDATES",
    "Choice",
    "Part",
    "Pick",
    "Slot",
    "Space",
    "Stage",
    "Subgraph",
    "space_of",
    "taps_of",
]

CANDIDATES = ("G(2)", "G(4)", "G(8)", "G(16)", "G(N)", "B(2)", "B(4)", "BG(2,4)", "BG(2,M)")
"""Blocks that are tried in every slot, beside S; those that do not divide are left out."""

Pick = tuple[tuple[tuple[int, ...], ...], ...]
"""For each stage, for each part that it keeps, the number of the choice in each slot."""

Shape = tuple[int, ...]
"""Without the batch: [C, H, W] of a map, [T, C] of tokens."""


@dataclass(frozen=True, eq=False)
class Subgraph:
    """A part of a network that runs alone."""

    module: nn.Module = field(repr=False)
    shape: Shape
    """Of its input, without the batch."""
    label: str

    @cached_property
    def key(self) -> str:
        """The same for equal layers at the same shape, in every process."""
        built = re.sub(r" at 0x[0-9a-f]+", "", repr(self.module))
        return hashlib.sha256(f"{built} {self.shape}".encode()).hexdigest()[:16]

    @cached_property
    def count(self) -> Count:
        """Its size and cost."""
        return count(self.module, self.shape)


@dataclass(frozen=True)
class Choice:
    """A block in a slot."""

    block: str
    graph: Subgraph


@dataclass(frozen=True)
class Slot:
    """A place for a block."""

    path: str
    """Its name in `student.blocks`."""
    choices: tuple[Choice, ...]
    """The first is S: the network's own."""


@dataclass(frozen=True)
class Part:
    """A residual block, or a convolution outside of them."""

    path: str
    slots: tuple[Slot, ...]
    whole: Subgraph | None
    """All of it as it is; None for a lone convolution."""


@dataclass(frozen=True)
class Stage:
    """Parts of which the last ones may be left out."""

    name: str
    """In `student.depth`."""
    parts: tuple[Part, ...]
    least: int
    """Parts that stay."""


@dataclass(frozen=True)
class Space:
    """All students that a network can become."""

    name: str
    options: Mapping[str, Any]
    num_classes: int
    shape: Shape
    """Of an image."""
    stages: tuple[Stage, ...]
    note: str = ""
    """What tells the network from others of its name, for labels."""

    @property
    def original(self) -> Pick:
        """The network itself."""
        return tuple(tuple((0,) * len(p.slots) for p in stage.parts) for stage in self.stages)

    def graphs(self) -> Iterator[tuple[Subgraph, str]]:
        """Everything that has a cost, and the block in it; equal ones once."""
        seen: set[str] = set()
        for stage in self.stages:
            for part in stage.parts:
                whole = [] if part.whole is None else [(part.whole, "S")]
                inside = [(one.graph, one.block) for slot in part.slots for one in slot.choices]
                for graph, block in whole + inside:
                    if graph.key not in seen:
                        seen.add(graph.key)
                        yield graph, block

    def slots(self) -> Iterator[Slot]:
        """All of them, in order."""
        for stage in self.stages:
            for part in stage.parts:
                yield from part.slots

    def genotype(self, pick: Pick) -> dict[str, Any]:
        """The options of `create_model` that make it: blocks and depth, where they are needed."""
        blocks: dict[str, str] = {}
        depth: dict[str, int] = {}
        for stage, kept in zip(self.stages, pick, strict=True):
            if len(kept) < len(stage.parts):
                depth[stage.name] = len(kept)
            for part, numbers in zip(stage.parts, kept, strict=False):
                for slot, number in zip(part.slots, numbers, strict=True):
                    if number:
                        blocks[slot.path] = slot.choices[number].block
        return ({"blocks": blocks} if blocks else {}) | ({"depth": depth} if depth else {})

    def options_of(self, pick: Pick) -> dict[str, Any]:
        """All options of `create_model`."""
        return {**self.options, **self.genotype(pick)}

    def label(self, pick: Pick) -> str:
        """For people: how often each block is used, and the depth."""
        used: dict[str, int] = {}
        for stage, kept in zip(self.stages, pick, strict=True):
            for part, numbers in zip(stage.parts, kept, strict=False):
                for slot, number in zip(part.slots, numbers, strict=True):
                    block = slot.choices[number].block
                    used[block] = used.get(block, 0) + 1
        blocks = ", ".join(f"{number} {block}" for block, number in sorted(used.items()))
        both = zip(self.stages, pick, strict=True)
        deep = "-".join(str(len(kept)) for stage, kept in both if stage.name)
        return ", ".join(filter(None, [self.note, f"depth {deep}" if deep else "", blocks]))


def space_of(
    name: str, num_classes: int, shape: Shape, options: Mapping[str, Any], note: str = ""
) -> Space:
    """The space of a network for images of this shape [C, H, W]. note: for labels.

    Raises:
        UserError: the network cannot be built, or fails on such images.
    """
    # Which numbers the weights are does not matter, and the caller's generator stays as it is.
    with torch.random.fork_rng(devices=[]):
        model = create_model(name, num_classes, kernels="plain", **options).eval()
        finder = _Finder(model, shape)
        stages = tuple(finder.stages())
    return Space(name, dict(options), num_classes, shape, stages, note)


class _Finder:
    """Looks for stages, parts and slots in a network."""

    def __init__(self, model: nn.Module, shape: Shape) -> None:
        self.model = model
        self.seen = _inputs(model, shape)
        self.owners = {p: m for p, m in model.named_modules() if isinstance(m, ResidualBlock)}
        self.rule = Eligible(Block(kind="S"), model, bool(self.owners))
        self.styles = StyleFinder(model)
        self.taken: set[str] = set()

    def stages(self) -> Iterator[Stage]:
        """The stages that can be shortened, then one with all other slots."""
        for name, paths in stages_of(self.model).items():
            parts = tuple(self._part(path) for path in paths)
            yield Stage(name, parts, least_of(self.model, paths))
        inside = [path for path in self.owners if path not in self.taken]
        rest = [self._part(path) for path in inside]
        rest += [Part(slot.path, (slot,), None) for slot in self._lone("")]
        if rest:
            yield Stage("", tuple(rest), len(rest))

    def _part(self, path: str) -> Part:
        self.taken.add(path)
        module = self.model.get_submodule(path)
        whole = Subgraph(module, self._shape(path), self._title(path, module))
        owner = self.owners.get(path)
        slots = tuple(self._lone(f"{path}.")) if owner is None else self._owned(path, owner, whole)
        return Part(path, slots, whole)

    def _owned(self, path: str, owner: ResidualBlock, whole: Subgraph) -> tuple[Slot, ...]:
        """The slot of a residual block of the zoo."""

        def build(block: str) -> nn.Module:
            return owner.rebuilt(block)

        choices = self._choices(whole, build)
        return (Slot(path, choices),) if len(choices) > 1 else ()

    def _lone(self, prefix: str) -> Iterator[Slot]:
        """Slots of single convolutions below a path."""
        for path, conv in convs_of(self.model).items():
            if not path.startswith(prefix) or path in self.taken or path not in self.seen:
                continue
            owned = any(path.startswith(f"{at}.") for at in self.owners)
            if owned or self.rule.reason_to_leave(path, conv, owned) is not None:
                continue
            self.taken.add(path)
            assert isinstance(conv, nn.Conv2d)

            def build(block: str, conv: nn.Conv2d = conv) -> nn.Module:
                return self._with_norm(replacement(parse_block(block), conv, self.styles), conv)

            stride = f" /{conv.stride[0]}" if conv.stride[0] > 1 else ""
            shape = self._shape(path)
            label = f"3x3 {conv.in_channels}->{conv.out_channels}{stride} {_at(shape)}"
            whole = Subgraph(self._with_norm(conv, conv), shape, label)
            choices = self._choices(whole, build)
            if len(choices) > 1:
                yield Slot(path, choices)

    def _with_norm(self, module: nn.Module, conv: nn.Conv2d) -> nn.Module:
        """With the norm and activation that follow it, which a runtime merges with it."""
        style = self.styles.of(conv)
        after = [style.make_norm(conv.out_channels), style.activation(conv.out_channels)]
        return nn.Sequential(module, *after).eval()

    def _choices(self, whole: Subgraph, build: Any) -> tuple[Choice, ...]:
        found = {whole.key: Choice("S", whole)}
        for block in CANDIDATES:
            try:
                graph = Subgraph(build(block).eval(), whole.shape, whole.label)
            except UserError:  # groups or bottleneck that do not divide
                continue
            found.setdefault(graph.key, Choice(block, graph))
        return tuple(found.values())

    def _shape(self, path: str) -> Shape:
        """Of what a module gets. A walk of the zoo may run a block by its parts."""
        near = [one for one in self.seen if one == path or one.startswith(f"{path}.")]
        if not near:
            raise UserError(
                f"{path} of {type(self.model).__name__} does not run on an image, so it cannot be "
                f"measured: this network cannot be compressed"
            )
        return self.seen[near[0]]

    def _title(self, path: str, module: nn.Module) -> str:
        given = getattr(module, "arguments", {})
        shape = self._shape(path)
        if {"in_channels", "out_channels"} <= given.keys():
            stride = f" /{given['stride']}" if given.get("stride", 1) != 1 else ""
            return f"block {given['in_channels']}->{given['out_channels']}{stride} {_at(shape)}"
        return f"{type(module).__name__} {_at(shape)}"


def _at(shape: Shape) -> str:
    return f"at {'x'.join(map(str, shape))}"


def _inputs(model: nn.Module, shape: Shape) -> dict[str, Shape]:
    """Path -> shape of the first map that a module gets, in the order of the calls."""
    found: dict[str, Shape] = {}

    def noting(path: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].dim() in (3, 4):
                found.setdefault(path, tuple(args[0].shape[1:]))

        return note

    handles = [
        module.register_forward_pre_hook(noting(path)) for path, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            model(torch.zeros(1, *shape))
    except Exception as error:  # foreign code can fail in any way
        size = "x".join(map(str, shape))
        raise UserError(
            f"{type(model).__name__} fails on an image of {size} ({in_words(error)}): set another "
            f"data.image_size"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return found


def taps_of(model: nn.Module, shape: Shape) -> tuple[str, ...]:
    """The ends of its stages that are maps [C, H, W], as taps for losses on pairs."""
    if isinstance(model, ZooNetwork):
        return tuple(stage for stage in model.stage_paths() if stage in model.tap_names)
    found: list[str] = []

    def noting(path: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            # A map of one pixel says nothing of where a network looks.
            is_map = isinstance(output, Tensor) and output.dim() == 4 and output[0, 0].numel() > 1
            if is_map and path not in found:
                found.append(path)

        return note

    stages = [path for path in stages_of(model) if path]
    handles = [model.get_submodule(path).register_forward_hook(noting(path)) for path in stages]
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *shape))
    finally:
        for handle in handles:
            handle.remove()
    return tuple(found)
