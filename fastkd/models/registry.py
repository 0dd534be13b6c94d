"""Networks by name: the zoo, timm and torchvision behind one `create_model`.

Every network built here carries what is needed to build it again (`fastkd_name`, `num_classes`,
`fastkd_options`) and the `normalization` its weights expect, or None. `model_from_file` reads the
same facts from the metadata of a safetensors file.
"""

import difflib
import fnmatch
import inspect
import json
from collections.abc import Mapping
from os import PathLike
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from fastkd.config.section import Normalization
from fastkd.errors import UserError
from fastkd.models import hub, reused_head
from fastkd.models.blocks.grammar import parse_block
from fastkd.models.head import class_layers
from fastkd.models.rewrite.cheapen import cheapen
from fastkd.models.rewrite.shortcuts import remove_shortcuts
from fastkd.models.zoo import (
    erfnet,
    mobilenetv2,
    resnet,
    resnet18,
    resnet50,
    shufflenetv1,
    shufflenetv2,
    vgg,
    wrn,
)
from fastkd.storage.weights import load_into, load_weights

__all__ = ["classifier_paths", "create_model", "list_models", "model_from_file", "model_options"]

FAMILIES: tuple[ModuleType, ...] = (
    *(resnet, resnet18, resnet50, wrn, vgg, mobilenetv2, shufflenetv1, shufflenetv2, erfnet),
)
"""Each has NAMES (listed), PATTERN (accepted) and build(name, num_classes, *, options)."""


def create_model(
    name: str,
    num_classes: int | None = None,
    *,
    pretrained: bool = False,
    weights: str | PathLike[str] | None = None,
    new_head: bool = False,
    **options: Any,
) -> nn.Module:
    """Build a network: images [N, 3, H, W] -> logits [N, num_classes].

    name: of the zoo (`wrn_40_2`, `resnet20`, `resnet8x4`; see `list_models`), `timm:NAME` or
        `torchvision:NAME`.
    num_classes: required for the zoo unless `weights` names it; None keeps the count of the others.
    pretrained: weights of timm or torchvision; the head is new where the class count differs.
    weights: a checkpoint that is loaded strictly (formats: `fastkd.storage.weights.load_weights`).
    new_head: take all but the classifier from `weights` or the pretrained network, whatever their
        class count, and leave the classifier as it is initialised.
    options: of the family, such as `width` of the CIFAR ResNets, or of timm or torchvision. Every
        network takes `block` (cheap blocks for its 3x3 convolutions) and `shortcuts` (False: none,
        "projection": only those): where a family does not know them, `fastkd.cheapen` and
        `fastkd.remove_shortcuts` rewrite the finished network.

    The network has the attributes `fastkd_name`, `fastkd_options`, `num_classes` and
    `normalization` ((mean, std) per channel for images in [0, 1], or None): timm names its own,
    torchvision's come with pretrained weights, those of a weight file with the file.
    Raises UserError for unknown names and options (with the nearest), and for weights that do not
    fit.
    """
    if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
        raise UserError(f"num_classes: expected a positive integer, got {num_classes!r}")
    if weights is not None and pretrained:
        raise UserError("pretrained=True and weights=FILE exclude each other; give one of them")
    if new_head and weights is None and not pretrained:
        raise UserError(
            "new_head=True replaces the classifier of a trained network: give weights=FILE or "
            "pretrained=True"
        )
    state, metadata = (None, {}) if weights is None else load_weights(weights)
    facts = _read_facts(weights or "", metadata)
    if new_head and pretrained:
        donor = create_model(name, pretrained=True, **options)
        state, pretrained = donor.state_dict(), False
        facts = facts._replace(normalization=donor.normalization)
    if num_classes is None:
        num_classes = facts.num_classes
    if "block" in options:
        options["block"] = str(parse_block(options["block"]))
    rewrites = _rewrites(name, options)
    own = {option: value for option, value in options.items() if option not in rewrites}
    source, colon, rest = name.partition(":")
    if colon:
        sources = {**hub.HUBS, "simkd": _build_simkd}
        if source not in sources:
            raise UserError(
                f"unknown source {source!r} in {name!r}; expected timm:NAME, torchvision:NAME "
                "or a name of the zoo"
            )
        model, classes, normalization = sources[source](rest, num_classes, pretrained, own)
    else:
        model, normalization = _build_zoo(name, num_classes, pretrained, own), None
        assert num_classes is not None
        classes = num_classes
    model = _rewritten(model, rewrites)
    _sign(model, name, options, classes, facts.normalization or normalization)
    if state is not None:
        new = classifier_paths(model) if new_head else ()
        origin = str(weights or f"the pretrained {name}")
        load_into(model, state, metadata=metadata, origin=origin, new=new)
    return model


def classifier_paths(model: nn.Module) -> tuple[str, ...]:
    """Paths of the layers that hold the classes of a network of `create_model`, such as `fc`.

    Found by building it once more for one class more. Raises UserError for other networks.
    """
    built: Any = model
    if not hasattr(model, "fastkd_name"):
        raise UserError(
            f"{type(model).__name__} was not built by create_model, so its classifier is not known"
        )
    # The numbers that the caller draws next stay those that they were.
    with torch.random.fork_rng(devices=[]):
        other = create_model(built.fastkd_name, built.num_classes + 1, **built.fastkd_options)
    return class_layers(model, other)


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` accepts and that match a shell pattern.

    `timm:PATTERN` and `torchvision:PATTERN` search there. The zoo takes more than it lists: any
    `wrn_D_W` with D = 6n + 4.
    """
    source, colon, rest = pattern.partition(":")
    if colon:
        listings = {"timm": hub.list_timm, "torchvision": hub.list_torchvision}
        if source not in listings:
            raise UserError(f"unknown source {source!r}; expected one of {', '.join(listings)}")
        return [f"{source}:{name}" for name in listings[source](rest or "*")]
    names = [name for family in FAMILIES for name in family.NAMES]
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def model_options(name: str) -> list[str] | None:
    """What `create_model` takes for a network, found without building it.

    None: the network is unknown. Options of timm and torchvision are their own affair: [].
    """
    source, colon, rest = name.partition(":")
    if colon:
        return [] if source in hub.HUBS and hub.knows(source, rest) else None
    family = _family(name)
    # Any network can be rewritten with the first two.
    return ["block", "shortcuts", *_own_options(family)] if family else None


def model_from_file(path: str | PathLike[str]) -> nn.Module:
    """Rebuild the network that a fastkd weight file (or run folder) describes, weights included.

    Raises UserError when the metadata do not name a network that `create_model` can build.
    """
    facts = _read_facts(path, load_weights(path)[1])
    if facts.architecture is None:
        raise UserError(
            f"{path}: the file does not name its network; build it with "
            "create_model(NAME, num_classes, weights=FILE), or load it into your own module with "
            "fastkd.storage.weights.load_into"
        )
    return create_model(facts.architecture, facts.num_classes, weights=path, **facts.options)


def _build_simkd(
    student: str, num_classes: int | None, pretrained: bool, options: dict[str, Any]
) -> hub.Built:
    """What the SimKD loss made of a student; all the options stand in the metadata of its file."""
    if num_classes is None or pretrained or "student" not in options:
        raise UserError(
            f"simkd:{student} comes out of a training with the SimKD loss and is built again from "
            "its weight file: fastkd.models.model_from_file(FILE), or fastkd eval RUN"
        )
    own = dict(options)
    body = create_model(student, num_classes, **own.pop("student"))
    return hub.Built(reused_head.build(body, num_classes, **own), num_classes, None)


def _build_zoo(
    name: str, num_classes: int | None, pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    family = _family(name)
    if family is None:
        near = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise UserError(
            f"unknown network {name!r}{hint}. The zoo has {', '.join(list_models())} (any wrn_D_W "
            "with D = 6n + 4); other networks: timm:NAME, torchvision:NAME"
        )
    if pretrained:
        raise UserError(f"{name}: the zoo has no pretrained weights; give weights=FILE")
    if num_classes is None:
        raise UserError(f"{name}: num_classes is missing; give the number of classes of your data")
    allowed = _own_options(family)
    for option in options:
        if option not in allowed:
            near = difflib.get_close_matches(option, allowed, n=1, cutoff=0.5)
            hint = f"; nearest: {near[0]}" if near else ""
            known = ", ".join(allowed) or "none"
            with torch.device("meta"):  # a name that no network has is the first mistake
                family.build(name, num_classes)
            raise UserError(
                f"{name} has no option {option!r}{hint}; its options: {known}. Where a recipe sets "
                f"it: student.{option}=null or teacher.{option}=null"
            )
    return family.build(name, num_classes, **options)


def _family(name: str) -> ModuleType | None:
    return next((family for family in FAMILIES if family.PATTERN.fullmatch(name)), None)


def _own_options(family: ModuleType) -> list[str]:
    parameters = inspect.signature(family.build).parameters.values()
    return [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]


def _rewrites(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """`block` and `shortcuts` where the network's own builder does not know them."""
    family = _family(name)
    own = _own_options(family) if family else []
    return {key: options[key] for key in ("block", "shortcuts") if key in options if key not in own}


def _rewritten(model: nn.Module, rewrites: dict[str, Any]) -> nn.Module:
    shortcuts = rewrites.get("shortcuts", True)
    if shortcuts not in (True, False, "projection"):
        raise UserError(
            f"shortcuts={shortcuts!r}: of this network they can be kept (True), removed (False) or "
            "removed except for projections ('projection')"
        )
    if shortcuts is not True:
        model = remove_shortcuts(model, keep_projection=shortcuts == "projection")
    return cheapen(model, rewrites["block"]) if "block" in rewrites else model


def _sign(
    model: nn.Module,
    name: str,
    options: dict[str, Any],
    num_classes: int,
    normalization: Normalization | None,
) -> None:
    signed: Any = model
    signed.fastkd_name = name
    signed.fastkd_options = dict(options)
    signed.num_classes = num_classes
    signed.normalization = normalization


class _Facts(NamedTuple):
    """What the metadata of a weight file say of its network; see
    `fastkd.storage.weights.describe`."""

    architecture: str | None
    num_classes: int | None
    options: dict[str, Any]
    normalization: Normalization | None


def _read_facts(path: str | PathLike[str], metadata: Mapping[str, str]) -> _Facts:
    try:
        mean_std = json.loads(metadata.get("normalization", "null"))
        return _Facts(
            architecture=metadata.get("architecture"),
            num_classes=int(metadata["num_classes"]) if "num_classes" in metadata else None,
            options=dict(json.loads(metadata.get("options", "{}"))),
            normalization=None if mean_std is None else (tuple(mean_std[0]), tuple(mean_std[1])),
        )
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(f"{path}: its metadata cannot be read ({error})") from error
