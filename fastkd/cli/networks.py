"""`fastkd models` and `fastkd cheapen`: sizes and costs of networks, built without memory."""

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from fastkd.compute.precision import Precision
from fastkd.config.mistakes import explain
from fastkd.errors import UserError
from fastkd.models import Count, count, create_model, list_models, shorten
from fastkd.models import cheapen as cheapen_network
from fastkd.models.card import card_of
from fastkd.models.config import StudentConfig
from fastkd.models.counting.count import cost
from fastkd.models.hub import HUBS
from fastkd.models.intake import Remedy, refusal
from fastkd.models.taps import available_taps
from fastkd.recipe.overrides import parse_override
from fastkd.storage.description import keys_in_words

__all__ = ["changed", "cheapen", "image_shape", "models", "own_shape"]


def models(options: argparse.Namespace) -> None:
    """List networks with parameters and MACs."""

    shape = image_shape(options.input) if options.input else None
    names = list_models(options.pattern)
    if not names:
        others = [one for hub in HUBS if (one := f"{hub}:{options.pattern}") and list_models(one)]
        hint = " or ".join(map(repr, others or ["resnet*", "timm:resnet*"]))
        raise UserError(f"no network matches {options.pattern!r}; try {hint}")
    rows = (_model_row(name, shape) for name in names)
    if options.json:
        print(json.dumps(list(rows), indent=1))
        return
    uncounted = "other input" if shape else "-"
    # Rows appear as their networks are built, so only the names are known before.
    width = max(32, *map(len, names))
    print(_line(width, "network", "parameters", "MACs", "input", "classes", "taps"))
    for row in rows:
        macs = f"{row['macs']:,}" if row["macs"] is not None else uncounted
        taps = _short_taps(row["taps"])
        cells = (f"{row['params']:,}", macs, row["input"], row["classes"], taps)
        print(_line(width, row["name"], *cells), flush=True)
    if ":" not in options.pattern:
        print("each stage also before its last activation: stage1:preact")


def _line(width: int, name: str, *cells: object) -> str:
    """Two spaces between any two cells, also where one is wider than its column."""
    widths = (14, 17, 10, 7)
    numbers = [f"{cell:>{size}}" for cell, size in zip(cells, widths, strict=False)]
    return "  ".join([f"{name:<{width}}", *numbers, str(cells[-1])])


def _short_taps(taps: Sequence[str]) -> str:
    """`stem stage1-3 pooled logits`, for networks of the zoo."""
    stages = [tap for tap in taps if re.fullmatch(r"stage\d", tap)]
    if not stages:
        return "module paths"
    runs = {stages[0]: f"{stages[0]}-{stages[-1][-1]}"}
    return " ".join(runs.get(tap, tap) for tap in taps if "stage" not in tap or tap in runs)


def _model_row(name: str, wanted: tuple[int, ...] | None) -> dict[str, Any]:
    """Size and cost of one network, built without memory for its weights."""

    with torch.device("meta"):
        model: Any = create_model(name, None if ":" in name else 100)
    shape = wanted or own_shape(name, model)
    row = {
        "name": name,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "macs": None,
        "training_bytes": None,
        "inference_bytes": None,
        "input": "x".join(map(str, shape)),
        "classes": model.num_classes,
        "taps": [] if ":" in name else list(available_taps(model)),
    }
    # Some networks accept certain image sizes only.
    if (size := cost(model, shape)) is not None:
        row |= {key: getattr(size, key) for key in ("macs", "training_bytes", "inference_bytes")}
    return row


def own_shape(name: str, model: Any) -> tuple[int, int, int]:
    """The image shape [C, H, W] that a network was made for."""
    own = {"zoo": (3, 32, 32), "torchvision": (3, 224, 224)}.get(name.rpartition(":")[0] or "zoo")
    return own or model.pretrained_cfg["input_size"]


def cheapen(options: argparse.Namespace) -> None:
    """Count a network before and after its 3x3 convolutions are replaced."""

    with torch.device("meta"):
        model = create_model(options.name, None if ":" in options.name else 100)
        cheap = changed(model, options.block, depth=options.depth, where=options.where)
    shape = image_shape(options.input) if options.input else own_shape(options.name, model)
    before, after = (_counted(options.name, one, shape) for one in (model, cheap))
    print(f"{options.name} at {'x'.join(map(str, shape))}")
    print(f"  {'':<12}{'before':>16}{'after':>16}{'share':>9}")
    for what, one, other in (
        ("parameters", before.params, after.params),
        ("MACs", before.macs, after.macs),
    ):
        print(f"  {what:<12}{one:>16,}{other:>16,}{other / one:>9.1%}")
    card = card_of(cheap)
    assert card is not None
    print(card.report)
    if card.options.keys() & {"blocks", "depth"}:
        keys = {f"student.{key}": one for key, one in card.options.items()}
        print(f"recipe: student.name={options.name} {keys_in_words(keys)}")


def changed(
    model: nn.Module,
    block: str,
    *,
    depth: str | None = None,
    where: Sequence[str] | None = None,
) -> nn.Module:
    """A copy with a block, or with those of a map such as `{layer1: G:4}`, and less depth."""
    if depth is not None:
        model = shorten(model, _value("depth", depth))
    if not block.startswith("{"):
        return cheapen_network(model, block, where=where)
    if where is not None:
        raise UserError(f"--where is for one block, and {block} says itself what each is for")
    if not block.strip("{} "):
        if depth is None:
            raise UserError("{} changes nothing: name blocks, or --depth")
        return model
    return cheapen_network(model, blocks=_value("blocks", block))


def _value(key: str, text: str) -> Any:
    """What the text means as the value of a key of the student."""
    _, value = parse_override(f"student.{key}={text}")
    try:
        return StudentConfig.model_validate({"name": "any", key: value}).options()[key]
    except ValidationError as error:
        said = explain(error, StudentConfig, {key: value}, (), prefix="student.")
        raise UserError(*said) from None


def _counted(name: str, model: Any, shape: tuple[int, int, int]) -> Count:
    try:
        return count(model, shape)
    except Exception as error:
        # Foreign code can fail in any way.
        raise refusal(
            error,
            title=name,
            model=model,
            run=model,
            images_NCHW=torch.zeros(1, *shape, device="meta"),
            precision=Precision("fp32", "cpu"),
            remedy=Remedy(f"give --input={shape[0]}x{{0}}x{{0}}"),
        ) from error


def image_shape(text: str) -> tuple[int, int, int]:
    """`--input=3x32x32` as numbers."""
    side = "([1-9][0-9]{0,4})"
    match = re.fullmatch(f"{side}x{side}x{side}", text)
    if not match:
        raise UserError(f"--input={text}: expected CxHxW such as 3x32x32")
    return int(match[1]), int(match[2]), int(match[3])
