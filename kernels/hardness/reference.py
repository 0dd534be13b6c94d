"""The slow honest version of `hardness` and `select_hardest`: plain torch, any device, any dtype.

    kl             sum_c p_t (log p_t - log p_s)     p = softmax(z / T); no T^2, no mean over rows
    entropy        - sum_c p log p                   p = softmax(z)
    cross_entropy  - log softmax(z)_y
    margin         max_{c != y} z_c - z_y

"Understanding the Success of Knowledge Distillation: A Data Augmentation Perspective", section 3.2
(TLCutMix+pick) and table 2: of a pool of augmented samples keep those on which teacher and student
differ most (T/S kld), or those with the highest entropy of the teacher or of the student.
It runs where no kernel does, and the kernels are tested against it in float64.
"""

import math

import torch
from torch import Tensor

__all__ = ["hardness_reference", "select_hardest_reference"]


def hardness_reference(
    logits_NC: Tensor,
    teacher_NC: Tensor | None,
    labels_N: Tensor | None,
    kind: str,
    temperature: float,
) -> Tensor:
    """Scores [N] of the op `_hardness`, see `Inputs`."""
    dtype = torch.promote_types(logits_NC.dtype, torch.float32)
    if teacher_NC is not None:
        dtype = torch.promote_types(dtype, teacher_NC.dtype)
    z_NC = logits_NC.detach().to(dtype)
    if kind == "kl":
        assert teacher_NC is not None
        log_p_s = (z_NC / temperature).log_softmax(-1)
        log_p_t = (teacher_NC.detach().to(dtype) / temperature).log_softmax(-1)
        p_t = log_p_t.exp()
        # 0 log 0 = 0; the sum may round below 0.
        return torch.where(p_t == 0, 0, p_t * (log_p_t - log_p_s)).sum(-1).clamp_min(0)
    if kind == "entropy":
        return torch.special.entr(z_NC.softmax(-1)).sum(-1)
    assert labels_N is not None
    is_class = (labels_N >= 0) & (labels_N < z_NC.shape[-1])
    y_N1 = torch.where(is_class, labels_N, 0).unsqueeze(-1)
    if kind == "cross_entropy":
        score_N1 = -z_NC.log_softmax(-1).gather(-1, y_N1)
    else:
        others = z_NC.scatter(-1, y_N1, -math.inf).amax(-1, keepdim=True)
        score_N1 = others - z_NC.gather(-1, y_N1)
    return torch.where(is_class, score_N1.squeeze(-1), math.nan)


def select_hardest_reference(scores_N: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(index [k] of the highest scores, number of NaN scores) of the op `_select_hardest`."""
    # Ascending order puts NaN last; a stable sort leaves ties in the order of their indices.
    index = (-scores_N.detach()).sort(stable=True).indices[:k]
    return index, scores_N.isnan().sum()
