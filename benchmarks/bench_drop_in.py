"""The fused loss in other people's training loops: what changing one line brings there.

    pytest benchmarks/bench_drop_in.py [--peer-path FOLDER] [--save-results]

RepDistiller's own `train_distill` (--peer-path holds a checkout named RepDistiller; its commit is
noted) and timm's LogitDistillationTask, each as it is against itself with KDLoss, on the same
in-memory batches and weights. The row `whole step` is what the user gains; `loss alone` is forward
and backward of the loss on logits of that size. The first losses must agree before anything is
timed.
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
from fastkd.testing import interleave, speedup

Run = Callable[[], float]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    """RepDistiller's modules, found where --peer-path says."""
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


def bench_repdistiller_loop(repdistiller, table, benchmark, request) -> None:
    torch.manual_seed(0)
    batches = [
        (torch.randn(64, 3, 32, 32), torch.randint(100, (64,)), torch.arange(64)) for _ in range(4)
    ]
    teacher = repdistiller.wrn.wrn_40_2(num_classes=100)
    student = repdistiller.wrn.wrn_16_2(num_classes=100)

    def epoch(divergence: nn.Module) -> Run:
        return repdistiller_epoch(repdistiller, student, teacher, divergence, batches, DEVICE)

    theirs, ours = repdistiller.kd.DistillKL(4), KDLoss(temperature=4.0, alpha=1.0)
    table.notes.append(f"RepDistiller at commit {repdistiller.commit}, batch 64, 100 classes")
    compare(
        "RepDistiller train_distill, wrn_40_2 -> wrn_16_2", "whole step",
        {"as it is": epoch(theirs), "fastkd": epoch(ours)}, table, request,
    )  # fmt: skip
    logits, target = 3 * torch.randn(2, 64, 100, device=DEVICE)
    compare(
        "RepDistiller DistillKL, 64x100", "loss alone",
        {"as it is": alone(theirs, logits, target), "fastkd": alone(ours, logits, target)},
        table, request, repeat=20,
    )  # fmt: skip
    benchmark.pedantic(alone(ours, logits, target), rounds=3)


@pytest.mark.parametrize("classes", [1000, 21841])
def bench_timm_task(classes: int, table, benchmark, request) -> None:
    import timm
    from timm.task import LogitDistillationTask

    class FusedTask(LogitDistillationTask):
        """The change a user of timm's task makes."""

        def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
            student = self.trainable_module(input)
            with torch.no_grad():
                images = self.teacher.normalize_input(input, self.student_mean, self.student_std)
                teacher = self.teacher(images, return_features=False)
            return {"loss": fused(student, teacher, target), "output": student}

    torch.manual_seed(0)
    batch = 256
    fused = KDLoss(temperature=4.0, alpha=0.9)
    images = torch.randn(batch, 3, 64, 64, device=DEVICE)
    labels = torch.randint(classes, (batch,), device=DEVICE)
    student = timm.create_model("test_resnet", num_classes=classes).to(DEVICE)
    teacher = timm.create_model("test_resnet", num_classes=classes).to(DEVICE)

    def steps(kind: type[LogitDistillationTask]) -> Run:
        task = kind(
            copy.deepcopy(student), copy.deepcopy(teacher), nn.CrossEntropyLoss(),
            distill_loss_weight=0.9, task_loss_weight=0.1, temperature=4.0, verbose=False,
            device=DEVICE,
        )  # fmt: skip
        task.train()
        optimizer = torch.optim.SGD(task.parameters(), 0.05, momentum=0.9)

        def run() -> float:
            loss = task(images, labels)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return run

    compare(
        f"timm LogitDistillationTask, test_resnet pair, 256x{classes}", "whole step",
        {"as it is": steps(LogitDistillationTask), "fastkd": steps(FusedTask)}, table, request,
    )  # fmt: skip
    logits, target = 3 * torch.randn(2, batch, classes, device=DEVICE)

    def as_timm_writes_it(s: Tensor, t: Tensor) -> Tensor:
        log_p, log_q = F.log_softmax(s / 4.0, dim=-1), F.log_softmax(t / 4.0, dim=-1)
        kl = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        return 0.1 * F.cross_entropy(s, labels) + 0.9 * 16.0 * kl

    ours = alone(lambda s, t: fused(s, t, labels), logits, target)
    compare(
        f"timm's formula, 256x{classes}", "loss alone",
        {"as it is": alone(as_timm_writes_it, logits, target), "fastkd": ours}, table, request,
    )  # fmt: skip
    benchmark.pedantic(ours, rounds=3)


def alone(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Run:
    """Forward and backward of a loss on fixed logits."""
    leaf = logits.clone().requires_grad_()

    def run() -> float:
        value = loss(leaf, target)
        value.backward()
        leaf.grad = None
        return value.detach()  # type: ignore[return-value]

    return run


def compare(
    loop: str, what: str, sides: dict[str, Run], table, request: pytest.FixtureRequest, repeat=1
) -> None:
    """One row; the first values of both sides must agree."""
    first = {side: float(run()) for side, run in sides.items()}
    assert first["fastkd"] == pytest.approx(first["as it is"], rel=1e-5), first
    seconds = interleave(sides, repeat * max(20, request.config.getoption("--pairs")))
    ratio, p10 = speedup(seconds, "as it is", "fastkd")
    medians = {f"{side} ms": 1e3 * sorted(v)[len(v) // 2] for side, v in seconds.items()}
    table.rows.append({"loop": loop, "what": what, **medians, "gain": ratio, "p10": p10})
