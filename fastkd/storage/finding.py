"""Where in a checkpoint a network lies: one rule for all the things that trainers put around it.

Every place that could hold it is compared with the network: a mapping in the file, or what lies
there below a prefix of the names. If it fits in one place, that is taken; an average of the weights
(EMA, SWA) goes before the weights that it averages, as in timm; anything else that fits in several
places is for the user to decide (`weights_key`).
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.storage.foreign_checkpoints import WRAPPING, Groups, joined, renamings, unwrapped_names

__all__ = ["Found", "find_network", "lies_in"]

AVERAGE = re.compile(r"(?<![a-z])(ema|swa|avg|averaged?|polyak|shadow)(?![a-z])|EMA|SWA")
"""What names of averages have in common: state_dict_ema, model_ema, averaged_model, EMACallback."""

COUNTERS = ("total_ops", "total_params")
"""Buffers that counters of operations (thop) leave on a network."""


@dataclass(frozen=True, slots=True)
class Found:
    """One place in a file, compared with a network."""

    place: str
    """Dotted path in the file; empty for the outermost level."""
    state: dict[str, Tensor]
    """What lies there, in the network's names."""
    missing: tuple[str, ...]
    """In the network, not in the file."""
    unexpected: tuple[str, ...]
    """In the file, not in the network, and not a counter or buffer without effect."""
    wrong_shape: tuple[str, ...]
    """In both, with different shapes, or of an integer type where the network has weights."""
    note: str | None = None
    """What was chosen, if there was a choice."""

    @property
    def fits(self) -> bool:
        """Nothing is missing, left over or of another shape."""
        return not (self.missing or self.unexpected or self.wrong_shape)

    def fitting(self, own: Mapping[str, Tensor]) -> list[str]:
        """The names in both, with the same shape."""
        return [name for name in own if name in self.state and _suits(self.state[name], own[name])]


def find_network(
    model: nn.Module,
    own: Mapping[str, Tensor],
    groups: Groups,
    *,
    new: Sequence[str] = (),
    origin: str = "the state dict",
) -> Found:
    """The place that fits the network, else the one that comes nearest.

    own: the network's tensors by their `unwrapped_names`. new: its layers that keep their initial
    weights, and are looked for nowhere.
    Raises UserError if the network fits in several places, and no average is among them.
    """
    wanted = {name: tensor for name, tensor in own.items() if not lies_in(name, new)}
    buffers = dict(model.named_buffers())
    places: list[Found] = []
    for at, tensors in groups.items():
        names = unwrapped_names(tensors)
        named = {name: tensors[key] for key, name in names.items()}
        for prefix in _prefixes(named, len(wanted)):
            below = {
                name.removeprefix(prefix): value
                for name, value in named.items()
                if name.startswith(prefix)
            }
            place = joined(_plain(at), prefix.rstrip("."))
            places.append(_compared(model, wanted, buffers, below, place, new))
    fits = [found for found in places if found.fits]
    if not fits:
        # A part of the network, such as the head, may lie beside the rest.
        fits = [both for found in places if (both := _with_part_beside(found, groups, wanted))]
    if fits:
        return _chosen(fits, groups, own, origin)
    return max(places, key=lambda found: (len(found.fitting(wanted)), -len(found.unexpected)))


def lies_in(name: str, layers: Sequence[str]) -> bool:
    """Whether a tensor belongs to one of the layers."""
    return name.startswith(tuple(f"{layer}." for layer in layers))


def _plain(path: str) -> str:
    """A path in a file without the components of wrappers."""
    return ".".join(part for part in path.split(".") if part not in WRAPPING)


def _prefixes(named: Mapping[str, Tensor], size: int) -> list[str]:
    """Prefixes of names, with their dot, below which at least half a network lies; "" first."""
    count = Counter[str]()
    for name in named:
        end = name.find(".")
        while end >= 0:
            count[name[: end + 1]] += 1
            end = name.find(".", end + 1)
    return ["", *(prefix for prefix, number in count.items() if 2 * number >= size)]


def _compared(
    model: nn.Module,
    wanted: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    below: dict[str, Tensor],
    place: str,
    new: Sequence[str],
) -> Found:
    """One place, read in the way that fits best."""
    best: dict[str, Tensor] | None = None
    most = (-1, 0)
    for renaming in renamings(model, list(below)):
        state = {
            name: _as_in(wanted.get(name), below[key])
            for key, name in renaming.items()
            if not lies_in(name, new)
        }
        # Of two that find as much of the network, the one with less beside it.
        common = len(state.keys() & wanted.keys())
        if (common, -len(state)) > most:
            best, most = state, (common, -len(state))
    state = best or {}
    beginnings = {name.partition(".")[0] for name in (*wanted, *(f"{layer}." for layer in new))}
    return Found(
        place,
        state,
        missing=tuple(
            name
            for name in wanted
            # Files older than torch 0.4.1 lack this counter; only cumulative averages need it.
            if name not in state and not name.endswith("num_batches_tracked")
        ),
        unexpected=tuple(
            name
            for name, value in state.items()
            if name not in wanted
            and not _is_idle(name, value, buffers)
            # Beside a body that gets a new head, what is not of the body was the old one.
            and not (new and name.partition(".")[0] not in beginnings)
        ),
        wrong_shape=tuple(
            name for name in wanted if name in state and not _suits(state[name], wanted[name])
        ),
    )


def _suits(value: Tensor, own: Tensor) -> bool:
    """The same shape, and no integer (of a quantised network) for a weight."""
    plain = value.is_floating_point() or not own.is_floating_point()
    return value.shape == own.shape and plain


def _is_idle(name: str, value: Tensor, buffers: Mapping[str, Tensor]) -> bool:
    """Whether a network computes the same without this tensor of a file.

    A counter or an index (no weight is an integer), or a buffer that the network makes itself.
    """
    if not (value.is_floating_point() or value.is_complex()) or name.endswith(COUNTERS):
        return True
    return name in buffers and buffers[name].shape == value.shape


def _as_in(own: Tensor | None, value: Tensor) -> Tensor:
    """A 1x1 convolution of the file may be a linear layer here."""
    flat = own is not None and own.ndim == 2 and value.ndim == 4 and value.shape[2:] == (1, 1)
    return value.flatten(1) if flat else value


def _with_part_beside(found: Found, groups: Groups, wanted: Mapping[str, Tensor]) -> Found | None:
    """The network in two places, if one beside the first holds exactly what that one lacks."""
    if not found.missing or found.unexpected or found.wrong_shape or not found.place:
        return None
    above = found.place.rpartition(".")[0]
    parts: dict[str, dict[str, Tensor]] = {}
    for at, tensors in groups.items():
        for name, tensor in tensors.items():
            path = _plain(joined(at, name))
            if path.startswith(f"{above}." if above else ""):
                part, _, inside = path.removeprefix(f"{above}.").partition(".")
                parts.setdefault(joined(above, part), {})[inside] = tensor
    lacking = {name: wanted[name].shape for name in found.missing}
    suitable = [
        part
        for place, part in parts.items()
        if place != found.place
        and {n: t.shape for n, t in part.items() if n in wanted or t.is_floating_point()} == lacking
    ]
    if len(suitable) != 1:
        return None
    return replace(found, state=found.state | suitable[0], missing=())


def _chosen(fits: Sequence[Found], groups: Groups, own: Mapping[str, Tensor], origin: str) -> Found:
    """The one that fits; of several an average, or one of those that hold the same values."""
    first = fits[0]
    differing = [found for found in fits if not _same(first, found, own)]
    if not differing:
        return first
    names = ", ".join(found.place or "the outermost level" for found in fits)
    choose = "weights_key=KEY chooses (in a recipe teacher.weights_key or student.weights_key)"
    averages = [found for found in fits if _is_average(found.place, groups)]
    if averages and all(_same(averages[0], found, own) for found in averages):
        place = averages[0].place
        note = f"{origin} holds several copies of the network ({names}); using {place}, the average"
        return replace(averages[0], note=f"{note} of the weights (EMA). {choose}")
    raise UserError(f"{origin} holds several networks that fit ({names}): {choose}")


def _same(one: Found, other: Found, own: Mapping[str, Tensor]) -> bool:
    names = [name for name in one.fitting(own) if not name.endswith("num_batches_tracked")]
    pairs = [(one.state[name], other.state[name]) for name in names]
    return all(a.dtype == b.dtype and _equal(a, b) for a, b in pairs)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Also where both are NaN."""
    if one is other or torch.equal(one, other):
        return True
    nans = torch.equal(one.isnan(), other.isnan())
    return nans and torch.equal(one.nan_to_num(), other.nan_to_num())


def _is_average(place: str, groups: Groups) -> bool:
    """Whether the weights of a place are an average, by its name or by what lies beside it."""
    head, _, rest = place.partition(".")
    # mmengine and Lightning write the average to state_dict, and what it averages beside it.
    swapped = "steps" in groups.get("ema_state_dict", {})
    if swapped or any(at.partition(".")[0] == "current_model_state" for at in groups):
        return head == "state_dict" or (not swapped and bool(AVERAGE.search(rest)))
    named = any(AVERAGE.search(part) for part in place.split("."))
    return named or "n_averaged" in groups.get(place, {})
