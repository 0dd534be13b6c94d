"""Whole training steps on a GPU: nothing waits, nothing breaks the graph, nothing compiles anew.

Rehearsed on a CPU (FASTKD_REHEARSE=1) the same trainers run, compiled, without what only a CUDA
device can answer.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from fastkd import create_model
from fastkd.augment.config import PickConfig
from fastkd.compute.placement import Placement
from fastkd.compute.precision import resolve_precision
from fastkd.compute.ranks import World
from fastkd.data import ImageSet, Loading, ResidentLoader
from fastkd.data.facts import Facts
from fastkd.data.geometry import Geometry
from fastkd.errors import UserError
from fastkd.losses import KD
from fastkd.losses.base.term import LossTerm
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.teaching import Teaching
from fastkd.testing import no_host_sync
from fastkd.training.ahead import run_ahead
from fastkd.training.build import build_trainer
from fastkd.training.config import OptimConfig
from fastkd.training.progress import Plan
from fastkd.training.settings import Output, TrainData, TrainingSettings
from fastkd.training.trainer import Trainer

pytestmark = pytest.mark.gpu
CLASSES, BATCH, SIDE = 10, 16, 16
MEAN, STD = (0.5,) * 3, (0.25,) * 3


def images(num: int) -> ImageSet:
    pixels_NHWC = np.random.default_rng(0).integers(0, 256, (num, SIDE, SIDE, 3), np.uint8)
    return ImageSet("random", pixels_NHWC, np.arange(num) % CLASSES, tuple(map(str, range(10))))


def trainer(
    device: torch.device,
    *,
    precision: str = "auto",
    compiled: bool = True,
    picks: bool = False,
    num: int = 4 * BATCH,
    drop_last: bool = True,
    world: World | None = None,
) -> Trainer:
    """Resident data with crop and flip, a WRN pair, KD on x, or on x and a picked CutMix view."""
    chosen, world = resolve_precision(precision, device), world or World(0, 0, 1, device, None)
    torch.manual_seed(0)
    loader = ResidentLoader(
        images(num),
        Loading(
            batch_size=BATCH,
            seed=0,
            train=True,
            normalization=(MEAN, STD),
            placement=Placement(world, chosen),
            geometry=Geometry(2, "zero", True),
            drop_last=drop_last,
        ),
    )
    terms: list[LossTerm] = [KD(views=("x", "xprime"))] if picks else [KD()]
    return build_trainer(
        Plan(stage="gpu", digest="", seed=0, epochs=3),
        student=create_model("wrn_10_1", CLASSES),
        teaching=Teaching((LoadedNet(create_model("wrn_16_1", CLASSES)),)),
        terms=terms,
        data=TrainData(
            loader,
            loader,
            Facts((3, SIDE, SIDE), CLASSES, loader.labels_N, "class", (MEAN, STD)),
            num,
        ),
        settings=TrainingSettings(
            optim=OptimConfig(lr=0.01),
            xprime="cutmix" if picks else "none",
            pick=PickConfig() if picks else None,
            compile="on" if compiled else "off",
        ),
        placement=Placement(world, chosen),
        output=Output(),
    )


def epoch(made: Trainer, number: int, device: torch.device) -> None:
    """What the trainer does with an epoch, without the fetches at its end."""
    made.runner.train()
    ahead = run_ahead(made.prepare(number), device)
    for step, prepared in enumerate(ahead):
        made.optimize(prepared, number, step)


def mean_loss(made: Trainer) -> float:
    totals = dict(zip(made.metric_names, made.totals_M.tolist(), strict=True))
    made.totals_M.zero_()
    return totals["loss"] / totals["images"]


@pytest.mark.parametrize("picks", [False, True], ids=["kd", "tlcutmix+pick"])
def test_a_step_never_waits_breaks_or_compiles_anew(picks: bool, device: torch.device) -> None:
    torch.compiler.reset()
    counters.clear()
    made = trainer(device, picks=picks)
    epoch(made, 0, device)  # compiles, records the graphs
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == (4 if picks else 2)  # teacher and step; teacher of the pool, pick
    with no_host_sync(device):
        epoch(made, 1, device)
    made.guard.check()
    epoch(made, 2, device)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert made.guard.counts() == (0, 0)


def test_another_batch_size_costs_one_graph_per_unit(device: torch.device) -> None:
    """The last batch of an epoch is smaller; the second epoch compiles nothing."""
    torch.compiler.reset()
    counters.clear()
    made = trainer(device, num=2 * BATCH + 6, drop_last=False)
    epoch(made, 0, device)
    assert counters["stats"]["unique_graphs"] == 4
    with no_host_sync(device):
        epoch(made, 1, device)
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_compiled_and_captured_steps_train_like_eager_ones(
    precision: str, device: torch.device
) -> None:
    if precision == "fp16" and device.type == "cpu":
        with pytest.raises(UserError, match="precision=fp16 needs a GPU"):
            trainer(device, precision=precision)
        return
    losses: dict[bool, list[float]] = {}
    for compiled in (False, True):
        torch.compiler.reset()
        made = trainer(device, precision=precision, compiled=compiled)
        losses[compiled] = []
        for number in range(3):
            epoch(made, number, device)
            losses[compiled].append(mean_loss(made))
        assert all(p.isfinite().all() for p in made.student.parameters())
        # A GradScaler starts high: its first steps may overflow and are skipped.
        assert made.guard.counts()[1] <= (6 if precision == "fp16" else 0)
    tolerance = 1e-3 if precision == "fp32" else 0.05
    assert losses[True] == pytest.approx(losses[False], rel=tolerance)
    assert losses[True][-1] != losses[True][0]


def test_a_bad_batch_leaves_everything_as_it_was(device: torch.device) -> None:
    torch.compiler.reset()
    made = trainer(device)
    epoch(made, 0, device)
    state = {name: x.clone() for name, x in made.step.state_dict().items()}
    prepared = next(made.prepare(1))
    prepared.views["x"][0, 0, 0, 0] = float("nan")
    with no_host_sync(device):
        made.optimize(prepared, 1, 0)
    assert made.guard.counts() == (1, 1)
    for name, x in made.step.state_dict().items():
        assert torch.equal(x, state[name]), name


def test_memory_does_not_grow_with_the_epochs(device: torch.device) -> None:
    """Batches made ahead on the side stream give their memory back."""
    made = trainer(device)
    seen: list[Any] = []
    for number in range(3):
        epoch(made, number, device)
        if device.type == "cuda":
            torch.cuda.synchronize()
            seen.append(torch.cuda.memory_reserved())
    assert not seen or seen[2] == seen[1]
