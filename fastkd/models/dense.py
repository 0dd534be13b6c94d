"""Logits of every pixel: how they are brought to the size of the labels."""

from torch import Tensor
from torch.nn import functional as F

__all__ = ["logits_at"]


def logits_at(logits_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits [N, C, h, w] at another height and width; those that have it are returned as they are.

    The one rule of fastkd, for students and teachers, in training and evaluation: bilinear between
    the centres of pixels (align_corners=False), as torchvision's own segmentation networks end.
    Labels are never resized to fit logits.
    """
    if logits_NCHW.shape[2:] == size:
        return logits_NCHW
    return F.interpolate(logits_NCHW, size, mode="bilinear", align_corners=False)
