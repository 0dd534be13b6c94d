"""Weights copied into a network: compares names and shapes, and explains mismatches."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.printable import shown
from fastkd.storage.description import facts_of, options_in_words, other_options
from fastkd.storage.finding import Found, find_network, lies_in
from fastkd.storage.foreign_checkpoints import unwrapped_names
from fastkd.storage.weight_file import WeightFile, WeightSource

__all__ = ["LoadReport", "load_into"]

SHOWN = 4
"""Keys of each kind that an error message lists."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What `load_into` left out; all empty after a strict load."""

    missing: tuple[str, ...]
    """In the network, not in the file."""
    unexpected: tuple[str, ...]
    """In the file, not in the network."""
    wrong_shape: tuple[str, ...]
    """In both, with different shapes: `name: file 10x64, network 100x64`."""

    @property
    def complete(self) -> bool:
        """Every tensor of the file was used and nothing was missing."""
        return not (self.missing or self.unexpected or self.wrong_shape)


def load_into(
    model: nn.Module,
    source: WeightSource | Mapping[str, Tensor],
    *,
    strict: bool = True,
    metadata: Mapping[str, str] | None = None,
    origin: str = "the state dict",
    new: Sequence[str] = (),
) -> LoadReport:
    """Copy weights from a file (path or opened) or a state dict into a network, by name and shape.

    `fastkd.storage.finding` says where in a file the network is looked for: prefixes and wrappers
    on either side do not matter. Networks of the zoo also know the names that other repositories
    use (`ZooNetwork.key_maps`). Values are cast to the network's dtype and device. A warning says
    which weights were taken if the file has an average of them, too.
    `metadata` and `origin` (where they came from) improve the error message for a state dict.
    Raises UserError when strict and anything is missing, unexpected or wrongly shaped, and always
    when nothing fits; the network is then unchanged.
    """
    if isinstance(source, Mapping):
        groups, facts = {"": dict(source)}, metadata or {}
    else:
        file = WeightFile.open(source)
        groups, facts, origin = file.groups, file.facts, str(file)
    tensors = {key: value for key, value in model.state_dict().items() if torch.is_tensor(value)}
    names = {name: key for key, name in unwrapped_names(tensors).items()}
    own = {name: tensors[key] for name, key in names.items()}
    found = find_network(model, own, groups, new=new, origin=origin)
    fitting = [key for key in found.fitting(own) if not lies_in(key, new)]
    report = LoadReport(
        found.missing,
        found.unexpected,
        tuple(
            f"{key}: file {_dims(found.state[key], own[key])}, network {_dims(own[key])}"
            for key in found.wrong_shape
        ),
    )
    if (strict and not report.complete) or not fitting:
        hint = _hint(model, found, facts, own)
        title = f"{_title(model)}, of which {', '.join(new)} is new" if new else _title(model)
        listing = _listing(report) or "it has no tensor of this network"
        raise UserError(f"{origin} does not fit {title}: {listing}{hint}")
    _check_finite(model, {names[key]: found.state[key] for key in fitting}, origin)
    if found.note:
        warnings.warn(found.note, stacklevel=1)
    model.load_state_dict({names[key]: found.state[key] for key in fitting}, strict=False)
    return report


def _check_finite(model: nn.Module, values: Mapping[str, Tensor], origin: str) -> None:
    """UserError for NaN or inf, but in a buffer in which the network has them itself: a mask."""
    masks = {
        name for name, buffer in model.named_buffers() if not (buffer.is_meta or _finite(buffer))
    }
    for name, value in values.items():
        if name not in masks and not _finite(value):
            raise UserError(
                f"{origin}: {name} is not finite (NaN or inf), so the answers of the network "
                f"would be useless: take a checkpoint from before its training diverged"
            )


def _finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    # Types of one byte have no arithmetic.
    return bool((tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all())


def _title(model: nn.Module) -> str:
    facts = facts_of(model)
    if facts.architecture is None:
        return type(model).__name__
    return f"{facts.architecture} with {facts.num_classes} classes"


def _listing(report: LoadReport) -> str:
    kinds = (
        ("missing", report.missing),
        ("unexpected", report.unexpected),
        ("of wrong shape", report.wrong_shape),
    )
    parts: list[str] = []
    for kind, keys in kinds:
        if keys:
            more = "; .." if len(keys) > SHOWN else ""
            parts.append(f"{len(keys)} {kind} ({'; '.join(keys[:SHOWN])}{more})")
    return ", ".join(parts)


def _hint(
    model: nn.Module, found: Found, facts: Mapping[str, str], own: Mapping[str, Tensor]
) -> str:
    name = facts_of(model).architecture
    if facts.get("architecture", name) != name:
        held = shown(facts["architecture"], 80)
        classes = shown(facts.get("num_classes", "unknown"), 80)
        base = held.removeprefix("simkd:")  # a teacher's key does not tell them apart
        keys = f"teacher.name={base}" + (f" or student.name={base}" if base == held else "")
        return f". The file holds {held} with {classes} classes: build that one (recipe: {keys})"
    if said := other_options(model, facts):
        return f". The file holds {name} {said}"
    state, wrong = found.state, found.wrong_shape
    only_head = (
        not (found.missing or found.unexpected)
        and len({key.rpartition(".")[0] for key in wrong}) == 1
        and all(state[key].shape[1:] == own[key].shape[1:] for key in wrong)
    )
    if only_head:
        classes = len(state[wrong[0]])
        return (
            f". The class counts differ: build the network with num_classes={classes}. In a recipe "
            "teacher.train=true teacher.new_head=true fine-tunes a teacher with a new classifier, "
            "a finished one needs teacher.class_map (the output for each class of the data), and "
            "student.new_head=true (new_head=True) takes all but the classifier"
        )
    if found.missing and all(".downsample." in key for key in found.missing) and not wrong:
        return '. The file has no projections: build the network with shortcuts="pad" or False'
    if len(found.fitting(own)) < len(own) / 2:
        return f". The file looks like another network{_or_another_block(model)}"
    return ""


def _or_another_block(model: nn.Module) -> str:
    options = facts_of(model).options
    given = {key: options[key] for key in ("block", "blocks", "depth") if options.get(key)}
    what = "cheap block" if "block" in given else "genotype"
    return f", or like this one without its {what}: {options_in_words(given)}" if given else ""


def _dims(tensor: Tensor, other: Tensor | None = None) -> str:
    """Its shape; with its type, where the shape alone is that of the other."""
    same = other is not None and other.shape == tensor.shape
    kind = f" of {str(tensor.dtype).removeprefix('torch.')}" if same else ""
    return ("x".join(map(str, tensor.shape)) or "scalar") + kind
