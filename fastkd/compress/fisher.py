"""Fisher potential: how much of the loss an untrained student's layers already move.

BlockSwap (Turner, Crowley, O'Boyle, Storkey, Gray 2020, arXiv 1906.04113), section 4.1; as computed
by BayesWatch/pytorch-blockswap models/blocks.py, MaskBlock._fisher, and model_generator.py:

    delta_c   = 1 / (2 N) * sum over n of (sum over pixels of a_nc * g_nc)^2
    potential = sum of delta_c over all channels of all blocks

a is the output of a block's last convolution, before the shortcut is added; g is the gradient of
the mean cross entropy of the batch. The network is in training mode, with its initial weights,
except that norms whose weights are all zero get ones: timm begins its residual branches so, and no
gradient would reach what is in them.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.compress.space import Pick, Space
from fastkd.models.blocks.layers import ResidualBlock
from fastkd.models.taps import logits_of

__all__ = ["fisher_potential", "sites_of"]


def sites_of(space: Space, pick: Pick, model: nn.Module) -> list[str]:
    """Paths of the modules whose outputs count: one for each part of a student.

    In a residual block of the zoo its last convolution; elsewhere the last slot of a residual
    block, or the block itself if it has none.
    """
    found: list[str] = []
    for stage, kept in zip(space.stages, pick, strict=True):
        for part in stage.parts[: len(kept)]:
            module = model.get_submodule(part.path)
            if isinstance(module, ResidualBlock):
                inside = [name for name, _ in module.named_children() if name.startswith("conv")]
                found.append(".".join([part.path, *inside[-1:]]))
            else:
                found.append(part.slots[-1].path if part.slots else part.path)
    return found


def fisher_potential(
    model: nn.Module, sites: Sequence[str], batches: Iterable[tuple[Tensor, Tensor]]
) -> float:
    """Mean over batches of (images [N, 3, H, W], class ids [N]) of the potential.

    The model is left in training mode, with running statistics that have moved and without
    norms of zeros.
    """
    model.train()
    _wake(model)
    total, number = 0.0, 0
    for images_NCHW, labels_N in batches:
        total += _of_batch(model, sites, images_NCHW, labels_N)
        number += 1
    model.zero_grad(set_to_none=True)
    return total / max(1, number)


def _wake(model: nn.Module) -> None:
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 1 and not weight.any():
            nn.init.ones_(weight)


def _of_batch(
    model: nn.Module, sites: Sequence[str], images_NCHW: Tensor, labels_N: Tensor
) -> float:
    deltas: list[Tensor] = []

    def catch(module: nn.Module, args: object, output: Tensor) -> None:
        # A copy: a later layer may overwrite it in place. The gradient is that of the value here.
        act_NCHW = output.detach().clone()

        def compare(grad_NCHW: Tensor) -> None:
            moved_NC = (act_NCHW * grad_NCHW).flatten(2).sum(2)
            deltas.append(moved_NC.double().square().sum() / (2 * len(moved_NC)))

        output.register_hook(compare)

    handles = [model.get_submodule(path).register_forward_hook(catch) for path in sites]
    try:
        with torch.enable_grad():
            F.cross_entropy(logits_of(model(images_NCHW)), labels_N).backward()
    finally:
        for handle in handles:
            handle.remove()
    return float(torch.stack(deltas).sum()) if deltas else 0.0
