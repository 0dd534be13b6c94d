"""`fastkd eval FILE.onnx`: the metrics of an exported network, computed by onnxruntime."""

from collections.abc import Sequence
from typing import Any

from fastkd.deploy.onnx_file import OnnxFile, OnnxNetwork
from fastkd.errors import UserError
from fastkd.runs.evaluate_saved import (
    as_shown,
    evaluate_network,
    names_data,
    no_student_keys,
    recipe_for,
)

__all__ = ["ON_CPU", "evaluate_onnx"]

ON_CPU = {"device": "cpu", "precision": "fp32", "channels_last": False}
"""Recipe keys under which a network computes as onnxruntime does here."""


def evaluate_onnx(path: str, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate a file of `fastkd export`, with pictures shown as it says.

    keys: where the images are, `data.root=..`; `data.name` is in the file unless a key names it.

    Raises:
        UserError: the file is damaged or of another program, it has no classifier, or the data are
            not there or of other classes.
    """
    no_student_keys(path, keys, "evaluated")
    file = OnnxFile.open(path)
    facts = file.facts
    if facts.num_classes is None:
        raise UserError(f"{path} gives an embedding, and only a classifier has an accuracy")
    if not names_data(keys):
        if facts.data is None or facts.data.name is None:
            raise UserError(
                f"{path} does not say which data it is for: name them, data.name=folder "
                f"data.root=FOLDER"
            )
        keys = [f"data.name={facts.data.name}", *keys]
    # The network is in the file; a recipe wants the name of one.
    recipe = as_shown(recipe_for("resnet20", keys), facts.data)
    found = evaluate_network(recipe.model_copy(update=ON_CPU), lambda _: OnnxNetwork(file))
    for key in ("params", "macs"):
        text = file.metadata.get(key, "")
        found[key] = int(text) if text.isdecimal() and len(text) < 20 else None
    return found | {"precision": file.metadata.get("precision", "fp32"), "by": "onnxruntime"}
