"""Student and teachers of a recipe: built, loaded with weights, every teacher checked first.

Flow: `runs.stages` calls this before it builds a stage. A teacher that has to be trained first is
trained by a function that `runs.stages` passes in.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision, resolve_precision
from fastkd.config.section import Normalization
from fastkd.data import DataPair
from fastkd.errors import UserError
from fastkd.evaluation.evaluate import evaluate
from fastkd.evaluation.headline import HEADLINES, headline, least_above_chance
from fastkd.models import count, create_model
from fastkd.models.card import card_of, sign
from fastkd.models.config import StudentConfig
from fastkd.models.head import freeze_backbone
from fastkd.models.registry import classifier_paths
from fastkd.models.taps import remove_taps
from fastkd.storage.fitting import load_into
from fastkd.storage.weight_file import WeightFile, WeightSource
from fastkd.teachers.config import MemberConfig, TeacherConfig
from fastkd.teachers.ensemble import bind_teacher
from fastkd.teachers.loaded import LoadedNet

__all__ = ["load_net", "load_teacher", "prove_teacher", "size", "start_of"]


def load_teacher(config: TeacherConfig | None, data: DataPair) -> tuple[LoadedNet, ...]:
    """The recipe's teachers, with their weights unless they have yet to be trained."""
    members = config.members() if config else {}
    return tuple(load_net(one, data, one.weights, key) for key, one in members.items())


def prove_teacher(
    config: TeacherConfig | None,
    nets: tuple[LoadedNet, ...],
    data: DataPair,
    placement: Placement,
    *,
    say: Callable[[str], None],
    train: Callable[[MemberConfig], tuple[Path, dict[str, Any]]],
) -> tuple[tuple[LoadedNet, ...], dict[str, Any] | None]:
    """The recipe's teachers, trained first if the recipe says so, each better than chance.

    nets: as returned by `load_teacher`; those that are trained first are filled in place.
    placement: of the run; its precision is for teachers without their own.
    say: shows a sentence to the user.
    train: trains one of them; its run folder and summary.
    Also returns the facts for summary.json: name, accuracy, size; for several teachers these are
    joint, and each one's are in `members`. UserError for a teacher below `min_accuracy`.
    """
    if config is None:
        return (), None
    # Hooks that a trial of the run has left on them.
    remove_taps(*(net.model for net in nets))
    proven = list[LoadedNet]()
    facts = list[dict[str, Any]]()
    for (key, one), net in zip(config.members().items(), nets, strict=True):
        lesson = {}
        if one.trains:
            path, summary = train(one)
            net = _filled(net, path)
            lesson = {"training": summary}
        found = _evaluated((net,), data, placement)
        metric = headline(found)
        say(f"teacher {one.label}: {HEADLINES[metric]} {found[metric]:.2%}")
        _check_quality(key, one, found, data)
        proven.append(net)
        facts.append({"name": one.name, metric: found[metric]} | size(net.model, data) | lesson)
    if len(proven) == 1:
        return tuple(proven), facts[0]
    found = _evaluated(proven, data, placement)
    metric = headline(found)
    say(f"the {len(proven)} teachers together: {HEADLINES[metric]} {found[metric]:.2%}")
    return tuple(proven), {
        "name": " + ".join(one["name"] for one in facts),
        metric: found[metric],
        **{each: sum(one[each] for one in facts) for each in ("params", "macs")},
        "members": facts,
    }


def load_net(
    config: StudentConfig, data: DataPair, weights: WeightSource | None, key: str = "student"
) -> LoadedNet:
    """Build a network of the data's class count and fill it from a file or a run folder.

    key: its key in the recipe, for messages.
    """
    own = config if isinstance(config, MemberConfig) else None
    class_map = own.class_map if own else None
    file = None if weights is None else WeightFile.open(weights)
    classes = data.facts.num_classes
    if class_map is not None:
        classes = _own_classes(config.name, file, classes)
    model = create_model(
        config.name,
        classes,
        pretrained=config.pretrained and file is None,
        weights=file,
        new_head=config.new_head,
        **config.options(),
    )
    card = card_of(model)
    assert card is not None and card.num_classes is not None
    if config.frozen and own is None:
        freeze_backbone(model, classifier_paths(model))
    if class_map is not None and not 0 <= min(class_map) <= max(class_map) < card.num_classes:
        raise UserError(
            f"{key}.class_map names outputs from {min(class_map)} to {max(class_map)}, but "
            f"{config.name} has {card.num_classes}, numbered from 0"
        )
    if own is None:
        return LoadedNet(model, card.normalization)
    return LoadedNet(
        model,
        (own.mean, own.std) if own.mean and own.std else card.normalization,
        resolution=own.resolution,
        class_map=class_map,
        name=own.name,
        precision=own.precision,
        compiled=None if own.compile is None else own.compile == "on",
    )


def _filled(net: LoadedNet, run: Path) -> LoadedNet:
    """A network that was built before its training, with the trained weights."""
    file = WeightFile.open(run / "best.safetensors")
    load_into(net.model, file)
    card = card_of(net.model)
    assert card is not None
    card = replace(card, normalization=file.network.normalization or card.normalization)
    sign(net.model, card)
    return replace(net, normalization=card.normalization)


def start_of(config: StudentConfig, net: LoadedNet, data: DataPair) -> list[str]:
    """The student's starting point in sentences: what is loaded, new, frozen; normalisation."""
    source = config.weights or ("pretrained weights" if config.pretrained else None)
    said = []
    if config.new_head or config.frozen:
        card = card_of(net.model)
        assert card is not None
        head = classifier_paths(net.model)
        names = ", ".join(f"{path} ({card.num_classes} classes)" for path in head)
        inside = tuple(f"{path}." for path in head)
        state = net.model.state_dict()
        loaded = [key for key in state if not (config.new_head and key.startswith(inside))]
        said.append(
            f"student {config.name}: {len(loaded) if source else 0} of {len(state)} tensors from "
            f"{source or 'nowhere, all are random'}"
            + (f"; new: {names}" if config.new_head else "")
        )
        if config.frozen:
            said.append(
                f"only {names} is trained; the rest, batch norm statistics included, stays as it is"
            )
    wanted = net.normalization
    if source and wanted and not _close(wanted, data.facts.normalization):
        mean, std = (",".join(f"{value:g}" for value in values) for values in wanted)
        said.append(
            f"note: {source} learned from images normalised by data.mean={mean} data.std={std}, "
            f"but this run uses others"
        )
    return said


def size(model: nn.Module, data: DataPair) -> dict[str, int]:
    """Parameters and multiply-accumulates at the size of the data's images."""
    found = count(model, data.facts.image_shape)
    return {"params": found.params, "macs": found.macs}


def _close(one: Normalization, other: Normalization) -> bool:
    pairs = zip((*one[0], *one[1]), (*other[0], *other[1]), strict=True)
    return all(abs(a - b) < 1e-3 for a, b in pairs)


def _evaluated(nets: Sequence[LoadedNet], data: DataPair, placement: Placement) -> dict[str, float]:
    teacher = bind_teacher(
        nets,
        {},
        placement,
        data_normalization=data.facts.normalization,
        # Exactly the number that its own training reported.
        fold_batch_norm=False,
    )
    precision = placement.precision
    if len(nets) > 1:
        # Members of different types take the images as they come and cast them on their own.
        precision = Precision("fp32", placement.device.type)
    elif nets[0].precision is not None:
        precision = resolve_precision(nets[0].precision, placement.device)
    return evaluate(teacher.logits, data.val, precision, placement.world, data.facts.multilabel)


def _check_quality(key: str, config: MemberConfig, found: dict[str, float], data: DataPair) -> None:
    reached, floor = found[headline(found)], config.min_accuracy
    if floor is None:
        floor = least_above_chance(found, data.facts.num_classes)
    if reached < floor:
        raise UserError(
            f"the teacher {config.name} reaches {reached:.2%} on the validation images, at least "
            f"{floor:.2%} was expected. If its weights are right, its class order "
            f"({key}.class_map) or normalisation is not; if it was just trained, give it more "
            f"epochs; {key}.min_accuracy=0 accepts it as it is"
        )


def _own_classes(name: str, file: WeightFile | None, of_data: int) -> int | None:
    """Class count of a teacher whose outputs are mapped; None if the network's source knows it."""
    if file is None:
        return None if ":" in name else of_data
    if "num_classes" in file.facts:
        return int(file.facts["num_classes"])
    # In a foreign checkpoint the last layer shows it.
    heads = [tensor for tensor in file.tensors.values() if tensor.dim() == 2]
    return heads[-1].shape[0] if heads else of_data
