"""An artificial loss term that uses everything the contract offers.

A connector with a learning rate of its own, a head without weight decay, a batch norm, two banks
(one of integers) that are alike on all ranks, a scheduled value, and a tap of each network on each
view.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.compute.collectives import join_rows
from fastkd.losses.base.arguments import Weight
from fastkd.losses.base.dtypes import autocast_like
from fastkd.losses.base.needs import Need
from fastkd.losses.base.registry import register as register_loss
from fastkd.losses.base.term import BindContext, LossTerm, TermInputs, TermOutput

S_MAP, T_MAP = "x/student/stage2", "x/teacher/stage3:preact"
S_ROW, T_ROW = "xprime/student/pooled", "xprime/teacher/logits"


class Proof(LossTerm):
    """eta * [feature MSE on x] + [soft cross entropy on x'] + [distance to the bank's row].

    Args:
        weight: Factor of the feature part.
    """

    banks = ("rows_KD", "times_K")
    uses_index = True
    rows_KD: Tensor
    times_K: Tensor

    def __init__(self, *, weight: Weight = 1.0, name: str = "proof") -> None:
        super().__init__(name, self.needs_of(), self.weights_of(name, weight=weight))

    @classmethod
    def needs_of(cls, **keys: Any) -> tuple[Need, ...]:
        return tuple(map(Need, (S_MAP, T_MAP, S_ROW, T_ROW)))

    @classmethod
    def weights_of(cls, name: str, *, weight: float, **keys: Any) -> dict[str, float]:
        return {name: weight, f"{name}_soft": 0.5, f"{name}_bank": 0.1}

    def bind(self, context: BindContext) -> None:
        """Modules and banks in the sizes of this run."""
        student, teacher, row = (context.shapes[need] for need in (S_MAP, T_MAP, S_ROW))
        self.connector = nn.Sequential(
            nn.Conv2d(student[0], teacher[0], 1), nn.BatchNorm2d(teacher[0])
        )
        self.head = nn.Linear(row[0], context.num_classes)
        self.register_buffer("rows_KD", F.normalize(torch.randn(context.num_samples, row[0])))
        self.register_buffer("times_K", torch.zeros(context.num_samples, dtype=torch.int64))

    def param_groups(self) -> list[dict[str, Any]]:
        """Both differ from the student's group."""
        return [
            {"params": list(self.connector.parameters()), "lr_scale": 0.1},
            {"params": list(self.head.parameters()), "lr_scale": 2.0, "weight_decay": 0.0},
        ]

    def schedules(self) -> dict[str, Callable[[float], float]]:
        """Falls within an epoch, too."""
        return {"eta": lambda epoch: 1.0 / (1.0 + epoch)}

    def forward(self, inputs: TermInputs) -> TermOutput:
        """The bank is read as it was before this step."""
        student_NCHW, teacher_NCHW = inputs.tensors[S_MAP], inputs.tensors[T_MAP]
        row_ND, teacher_NC = inputs.tensors[S_ROW], inputs.tensors[T_ROW]
        with autocast_like(student_NCHW):
            mapped_NCHW = self.connector(student_NCHW)
            logits_NC = self.head(row_ND)
        size = (teacher_NCHW.shape[2], teacher_NCHW.shape[3])
        mapped_NCHW = F.adaptive_avg_pool2d(mapped_NCHW.float(), size)
        row_ND = F.normalize(row_ND.float())
        old_ND = self.rows_KD[inputs.index_N]
        eta = inputs.schedule["eta"]
        soft = F.cross_entropy(logits_NC.float(), teacher_NC.float().softmax(1))
        parts = {
            self.name: eta * F.mse_loss(mapped_NCHW, teacher_NCHW.float()),
            f"{self.name}_soft": soft,
            f"{self.name}_bank": (row_ND - old_ND).square().sum(1).mean(),
        }
        row_ND, index_N = (
            join_rows(rows, inputs.rows_of_ranks) for rows in (row_ND.detach(), inputs.index_N)
        )
        return TermOutput(parts, {"row_ND": row_ND, "index_N": index_N})

    def commit(self, carry: Mapping[str, Tensor], index_N: Tensor, ok: Tensor) -> None:
        """Move the rows of the whole global batch half way, on every rank."""
        row_ND, index_N = carry["row_ND"], carry["index_N"]
        old_ND = self.rows_KD[index_N]
        self.rows_KD[index_N] = torch.where(ok, F.normalize(old_ND + row_ND), old_ND)
        self.times_K[index_N] += ok


def register() -> None:
    """Make `losses.proof` known to this process."""
    register_loss("proof", Proof)
