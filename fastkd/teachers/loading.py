"""Student and teachers of a recipe: built, filled with weights, every teacher proven first.

Flow: `run` asks here before it builds a stage. A teacher that has to be trained first is trained
by the function that `run` hands in.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastkd.compute.layout import memory_format
from fastkd.compute.precision import Precision, resolve_precision
from fastkd.compute.ranks import World
from fastkd.config.section import Normalization
from fastkd.data import DataPair
from fastkd.errors import UserError
from fastkd.evaluation.evaluate import evaluate
from fastkd.evaluation.headline import HEADLINES, headline
from fastkd.models import count, create_model
from fastkd.models.config import StudentConfig
from fastkd.models.head import freeze_backbone
from fastkd.models.registry import classifier_paths
from fastkd.output.console import Console
from fastkd.storage.weights import load_weights
from fastkd.teachers.config import MemberConfig, TeacherConfig
from fastkd.teachers.ensemble import LoadedNet, bind_teacher

__all__ = ["load_net", "load_teacher", "prove_teacher", "size", "start_of"]


def load_teacher(config: TeacherConfig | None, data: DataPair) -> LoadedNet | None:
    """The recipe's teachers, with their weights unless these are still to be trained."""
    if config is None:
        return None
    return _joined([load_net(one, data, one.weights, key) for key, one in config.members().items()])


def prove_teacher(
    config: TeacherConfig | None,
    loaded: LoadedNet | None,
    data: DataPair,
    world: World,
    console: Console,
    train: Callable[[MemberConfig], tuple[Path, dict[str, Any]]],
    *,
    precision: str,
    channels_last: bool,
) -> tuple[LoadedNet | None, dict[str, Any] | None]:
    """The recipe's teachers, trained first where they ask for that, each better than chance.

    loaded: what `load_teacher` gave; a teacher that is trained here is built anew afterwards.
    train: trains one of them; its run folder and summary.
    precision, channels_last: those of the run, for teachers that have no type of their own.
    Returns also the facts for summary.json: name, accuracy, size; of several those of all together
    and, as `members`, of each. UserError for one below `min_accuracy`.
    """
    if config is None or loaded is None:
        return None, None
    nets, facts = [], []
    for (key, one), net in zip(config.members().items(), loaded.members, strict=True):
        lesson = {}
        if one.trains:
            path, summary = train(one)
            lesson = {"training": summary}
            net = load_net(one, data, str(path / "best.safetensors"), key)
        found = _evaluated(net, data, world, precision, channels_last)
        metric = headline(found)
        console.note(f"teacher {one.label}: {HEADLINES[metric]} {found[metric]:.2%}")
        _check_quality(key, one, found, data)
        nets.append(net)
        own = {"name": one.name, metric: found[metric]}
        facts.append(own | size(net.model, data) | lesson)
    together = _joined(nets)
    if len(nets) == 1:
        return together, facts[0]
    found = _evaluated(together, data, world, precision, channels_last)
    metric = headline(found)
    console.note(f"the {len(nets)} teachers together: {HEADLINES[metric]} {found[metric]:.2%}")
    return together, {
        "name": " + ".join(one["name"] for one in facts),
        metric: found[metric],
        **{each: sum(one[each] for one in facts) for each in ("params", "macs")},
        "members": facts,
    }


def load_net(
    config: StudentConfig, data: DataPair, weights: str | None, key: str = "student"
) -> LoadedNet:
    """Build a network of the data's class count and fill it from a file or a run folder.

    key: where it stands in the recipe, for messages.
    """
    own = config if isinstance(config, MemberConfig) else None
    class_map = own.class_map if own else None
    options = config.options()
    # A teacher that was trained here has learned its head by now.
    new_head = config.new_head and weights == config.weights
    classes = len(data.classes)
    if class_map is not None:
        classes = _own_classes(config.name, weights, classes)
    # A pretrained teacher that was then trained here has weights of its own.
    pretrained = config.pretrained and weights is None
    model: Any = create_model(
        config.name,
        classes,
        pretrained=pretrained,
        weights=weights,
        new_head=new_head,
        **options,
    )
    if config.frozen and own is None:
        freeze_backbone(model, classifier_paths(model))
    if class_map is not None and not 0 <= min(class_map) <= max(class_map) < model.num_classes:
        raise UserError(
            f"{key}.class_map names outputs from {min(class_map)} to {max(class_map)}, but "
            f"{config.name} has {model.num_classes}, numbered from 0"
        )
    normalization = getattr(model, "normalization", None)
    if own is None:
        return LoadedNet(model, normalization)
    if own.mean and own.std:
        normalization = (own.mean, own.std)
    compiled = None if own.compile is None else own.compile == "on"
    return LoadedNet(
        model, normalization, own.resolution, class_map, own.name, own.precision, compiled
    )


def start_of(config: StudentConfig, net: LoadedNet, data: DataPair) -> list[str]:
    """What the student starts from, in sentences: loaded, new, frozen, normalised how."""
    source = config.weights or ("pretrained weights" if config.pretrained else None)
    model: Any = net.model
    said = []
    if config.new_head or config.frozen:
        head = classifier_paths(model)
        names = ", ".join(f"{path} ({model.num_classes} classes)" for path in head)
        inside = tuple(f"{path}." for path in head)
        state = model.state_dict()
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
    if source and wanted and not _close(wanted, (data.mean, data.std)):
        mean, std = (",".join(f"{value:g}" for value in values) for values in wanted)
        said.append(
            f"note: {source} learned from images normalised by data.mean={mean} data.std={std}, "
            f"which are not those of this run"
        )
    return said


def size(model: Any, data: DataPair) -> dict[str, int]:
    """Parameters and multiply-accumulates at the size of the data's images."""
    found = count(model, (3, data.image_size, data.image_size))
    return {"params": found.params, "macs": found.macs}


def _close(one: Normalization, other: Normalization) -> bool:
    pairs = zip((*one[0], *one[1]), (*other[0], *other[1]), strict=True)
    return all(abs(a - b) < 1e-3 for a, b in pairs)


def _joined(nets: list[LoadedNet]) -> LoadedNet:
    return replace(nets[0], ensemble=tuple(nets[1:]))


def _evaluated(
    net: LoadedNet, data: DataPair, world: World, of_run: str, channels_last: bool
) -> dict[str, float]:
    precision = resolve_precision(net.precision or of_run, world.device)
    teacher = bind_teacher(
        net,
        {},
        precision=precision,
        device=world.device,
        data_normalization=(data.mean, data.std),
        layout=memory_format(channels_last, world.device, net.model),
        # To the digit what its own training reported.
        fold_batch_norm=False,
    )
    # Members of different types each take the images as they come and cast them for themselves.
    outer = Precision("fp32", world.device.type) if net.ensemble else precision
    return evaluate(teacher.logits, data.val, outer, world, data.multilabel)


def _check_quality(key: str, config: MemberConfig, found: dict[str, float], data: DataPair) -> None:
    reached, floor = found[headline(found)], config.min_accuracy
    if floor is None:
        chance = found.get("chance", 1 / len(data.classes))
        floor = chance + 2 * (chance * (1 - chance) / data.val.num_samples) ** 0.5
    if reached < floor:
        raise UserError(
            f"the teacher {config.name} reaches {reached:.2%} on the validation images, at least "
            f"{floor:.2%} was expected. If its weights are right, its class order "
            f"({key}.class_map) or normalisation is not; if it was just trained, give it more "
            f"epochs; {key}.min_accuracy=0 accepts it as it is"
        )


def _own_classes(name: str, weights: str | None, of_data: int) -> int | None:
    """Class count of a teacher whose outputs are mapped; None where the network's source knows."""
    if weights is None:
        return None if ":" in name else of_data
    tensors, facts = load_weights(weights)
    if "num_classes" in facts:
        return int(facts["num_classes"])
    # A checkpoint of others tells it by its last layer.
    heads = [tensor for tensor in tensors.values() if tensor.dim() == 2]
    return heads[-1].shape[0] if heads else of_data
