"""What a weight file says about its network: metadata from which `create_model` rebuilds it.

What it says about the data is in `fastkd.storage.facts`.
"""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from fastkd.config.section import Normalization
from fastkd.config.values import is_list, is_mapping
from fastkd.printable import brief
from fastkd.storage.facts import DataFacts, parsed

__all__ = [
    "CARD",
    "NetworkFacts",
    "describe",
    "facts_of",
    "keys_in_words",
    "options_in_words",
    "other_options",
]

CARD = "fastkd_card"
"""The attribute that holds a network's `fastkd.models.card.Card`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkFacts:
    """Name, class count, options and normalisation of a network, and the data it learned from."""

    architecture: str | None = None
    num_classes: int | None = None
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    normalization: Normalization | None = None
    data: DataFacts | None = None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "NetworkFacts":
        """Read what `to_metadata` wrote. Raises ValueError for what it never writes.

        A file may come from a stranger: what it says must not make `create_model` load other files,
        download, or build anything that is out of proportion.
        """
        normalization = _normalization(_json(metadata, "normalization", None))
        if "architecture" not in metadata:  # perhaps written by other programs
            return cls(normalization=normalization, data=_data_if_ours(metadata))
        name, classes = metadata["architecture"], metadata.get("num_classes")
        if not NAME.fullmatch(name):
            raise ValueError(f"architecture={brief(name)}: expected the name of a network")
        if classes is not None and not CLASSES.fullmatch(classes):
            raise ValueError(f"num_classes={brief(classes)}: expected 1 to 99999999")
        options = _json(metadata, "options", {})
        if not is_mapping(options):
            raise ValueError(f"options={brief(options)}: expected values by name")
        _check_options(options)
        return cls(
            architecture=name,
            num_classes=None if classes is None else int(classes),
            options=dict(options),
            normalization=normalization,
            data=DataFacts.from_metadata(metadata),
        )

    def plain(self) -> dict[str, Any]:
        """Name, class count and options, as plain values for JSON."""
        return {
            "architecture": self.architecture,
            "num_classes": self.num_classes,
            "options": self.options,
        }

    def to_metadata(self) -> dict[str, str]:
        """Text by key; of the network nothing where text cannot rebuild it."""
        metadata = self.data.to_metadata() if self.data else {}
        if self.architecture is None:
            return metadata
        try:
            options = json.dumps(self.options)
        except TypeError:  # an option such as a class
            return metadata
        metadata |= {
            "architecture": self.architecture,
            "num_classes": str(self.num_classes),
            "options": options,
        }
        if self.normalization is not None:
            metadata["normalization"] = json.dumps(self.normalization)
        return metadata


NAME = re.compile(r"(simkd:)?((timm|torchvision):)?[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
"""Not timm:hf-hub:NAME or timm:local-dir:NAME, which read other places."""

CLASSES = re.compile(r"[1-9][0-9]{0,7}")

LOADING = re.compile(r"(pretrained|weights).*|checkpoint_path|cache_dir|.*(file|url|_dir|hub_id)")
"""Options of timm and torchvision that download or read a file."""

WORD = re.compile(r"[A-Za-z0-9_.:+,()/ -]{0,64}")

MOST_TEXT, MOST_ENTRIES, LARGEST, DEEPEST = 50_000, 64, 65_536, 4

MAPS = {"blocks": 1000, "depth": 1000}
"""Options that may have more entries, by path."""


def _json(metadata: Mapping[str, str], key: str, default: Any) -> Any:
    text = metadata.get(key)
    if text is None:
        return default
    if len(text) > MOST_TEXT:
        raise ValueError(f"{key} has {len(text)} characters, expected at most {MOST_TEXT}")
    return parsed(key, text)


def _data_if_ours(metadata: Mapping[str, str]) -> DataFacts | None:
    """Facts of the data; None where another program means other things by these keys."""
    with suppress(ValueError):
        return DataFacts.from_metadata(metadata)
    return None


def _normalization(given: Any) -> Normalization | None:
    if given is None:
        return None
    try:
        return TypeAdapter[Normalization](Normalization).validate_python(given)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise ValueError(
            f"normalization={brief(given)}: expected three means and three deviations ({problem})"
        ) from None


def _check_options(options: Mapping[Any, Any], depth: int = 0, entries: int = MOST_ENTRIES) -> None:
    if len(options) > entries or depth > DEEPEST:
        raise ValueError("options: too many")
    for name, value in options.items():
        if LOADING.fullmatch(name):
            raise ValueError(f"options: {brief(name)} would read another file or download")
        _check_value(name, value, depth)


def _check_value(name: str, value: Any, depth: int) -> None:
    if is_mapping(value):
        _check_options(value, depth + 1, MAPS.get(name, MOST_ENTRIES))
    elif is_list(value) and len(value) <= MOST_ENTRIES and depth <= DEEPEST:
        for entry in value:
            _check_value(name, entry, depth + 1)
    elif isinstance(value, str):
        if not WORD.fullmatch(value) or "://" in value or ".." in value:
            raise ValueError(f"options: {brief(name)}={brief(value)}: expected a word")
    elif not (value is None or isinstance(value, bool) or _is_number(value, LARGEST)):
        raise ValueError(
            f"options: {brief(name)}={brief(value)}: expected at most {LARGEST} in size"
        )


def _is_number(value: Any, largest: float) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared before it is converted: an integer may be too large for that.
    return plain and -largest <= value <= largest and math.isfinite(value)


def options_in_words(options: Mapping[str, Any]) -> str:
    """`block=G(4), width=0.5`, or `no options`."""
    return ", ".join(f"{name}={_in_words(one)}" for name, one in options.items()) or "no options"


def _in_words(value: object) -> str:
    """`{layer1: G(4)}`, `5,3,5`."""
    if is_mapping(value):
        return f"{{{', '.join(f'{name}: {_in_words(one)}' for name, one in value.items())}}}"
    return ",".join(map(str, value)) if is_list(value) else str(value)


def keys_in_words(options: Mapping[str, Any]) -> str:
    """`block=G:4 width=0.5`, as a shell takes them."""
    words: list[str] = []
    for name, value in options.items():
        text = "null" if value is None else str(value).lower() if value in (True, False) else value
        key = name.rpartition(".")[2]
        if key == "block":
            text = _with_colons(text)
        elif key == "blocks" and is_mapping(value):
            text = {_quoted(path): _with_colons(block) for path, block in value.items()}
        text = _in_words(text)
        words.append(f"{name}='{text}'" if " " in text or "*" in text else f"{name}={text}")
    return " ".join(words)


def _with_colons(block: object) -> str:
    return re.sub(r"[(),/]+", ":", str(block)).rstrip(":")


def _quoted(path: str) -> str:
    """As YAML takes a key: a star in front would be an alias."""
    return f'"{path}"' if re.match(r"[*?\[!&-]", path) else path


def other_options(model: nn.Module, metadata: Mapping[str, str]) -> str | None:
    """What a file of the same network says about its options if the network was built with others.

    In words, with the keys of a recipe to set.
    """
    try:
        written = NetworkFacts.from_metadata(metadata)
    except ValueError:
        return None
    own = facts_of(model)
    if written.architecture is None or written.options == own.options:
        return None
    names = {*written.options, *own.options}
    differing = sorted(
        name
        for name in names
        if "drop" not in name and written.options.get(name) != own.options.get(name)
    )
    if not differing:
        return None
    keys = keys_in_words({name: written.options.get(name) for name in differing})
    built = {name: own.options[name] for name in differing if name in own.options}
    return (
        f"with {options_in_words(written.options)}, this one has {options_in_words(built)}: set "
        f"{keys} below student or teacher, or as arguments"
    )


def facts_of(model: nn.Module) -> NetworkFacts:
    """What a network's card says about it; nothing if it has none."""
    card = getattr(model, CARD, None)
    return NetworkFacts() if card is None else card.facts


def describe(model: nn.Module) -> dict[str, str]:
    """Metadata from which `fastkd.models.model_from_file` rebuilds the network.

    Keys: `architecture`, `num_classes`, `options` (JSON), `normalization` (JSON [mean, std]); of
    its data `classes`, `image_size`, `evaluation` and `data` (all JSON, `DataFacts`). Each only if
    it is known; of networks that `create_model` cannot rebuild only those of the data.
    """
    return facts_of(model).to_metadata()
