"""Repeated images among files that cannot be read, by every backend that decodes files."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World
from fastkd.data import Loading, TorchLoader
from fastkd.data.sources.by_name import open_source


def test_repeats_of_files_that_cannot_be_read_and_random_areas(
    make_folder: Callable[..., Path],
) -> None:
    root = make_folder(per_class=6)
    victim = sorted((root / "train").rglob("*.png"))[3]
    victim.write_bytes(b"damaged")
    source = open_source("folder", root)
    given = Loading(
        batch_size=4,
        seed=0,
        train=True,
        normalization=((0.5,) * 3, (0.2,) * 3),
        placement=Placement(World(0, 0, 1, torch.device("cpu"), None), Precision("fp32", "cpu")),
        repeats=2,
        drop_last=False,
    )
    kinds: list[Any] = [TorchLoader]
    if find_spec("nvidia.dali"):
        kinds.append(import_module("fastkd.data.loaders.dali_loader").DaliLoader)
    shown = []
    for kind in kinds:
        own = kind(source, given, image_size=12, crop="resized", skips=True)
        batches = [batch for epoch in range(2) for batch in own.epoch(epoch)]
        ids = torch.cat([batch.index_N for batch in batches])
        assert int(ids.max()) < len(source) and 3 not in ids.tolist()
        assert sum(len(batch.unread) for batch in batches) >= 2
        assert {n for batch in batches for n, _ in batch.unread} == {3}
        shown.append((ids.tolist(), torch.cat([batch.images_NCHW for batch in batches])))
        for first in range(0, 4, 2):
            assert not torch.equal(batches[0].images_NCHW[first], batches[0].images_NCHW[first + 1])
    if len(shown) == 2:
        assert shown[0][0] == shown[1][0]
        # Of two decoders; in units of a deviation of 0.2.
        assert (shown[0][1] - shown[1][1]).abs().mean() < 0.05
