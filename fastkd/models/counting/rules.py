"""How each paper counts parameters and operations, by name, for `count(model, shape, rule=NAME)`.

kdda             "Understanding the success of knowledge distillation: a data augmentation
                 perspective": tables 6, 7, 8. Parameters of convolutions and linear layers only.
                 MACs, but a grouped convolution's are divided by its groups once more, a
                 mistake of its counter. It prints FLOPs, two per MAC.
demystification  Jha, Saini, Mittal 2020 (arXiv 2006.16589): tables 8, 9. MACs, one operation for
                 each bias of the classifier, one for each output of the average pooling.
moonshine        Crowley, Gray, Storkey 2018 (arXiv 1711.02613): tables 2, 3, 4. MACs, one operation
                 for each bias of the classifier and each output of a ReLU, those inside a cheap
                 block excepted; on ImageNet also one for each pixel under a pooling window. In
                 ERFNet neither ReLUs nor biases nor pooling count, and a transposed convolution
                 counts as if it ran on its output pixels. Defined for these networks only.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn

from fastkd.errors import UserError
from fastkd.models.blocks.layers import Bottleneck, GroupedPointwise
from fastkd.models.card import title_of
from fastkd.models.zoo.erfnet import ERFNet, ERFNetEncoder
from fastkd.models.zoo.resnet18 import ResNet18
from fastkd.models.zoo.wrn import WideResNet

__all__ = ["PLAIN", "RULES", "Rule", "rule_for"]

aten = torch.ops.aten
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What counts in addition to, or instead of, the multiply-accumulates that torch counts."""

    formulas: Mapping[Any, Callable[..., int]] = field(default_factory=dict)
    """Operator -> twice its operations, from the shapes of its arguments and `out_shape`."""
    conv_linear_only: bool = False
    """Parameters of other layers do not count."""
    skip_relu_in: tuple[type[nn.Module], ...] = ()
    """Modules in which ReLUs do not count."""

    def total(self, model: nn.Module, counts: Mapping[str, Mapping[Any, int]]) -> int:
        """Twice the operations, from what the counter found by module path and operator."""
        skipped = sum(
            counts.get(f"{type(model).__name__}.{path}", {}).get(aten.relu, 0)
            for path, module in model.named_modules()
            if isinstance(module, self.skip_relu_in)
        )
        return sum(counts.get("Global", {}).values()) - skipped


PLAIN = Rule()


def rule_for(name: str, model: nn.Module) -> Rule:
    """The rule of a paper for a network. Raises UserError as `count` says."""
    if name not in RULES:
        near = difflib.get_close_matches(name, RULES, n=1, cutoff=0.5)
        hint = f"; nearest: {near[0]}" if near else ""
        raise UserError(f"there is no counting rule {name!r}{hint}. Rules: {', '.join(RULES)}")
    return RULES[name](model)


def _kdda(model: nn.Module) -> Rule:
    return Rule(formulas={aten.convolution: _conv_divided_by_groups}, conv_linear_only=True)


def _demystification(model: nn.Module) -> Rule:
    return Rule(formulas={aten.addmm: _linear_with_bias, aten.mean: _outputs})


def _moonshine(model: nn.Module) -> Rule:
    if isinstance(model, ERFNet | ERFNetEncoder):
        return Rule(formulas={aten.convolution: _conv_on_output_pixels})
    formulas = {aten.addmm: _linear_with_bias, aten.relu: _outputs}
    cheap = (GroupedPointwise, Bottleneck)
    if isinstance(model, WideResNet):
        return Rule(formulas=formulas, skip_relu_in=cheap)
    if isinstance(model, ResNet18) and isinstance(model.maxpool, nn.MaxPool2d):
        pools = {aten.max_pool2d_with_indices: _max_pool, aten.mean: _average}
        return Rule(formulas=formulas | pools, skip_relu_in=cheap)
    raise UserError(
        f"the rule 'moonshine' is not defined for {title_of(model)}, only for wrn_D_W, for "
        "resnet18 and resnet34 with stem='imagenet', and for erfnet and erfnet_encoder"
    )


RULES: Mapping[str, Callable[[nn.Module], Rule]] = {
    "moonshine": _moonshine,
    "demystification": _demystification,
    "kdda": _kdda,
}


def _conv_macs(x: Shape, weight: Shape, out: Shape, transposed: bool) -> int:
    return x[0] * prod(weight) * prod((x if transposed else out)[2:])


def _conv_divided_by_groups(x: Shape, weight: Shape, *args: Any, out_shape: Shape) -> int:
    *_, transposed, _, groups = args
    return 2 * _conv_macs(x, weight, out_shape, transposed) // groups


def _conv_on_output_pixels(x: Shape, weight: Shape, *args: Any, out_shape: Shape) -> int:
    return 2 * _conv_macs(x, weight, out_shape, transposed=False)


def _linear_with_bias(bias: Shape, x: Shape, weight: Shape, *, out_shape: Shape) -> int:
    return 2 * (prod(x) * weight[1] + prod(out_shape))


def _outputs(x: Shape, *args: Any, out_shape: Shape) -> int:
    return 2 * prod(out_shape)


def _max_pool(x: Shape, kernel: Any, *args: Any, out_shape: Any) -> int:
    return 2 * prod(out_shape[0]) * prod(kernel)


def _average(x: Shape, *args: Any, out_shape: Shape) -> int:
    return 2 * prod(x)
