"""`report.record=weights`: how the weights of the first, a middle and the last layer are spread.

MEAL V2 (arXiv:2009.08453), figures 7 and 8: "first, middle (last conv in block 2) and last conv
layers in a ResNet-50", and the elements at 10, 25, 50, 75 and 90 percent over the training.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from torch import Tensor, nn
from typing_extensions import override

from fastkd.errors import UserError
from fastkd.models.taps import ZooNetwork
from fastkd.training.config import RecordName
from fastkd.training.recording.recording import Recording, Row
from fastkd.training.step import Prepared

__all__ = ["BINS", "PERCENTS", "Weights", "layers_of"]

BINS = 100
"""Of a histogram, equal ones from the lowest weight to the highest."""
PERCENTS = (10, 25, 50, 75, 90)
"""The paper's."""

_SHORTCUTS = ("downsample", "shortcut")
"""Layers beside the others, which are none of the three."""


def layers_of(model: nn.Module) -> dict[str, str]:
    """`first`, `middle` and `last` -> path of the layer, in the order of the network's modules.

    Convolutions; linear layers too where there are fewer than three; none in a shortcut. The middle
    one is the last of the second stage in a residual network, else the one halfway.

    Raises:
        UserError: there are fewer than three layers with weights.
    """
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    known = [
        (path, one)
        for path, one in model.named_modules()
        if isinstance(one, kinds) and not any(part in _SHORTCUTS for part in path.split("."))
    ]
    convolutions = [path for path, one in known if not isinstance(one, nn.Linear)]
    paths = convolutions if len(convolutions) >= 3 else [path for path, _ in known]
    if len(paths) < 3:
        raise UserError(
            f"report.record=weights shows the first, a middle and the last layer, and "
            f"{type(model).__name__} has {len(paths)} convolutions and linear layers: leave it out"
        )
    prefixes: tuple[str, ...] = ("layer2",)  # of timm and torchvision
    if isinstance(model, ZooNetwork):
        stages = model.stage_paths()
        prefixes = stages.get("stage2", ()) if len(stages) in (3, 4) else ()
    inside = [
        path
        for path in paths[1:-1]
        if any(path == prefix or path.startswith(f"{prefix}.") for prefix in prefixes)
    ]
    middle = inside[-1] if inside else paths[len(paths) // 2]
    return {"first": paths[0], "middle": middle, "last": paths[-1]}


class Weights(Recording):
    """Reads three layers at the end of an epoch, and before the first."""

    name: ClassVar[RecordName] = "weights"

    def __init__(self, student: nn.Module) -> None:
        """UserError as of `layers_of`."""
        self.layers = {
            place: (path, student.get_submodule(path)) for place, path in layers_of(student).items()
        }

    @override
    def before_training(self) -> Row:
        return self._row()

    @override
    def of_epoch(self, epoch: int, last: Prepared, wait_ms: float) -> Row:
        return self._row()

    def _row(self) -> Row:
        row: Row = {}
        for place, (path, layer) in self.layers.items():
            weight = layer.weight
            assert isinstance(weight, Tensor)
            row[place] = {"layer": path, **_spread(weight.detach().float().cpu().numpy())}
        return row


def _spread(weights: np.ndarray) -> Mapping[str, object]:
    """Lowest and highest weight, counts of BINS equal bins between, and the PERCENTS by name."""
    flat = weights[np.isfinite(weights)].astype(np.float64)
    if not flat.size:
        return {"low": None, "high": None, "counts": [], "percentiles": {}}
    percentiles = np.percentile(flat, PERCENTS)
    counts, edges = np.histogram(flat, BINS)
    return {
        "low": float(edges[0]),
        "high": float(edges[-1]),
        "counts": counts.tolist(),
        "percentiles": dict(zip(map(str, PERCENTS), percentiles.tolist(), strict=True)),
    }
