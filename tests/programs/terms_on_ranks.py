"""Losses on one process and on two ranks, looked at from inside: `terms_on_ranks.py FILE`.

Writes FILE, {"one": [..], "two": [.., ..]} of what every case left on every rank;
tests/losses/test_terms_on_ranks.py starts it and judges.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch
from alike import same_on_all_ranks
from torch import Tensor
from two_ranks import make

from fastkd.compute.ranks import World
from fastkd.losses import (
    AB,
    AT,
    CWD,
    DIST,
    DKD,
    FSP,
    FT,
    KD,
    MGD,
    NST,
    VID,
    BinaryCrossEntropy,
    CrossEntropy,
    Discriminator,
    FitNet,
    JointRD,
    LossTerm,
    ReviewKD,
    SimKD,
    SoftCE,
    StageMSE,
)
from fastkd.models import create_model
from fastkd.teachers.teacher import freeze
from fastkd.testing import bind_term, call_term, sines

STAGES = ("stage1", "stage2", "stage3")
WEIGHTS = tuple(0.5 + k for k in range(10))
TERMS: dict[str, Callable[[], LossTerm]] = {
    "ce": lambda: CrossEntropy(),
    "bce": lambda: BinaryCrossEntropy(),
    "kd": lambda: KD(ce_weight=0),
    "kd_standardized": lambda: KD(ce_weight=0, standardize=True, name="kd_standardized"),
    "soft_ce": lambda: SoftCE(),
    "dkd": lambda: DKD(),
    "dist": lambda: DIST(),
    "dist_apart": lambda: DIST(gather=False, name="dist_apart"),
    "stage_mse": lambda: StageMSE({"stage1": "stage1"}),
    "jointrd": lambda: JointRD(STAGES),
    "discriminator": lambda: Discriminator(),
    "at": lambda: AT({"stage1": "stage1", "stage3": "stage2"}),
    "ab": lambda: AB({"stage1:preact": "stage1:preact", "stage3": "stage3"}),
    "ab_connected": lambda: AB({"stage1": "stage2"}, name="ab_connected"),
    "fsp": lambda: FSP({"stage1": "stage1", "stage2": "stage2", "stage3": "stage3"}),
    "ft": lambda: FT({"stage3": "stage2"}),
    "nst": lambda: NST({"stage1": "stage2"}),
    "vid": lambda: VID({"stage2": "stage2"}),
    "fitnet": lambda: FitNet({"stage2": "stage2"}),
    "reviewkd": lambda: ReviewKD(),
    "simkd": lambda: SimKD(),
    "ce_weighted": lambda: CrossEntropy(class_weights=WEIGHTS, name="ce_weighted"),
    "cwd": lambda: CWD({"stage1": "stage1", "stage2": "stage2"}),
    "cwd_connected": lambda: CWD({"stage1": "stage2"}, name="cwd_connected"),
    "cwd_released": lambda: CWD({"stage1": "stage2"}, connector="released", name="cwd_released"),
    "mgd": lambda: MGD({"stage1": "stage2"}),
    "jointrd_released": lambda: JointRD(STAGES, form="released", name="jointrd_released"),
}
NUM = 9
ROWS = [slice(0, 5), slice(5, NUM)]
"""Of the ranks: as in a partial batch."""
SHAPES = {"logits": (10,), "mean_logits": (10,), "pooled": (32,)} | {
    f"stage{k}{kind}": (4 * 2**k, 16 // 2**k, 16 // 2**k)
    for k in (1, 2, 3)
    for kind in ("", ":preact")
}


def measure(name: str, rows: slice, compiled: bool = False) -> dict[str, Any]:
    """Loss and gradients of some rows of a fixed batch, weighted as the trainer weights ranks."""
    torch.manual_seed(0)
    teacher: Any = freeze(create_model("resnet8", 10, width=0.5)).double()
    term = TERMS[name]()
    tensors: dict[str, Tensor] = {}
    for number, need in enumerate(term.needs):
        tensor = sines((NUM, *SHAPES[need.split("/")[2]]), 300 + number, 3)[rows]
        tensors[str(need)] = tensor.requires_grad_("/student/" in need)
    known = {"teacher_stages": teacher.forward_from, "teacher_head": teacher.fc}
    bind_term(term, tensors, **known, teacher_norm=teacher.layer3[0].bn2).double()
    call = torch.compile(call_term, backend="aot_eager", fullgraph=True) if compiled else call_term
    labels_N = (torch.arange(NUM) % 10)[rows]
    if term.label_kind == "multi":
        labels_N = (sines((NUM, 10), 400) > 0).long()[rows]
    sizes = (5, 4) if torch.distributed.is_initialized() else ()
    parts = call(term, tensors, labels_N, rows_of_ranks=sizes).parts
    loss = torch.stack([weight * parts[part] for part, weight in term.weights.items()]).sum()
    share = (rows.stop - rows.start) / NUM
    (share * loss).backward()
    gradients = [tensor.grad for tensor in tensors.values() if tensor.grad is not None]
    own = [parameter.grad for parameter in term.parameters()]
    return {"loss": share * loss.detach(), "rows": gradients, "own": own}


def training(world: World) -> dict[str, Any]:
    """Two epochs with all losses for one class per image; the last batch has 5 and 4 images."""
    torch.manual_seed(0)
    terms = [make_term() for name, make_term in TERMS.items() if name != "bce"]
    student = create_model("resnet8", 10, width=0.5)
    trainer = make(world, student, terms, lr=0.01, plan={"epochs": 2})
    trainer.fit()
    return {
        "same": same_on_all_ranks(trainer.step),
        "history": trainer.history,
        "skipped": trainer.guard.counts()[1],
    }


def shares(world: World, name: str) -> dict[str, Any]:
    """This rank's share; in one process the whole batch, and the ranks' shares one by one."""
    if world.size > 1:
        return measure(name, ROWS[world.rank])
    apart = [measure(name, rows) for rows in ROWS]
    return {"joined": measure(name, slice(0, NUM)), "apart": apart}


CASES: dict[str, Callable[[World], dict[str, Any]]] = {
    **{name: partial(shares, name=name) for name in TERMS},
    "dist compiled": lambda world: measure("dist", ROWS[world.rank], compiled=True),
    "training": training,
}

if __name__ == "__main__":
    target = Path(sys.argv[1]).absolute()
    torch.save(tiny.in_both_worlds(target, CASES), target)
