"""`fastkd doctor --blocks`: the cheap blocks of a network, and what the planner picks for each.

The network is built without memory and only asked for the shapes that its blocks see; the planner
then measures, or finds what it has measured before.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.cli.networks import changed, image_shape, own_shape
from fastkd.compute.machine import cpu_facts
from fastkd.compute.precision import Precision, resolve_precision
from fastkd.errors import UserError
from fastkd.models import create_model, use_kernels
from fastkd.models.fused.method import fused_methods
from fastkd.models.intake import Remedy, refusal
from fastkd.models.planner import CHOOSER, BlockSpec, Case
from fastkd.models.planner.spec import KINDS

__all__ = ["blocks_of"]

DEFAULT = ("wrn_40_2", "G:N")
DIRECTIONS = {
    "training": "Training, forward and backward pass",
    "inference": "Inference, forward pass in eval mode",
}

Found = tuple[BlockSpec, tuple[int, int, int, int]]
"""A block and the shape of its input."""


def blocks_of(options: argparse.Namespace) -> None:
    """Print the tables, as text or as JSON."""
    name, block = _asked(options.blocks)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(options.precision or "auto", device)
    with torch.device("meta"):
        model = create_model(name, None if ":" in name else 100)
        model = use_kernels(model if block is None else changed(model, block), "auto")
    shape = image_shape(options.input) if options.input else own_shape(name, model)
    images_NCHW = torch.zeros(options.batch or 32, *shape, device="meta")
    found = Counter(_blocks_in(model, name, images_NCHW, precision))
    if not found:
        raise UserError(
            f"{name} has no grouped 3x3 convolution -> batch norm -> ReLU -> 1x1 convolution that "
            f"can run as one op; give a block to put into it: fastkd doctor --blocks {name} G:4"
        )
    rows = _rows(found, precision.dtype, device)
    if options.json:
        print(json.dumps(list(rows), indent=1))
        return
    where = torch.cuda.get_device_name() if device.type == "cuda" else cpu_facts()["name"]
    num = torch.get_num_threads()
    threads = "" if device.type == "cuda" else f", {num} thread{'' if num == 1 else 's'}"
    sizes = "x".join(map(str, images_NCHW.shape))
    title = name if block is None else f"{name} with {block}"
    print(f"{title}, {sizes}, {precision.name}, {where}{threads}; milliseconds a call")
    _print(rows, max(len(str(spec)) for spec, _ in found))


def _asked(words: list[str]) -> tuple[str, str | None]:
    if len(words) > 2:
        raise UserError(f"--blocks takes a network and a block, got {' '.join(words)}")
    name, block = (*words, None, None)[:2] if words else DEFAULT
    assert name is not None
    return name, block


def _blocks_in(
    model: nn.Module, name: str, images_NCHW: Tensor, precision: Precision
) -> list[Found]:
    """Each chain that the op can run, with the shape of its input, in the order of their calls."""
    # A chain that an outer module has too is longer there, and listed later.
    chains = {
        chain.grouped: chain.spec
        for method in sorted(fused_methods(model), key=lambda one: -_depth(model, one.module))
        for trace in method.traces
        for chain in trace.chains
    }
    found: list[Found] = []

    def note(conv: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        spec = chains[conv]  # pyright: ignore[reportArgumentType]
        num, _, height, width = inputs[0].shape
        found.append((spec, (num, spec.in_channels, height, width)))

    for conv in chains:
        conv.register_forward_pre_hook(note)
    try:
        with torch.no_grad():
            model.eval()(images_NCHW)
    except Exception as error:
        # Foreign code can fail in any way.
        channels = images_NCHW.shape[1]
        raise refusal(
            error,
            title=name,
            model=model,
            run=model,
            images_NCHW=images_NCHW,
            precision=precision,
            remedy=Remedy(f"give --input={channels}x{{0}}x{{0}}"),
        ) from error
    return found


def _depth(model: nn.Module, module: nn.Module) -> int:
    """How many modules are around one."""
    path = next(path for path, one in model.named_modules() if one is module)
    return path.count(".") + bool(path)


def _rows(
    found: Counter[Found], dtype: torch.dtype, device: torch.device
) -> Iterator[dict[str, Any]]:
    """One row for each distinct block and direction, as it is measured."""
    for training in (True, False):
        for (spec, shape), times in found.items():
            choice = CHOOSER.choose(Case(spec, shape, dtype, device, training, training))
            yield {
                "direction": "training" if training else "inference",
                "block": str(spec),
                "input": "x".join(map(str, shape[1:])),
                "times": times,
                "choice": choice.kind,
                "ms": dict(choice.ms),
                "gain": choice.gain,
                "source": choice.source,
            }


def _print(rows: Iterator[dict[str, Any]], width: int) -> None:
    """The rows of a direction, then what all its blocks take in a pass of the network.

    width: of the column of blocks, as rows appear while others are still measured.
    """
    for direction, of_one in groupby(rows, key=lambda row: row["direction"]):
        print(f"\n{DIRECTIONS[direction]}")
        print(_line(width, "block", "input", "times", "choice", *KINDS, "gain"))
        times, chosen, sums = 0, 0.0, dict.fromkeys(KINDS, 0.0)
        for row in of_one:
            ms = row["ms"]
            cells = [f"{ms[kind]:.3g}" if ms else "-" for kind in KINDS]
            gain = f"{row['gain']:.2f}x" if ms else "-"
            place = row["block"], row["input"], row["times"], row["choice"]
            print(_line(width, *place, *cells, gain), flush=True)
            times += row["times"]
            chosen += row["times"] * ms.get(row["choice"], math.nan)
            sums = {kind: sums[kind] + row["times"] * ms.get(kind, math.nan) for kind in KINDS}
        if not math.isnan(chosen):
            gain = f"{sums['plain'] / chosen:.2f}x"
            cells = [f"{ms:.4g}" for ms in sums.values()]
            print(_line(width, "together", "", times, f"{chosen:.4g} ms", *cells, gain))


def _line(width: int, *cells: object) -> str:
    block, shape, *rest = cells
    widths = (5, 12, 8, 8, 7)
    numbers = [f"{cell!s:>{size}}" for cell, size in zip(rest, widths, strict=True)]
    return f"  {block!s:<{width}}  {shape!s:<12} {' '.join(numbers)}"
