"""The names in checkpoints of Moonshine's released code, in those of the zoo.

BayesWatch/pytorch-moonshine keeps a stage as a list of parts, each with its residual blocks in
`layer`, and every convolution, cheap or not, in a module of its own:

    block2.0.layer.3.conv1.conv1x1_down.weight      ->  layer2.3.conv1.reduce.weight

Several parts (its AT_split) are numbered on. Wide residual networks have `block1` to `block3`, the
ImageNet networks `layer1` to `layer4`. Its `DConv..` are G, `ConvB..`, `G..B..` and `A..B..` are B
and BG, `Conv2x2` is S-2x2. One bottleneck for both convolutions of a residual block (its blocktype
Bottle) is `block="B(2)"`; one for each of them (Basic) is made by `cheapen`, once with
`where="layer?.*.conv1"` and once with `where="layer?.*.conv2"`.
"""

import re
from collections.abc import Mapping, Sequence

__all__ = ["moonshine_names"]

BLOCK = re.compile(r"(?:block|layer)([1-4])\.(\d+)\.layer\.(\d+)\.(.+)")
CONV = re.compile(
    r"(conv[12])\.(conv1x1_down|conv1x1_up|convdw|conv1x1|conv3d|conv|bn1|bn2|bn)\.(\w+)"
)

BOTTLENECK = {
    "conv1x1_down": "reduce",
    "bn1": "norm1",
    "conv": "spatial",
    "convdw": "spatial",
    "bn2": "norm2",
    "conv1x1_up": "expand",
}
GROUPED = {"convdw": "grouped", "bn": "norm", "conv1x1": "pointwise"}


def moonshine_names(names: Sequence[str]) -> Mapping[str, str]:
    """Theirs -> ours; names that are not theirs stay."""
    places = {name: (found[1], int(found[2]), int(found[3])) for name, found in _blocks(names)}
    counts: dict[str, int] = {}
    number: dict[tuple[str, int, int], int] = {}
    for place in sorted(set(places.values())):
        number[place] = counts.get(place[0], 0)
        counts[place[0]] = number[place] + 1
    new = {name: name for name in names}
    for name, found in _blocks(names):
        inner = found[4].replace("convShortcut", "shortcut", 1)
        if conv := CONV.fullmatch(inner):
            beside = name.removesuffix(f"{conv[2]}.{conv[3]}")
            squeezed = f"{beside}conv1x1_down.weight" in new
            part = (BOTTLENECK if squeezed else GROUPED).get(conv[2])
            inner = ".".join(filter(None, (conv[1], part, conv[3])))
        new[name] = f"layer{found[1]}.{number[places[name]]}.{inner}"
    return new


def _blocks(names: Sequence[str]) -> list[tuple[str, re.Match[str]]]:
    return [(name, found) for name in names if (found := BLOCK.fullmatch(name))]
