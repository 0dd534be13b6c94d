"""Networks by name: the zoo, timm and torchvision behind one `create_model`.

Every network built here has a card (`fastkd.models.card`) with what is needed to rebuild it and
the normalisation that its weights expect. `model_from_file` reads the same facts from the metadata
of a safetensors file.
"""

import difflib
import fnmatch
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastkd.errors import UserError
from fastkd.models import hub, reused_head
from fastkd.models.card import Card, card_of, sign
from fastkd.models.fused import use_kernels
from fastkd.models.head import class_layers
from fastkd.models.planner import DEFAULT_KERNELS, KernelChoice
from fastkd.models.proportion import check_proportion
from fastkd.models.rewrite.options import (
    GENOTYPE,
    REWRITES,
    canonical,
    conflicts,
    fill,
    rewritten,
)
from fastkd.models.taps import ZooNetwork
from fastkd.models.zoo.families import FAMILIES, encoder_of, family_of, options_of
from fastkd.storage.description import NetworkFacts
from fastkd.storage.facts import DataFacts
from fastkd.storage.fitting import load_into
from fastkd.storage.weight_file import WeightFile, WeightSource

__all__ = [
    "classifier_paths",
    "create_model",
    "is_of_zoo",
    "list_models",
    "model_from_file",
    "model_options",
    "unnamed_options",
    "without_memory",
]


def create_model(
    name: str,
    num_classes: int | None = None,
    *,
    pretrained: bool = False,
    weights: WeightSource | None = None,
    weights_key: str | None = None,
    new_head: bool = False,
    kernels: KernelChoice = DEFAULT_KERNELS,
    **options: Any,
) -> nn.Module:
    """Build a network: images [N, 3, H, W] -> logits [N, num_classes], or for segmentation
    [N, num_classes, h, w].

    name: of the zoo (`wrn_40_2`, `resnet20`, `resnet8x4`; see `list_models`), `timm:NAME` or
        `torchvision:NAME`.
    num_classes: required for the zoo unless `weights` names it; None keeps the count of the others.
    pretrained: weights of timm or torchvision; the head is new where the class count differs.
    weights: a checkpoint that is loaded strictly: a path, or an already opened `WeightFile`. If
        fastkd wrote it for this network, options that are not given are those of its network
        (except dropout).
    weights_key: which network in that file, if several fit: a dotted path such as `state_dict` or
        `model.teacher`; by default the only one that fits, an average (EMA) before others.
    new_head: load everything except the classifier from `weights` or the pretrained network,
        whatever their class count; the classifier keeps its initialisation. From the file of its
        encoder (`erfnet_encoder` for `erfnet`) also the layers that this has not.
    kernels: how chains of grouped 3x3 and 1x1 convolutions compute, by default plain
        (`fastkd.use_kernels`).
    options: of the family, such as `width` of the CIFAR ResNets, or of timm or torchvision. Every
        network takes `block` (cheap blocks for its 3x3 convolutions) or `blocks` (one for each
        path, stage or pattern), `depth` (residual blocks that each stage keeps) and `shortcuts`
        (False: none, "projection": only those): if a family does not support them,
        `fastkd.cheapen`, `fastkd.models.shorten` and `fastkd.remove_shortcuts` rewrite the finished
        network. With `blocks` or `depth`, weights of the network without them are copied as far
        as they fit, with a warning.

    `card_of(model)` (`fastkd.models.card`) has the name, the options, the class count, the
    normalisation ((mean, std) per channel for images in [0, 1], or None) and `data`, how pictures
    are shown to it: timm states its own, torchvision's come with pretrained weights, a weight
    file's are in the file, together with the class names.
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
    file = None if weights is None else WeightFile.open(weights, weights_key)
    facts = NetworkFacts() if file is None else _facts_for(name, file, new_head)
    donor = None
    if new_head and pretrained:
        donor = create_model(name, pretrained=True, kernels="plain", **options)
        pretrained = False
        donor_card = card_of(donor)
        facts = donor_card.facts if donor_card else NetworkFacts()
        facts = NetworkFacts(normalization=facts.normalization, data=facts.data)
    taken = unnamed_options(name, facts, options)
    if file is not None and (taken or (num_classes is None and facts.num_classes)):
        _check_described(file, name, 2 if num_classes else facts.num_classes, taken | options)
    options = taken | options
    if num_classes is None:
        num_classes = facts.num_classes
    options = canonical(options)
    rewrites = _rewrites(name, options)
    own = {option: value for option, value in options.items() if option not in rewrites}
    built = _build(name, num_classes, pretrained, own)
    # Messages of the rewrites call it by its name.
    named = {"name": name, "options": own, "num_classes": built.num_classes}
    sign(built.model, replace(card_of(built.model) or Card(), **named))
    model = rewritten(built.model, rewrites)
    changed = tuple(key for key in GENOTYPE if key in options)
    sign(
        model,
        replace(
            card_of(model) or Card(),
            name=name,
            options=dict(options),
            num_classes=built.num_classes,
            normalization=facts.normalization or built.normalization,
            data=_data(facts.data or built.data, new_head),
            head=(model.head_path,) if isinstance(model, ZooNetwork) else None,
        ),
    )
    new = (*classifier_paths(model), *_lacking(name, facts)) if new_head else ()
    sign(model, replace(card_of(model) or Card(), new=new))
    if donor is not None:
        load_into(model, donor.state_dict(), origin=f"the pretrained {name}", new=new)
    elif file is not None:
        changed = fill(model, file, facts, new, create_model)
    if changed and (donor is not None or pretrained or file is not None):
        sign(model, replace(card_of(model) or Card(), unlearned=changed))
    return use_kernels(model, kernels)


def _data(facts: DataFacts | None, new_head: bool) -> DataFacts | None:
    """What a new classifier leaves of the facts: it knows no class yet."""
    return facts.model_copy(update={"classes": None}) if facts and new_head else facts


def _facts_for(name: str, file: WeightFile, new_head: bool) -> NetworkFacts:
    """The metadata of a file as far as they are about this network: of SimKD's, about its body."""
    facts = file.network
    if _lacking(name, facts) and not new_head:
        raise UserError(
            f"{file} holds {facts.architecture}, the first layers of {name}: new_head=True "
            f"(student.new_head=true) starts {name} from it, with a new decoder and classifier"
        )
    if facts.architecture != f"simkd:{name}":
        return facts
    if not new_head:
        raise UserError(
            f"{file} holds {facts.architecture}: {name} with a projector and the classifier of its "
            f"teacher, while its own classifier was not trained. "
            f"fastkd.models.model_from_file({str(file)!r}) builds it, fastkd eval and "
            f"teacher.weights take it; new_head=True (student.new_head=true) takes the body alone"
        )
    return replace(facts, architecture=name, options=dict(facts.options.get("student") or {}))


def unnamed_options(name: str, facts: NetworkFacts, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a file's network that were not given and are not the defaults.

    Rates of dropout and the like are left out: they belong to a training, not to its result.
    """
    if facts.architecture != name and not _lacking(name, facts):
        return {}
    family = family_of(name)
    defaults = inspect.signature(family.build).parameters if family else {}
    return {
        option: value
        for option, value in facts.options.items()
        if option not in given
        and "drop" not in option
        and not conflicts(option, given)
        and not (option in defaults and defaults[option].default == value)
    }


def _lacking(name: str, facts: NetworkFacts) -> tuple[str, ...]:
    """Layers of a network that a file of its encoder has not; none for any other file."""
    encoder = encoder_of(name)
    return encoder.lacks if encoder and facts.architecture == encoder.name else ()


def classifier_paths(model: nn.Module) -> tuple[str, ...]:
    """Paths of the classifier layers of a network from `create_model`, such as `fc`.

    Networks of the zoo know theirs. In others these are the layers that differ in the same network
    with one class more, built once, on the meta device where it can; the card keeps the answer.
    Raises UserError for networks built elsewhere.
    """
    card = card_of(model)
    if card is None or card.name is None or card.num_classes is None:
        raise UserError(
            f"{type(model).__name__} was not built by create_model, so its classifier is not known"
        )
    if card.head is None:
        other = without_memory(card.name, card.num_classes + 1, **card.options)
        card = replace(card, head=class_layers(model, other))
        sign(model, card)
    assert card.head is not None
    return card.head


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` accepts and that match a shell pattern.

    `timm:PATTERN` and `torchvision:PATTERN` search there. The zoo accepts more than it lists: any
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


def is_of_zoo(name: str) -> bool:
    """Whether `create_model` builds this network from the zoo."""
    return family_of(name) is not None


def model_options(name: str) -> list[str] | None:
    """The options that `create_model` accepts for a network, found without building it.

    None: the network is unknown. Of timm and torchvision, which check their own options, only those
    that fastkd names.
    """
    # Any network can be rewritten with these.
    rewrites = list(REWRITES)
    source, colon, rest = name.partition(":")
    if colon:
        known = source in hub.HUBS and hub.knows(source, rest)
        return [*rewrites, "drop_path"] if known else None
    family = family_of(name)
    return [*rewrites, *options_of(family)] if family else None


def model_from_file(path: WeightSource) -> nn.Module:
    """Rebuild the network that a fastkd weight file (or run folder) describes, weights included.

    path: the file, or an already opened `WeightFile`.
    Raises UserError if the metadata do not name a network that `create_model` can build.
    """
    file = WeightFile.open(path)
    facts = file.network
    if facts.architecture is None:
        if "module" in file.facts:
            raise UserError(
                f"{file}: its network is a {file.facts['module']}, which fastkd did not build and "
                f"cannot rebuild; make one as your script does, and fill it with "
                f"fastkd.storage.weights.load_into(network, FILE). Networks of timm and "
                f"torchvision are rebuilt if fastkd made them, as with "
                f"fastkd.create_model('timm:NAME', ..)"
            )
        raise UserError(
            f"{file}: the file does not name its network; build it with "
            "create_model(NAME, num_classes, weights=FILE), or load it into your own module with "
            "fastkd.storage.weights.load_into"
        )
    _check_described(file, facts.architecture, facts.num_classes, facts.options)
    return create_model(facts.architecture, facts.num_classes, weights=file, **facts.options)


def without_memory(name: str, num_classes: int | None, **options: Any) -> nn.Module:
    """The network of `create_model` without memory for its weights where its constructor allows it.

    For its shapes, or to learn whether it can be built. The random state stays as it is. Raises
    what `create_model` raises.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return create_model(name, num_classes, kernels="plain", **options)
        except RuntimeError:
            # A constructor that computes its widths with tensors, such as torchvision's RegNet.
            return create_model(name, num_classes, kernels="plain", **options)


def _check_described(
    file: WeightFile, name: str, num_classes: int | None, options: Mapping[str, Any]
) -> None:
    """UserError if a network that a file describes is not one of ours, or larger than the file."""

    def build() -> None:
        if reserved := options.keys() & inspect.signature(create_model).parameters.keys():
            raise UserError(f"{', '.join(sorted(reserved))} is not an option of a network")
        without_memory(name, num_classes, **options)

    check_proportion(file, name, options, build)


def _build(
    name: str, num_classes: int | None, pretrained: bool, options: dict[str, Any]
) -> hub.Built:
    """The network as its source builds it, before any rewrite."""
    source, colon, rest = name.partition(":")
    if not colon:
        return _build_zoo(name, num_classes, pretrained, options)
    sources = {**hub.HUBS, "simkd": _build_simkd}
    if source not in sources:
        raise UserError(
            f"unknown source {source!r} in {name!r}; expected timm:NAME, torchvision:NAME "
            "or a name of the zoo"
        )
    return sources[source](rest, num_classes, pretrained, options)


def _build_simkd(
    student: str, num_classes: int | None, pretrained: bool, options: dict[str, Any]
) -> hub.Built:
    """A student as the SimKD loss left it; all options are in the metadata of its file."""
    if num_classes is None or pretrained or "student" not in options:
        raise UserError(
            f"simkd:{student} comes from training with the SimKD loss and is rebuilt from "
            "its weight file: fastkd.models.model_from_file(FILE), or fastkd eval RUN"
        )
    own = dict(options)
    body = create_model(student, num_classes, kernels="plain", **own.pop("student"))
    return hub.Built(reused_head.build(body, num_classes, **own), num_classes, None)


def _build_zoo(
    name: str, num_classes: int | None, pretrained: bool, options: dict[str, Any]
) -> hub.Built:
    family = family_of(name)
    if family is None:
        raise _unknown(name)
    if pretrained:
        raise UserError(f"{name}: the zoo has no pretrained weights; give weights=FILE")
    if num_classes is None:
        raise UserError(f"{name}: num_classes is missing; give the number of classes of your data")
    allowed = options_of(family)
    for option in options:
        if option not in allowed:
            # Those of a genotype are of every network.
            known = list(dict.fromkeys([*allowed, *GENOTYPE]))
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.65)
            hint = f"; nearest: {near[0]}" if near else ""
            with torch.device("meta"):  # report an unknown name before an unknown option
                family.build(name, num_classes)
            raise UserError(
                f"{name} has no option {option!r}{hint}; its options: {', '.join(known)}. If a "
                f"recipe sets it: student.{option}=null or teacher.{option}=null"
            )
    return hub.Built(family.build(name, num_classes, **options), num_classes, None)


def _unknown(name: str) -> UserError:
    """The error for a bare name that the zoo does not have: who has it, or the nearest names."""
    elsewhere = [f"{source}:{name}" for source in hub.HUBS if hub.knows(source, name)]
    if elsewhere:
        return UserError(
            f"the zoo of fastkd has no network {name!r}: write {' or '.join(elsewhere)}"
        )
    found: list[str] = []
    for prefix, names in (("", list_models()), *((f"{source}:", ()) for source in hub.HUBS)):
        names = names or [one.removeprefix(prefix) for one in list_models(prefix)]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        found += [prefix + one for one in near]

    def likeness(one: str) -> float:
        return difflib.SequenceMatcher(None, one.rpartition(":")[2], name).ratio()

    # Sorting is stable: of equally similar names the zoo's come first.
    nearest = sorted(found, key=likeness, reverse=True)[:3]
    hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
    return UserError(
        f"unknown network {name!r}{hint}. The zoo has {', '.join(list_models())} (any wrn_D_W "
        "with D = 6n + 4); other networks: timm:NAME, torchvision:NAME"
    )


def _rewrites(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that rewrite the finished network, as its builder does not support them."""
    family = family_of(name)
    own = options_of(family) if family else []
    return {key: options[key] for key in REWRITES if key in options if key not in own}
