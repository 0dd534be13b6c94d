"""Parts of a teacher that some losses use: its classifier, the taps it pools, its last norm.

`fastkd.training.build` passes them on in a `BindContext`. SimKD and JointRD need them, always from
one network: an ensemble has no such parts.
"""

import copy

import torch
from torch import nn

from fastkd.models.taps import pooled_taps
from fastkd.teachers.loaded import LoadedNet

__all__ = ["copy_of_head", "last_linear", "last_norm", "taps_into_head"]


def last_linear(model: nn.Module) -> nn.Linear | None:
    """The linear layer registered last: the classifier in the zoo, timm and torchvision."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linears[-1] if linears else None


def copy_of_head(
    model: nn.Module, class_map: tuple[int, ...] | None, device: torch.device
) -> nn.Linear | None:
    """A copy of the last linear layer, its outputs in the class order of the data."""
    last = last_linear(model)
    if last is None:
        return None
    head = copy.deepcopy(last).to(device)
    if class_map is not None:
        rows = list(class_map)
        head.weight = nn.Parameter(head.weight[rows], requires_grad=False)
        if head.bias is not None:
            head.bias = nn.Parameter(head.bias[rows], requires_grad=False)
        head.out_features = len(rows)
    return head


def taps_into_head(
    net: LoadedNet, image_shape: tuple[int, int, int], device: torch.device
) -> tuple[str, ...]:
    """A teacher's taps that its classifier pools, found with two images of noise."""
    classifier = last_linear(net.model)
    if classifier is None:
        return ()
    shape = net.image_shape(image_shape)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    return pooled_taps(net.model, classifier, noise.to(device, classifier.weight.dtype))


def last_norm(model: nn.Module) -> nn.BatchNorm2d | None:
    """The last batch norm outside shortcuts, which every family calls downsample or shortcut."""
    norms = [
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        and not {"downsample", "shortcut"} & set(path.split("."))
    ]
    return norms[-1] if norms else None
