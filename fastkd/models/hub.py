"""Networks of timm and torchvision by name, with the class count replaced.

Called by the registry for `timm:NAME` and `torchvision:NAME`. Both packages are imported on first
use. Nothing is downloaded unless pretrained weights are requested, and then by the package's own
interface.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, get_args

from torch import nn

from fastkd.config.section import Normalization
from fastkd.errors import UserError
from fastkd.models.head import class_layers
from fastkd.printable import in_words
from fastkd.storage.facts import DataFacts, Framing, FramingMode, Interpolation

__all__ = ["HUBS", "Built", "convention", "knows", "list_timm", "list_torchvision"]

BARE_IN_TIMM_0_2 = {
    "resnet18": "tv_in1k",
    "resnet50": "ram_in1k",
    "tf_efficientnet_b0": "aa_in1k",
    "tf_efficientnet_b4": "aa_in1k",
}
"""Weights that a bare name meant in timm 0.2, which MEAL V2 used, if it means others now."""

_DROP_PATH = {"timm": "drop_path_rate", "torchvision": "stochastic_depth_prob"}
"""What stochastic depth is called there."""


class Built(NamedTuple):
    """A network, with facts that the caller cannot read off it."""

    model: nn.Module
    num_classes: int
    normalization: Normalization | None
    data: DataFacts | None = None
    """How its publisher shows pictures to it."""


def build_timm(
    name: str, num_classes: int | None, pretrained: bool, options: dict[str, Any]
) -> Built:
    """`timm.create_model`; `num_classes=None` keeps the network's own count."""
    import timm

    base, _, tag = name.partition(".")
    if ":" not in name and not timm.is_model(base):
        _unknown("timm", base, timm.list_models())
    if ":" not in name and tag and name not in timm.list_pretrained(f"{base}.*"):
        _unknown("timm", name, timm.list_pretrained(f"{base}.*"))
    if pretrained and ":" not in name and not tag:
        _check_pinned(base)
    if num_classes is not None:
        options = {**options, "num_classes": num_classes}
    options = _spelled(options, _DROP_PATH["timm"])
    model = _build("timm", name, pretrained, lambda: timm.create_model(name, pretrained, **options))
    details: Any = model
    mean_std = tuple(details.pretrained_cfg["mean"]), tuple(details.pretrained_cfg["std"])
    size = options.get("img_size")
    shown = _shown_by_timm(details.pretrained_cfg, size if isinstance(size, int) else None)
    return Built(model, details.num_classes, mean_std, shown)


def build_torchvision(
    name: str, num_classes: int | None, pretrained: bool, options: dict[str, Any]
) -> Built:
    """`torchvision.models.get_model`; pretrained: its default weights, with their normalisation."""
    from torchvision.models import get_model, get_model_builder, get_model_weights

    if name not in list_torchvision():
        _unknown("torchvision", name, list_torchvision())
    options = _spelled(options, _DROP_PATH["torchvision"])
    choices: Any = get_model_weights(name)
    weights = choices.DEFAULT
    own_classes = len(weights.meta["categories"])
    if "weights_backbone" in inspect.signature(get_model_builder(name)).parameters:
        # Segmentation networks download a pretrained backbone unless this is switched off.
        options = {"weights_backbone": None, **options}
    if num_classes is None:
        num_classes = own_classes
    sized = {**options, "num_classes": num_classes}
    if not pretrained:
        model = _build("torchvision", name, False, lambda: get_model(name, weights=None, **sized))
        if "aux_loss" not in options:
            _drop_auxiliary(model)
        return Built(model, num_classes, None)
    model = _build("torchvision", name, True, lambda: get_model(name, weights=weights, **options))
    if "aux_loss" not in options:
        _drop_auxiliary(model)
    if num_classes != own_classes:
        fresh = _build("torchvision", name, False, lambda: get_model(name, weights=None, **sized))
        _take_heads(model, fresh)
    preset = weights.transforms()
    shown = None
    if hasattr(preset, "crop_size"):  # not of segmentation
        (resize,), (crop,) = preset.resize_size, preset.crop_size
        framing = Framing(resize=resize, crop=crop, interpolation=preset.interpolation.value)
        shown = DataFacts(image_size=crop, evaluation=framing)
    return Built(model, num_classes, (tuple(preset.mean), tuple(preset.std)), shown)


def _drop_auxiliary(model: nn.Module) -> None:
    """Leave out the second classifier of a segmentation network: no loss here would train it.

    torchvision's own checkpoints have weights of it, which are passed over.
    """
    from torchvision.models.segmentation import FCN, DeepLabV3

    if isinstance(model, FCN | DeepLabV3):
        model.aux_classifier = None
        attributes: dict[str, Any] = model.__dict__
        attributes["key_maps"] = {"torchvision": {"aux_classifier": None}}


def convention(name: str, size: int | None = None) -> DataFacts | None:
    """How timm shows pictures to one of its networks, found without building it.

    size: side of the images in pixels, if not the network's own. None if nothing is known, as of
    torchvision's networks, whose convention depends on the weights.
    """
    hub, _, rest = name.partition(":")
    # Only a download would tell about hf-hub:NAME and the like.
    if hub != "timm" or ":" in rest or not knows(hub, rest):
        return None
    import timm

    config = timm.get_pretrained_cfg(rest)
    return _shown_by_timm(config.to_dict() if config else {}, size)


def _shown_by_timm(config: dict[str, Any], size: int | None) -> DataFacts | None:
    """timm's rule: sides of size / crop_pct, the centre of it kept. None for other shapes."""
    from timm.data.config import resolve_data_config

    found = resolve_data_config(pretrained_cfg=config)
    _, height, width = found["input_size"]
    mode, interpolation = found["crop_mode"], found["interpolation"]
    if height != width or mode not in get_args(FramingMode):
        return None
    if interpolation not in get_args(Interpolation):
        return None
    side = size or height
    resize = math.floor(side / found["crop_pct"])
    if resize < side:
        return None
    framing = Framing(
        resize=resize,
        crop=side,
        interpolation=interpolation,
        mode=mode,
    )
    return DataFacts(image_size=side, evaluation=framing)


HUBS: dict[str, Callable[[str, int | None, bool, dict[str, Any]], Built]] = {
    "timm": build_timm,
    "torchvision": build_torchvision,
}


def knows(hub: str, name: str) -> bool:
    """Whether timm or torchvision has a network of this name, and timm its weight tag."""
    if hub == "torchvision":
        return name in list_torchvision()
    import timm

    base, _, tag = name.partition(".")
    # Only timm can resolve hf-hub:NAME and the like.
    return ":" in name or (timm.is_model(base) and (not tag or timm.is_model_pretrained(name)))


def list_timm(pattern: str = "*") -> list[str]:
    """timm's network names; with a weight tag (`resnet50.a1_in1k`) if the pattern has a dot."""
    import timm

    return timm.list_pretrained(pattern) if "." in pattern else timm.list_models(pattern)


def list_torchvision(pattern: str = "*") -> list[str]:
    """torchvision's classification and segmentation networks."""
    from torchvision import models

    kinds = (models, models.segmentation)
    return [name for kind in kinds for name in models.list_models(kind, include=pattern)]


def _spelled(options: dict[str, Any], drop_path: str) -> dict[str, Any]:
    """The options as a package spells them; without a rate the network has its own."""
    named = {key: value for key, value in options.items() if key != "drop_path"}
    rate = options.get("drop_path")
    return named if rate is None else {**named, drop_path: rate}


def _build(hub: str, name: str, pretrained: bool, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except TypeError as error:  # the builders take **kwargs: a wrong option fails only here
        if any(word in str(error) for word in _DROP_PATH.values()):
            raise UserError(
                f"{hub}:{name} has no stochastic depth: leave out drop_path, or take a network "
                "that has it, such as timm:resnet50"
            ) from error
        raise UserError(f"{hub}:{name} does not take these options: {error}") from error
    except Exception as error:
        # Download errors come from four libraries and share no base class.
        if not pretrained:
            raise
        raise UserError(
            f"{hub}:{name}: no pretrained weights ({in_words(error)}). "
            "Without a network connection, build it with pretrained=False and weights=FILE"
        ) from error


def _take_heads(model: nn.Module, fresh: nn.Module) -> None:
    """Replace the layers whose parameter shapes depend on the class count by those of `fresh`."""
    for path in class_layers(model, fresh):
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, fresh.get_submodule(path))


def _check_pinned(name: str) -> None:
    """UserError for the bare name of a network for which timm has several weights.

    Which of them it means has changed silently between versions of timm.
    """
    import timm

    tags = timm.list_pretrained(f"{name}.*")
    default = timm.get_pretrained_cfg(name)
    if len(tags) < 2 or default is None:
        return
    pins = [f"{name}.{tag}" for tag in (BARE_IN_TIMM_0_2.get(name), default.tag) if tag]
    once = f"in timm 0.2 it was {BARE_IN_TIMM_0_2[name]}, " if len(pins) > 1 else ""
    raise UserError(
        f"timm:{name} has {len(tags)} pretrained weights, and which one the bare name means "
        f"depends on timm's version ({once}in {timm.__version__} it is {default.tag}): name the "
        f"weights, {' or '.join(f'timm:{pin}' for pin in pins)} (fastkd models 'timm:{name}.*' "
        f"lists all)"
    )


def _unknown(hub: str, name: str, names: Sequence[str]) -> NoReturn:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"; nearest: {', '.join(f'{hub}:{match}' for match in near)}" if near else ""
    raise UserError(f"{hub} has no network {name!r}{hint}")
