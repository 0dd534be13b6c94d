"""Student and teachers of a recipe: built, loaded with weights, every teacher checked first.

Flow: `runs.stages` calls this before it builds a stage. A teacher that has to be trained first is
trained by a function that `runs.stages` passes in.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision, resolve_precision
from fastkd.config.section import Normalization
from fastkd.data import DataPair
from fastkd.errors import UserError
from fastkd.evaluation.chance import Chance, chance_of, class_counts
from fastkd.evaluation.confusion import reached
from fastkd.evaluation.evaluate import evaluate
from fastkd.evaluation.headline import HEADLINES, headline
from fastkd.models import create_model
from fastkd.models.card import card_of, sign
from fastkd.models.config import StudentConfig
from fastkd.models.counting.count import cost
from fastkd.models.head import freeze_backbone
from fastkd.models.intake import Remedy
from fastkd.models.registry import classifier_paths, model_from_file, unnamed_options
from fastkd.models.taps import remove_taps
from fastkd.printable import few
from fastkd.storage.description import keys_in_words, options_in_words
from fastkd.storage.facts import DataFacts
from fastkd.storage.finding import lies_in
from fastkd.storage.fitting import load_into
from fastkd.storage.weight_file import WeightFile, WeightSource
from fastkd.teachers.class_names import map_by_name, other_order_in_timm
from fastkd.teachers.config import MemberConfig, TeacherConfig
from fastkd.teachers.ensemble import bind_teacher
from fastkd.teachers.loaded import LoadedNet, unlearned

__all__ = [
    "chance_in",
    "filled",
    "good_enough",
    "load_net",
    "load_teacher",
    "of_images",
    "prove_teacher",
    "size",
    "start_of",
]


def load_teacher(config: TeacherConfig | None, data: DataPair) -> tuple[LoadedNet, ...]:
    """The recipe's teachers, with their weights unless they have yet to be trained."""
    members = config.members() if config else {}
    return tuple(load_net(one, data, one.weights, key) for key, one in members.items())


class Proof(NamedTuple):
    """Teachers that may teach."""

    nets: tuple[LoadedNet, ...]
    """With their weights."""
    summary: dict[str, Any] | None
    """For summary.json: name, accuracy, size; for several teachers these are joint, and each one's
    are in `members`. None without a teacher."""
    evaluations: tuple[dict[str, float], ...]
    """What each reaches on the validation images."""


def prove_teacher(
    config: TeacherConfig | None,
    nets: tuple[LoadedNet, ...],
    data: DataPair,
    placement: Placement,
    *,
    say: Callable[[str], None],
    train: Callable[[MemberConfig], tuple[Path, dict[str, Any]]],
) -> Proof:
    """The recipe's teachers, trained first if the recipe says so, each better than chance.

    nets: as returned by `load_teacher`; those that are trained first are filled in place.
    placement: of the run; its precision is for teachers without their own.
    say: shows a sentence to the user.
    train: trains one of them; its run folder and summary.
    UserError for a teacher below `min_accuracy`.
    """
    if config is None:
        return Proof((), None, ())
    # Hooks that a trial of the run has left on them.
    remove_taps(*(net.model for net in nets))
    proven = list[LoadedNet]()
    facts = list[dict[str, Any]]()
    evaluations = list[dict[str, float]]()
    for (key, one), net in zip(config.members().items(), nets, strict=True):
        lesson = {}
        if one.trains:
            path, summary = train(one)
            net = filled(net, path)
            lesson = {"training": summary}
        for note in net.notes:
            say(note)
        found = _evaluated((net,), data, placement)
        metric = headline(found)
        say(f"teacher {_title(one, net)}: {HEADLINES[metric]} {found[metric]:.2%}")
        _check_quality(key, one, found, data)
        evaluations.append({key: value for key, value in found.items() if key != "class_iou"})
        # A new one, which is bound anew: the trial's teachers are without their hooks.
        proven.append(replace(net))
        cost_of = size(net.model, net.image_shape(data.facts.image_shape))
        facts.append({"name": one.name, **reached(found, data.facts.classes)} | cost_of | lesson)
    if len(proven) == 1:
        return Proof(tuple(proven), facts[0], tuple(evaluations))
    found = _evaluated(proven, data, placement)
    metric = headline(found)
    say(f"the {len(proven)} teachers together: {HEADLINES[metric]} {found[metric]:.2%}")
    summary = {
        "name": " + ".join(one["name"] for one in facts),
        **reached(found, data.facts.classes),
        **{each: _total(one[each] for one in facts) for each in ("params", "macs")},
        "members": facts,
    }
    return Proof(tuple(proven), summary, tuple(evaluations))


def _title(config: MemberConfig, net: LoadedNet) -> str:
    """Its label, with what only its weight file says."""
    card = card_of(net.model)
    if card is None or card.name is None:
        return config.label
    if card.name != config.name:
        return f"{config.label} ({card.name})"
    more = {name: value for name, value in card.options.items() if name not in config.options()}
    return f"{config.label} ({options_in_words(more)})" if more else config.label


def load_net(
    config: StudentConfig, data: DataPair, weights: WeightSource | None, key: str = "student"
) -> LoadedNet:
    """Build a network of the data's class count and fill it from a file or a run folder.

    key: its key in the recipe, for messages.
    """
    own = config if isinstance(config, MemberConfig) else None
    file = None if weights is None else WeightFile.open(weights, config.weights_key)
    class_map, notes = _class_map(own, file, data, key) if own else (None, ())
    notes += _other_size(own, file, data, key) if own else ()
    classes = data.facts.num_classes
    if class_map is not None:
        classes = _own_classes(config.name, file, classes)
    finished = own is not None and not own.trains
    if file is not None and finished and file.network.architecture == f"simkd:{config.name}":
        model = model_from_file(file)
    else:
        if file is not None and not finished:
            _check_written(config, file, key)
        model = create_model(
            config.name,
            classes,
            pretrained=config.pretrained and file is None,
            weights=file,
            new_head=config.new_head,
            kernels=config.kernels,
            **config.options(),
        )
    card = card_of(model)
    assert card is not None and card.num_classes is not None
    if card.unlearned and finished:
        raise UserError(unlearned(card, file, key, "a finished teacher has to be trained like it"))
    if card.unlearned and config.frozen and own is None:
        raise UserError(unlearned(card, file, key, f"{key}.frozen=backbone would never train it"))
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
        notes=notes,
        remedy=Remedy(
            of_images(data).size if own.trains else f"set {key}.resolution={{0}}",
            f"set {key}.precision=fp32",
        ),
    )


def _class_map(
    config: MemberConfig, file: WeightFile | None, data: DataPair, key: str
) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """The teacher's output for every class of the data, by key or by name, and a sentence on it."""
    classes = data.facts.classes
    if config.class_map is not None or file is None or classes is None:
        return config.class_map, ()
    by_name = map_by_name(
        file.network.data,
        classes,
        network=f"the teacher {config.name} ({file})",
        cure=f"If only the names differ, set {key}.class_map: the teacher's output for each class "
        f"of the data, in the order {few(classes)}",
    )
    if by_name is not None:
        return by_name, (f"teacher {config.label}: its classes are matched by name ({file})",)
    timms = other_order_in_timm(classes)
    if timms is None or file.facts:
        return None, ()
    given = ",".join(map(str, timms))
    return None, (
        f"note: {file} does not name its classes. Folders such as {few(classes)} are in this "
        f"order for fastkd and torchvision, timm sorts them by number: if timm trained it, set "
        f"{key}.class_map={given}",
    )


def _other_size(
    config: MemberConfig, file: WeightFile | None, data: DataPair, key: str
) -> tuple[str, ...]:
    """A note if the teacher learned from images of another size than it will be shown."""
    facts = file.network.data if file else None
    size, shown = facts.image_size if facts else None, data.facts.image_shape[1]
    if data.facts.label_kind == "pixel":
        # The short side; the images are padded to a multiple of some pixels.
        framing = data.facts.evaluation
        shown = framing.resize if framing else size
    if size is None or size == shown or config.resolution is not None:
        return ()
    return (
        f"note: {file} learned from images of {size} pixels and is shown {shown}; "
        f"{key}.resolution={size} shows it its own size",
    )


def _check_written(config: StudentConfig, file: WeightFile, key: str) -> None:
    """UserError if a network to be trained would silently become another than the recipe says."""
    missing = unnamed_options(config.name, file.network, config.options())
    if missing:
        words = keys_in_words({f"{key}.{name}": value for name, value in missing.items()})
        raise UserError(
            f"{file} holds {config.name} with {options_in_words(missing)}, {key}.name="
            f"{config.name} is another network: set {words}"
        )


def of_images(data: DataPair) -> Remedy:
    """How a recipe gives its student other images."""
    size = "set data.image_size={0}"
    if data.name == "digits":
        size = "digits has no others, so choose another network or data set"
    return Remedy(size, "set precision=fp32")


def filled(net: LoadedNet, run: Path) -> LoadedNet:
    """A network that was built before its training, with the trained weights."""
    file = WeightFile.open(run / "best.safetensors")
    load_into(net.model, file)
    card = card_of(net.model)
    assert card is not None
    facts = file.network
    card = replace(
        card,
        normalization=facts.normalization or card.normalization,
        data=facts.data or card.data,
        unlearned=(),
    )
    sign(net.model, card)
    return replace(net, normalization=card.normalization)


def start_of(config: StudentConfig, net: LoadedNet, data: DataPair, role: str) -> list[str]:
    """A network's starting point in sentences: what is loaded, new, frozen; normalisation.

    role: student or teacher.
    """
    source = config.weights or ("pretrained weights" if config.pretrained else None)
    said = []
    if config.new_head or config.frozen:
        card = card_of(net.model)
        assert card is not None
        head = classifier_paths(net.model)
        names = ", ".join(f"{path} ({card.num_classes} classes)" for path in head)
        state = net.model.state_dict()
        loaded = [key for key in state if not lies_in(key, card.new)]
        fresh = ", ".join([names, *(path for path in card.new if path not in head)])
        said.append(
            f"{role} {config.name}: {len(loaded) if source else 0} of {len(state)} tensors from "
            f"{source or 'nowhere, all are random'}"
            + (f"; new: {fresh}" if config.new_head else "")
        )
        if config.frozen:
            said.append(
                f"only {names} is trained; the rest, batch norm statistics included, stays as it is"
            )
    if config.weights and (note := _other_classes(config, net, data)):
        said.append(note)
    wanted = net.normalization
    if source and wanted and not _close(wanted, data.facts.normalization):
        mean, std = (",".join(f"{value:g}" for value in values) for values in wanted)
        said.append(
            f"note: {source} learned from images normalised by data.mean={mean} data.std={std}, "
            f"but this run uses others"
        )
    return said


def _other_classes(config: StudentConfig, net: LoadedNet, data: DataPair) -> str | None:
    """A note if the student's classifier was trained for other classes, or in another order."""
    card, ours = card_of(net.model), data.facts.classes
    learned = card.data if card else None
    if config.new_head or ours is None or learned is None or learned.classes == ours:
        return None
    if learned.named is None or DataFacts(classes=ours).named is None:
        return None
    return (
        f"note: the classifier of {config.weights} is for the classes {few(learned.named)}, those "
        f"of this run are {few(ours)}; student.new_head=true starts with a new one"
    )


def size(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, int | None]:
    """Parameters, and multiply-accumulates of an image of this shape: None if nobody can tell."""
    found = cost(model, image_shape)
    params = sum(parameter.numel() for parameter in model.parameters())
    return {"params": params, "macs": None if found is None else found.macs}


def _total(each: Iterable[int | None]) -> int | None:
    found = list(each)
    return None if None in found else sum(one for one in found if one)


def _close(one: Normalization, other: Normalization) -> bool:
    pairs = zip((*one[0], *one[1]), (*other[0], *other[1]), strict=True)
    return all(abs(a - b) < 1e-3 for a, b in pairs)


def _evaluated(nets: Sequence[LoadedNet], data: DataPair, placement: Placement) -> dict[str, Any]:
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
    return evaluate(teacher.logits, data.val, precision, placement.world, data.facts.label_kind)


def chance_in(data: DataPair, found: Mapping[str, Any] | None = None) -> Chance:
    """What guessing reaches on the validation images. found: as in `chance_of`."""
    return chance_of(class_counts(data.val_labels_N, data.facts.num_classes), found)


def good_enough(config: MemberConfig, found: Mapping[str, Any], data: DataPair) -> bool:
    """Whether a teacher with this evaluation may teach; see `min_accuracy`."""
    reached = found.get(headline(found), 0.0)
    if config.min_accuracy is None:
        return chance_in(data, found).beaten_by(reached)
    return reached >= config.min_accuracy


def _check_quality(
    key: str, config: MemberConfig, found: Mapping[str, Any], data: DataPair
) -> None:
    if good_enough(config, found, data):
        return
    reached, least = found[headline(found)], config.min_accuracy
    chance = chance_in(data, found)
    wanted = f"more than {chance.floor:.2%}, clearly above chance ({chance.accuracy:.2%}),"
    if least is not None:
        wanted = f"at least {least:.2%}"
    raise UserError(
        f"the teacher {config.name} reaches {reached:.2%} on the validation images, {wanted} "
        f"was expected. If its weights are right, its class order "
        f"({key}.class_map) or normalisation is not; if it was just trained, give it more "
        f"epochs; {key}.min_accuracy=0 accepts it as it is"
    )


def _own_classes(name: str, file: WeightFile | None, of_data: int) -> int | None:
    """Class count of a teacher whose outputs are mapped; None if the network's source knows it."""
    if file is None:
        return None if ":" in name else of_data
    if (written := file.network.num_classes) is not None:
        return written
    # In a foreign checkpoint the last layer shows it.
    heads = [tensor for tensor in file.tensors.values() if tensor.dim() == 2]
    return heads[-1].shape[0] if heads else of_data
