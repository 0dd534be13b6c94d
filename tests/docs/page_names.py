"""The names that the Python of README and docs/ takes for granted."""

from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def network(width: int) -> nn.Module:
    """Somebody's network, with modules of the names that the pages tap."""

    def layer(ins: int) -> nn.Module:
        conv = nn.Conv2d(ins, width, 3, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())

    convs = {"layer1": layer(3), "layer2": layer(width), "layer3": layer(width)}
    head = {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(width, 4)}
    return nn.Sequential(OrderedDict(convs | head))


def names_of_pages() -> dict[str, Any]:
    """Networks, loaders and logits of four classes, the same in every call."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 4)
    return {
        "student": network(8),
        "teacher": network(16),
        "train_loader": DataLoader(data, batch_size=4),
        "val_loader": DataLoader(data, batch_size=4),
        "student_logits": torch.randn(8, 4, requires_grad=True),
        "teacher_logits": torch.randn(8, 4),
        "labels": torch.arange(8) % 4,
    }
