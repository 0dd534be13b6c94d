"""Exact accuracy on the validation images: every sample once, over all ranks."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.data.batch import Batch
from fastkd.distributed import World, all_reduce_sum
from fastkd.precision import Precision

__all__ = ["EvalLoader", "evaluate", "evaluating"]


class EvalLoader(Protocol):
    """This rank's share of the validation images."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Each sample exactly once over all ranks; a rank may get none."""
        ...


class evaluating:
    """Evaluation mode within the block; every module's own mode afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.modes = [(module, module.training) for module in model.modules()]
        self.model = model

    def __enter__(self) -> nn.Module:
        return self.model.eval()

    def __exit__(self, *exc: object) -> None:
        for module, training in self.modes:
            module.training = training


def evaluate(
    forward: Callable[[Tensor], Tensor], loader: EvalLoader, precision: Precision, world: World
) -> dict[str, float]:
    """Top-1 and top-5 accuracy (shares of 1), mean cross entropy, and the number of samples.

    forward: images [N, 3, H, W] -> logits [N, C], in evaluation mode already.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    with torch.no_grad():
        for batch in loader.epoch(0):
            with precision.autocast():
                logits_NC = forward(batch.images_NCHW.to(precision.dtype))
            logits_NC = logits_NC.float()
            top = logits_NC.topk(min(5, logits_NC.shape[1]), dim=1).indices
            hits = top == batch.labels_N[:, None]
            sums[0] += hits[:, 0].sum()
            sums[1] += hits.any(1).sum()
            sums[2] += F.cross_entropy(logits_NC, batch.labels_N, reduction="sum").double()
            sums[3] += len(batch.labels_N)
    if world.size > 1:
        all_reduce_sum(sums)
    correct, correct5, loss, count = sums.tolist()
    if not count:
        raise ValueError("there is no validation sample to evaluate on")
    return {
        "accuracy": correct / count,
        "top5": correct5 / count,
        "loss": loss / count,
        "samples": int(count),
    }
