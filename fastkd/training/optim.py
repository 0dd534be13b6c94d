"""Optimizers by name, built so that a bad step can be skipped without a host synchronisation.

Flow: recipe -> `build_optimizer` -> `guard.Guard` steps it; `set_lr` applies the schedule.

torch's SGD, Adam and AdamW run fused: those kernels read `optimizer.found_inf` on the device and
leave everything alone where it is 1, so no step needs a host synchronisation. Two properties of the
fused kernels are handled here, both found by test (torch 2.15): SGD allocates its momentum
uninitialised in its first step, which leaves garbage when that step is skipped, and breaks when a
parameter gets its first gradient later than the others; on a CPU the kernels walk raw memory, so a
state restored into a parameter of another memory order silently gives wrong numbers (gradients
always have their parameter's order: autograd ensures that).

Weight decay applies to every parameter, batch norm and biases included, because the reproduced
papers do so; a group with its own `weight_decay` overrides it, and `spare_norms` makes
such groups for norms and biases. LAMB is timm's, which always clips to a global gradient norm of
1. apex is opt-in by name, never chosen silently.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from fastkd.errors import UserError
from fastkd.training.config import OptimConfig, OptimizerName

__all__ = [
    "apex_missing",
    "build_optimizer",
    "set_lr",
    "skip_aware",
    "spare_norms",
]

# Every `OptimizerName` but lamb, which torch does not have (timm's is used).
_TORCH_CLASS: dict[OptimizerName, Callable[..., Optimizer]] = {
    "sgd": SGD,
    "adam": Adam,
    "adamw": AdamW,
}
_APEX_CLASS = {
    "sgd": "FusedSGD",
    "adam": "FusedAdam",
    "adamw": "FusedAdam",
    "lamb": "FusedLAMB",
}
_APEX_HELP = (
    "NVIDIA apex is built from source (github.com/NVIDIA/apex, with APEX_CPP_EXT=1 "
    "APEX_CUDA_EXT=1 and --no-build-isolation) or comes with NVIDIA's PyTorch containers; the "
    "package called apex on PyPI is an unrelated project. optim.impl=torch needs nothing"
)


def build_optimizer(
    named_groups: Sequence[Mapping[str, Any]],
    config: OptimConfig,
    device: torch.device | str = "cpu",
) -> Optimizer:
    """The optimizer of a run; parameters that need no gradient are left out.

    `named_groups` are mappings with `params`, and optionally `lr_scale` (the group's learning rate
    is lr * lr_scale; 1 by default), `weight_decay` and a `name` for reports. Each group keeps its
    unscheduled rate as `base_lr`. `momentum` and `nesterov` belong to SGD; Adam, AdamW and LAMB run
    with betas (0.9, 0.999). Adam adds the weight decay to the gradient, AdamW does not.

    Raises:
        UserError: nothing to train; nesterov without momentum; apex requested but not usable, or
            with bfloat16 parameters, which its FusedSGD silently skips.
    """
    if config.name == "sgd" and config.nesterov and config.momentum <= 0:
        raise UserError(f"nesterov needs a momentum above 0, got optim.momentum={config.momentum}")
    groups = _with_rates(named_groups, config.lr)
    if not groups:
        raise UserError("there is nothing to train: no parameter requires a gradient")
    device = torch.device(device)
    if config.impl == "apex":
        return _apex_class(config.name, groups, device)(groups, **_options(config))
    if config.name == "lamb":
        from timm.optim.lamb import Lamb

        return Lamb(groups, **_options(config))
    fused = device.type in ("cpu", "cuda") and all(
        parameter.is_floating_point() for group in groups for parameter in group["params"]
    )
    optimizer = _TORCH_CLASS[config.name](groups, **_options(config), fused=fused)
    if fused:
        _prepare_fused_steps(optimizer)
    return optimizer


def spare_norms(
    named_groups: Sequence[Mapping[str, Any]], student: nn.Module
) -> list[dict[str, Any]]:
    """The groups, with parameters of at most one dimension moved to groups without weight decay.

    These are the scales and shifts of norms and all biases, and also what a timm network names in
    `no_weight_decay()`, such as position embeddings. This is timm's rule for its own training
    (`param_groups_weight_decay`). Groups with their own weight decay are unchanged.
    """
    exempt: Any = getattr(student, "no_weight_decay", set)
    names = exempt()
    named = {id(parameter) for name, parameter in student.named_parameters() if name in names}
    groups: list[dict[str, Any]] = []
    for group in named_groups:
        if group.get("weight_decay") is not None:
            groups.append(dict(group))
            continue
        parameters = list(group["params"])
        spared = [p for p in parameters if p.ndim <= 1 or id(p) in named]
        kept = [p for p in parameters if not (p.ndim <= 1 or id(p) in named)]
        groups += [{**group, "params": kept}, {**group, "params": spared, "weight_decay": 0.0}]
    return groups


def set_lr(optimizer: Optimizer, factor: float, momentum: float | None = None) -> None:
    """Set every group to `factor` times its base rate; `momentum` also replaces Adam's beta1."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
        if momentum is None:
            continue
        if "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])
        else:
            group["momentum"] = momentum


def skip_aware(optimizer: Optimizer) -> bool:
    """Whether a step does nothing if the 0-dim device tensor `optimizer.found_inf` is 1."""
    return getattr(optimizer, "_step_supports_amp_scaling", False) and all(
        group.get("fused") for group in optimizer.param_groups
    )


def apex_missing(class_name: str = "FusedSGD") -> str | None:
    """Why apex's fused optimizer cannot be used here, or None if it can.

    Checks the capability: apex reports version 0.1 whatever it contains, and a Python-only
    build imports but cannot step.
    """
    try:
        optimizers = importlib.import_module("apex.optimizers")
        applier = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    except (Exception, SystemExit) as error:  # a broken build may raise anything when imported
        return f"apex.optimizers cannot be imported ({type(error).__name__}: {error})"
    if not hasattr(optimizers, class_name):
        return f"this apex has no {class_name}"
    if not applier.available:
        return "this apex was built without its CUDA extensions"
    if not torch.cuda.is_available():
        return "apex needs a CUDA device and torch sees none"
    return None


def _with_rates(named_groups: Sequence[Mapping[str, Any]], lr: float) -> list[dict[str, Any]]:
    groups = []
    for named_group in named_groups:
        group = dict(named_group)
        group["params"] = [p for p in group["params"] if p.requires_grad]
        group["base_lr"] = group["lr"] = lr * group.pop("lr_scale", 1.0)
        if group.get("weight_decay", 0.0) is None:
            del group["weight_decay"]
        if group["params"]:
            groups.append(group)
    return groups


def _options(config: OptimConfig) -> dict[str, Any]:
    """Keyword arguments of the update rule, the same in torch, timm and apex."""
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "sgd":
        options |= {"momentum": config.momentum, "nesterov": config.nesterov}
    if config.name in ("adam", "adamw") and config.impl == "apex":
        options["adam_w_mode"] = config.name == "adamw"
    return options


def _apex_class(name: OptimizerName, groups: list[dict[str, Any]], device: torch.device) -> Any:
    """apex's class for this update rule; UserError if it cannot be used."""
    class_name = _APEX_CLASS[name]
    if (missing := apex_missing(class_name)) is not None:
        raise UserError(f"optim.impl=apex cannot be used: {missing}. {_APEX_HELP}")
    if device.type != "cuda":
        raise UserError(f"optim.impl=apex runs on CUDA devices only, got {device.type}")
    if any(one.dtype == torch.bfloat16 for group in groups for one in group["params"]):
        raise UserError(
            f"apex's {class_name} does not handle bfloat16 parameters (FusedSGD silently "
            "skips them); keep fp32 parameters under autocast, or optim.impl=torch"
        )
    return getattr(importlib.import_module("apex.optimizers"), class_name)


def _prepare_fused_steps(optimizer: Optimizer) -> None:
    """Give each parameter, before its first step, zero momentum and state in its memory order."""
    prepared: set[int] = set()

    def prepare(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in prepared or parameter.grad is None:
                    continue
                prepared.add(id(parameter))
                state = optimizer.state[parameter]
                if group.get("momentum") and state.get("momentum_buffer") is None:
                    # Equal to torch's own first step: momentum * 0 + gradient, without dampening.
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                for key, value in state.items():
                    if value.dim() == parameter.dim():
                        state[key] = _in_order_of(parameter, value)

    optimizer.register_step_pre_hook(prepare)
    optimizer.register_load_state_dict_post_hook(lambda _: prepared.clear())


def _in_order_of(parameter: Tensor, value: Tensor) -> Tensor:
    sizes_and_strides = zip(parameter.shape, parameter.stride(), value.stride(), strict=True)
    # The stride of a dimension of one element means nothing: 1x1 convolutions often differ there.
    if all(size == 1 or ours == theirs for size, ours, theirs in sizes_and_strides):
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
