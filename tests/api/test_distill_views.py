"""`fastkd.distill` with a second view x' and a pick, on loaders and networks of the user's own."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd.augment.config import PickConfig
from fastkd.errors import UserError
from fastkd.losses import KD

QUIET: dict[str, Any] = {"device": "cpu", "compile": "off", "precision": "fp32", "quiet": True}


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def loader(num: int) -> DataLoader[Any]:
    images_NCHW = torch.randn(num, 3, 8, 8, generator=torch.Generator().manual_seed(num))
    return DataLoader(TensorDataset(images_NCHW, torch.arange(num) % 4), batch_size=16)


def trained(module: nn.Module) -> bool:
    """In a pass of a training step, not of an evaluation or a pick."""
    return module.training and torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("xprime", "pick"),
    [
        ("cutmix", "kl"),
        ("cutout", PickConfig(criterion="student_entropy", images=5, update_statistics=False)),
        ("mixup", None),
    ],
    ids=["kl", "config", "none"],
)
def test_x_prime_can_be_picked_from_a_pool(xprime: Any, pick: Any) -> None:
    student = network(2)
    sizes: list[int] = []
    student[0].register_forward_pre_hook(
        lambda module, args: sizes.append(len(args[0])) if trained(module) else None
    )
    result = fastkd.distill(
        student,
        network(1),
        loader(40),
        loader(12),
        epochs=1,
        losses=[KD(views=("x", "xprime"))],
        xprime=xprime,
        pick=pick,
        **QUIET,
    )
    (row,) = result.metrics["history"]
    assert ("pick_ratio" in row) == (pick is not None)
    if pick is not None:
        assert row["pick_ratio"] > 1
    # x, then what was chosen, of batches of 16, 16 and 8.
    chosen = [5, 5] if isinstance(pick, PickConfig) else [16, 8]
    steps = [16, chosen[0], 16, chosen[0], 8, chosen[1]]
    assert sizes[-len(steps) :] == steps  # behind the trial


@pytest.mark.parametrize("size", [{"images": 3}, {"share": 0.05}], ids=str)
def test_fewer_picked_than_micro_batches_make_fewer_micro_batches(size: dict[str, Any]) -> None:
    """One without an image would have no mean: the step would be skipped."""
    student, rows = network(2), []
    student[0].register_forward_pre_hook(
        lambda module, args: rows.append(len(args[0])) if trained(module) else None
    )
    result = fastkd.distill(
        student,
        network(1),
        loader(40),
        loader(12),
        epochs=1,
        losses=[KD(views=("x", "xprime"))],
        xprime="cutmix",
        pick=PickConfig(**size),
        accumulate=4,
        **QUIET,
    )
    assert result.metrics["skipped_steps"] == 0
    # x and x' of each micro-batch, of batches of 16, 16 and 8.
    chosen = [[6, 1, 5, 1, 5, 1]] * 2 + [[3, 1, 3, 1, 2, 1]]
    if "share" in size:
        chosen = [[8, 1, 8, 1]] * 2 + [[8, 1]]
    steps = list(itertools.chain(*chosen))
    assert rows[-len(steps) :] == steps  # behind the trial


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"xprime": "cutmix", "pick": "loss"}, "pick='loss'; choose one of kl, teacher_entropy"),
        ({"xprime": "cutmix", "pick": "kl", "losses": [KD()]}, "which no loss uses"),
        ({"xprime": "randaugment"}, "made of the pictures as they are stored, and a loader of"),
        ({"xprime": "cutout", "losses": [KD()]}, "would make a view x' that no loss uses"),
        ({"xprime": "blur"}, "xprime='blur'; choose one of none, cutmix, mixup, cutout, cropflip"),
    ],
    ids=["criterion", "no loss", "picture view", "nobody looks", "unknown view"],
)
def test_picks_and_views_that_cannot_be_are_refused(
    options: dict[str, Any],
    message: str,
) -> None:
    options = {"losses": [KD(views=("x", "xprime"))]} | options
    with pytest.raises(UserError, match=message):
        fastkd.distill(network(2), network(1), loader(40), loader(12), epochs=1, **options, **QUIET)
