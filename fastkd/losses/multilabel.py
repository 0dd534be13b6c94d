"""Losses for images with several labels: one sigmoid per class.

Targets are [N, C] in 0..1, `fastkd.data.batch.IGNORED` where a label is not known (VOC's
"difficult" objects).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from fastkd.data.batch import IGNORED
from fastkd.losses.base.arguments import Weight
from fastkd.losses.base.dtypes import widened
from fastkd.losses.base.needs import STUDENT_LOGITS, Need
from fastkd.losses.base.term import LossTerm, TermInputs, TermOutput

__all__ = ["BinaryCrossEntropy", "known_bce"]


def known_bce(logits_NC: Tensor, targets_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the binary cross entropies in nats over all known labels, and their number.

    Both 0-dim, in the type of the logits; an unknown label gives neither loss nor gradient.
    """
    known_NC = targets_NC != IGNORED
    loss_NC = F.binary_cross_entropy_with_logits(
        logits_NC, targets_NC.clamp(min=0).to(logits_NC.dtype), reduction="none"
    )
    return torch.where(known_NC, loss_NC, 0.0).sum(), known_NC.sum().to(logits_NC.dtype)


class BinaryCrossEntropy(LossTerm):
    """Binary cross entropy of the student with several labels per image.

        loss = mean over all known labels of the batch of -[y log s(z) + (1 - y) log(1 - s(z))]

    s is the sigmoid, z the student's logits. As in `nn.BCEWithLogitsLoss` the mean is over images
    and classes; unknown labels (-1) count in neither the sum nor the divisor. With several
    processes, or with accumulate, each rank or micro-batch divides by its own number of known
    labels, as is usual for an ignored label. MEAL V2 uses it to fine-tune on VOC 2007. Part:
    `<name>`.

    Args:
        weight: Factor in the total.

    Source: `torch.nn.BCEWithLogitsLoss`; Shen and Savvides 2020, arXiv:2009.08453, appendix.
    Needs: the student's logits on x, and labels [N, C].
    Weight: 1.
    Tests: tests/losses/test_multilabel.py, test_terms_on_ranks.py,
    tests/evaluation/test_multilabel.py; no released number, the formula is the oracle.
    """

    label_kind = "multi"

    def __init__(self, *, weight: Weight = 1.0, name: str = "bce") -> None:
        super().__init__(name, self.needs_of(), {name: weight})

    @override
    @classmethod
    def needs_of(cls, **keys: Any) -> tuple[Need, ...]:
        return (STUDENT_LOGITS,)

    @override
    def forward(self, inputs: TermInputs) -> TermOutput:
        """In fp32 whatever the autocast type; 0 if no label of the batch is known."""
        (logits_NC,) = self.wanted(inputs)
        total, known = known_bce(widened(logits_NC), inputs.labels_N)
        return TermOutput({self.name: total / known.clamp(min=1)})
