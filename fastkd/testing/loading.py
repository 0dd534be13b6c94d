"""How tests load images: one `Loading`, of which each test says what is different."""

from typing import Any

import torch

from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision, PrecisionName
from fastkd.compute.ranks import World
from fastkd.data.geometry import Geometry
from fastkd.data.loaders.planned import Loading

__all__ = ["loading", "placed"]


def placed(rank: int = 0, world_size: int = 1, precision: PrecisionName = "fp32") -> Placement:
    """On the CPU, of a rank that talks to no other."""
    world = World(rank, rank, world_size, torch.device("cpu"), None)
    return Placement(world, Precision(precision, "cpu"))


def loading(rank: int = 0, world_size: int = 1, **changes: Any) -> Loading:
    """Ten images a batch, in training, shifted by a pixel and flipped."""
    plain: dict[str, Any] = {
        "batch_size": 10,
        "seed": 0,
        "train": True,
        "normalization": ((0.5,) * 3, (0.2,) * 3),
        "placement": placed(rank, world_size),
        "geometry": Geometry(1, "zero", True),
    }
    return Loading(**(plain | changes))
