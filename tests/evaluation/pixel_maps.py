"""Logits and label maps for tests of the evaluation, and a loader that hands them out."""

import torch

from fastkd.data.batch import NO_LABEL, Batch

__all__ = ["Maps", "as_it_is", "example"]


def example(num=7, classes=5, ignored=0.2, size=(6, 9), seed=0):
    """Logits, and label maps that they fit better than chance does."""
    generator = torch.Generator().manual_seed(seed)
    logits_NCHW = torch.randn(num, classes, *size, generator=generator)
    labels_NHW = (2 * logits_NCHW + torch.randn(logits_NCHW.shape, generator=generator)).argmax(1)
    labels_NHW[torch.rand(labels_NHW.shape, generator=generator) < ignored] = NO_LABEL
    return logits_NCHW, labels_NHW


class Maps:
    """A loader whose images are the logits themselves: this rank's part of every batch."""

    def __init__(self, logits_NCHW, labels_NHW, batch_size=3, rank=0, size=1):
        self.batches = []
        for logits, labels in zip(
            logits_NCHW.split(batch_size), labels_NHW.split(batch_size), strict=True
        ):
            own = slice(rank * len(labels) // size, (rank + 1) * len(labels) // size)
            if len(labels[own]):
                self.batches.append(Batch(logits[own], labels[own], torch.zeros(0)))

    def epoch(self, epoch, start_step=0):
        return iter(self.batches)


def as_it_is(images):
    return images
