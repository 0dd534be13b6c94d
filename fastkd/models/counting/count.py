"""Parameters, multiply-accumulates and activation memory of any network, counted by torch.

Used by the report, by `fastkd models` and for comparing a student with its teacher.
One multiply-accumulate is one multiplication with its addition; biases, batch norm, activations,
pooling and additions count nothing. Each paper has its own variant:
`counting.rules`.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastkd.errors import UserError
from fastkd.models.counting.rules import PLAIN, rule_for
from fastkd.models.intake import is_compiled_ahead, is_quantised
from fastkd.models.taps import check_network

__all__ = ["Count", "cost", "count"]


@dataclass(frozen=True, slots=True)
class Count:
    """Size and cost of a network; `str()` gives one readable line."""

    params: int
    """All parameters; shared ones count once."""
    params_conv_linear: int
    """Weights and biases of convolutions and linear layers only."""
    macs: int
    """Multiply-accumulates of the forward pass of one image."""
    training_bytes: int
    """Activations of one image that a forward pass keeps for the backward pass, and its output."""
    inference_bytes: int
    """Activations of one image that exist at once in a forward pass, at its peak."""

    def __str__(self) -> str:
        return (
            f"{self.params:,} parameters ({self.params_conv_linear:,} in convolutions and linear "
            f"layers), {_short(self.macs)} multiply-accumulates per image, "
            f"{_short(self.training_bytes)}B of activations per image in training, "
            f"{_short(self.inference_bytes)}B in inference"
        )


def count(
    model: nn.Module, input_shape: Sequence[int] = (3, 32, 32), *, rule: str | None = None
) -> Count:
    """Count by two forward passes of a zero image of `input_shape` (C, H, W) in evaluation mode.

    rule: `moonshine`, `demystification` or `kdda`: `params` and `macs` are then counted as in that
        paper's tables (`fastkd.models.counting.rules`). None: all parameters, true MACs.

    The passes run eagerly on the model's device, the second with gradients, as if every parameter
    were trained. The memory covers tensors, but not the workspace of an algorithm or
    dropout masks; it differs a little between devices, whose operators keep different
    statistics. The training flag of every submodule is restored afterwards and running statistics
    do not change. An error of the network (an image too small, a wrong number of channels) is
    passed on. Raises UserError for an unknown rule, for `moonshine` on a network for which
    it was not defined, and for channels at the end of `input_shape`.
    """
    # Imported here because this module of torch imports Triton if it is installed.
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    check_network("count", model)
    counting = PLAIN if rule is None else rule_for(rule, model)
    first = next(model.parameters(), None)
    image: dict[str, Any] = {
        "size": (1, *input_shape),
        "device": None if first is None else first.device,
        "dtype": None if first is None or not first.is_floating_point() else first.dtype,
    }
    modes = {module: module.training for module in model.modules()}
    # Attention's fused inference path is one operator that the counter does not know.
    fast_attention = torch.backends.mha.get_fastpath_enabled()

    def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any) -> int:
        return sdpa_flop_count(query, key, value)

    # torch's counter knows the fused attention of GPUs only.
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    counter = FlopCounterMode(display=False, custom_mapping=on_cpu | dict(counting.formulas))
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        with torch.no_grad(), counter, _LiveBytes(model) as inference:
            model(torch.zeros(**image))
        trained = {
            name: parameter.detach().requires_grad_(parameter.is_floating_point())
            for name, parameter in model.named_parameters()
        }
        with torch.enable_grad(), _LiveBytes(model) as training:
            output = functional_call(model, trained, (torch.zeros(**image),))
            training_bytes = training.now
            del output
    except RuntimeError as error:
        _refuse_channels_last(model, input_shape, error)
        raise
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
        for module, flag in modes.items():
            module.training = flag
    conv_linear = {
        parameter
        for module in model.modules()
        if isinstance(module, (_ConvNd, nn.Linear))
        for parameter in module.parameters(recurse=False)
    }
    params_conv_linear = sum(parameter.numel() for parameter in conv_linear)
    params = sum(parameter.numel() for parameter in model.parameters())
    return Count(
        params=params_conv_linear if counting.conv_linear_only else params,
        params_conv_linear=params_conv_linear,
        macs=counting.total(model, counter.get_flop_counts()) // 2,
        training_bytes=training_bytes,
        inference_bytes=inference.peak,
    )


def cost(model: nn.Module, input_shape: Sequence[int]) -> Count | None:
    """`count` for a table or a guess, which must not end a run: None if there is no telling.

    That is a network that fails on such images, one in TorchScript or exported, whose operators
    are hidden, and a quantised one, whose products are not counted.
    """
    if is_compiled_ahead(model) or is_quantised(model):
        return None
    try:
        return count(model, input_shape)
    except Exception:
        # Foreign code can fail in any way; the trial of the run says what is wrong.
        return None


def _refuse_channels_last(
    model: nn.Module, input_shape: Sequence[int], error: RuntimeError
) -> None:
    """UserError if the shape has its channels last and the network expects them first."""
    conv = next((one for one in model.modules() if isinstance(one, nn.Conv2d)), None)
    if conv is None or len(input_shape) != 3 or input_shape[0] == conv.in_channels:
        return
    height, width, channels = input_shape
    if channels == conv.in_channels:
        raise UserError(
            f"count: got input_shape={tuple(input_shape)}; expected the channels first, "
            f"{(channels, height, width)}"
        ) from error


class _LiveBytes(TorchDispatchMode):
    """Memory of live tensors made by operators, without the tensors of `model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        own: list[Tensor] = [*model.parameters(), *model.buffers()]
        self._known = {tensor.untyped_storage()._cdata for tensor in own}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            # A view, or the result of an in-place operator, uses memory that is already counted.
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _short(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return str(number)
