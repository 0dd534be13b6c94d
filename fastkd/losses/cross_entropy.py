"""Cross entropy with the labels, as `CrossEntropy` and `KD` take it, and weights of the classes.

Class weights: Romera et al. 2018, "ERFNet", section IV, after ENet, arXiv:1606.02147, section 5.2.
"""

from typing import Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor
from torch.nn import functional as F

from fastkd.data.batch import NO_LABEL
from fastkd.errors import UserError
from fastkd.kernels import kd_loss_mean
from fastkd.losses.base.dtypes import widened
from fastkd.losses.base.term import BindContext

__all__ = ["ClassWeights", "check_hard_labels", "class_weights_C", "labelled_ce", "weighted_mean"]

ClassWeights = Literal["none", "erfnet", "erfnet_encoder"] | tuple[NonNegativeFloat, ...]
"""How much a row counts by its class: equally, by a formula of its class's share, or as given."""

# c of 1 / ln(c + share). The paper states 1.10 and no other; the released list of the encoder's
# stage follows from 1.20 (train/main.py of Eromera/erfnet_pytorch).
_OFFSETS = {"erfnet": 1.10, "erfnet_encoder": 1.20}


def class_weights_C(wanted: ClassWeights, loss: str, context: BindContext) -> Tensor:
    """fp32 [C] on the CPU, for the loss of that name; not for "none".

    Raises:
        UserError: a list of another length or of zeros, or labels that cannot be counted.
    """
    if isinstance(wanted, str):
        count_C = _labels_of_classes(context)
        if not count_C.sum():
            raise UserError(
                f"losses.{loss}.class_weights={wanted} follows from the labels of the training "
                f"set, which this data cannot count: give {context.num_classes} numbers, one per "
                f"class"
            )
        share_C = count_C.double() / count_C.sum()
        return (1 / (_OFFSETS[wanted] + share_C).log()).float()
    if len(wanted) != context.num_classes or not any(wanted):
        raise UserError(
            f"losses.{loss}.class_weights has {len(wanted)} numbers, {sum(map(bool, wanted))} of "
            f"them above 0: give {context.num_classes}, one per class and not all 0"
        )
    return torch.tensor(wanted, dtype=torch.float32)


def _labels_of_classes(context: BindContext) -> Tensor:
    """Labels of every class in the training set, int64 [C]: of pixels, or of whole images."""
    if context.count_pixels is not None:
        return context.count_pixels()
    labels_N = context.train_labels_N
    known_N = labels_N[labels_N != NO_LABEL] if labels_N.dim() == 1 else labels_N.new_empty(0)
    return torch.bincount(known_N, minlength=context.num_classes)


def check_hard_labels(loss: str, labels_N: Tensor) -> None:
    """UserError for rows of probabilities, which have no class to weigh them by."""
    if labels_N.is_floating_point():
        raise UserError(
            f"losses.{loss}.class_weights weighs an image or a pixel by its one class, and mixup, "
            f"CutMix and soft labels give it a share of several: leave one of them out"
        )


def labelled_ce(
    logits_NC: Tensor,
    labels_N: Tensor,
    label_smoothing: float,
    weight_C: Tensor | None = None,
    factor: float = 1.0,
) -> Tensor:
    """Mean cross entropy in fp32 of the rows with a label; 0 if there are none.

    labels_N: class ids [N], those of pixels [N, H, W] for logits [N, C, H, W], or probabilities of
    the logits' shape. weight_C: see `weighted_mean`; not with probabilities. factor: what the
    result will be multiplied with; it changes nothing but saves work.
    """
    if labels_N.is_floating_point():
        wide_NC = widened(logits_NC)
        return F.cross_entropy(wide_NC, labels_N.to(wide_NC), label_smoothing=label_smoothing)
    if logits_NC.dim() == 2 and weight_C is None:
        total = F.cross_entropy(
            widened(logits_NC),
            labels_N,
            label_smoothing=label_smoothing,
            ignore_index=NO_LABEL,
            reduction="sum",
        )
        return total / (labels_N != NO_LABEL).sum().clamp_min(1)
    count = (labels_N != NO_LABEL).sum().clamp_min(1)
    weight_N = None
    if weight_C is not None:
        wide = torch.promote_types(logits_NC.dtype, torch.float32)
        weight_N = _weight_of_rows(weight_C.to(wide), labels_N)
        # The kernel divides by the number of rows. Classes may weigh nothing, all of a batch too.
        total = weight_N.sum()
        weight_N = weight_N * torch.where(total > 0, count / total, 0.0)
    # With its factor in the total the gradient of the forward pass is the final one, where the
    # division makes the incoming gradient 1.
    mean = kd_loss_mean(
        logits_NC,
        labels=labels_N,
        kd_weight=0.0,
        ce_weight=factor,
        label_smoothing=label_smoothing,
        ignore_index=NO_LABEL,
        class_dim=1,
        weights=weight_N,
    )
    return mean / factor


def weighted_mean(ce_N: Tensor, labels_N: Tensor, weight_C: Tensor) -> Tensor:
    """sum of w[label] * ce / sum of w[label] over the rows with a label, as in torch; 0 if none of
    them weighs anything.

    ce_N is 0 in rows without a label.
    """
    weight_N = _weight_of_rows(weight_C.to(ce_N.dtype), labels_N)
    total = weight_N.sum()
    return (weight_N * ce_N).sum() / total.clamp_min(torch.finfo(total.dtype).tiny)


def _weight_of_rows(weight_C: Tensor, labels_N: Tensor) -> Tensor:
    """w[label], and 0 in rows without a label."""
    # Few passes over the labels: -1 and below share the first weight. index_select takes a sixth of
    # the time of indexing.
    padded = F.pad(weight_C, (1, 0))
    return padded.index_select(0, labels_N.clamp(min=-1).flatten() + 1).view_as(labels_N)
