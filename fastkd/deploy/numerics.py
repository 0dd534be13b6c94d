"""How far an exported network is from its source, on images.

The bound: 1e-4 of the largest |logit| in fp32, 1e-2 in fp16. Top-1 must be the same except for
ties: images (or pixels) whose two highest logits differ by less than that bound.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.config.section import Normalization
from fastkd.errors import RunFailed

__all__ = ["Comparison", "Meter", "on_noise"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found; differences are shares of the source's largest |logit|."""

    images: int
    max_difference: float
    mean_difference: float
    agreement: float | None
    """Share of equal top-1; None for embeddings."""
    unequal: int
    """Images, or pixels, with another top-1."""
    widest_tie: float
    """The largest distance of the two highest logits of the source among those, as a share."""

    def problem(self, bound: float) -> str | None:
        """Why this is not the same network, in words; None if it is."""
        # Not the other way round: NaN is never below.
        if not self.max_difference <= bound:
            return (
                f"its answers differ from the network's by up to {self.max_difference:.1e} of the "
                f"largest, and {bound:.0e} is allowed"
            )
        if self.widest_tie > bound:
            return (
                f"it gives another class {self.unequal} times, of which one is no tie: its two "
                f"highest logits differ by {self.widest_tie:.1e} of the largest"
            )
        return None


class Meter:
    """Compares answers batch by batch."""

    def __init__(self, *, classes: bool) -> None:
        self.classes = classes
        self.images = self.values = self.places = self.unequal = 0
        self.largest = self.most = self.sum = self.widest = 0.0

    def add(self, source: Tensor, exported: Tensor) -> None:
        """Answers to the same images, [N, ...]; classes in the second dimension."""
        if source.shape != exported.shape:
            raise RunFailed(
                f"the exported network answers {tuple(exported.shape)}, its source "
                f"{tuple(source.shape)}"
            )
        source, exported = source.double(), exported.double()
        apart = (source - exported).abs()
        self.images += len(source)
        self.values += apart.numel()
        self.largest = max(self.largest, source.abs().max().item())
        most = apart.max().item()
        # NaN stays.
        self.most = most if math.isnan(most) or most > self.most else self.most
        self.sum += apart.sum().item()
        if self.classes:
            self._add_top(source, exported)

    def _add_top(self, source: Tensor, exported: Tensor) -> None:
        unequal = source.argmax(1) != exported.argmax(1)
        self.places += unequal.numel()
        self.unequal += int(unequal.sum())
        if source.shape[1] > 1 and unequal.any():
            two = source.topk(2, dim=1).values
            gaps = (two[:, 0] - two[:, 1])[unequal]
            self.widest = max(self.widest, gaps.max().item())

    def result(self) -> Comparison:
        """Of all batches so far."""

        def share(value: float) -> float:
            if value == 0:
                return 0.0
            return value / self.largest if self.largest else float("inf")

        agreement = 1 - self.unequal / self.places if self.places else None
        mean = share(self.sum / max(self.values, 1))
        return Comparison(
            self.images, share(self.most), mean, agreement, self.unequal, share(self.widest)
        )


def on_noise(
    source: Callable[[Tensor], Tensor],
    exported: Callable[[Tensor], Tensor],
    shapes: Iterable[tuple[int, int, int, int]],
    *,
    classes: bool,
    inside: Normalization | None = None,
) -> Comparison:
    """Compare on normal noise of these shapes [N, 3, H, W], always the same.

    inside: (mean, std) that `exported` applies itself.
    """
    meter = Meter(classes=classes)
    generator = torch.Generator().manual_seed(0)
    mean, std = inside or ((0.0,) * 3, (1.0,) * 3)
    mean_3, std_3 = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    with torch.no_grad():
        for shape in shapes:
            images_NCHW = torch.randn(shape, generator=generator)
            meter.add(source(images_NCHW), exported(images_NCHW * std_3 + mean_3))
    return meter.result()
