"""What an exported file says about itself: text by key, alike in ONNX and torch.export files.

`mean` and `std` are what whoever calls the file must apply to images in 0..1: 0 and 1 if that
happens inside.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fastkd import __version__
from fastkd.config.section import Normalization
from fastkd.deploy.source import Choice, Source
from fastkd.errors import UserError
from fastkd.models.counting.count import cost
from fastkd.storage.description import NetworkFacts

__all__ = ["UNCHANGED", "facts_in", "metadata_of"]

UNCHANGED: Normalization = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def metadata_of(source: Source, choice: Choice) -> dict[str, str]:
    """Classes, size, framing, normalisation, origin; each only if it is known."""
    inside = source.normalization if choice.normalize else None
    outside = UNCHANGED if choice.normalize else source.normalization
    facts = replace(source.facts, normalization=outside)
    # The network reads what is its own under this key.
    known = facts.to_metadata() | {
        "fastkd": __version__,
        "answers": source.answers,
        "size": json.dumps(list(source.size)),
        "precision": "fp16" if choice.half else "fp32",
        "params": str(sum(parameter.numel() for parameter in source.model.parameters())),
    }
    found = {
        "num_classes": str(facts.num_classes) if facts.num_classes else None,
        "normalization": json.dumps(outside) if outside else None,
        "mean": json.dumps(outside[0]) if outside else None,
        "std": json.dumps(outside[1]) if outside else None,
        "normalized_inside": json.dumps(inside) if inside else None,
        "multiple": str(source.multiple) if source.answers == "pixels" else None,
        "recipe": source.recipe,
        "digest": source.digest,
    }
    if size := cost(source.model, (3, *source.size)):
        found["macs"] = str(size.macs)
    return known | {key: text for key, text in found.items() if text is not None}


def facts_in(metadata: Mapping[str, str], path: Path) -> NetworkFacts:
    """What a file of `fastkd export` says about its network. UserError for other files."""
    if "fastkd" not in metadata:
        raise UserError(
            f"{path} was not written by fastkd export: it does not say how images are shown to it"
        )
    try:
        return NetworkFacts.from_metadata(metadata)
    except ValueError as error:
        raise UserError(f"{path}: its metadata cannot be read ({error})") from error
