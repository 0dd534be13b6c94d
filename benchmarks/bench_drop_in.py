"""The fused loss in other people's training loops: what changing one line brings there.

    pytest benchmarks/bench_drop_in.py [--peer-path FOLDER] [--pairs 20] [--save-results]

RepDistiller's own `train_distill` (--peer-path holds a checkout named RepDistiller; its commit is
noted) and timm's LogitDistillationTask, each as it is against itself with KDLoss, on the same
in-memory batches and weights. `whole step` is what the user gains; `loss alone` is the forward and
backward pass of the loss on logits of that size. The loss of a first step, and the loss alone with
its gradient, are checked before anything is timed.
"""

import contextlib
import copy
import importlib
import io
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.losses import KDLoss
from fastkd.testing import (
    assert_loss_as_accurate,
    assert_mean_as_accurate,
    eager_step_rows,
    forward_backward,
)

Run = Callable[[], float]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 64
TIMM_BATCH, TIMM_SIDE = 256, 64


def load_repdistiller(folder: Path) -> Namespace | None:
    """RepDistiller's `loops`, `kd`, `wrn`, `resnet` and its commit; None without a checkout."""
    if not (folder / "helper" / "loops.py").exists():
        return None
    names = {"loops": "helper.loops", "kd": "distiller_zoo.KD"}
    names |= {"wrn": "models.wrn", "resnet": "models.resnet"}
    sys.path.insert(0, str(folder))
    with contextlib.redirect_stdout(io.StringIO()):
        found = {key: importlib.import_module(name) for key, name in names.items()}
    sys.path.remove(str(folder))
    head = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True).stdout.strip()
    return Namespace(commit=commit or "unknown", **found)


@pytest.fixture
def repdistiller(request: pytest.FixtureRequest) -> Namespace:
    """RepDistiller's modules from --peer-path."""
    found = load_repdistiller(Path(request.config.getoption("--peer-path") or "") / "RepDistiller")
    if found is None:
        pytest.skip("needs --peer-path with a checkout of HobbitLong/RepDistiller in it")
    return found


def repdistiller_epoch(
    peer: Namespace,
    student: nn.Module,
    teacher: nn.Module,
    divergence: nn.Module,
    batches: list[tuple[Tensor, ...]],
    device: torch.device,
) -> Run:
    """Its own training loop over these batches (images, labels, ids)."""
    options = Namespace(distill="kd", gamma=0.1, alpha=0.9, beta=0.0, print_freq=10**9)
    nets = nn.ModuleList([copy.deepcopy(student), copy.deepcopy(teacher)]).to(device)
    losses = nn.ModuleList([nn.CrossEntropyLoss(), divergence, nn.Identity()])
    optimizer = torch.optim.SGD(nets[0].parameters(), 0.05, momentum=0.9, weight_decay=5e-4)

    def run() -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            _, loss = peer.loops.train_distill(1, batches, nets, losses, optimizer, options)
        return loss

    return run


def check_first_step(
    sides: dict[str, Run], student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor
) -> None:
    """All sides have the loss of the formula in their first step."""
    rows = {}
    for dtype in (torch.float32, torch.float64):
        kd_N, ce_N = eager_step_rows(student, teacher, images, labels, dtype)
        rows[dtype] = 0.1 * ce_N + 0.9 * kd_N
    for side, step in sides.items():
        assert_mean_as_accurate(side, step(), rows[torch.float32], rows[torch.float64])


def bench_repdistiller_loop(repdistiller, table, race) -> None:
    torch.manual_seed(0)
    teacher = repdistiller.wrn.wrn_40_2(num_classes=100).to(DEVICE)
    student = repdistiller.wrn.wrn_16_2(num_classes=100).to(DEVICE)
    images = torch.randn(4, BATCH, 3, 32, 32, device=DEVICE)
    labels = torch.randint(100, (4, BATCH), device=DEVICE)
    batches = [(x, y, torch.arange(BATCH)) for x, y in zip(images, labels, strict=True)]
    divergences = {
        "as it is": repdistiller.kd.DistillKL(4),
        "fastkd": KDLoss(temperature=4.0, alpha=1.0),
    }

    def epochs(over: list[tuple[Tensor, ...]]) -> dict[str, Run]:
        return {
            side: repdistiller_epoch(repdistiller, student, teacher, divergence, over, DEVICE)
            for side, divergence in divergences.items()
        }

    check_first_step(epochs(batches[:1]), student, teacher, images[0], labels[0])
    found = race(epochs(batches))
    name = "RepDistiller train_distill, wrn_40_2 -> wrn_16_2"
    table.rows.append({"loop": name, "what": "whole step", **found.cells()})
    table.notes.append(f"RepDistiller at commit {repdistiller.commit}, batch {BATCH}, 100 classes")


def bench_repdistiller_loss(repdistiller, table, race) -> None:
    theirs, ours = repdistiller.kd.DistillKL(4), KDLoss(temperature=4.0, alpha=1.0)
    torch.manual_seed(0)
    logits, target = 3 * torch.randn(2, BATCH, 100, device=DEVICE)
    assert_loss_as_accurate("KDLoss", ours, theirs, logits, target)
    found = race(
        {
            "as it is": forward_backward(theirs, logits, target),
            "fastkd": forward_backward(ours, logits, target),
        },
        repeat=20,
    )
    name = f"RepDistiller DistillKL, {BATCH}x100"
    table.rows.append({"loop": name, "what": "loss alone", **found.cells()})


def timm_steps(
    student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor
) -> dict[str, Run]:
    """Steps of timm's task as it is, and with its loss exchanged."""
    from timm.task import LogitDistillationTask

    fused = KDLoss(temperature=4.0, alpha=0.9)

    class FusedTask(LogitDistillationTask):
        """The change that a user of timm's task makes."""

        def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
            student = self.trainable_module(input)
            with torch.no_grad():
                images = self.teacher.normalize_input(input, self.student_mean, self.student_std)
                teacher = self.teacher(images, return_features=False)
            return {"loss": fused(student, teacher, target), "output": student}

    def steps(kind: type[LogitDistillationTask]) -> Run:
        task = kind(
            copy.deepcopy(student),
            copy.deepcopy(teacher),
            nn.CrossEntropyLoss(),
            distill_loss_weight=0.9,
            task_loss_weight=0.1,
            temperature=4.0,
            verbose=False,
            device=DEVICE,
        )
        task.train()
        optimizer = torch.optim.SGD(task.parameters(), 0.05, momentum=0.9)

        def run() -> float:
            loss = task(images, labels)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return run

    return {"as it is": steps(LogitDistillationTask), "fastkd": steps(FusedTask)}


@pytest.mark.parametrize("classes", [1000, 21841])
def bench_timm_task(classes: int, table, race) -> None:
    import timm

    torch.manual_seed(0)
    images = torch.randn(TIMM_BATCH, 3, TIMM_SIDE, TIMM_SIDE, device=DEVICE)
    labels = torch.randint(classes, (TIMM_BATCH,), device=DEVICE)
    student, teacher = (
        timm.create_model("test_resnet", num_classes=classes).to(DEVICE) for _ in range(2)
    )
    nets_and_batch = (student, teacher, images, labels)
    check_first_step(timm_steps(*nets_and_batch), *nets_and_batch)
    found = race(timm_steps(*nets_and_batch))
    name = f"timm LogitDistillationTask, test_resnet pair, {TIMM_BATCH}x{classes}"
    table.rows.append({"loop": name, "what": "whole step", **found.cells()})


@pytest.mark.parametrize("classes", [1000, 21841])
def bench_timm_loss(classes: int, table, race) -> None:
    def as_timm_writes_it(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        log_p, log_q = F.log_softmax(s / 4.0, dim=-1), F.log_softmax(t / 4.0, dim=-1)
        kl = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        return 0.1 * F.cross_entropy(s, y) + 0.9 * 16.0 * kl

    torch.manual_seed(0)
    logits, target = 3 * torch.randn(2, TIMM_BATCH, classes, device=DEVICE)
    labels = torch.randint(classes, (TIMM_BATCH,), device=DEVICE)
    ours = KDLoss(temperature=4.0, alpha=0.9)
    assert_loss_as_accurate("KDLoss", ours, as_timm_writes_it, logits, target, labels)
    found = race(
        {
            "as it is": forward_backward(as_timm_writes_it, logits, target, labels),
            "fastkd": forward_backward(ours, logits, target, labels),
        }
    )
    name = f"timm's formula, {TIMM_BATCH}x{classes}"
    table.rows.append({"loop": name, "what": "loss alone", **found.cells()})
