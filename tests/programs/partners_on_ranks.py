"""Partners on ranks: rows that ranks send each other, and views as one process makes them.

`partners_on_ranks.py`, as several ranks; every rank compares what it gets with its own computation
of the whole.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.augment.mix import Mixing
from fastkd.augment.views import ViewMaker
from fastkd.compute.collectives import rows_of_partners, split_evenly
from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World, open_world
from fastkd.data.geometry import Geometry
from fastkd.data.loaders.planned import Loading
from fastkd.data.loaders.resident import ResidentLoader
from fastkd.data.sources.image_set import ImageSet
from fastkd.data.sources.synthetic import make_synthetic

KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)
SIZES = ((), (3,), (5, 4, 3))
ALONE = World(0, 0, 1, torch.device("cpu"), None)


def part_of(rank: int, num: int, ranks: int) -> slice:
    """Which rows of a batch are a rank's."""
    sizes = split_evenly(num, ranks)
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def everyone(num: int, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The rows of all ranks."""
    noise = torch.Generator().manual_seed(num)
    return (200 * torch.rand(num, *size, generator=noise)).to(dtype)


def check_rows(world: World, num: int) -> None:
    """Any type, size and choice of partners."""
    sizes, mine = split_evenly(num, world.size), part_of(world.rank, num, world.size)
    choices = [np.random.default_rng(seed).permutation(num) for seed in range(3)]
    # Somebody whom all want, and nobody but oneself.
    choices += [np.full(num, num - 1), np.arange(num)]
    for partner_n in choices:
        for dtype in KINDS:
            for size in SIZES:
                rows = everyone(num, size, dtype)
                own = rows_of_partners(rows[mine], partner_n, sizes)
                assert own.dtype == dtype
                assert torch.equal(own, rows[torch.from_numpy(partner_n[mine])])
    rows = everyone(num, (4, 3), torch.float32).requires_grad_()
    own = rows_of_partners(rows[mine].permute(0, 2, 1), np.arange(num), sizes)
    assert torch.equal(own, rows[mine].permute(0, 2, 1))
    assert not own.requires_grad


def views(world: World, kind: Any, mixing: Mixing, precision: str) -> list[dict[str, Tensor]]:
    """Views and targets of every step of an epoch, whose last batch is smaller."""
    whole = make_synthetic("train", 8)
    images = ImageSet("few", whole.images_NHWC[:57], whole.labels_N[:57], whole.classes)
    loading = Loading(
        batch_size=16,
        seed=3,
        train=True,
        normalization=((0.5,) * 3, (0.25,) * 3),
        placement=Placement(world, Precision(precision, "cpu")),
        geometry=Geometry(2, "zero", flip=True),
        drop_last=False,
    )
    maker = ViewMaker(
        kind,
        seed=3,
        placement=loading.placement,
        layout=torch.channels_last,
        pool=1 if kind == "none" else 2,
        mixes=() if kind == "none" else ("labels", "logits"),
        num_classes=10,
        mixing=mixing,
        joined=world.size > 1,
    )
    found = []
    for step, batch in enumerate(maker.opened(ResidentLoader(images, loading)).epoch(5)):
        batch = maker.mixed(batch, 5, step)
        shown = maker(batch, 5, step)
        answers = {"x/teacher/logits": batch.images_NCHW.mean((2, 3)).float()}
        targets = maker.xprime_targets(batch, answers, 5, step)
        found.append({**shown, **targets, "labels": batch.labels_N})
    return found


def check_views(world: World) -> None:
    """Every kind, against one process."""
    plain = Mixing()
    cases = [(kind, plain) for kind in ("cutmix", "mixup", "cutout")]
    cases += [("none", Mixing(mixup=0.4)), ("none", Mixing(0.2, 1.0, 0.5))]
    for kind, mixing in cases:
        for precision in ("fp32", "bf16"):
            mine = views(world, kind, mixing, precision)
            wanted = views(replace(ALONE), kind, mixing, precision)
            assert len(mine) == len(wanted) == 4
            for own, whole in zip(mine, wanted, strict=True):
                rows = part_of(world.rank, len(whole["x"]), world.size)
                for name, tensor in whole.items():
                    pool = 2 if name.startswith("xprime") else 1
                    parts = [each[rows] for each in tensor.chunk(pool)]
                    assert torch.equal(own[name], torch.cat(parts)), (kind, mixing, name)


with open_world("cpu") as world:
    for num in (world.size, 7, 16):
        check_rows(world, num)
    check_views(world)
