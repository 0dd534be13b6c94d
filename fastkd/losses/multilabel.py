"""Losses for images with several labels: one sigmoid per class.

Targets are [N, C] in 0..1, `fastkd.data.batch.IGNORED` where a label is not known (VOC's
"difficult" objects).
"""

from typing import Annotated, Any

import torch
from annotated_types import Gt, Lt
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from fastkd.config.section import Since
from fastkd.data.batch import IGNORED, NO_LABEL
from fastkd.errors import UserError
from fastkd.losses.base.arguments import Smoothing, Weight
from fastkd.losses.base.dtypes import widened
from fastkd.losses.base.needs import STUDENT_LOGITS, Need
from fastkd.losses.base.term import BindContext, LossTerm, TermInputs, TermOutput

__all__ = ["BinaryCrossEntropy", "known_bce"]

Threshold = Annotated[float, Gt(0), Lt(1)]


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
    """Binary cross entropy of the student with the labels: one sigmoid per class.

        loss = mean over all known labels of the batch of -[y log s(z) + (1 - y) log(1 - s(z))]

    s is the sigmoid, z the student's logits. As in `nn.BCEWithLogitsLoss` the mean is over images
    and classes; unknown labels (-1) count in neither the sum nor the divisor. With several
    processes, or with accumulate, each rank or micro-batch divides by its own number of known
    labels, as is usual for an ignored label. MEAL V2 uses it to fine-tune on VOC 2007. Part:
    `<name>`.

    Where an image has one class, y is 1 there and 0 elsewhere, or what mixup and CutMix leave of
    it. With `target_threshold` t, y becomes 1 above t and 0 up to it, so that both classes of a
    mixed image are present; `label_smoothing` e then makes it (1 - e) y + e / C, as ResNet strikes
    back states it (timm applies the threshold last, which undoes the smoothing). An unlabelled
    image (-100) counts in neither the sum nor the divisor.

    Args:
        weight: Factor in the total.
        label_smoothing: Share of the target spread over all classes, of images with one class.
        target_threshold: Targets above it become 1 and all others 0, of images with one class.

    Source: `torch.nn.BCEWithLogitsLoss`; Shen and Savvides 2020, arXiv:2009.08453, appendix;
    Wightman et al. 2021, arXiv:2110.00476, section 3; timm loss/binary_cross_entropy.py.
    Needs: the student's logits on x, and the labels.
    Weight: 1.
    Tests: tests/losses/test_multilabel.py, test_terms_on_ranks.py,
    tests/evaluation/test_multilabel.py; no released number, the formula is the oracle.
    """

    label_kind = "multi"
    takes_classes = True
    takes_no_label = True

    def __init__(
        self,
        *,
        weight: Weight = 1.0,
        label_smoothing: Annotated[Smoothing, Since("0.2")] = 0.0,
        target_threshold: Annotated[Threshold | None, Since("0.2")] = None,
        name: str = "bce",
    ) -> None:
        super().__init__(name, self.needs_of(), {name: weight})
        self.label_smoothing = label_smoothing
        self.target_threshold = target_threshold

    @override
    @classmethod
    def needs_of(cls, **keys: Any) -> tuple[Need, ...]:
        return (STUDENT_LOGITS,)

    def bind(self, context: BindContext) -> None:
        """Refuse targets that would blur several labels per image."""
        if context.train_labels_N.dim() == 2 and (self.label_smoothing or self.target_threshold):
            raise UserError(
                f"the loss {self.name} has label_smoothing or target_threshold, which are for "
                "images of one class, and these have several labels: leave them out"
            )

    @override
    def forward(self, inputs: TermInputs) -> TermOutput:
        """In fp32 whatever the autocast type; 0 if no label of the batch is known."""
        (logits_NC,) = self.wanted(inputs)
        targets_NC = self._targets(inputs.labels_N, logits_NC.shape[1])
        total, known = known_bce(widened(logits_NC), targets_NC)
        return TermOutput({self.name: total / known.clamp(min=1)})

    def _targets(self, labels_N: Tensor, num_classes: int) -> Tensor:
        targets_NC = labels_N
        if labels_N.dim() == 1:
            has_label_N1 = (labels_N != NO_LABEL)[:, None]
            targets_NC = F.one_hot(labels_N.clamp(min=0), num_classes).float()
            targets_NC = torch.where(has_label_N1, targets_NC, IGNORED)
        known_NC = targets_NC != IGNORED
        if self.target_threshold is not None:
            targets_NC = (targets_NC > self.target_threshold).float()
        if self.label_smoothing:
            spread = self.label_smoothing / num_classes
            targets_NC = (1.0 - self.label_smoothing) * targets_NC + spread
        return torch.where(known_NC, targets_NC, IGNORED)
