"""`mix` as torch sees it: schema, shape without data, and what implements it.

The op has a leading underscore and no gradient: where one is asked for, the reference runs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastkd.kernels._library import LIBRARY, Impl, attach, choose
from fastkd.kernels.mix.inputs import Inputs
from fastkd.kernels.mix.reference import mix_reference

__all__ = ["implementation"]

# What the kernels read; all but the first is also what they write.
_DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)
# Triton takes a mean and a std per channel as arguments of the launch.
_TRITON_CHANNELS = 16

LIBRARY.define(
    "_mix(Tensor images, Tensor? index, Tensor? partners, Tensor? boxes, Tensor? lam, "
    "float[] mean, float[] std, ScalarType dtype, bool channels_last) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def implementation(inputs: Inputs, impl: Impl | None) -> Callable[..., Tensor]:
    """What mixes such inputs; it takes them one by one."""
    picked = choose("mix", inputs.images.device.type, impl)
    reason = _why_only_the_reference(inputs, picked)
    if reason is not None and impl not in (None, "reference"):
        raise ValueError(f"mix: impl={impl!r} {reason}; use None or 'reference'")
    if reason is not None or picked == "reference":
        return mix_reference
    if impl == "triton":
        # The launcher itself: CPU tensors reach it under Triton's interpreter.
        from fastkd.kernels.mix import gpu

        return gpu.mixed
    return torch.ops.fastkd._mix.default


def _why_only_the_reference(inputs: Inputs, picked: Impl) -> str | None:
    """What a kernel cannot do with these inputs, or None."""
    source, target = inputs.images.dtype, inputs.dtype
    if source not in _DTYPES or target not in _DTYPES:
        return f"turns uint8, fp32, bf16, fp16 into the last three, not {source} into {target}"
    if torch.is_grad_enabled():
        for x in (inputs.images, inputs.partners, inputs.lam):
            if x is not None and x.requires_grad:
                return "has no gradient, which an input requires"
    if picked == "triton" and len(inputs.mean) > _TRITON_CHANNELS:
        return f"normalises up to {_TRITON_CHANNELS} channels, not {len(inputs.mean)}"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "cannot run under torch.func"
    return None


@torch.library.register_fake("fastkd::_mix", lib=LIBRARY)
def _fake(images, index, partners, boxes, lam, mean, std, dtype, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(images.shape, dtype=dtype, device=images.device, memory_format=layout)


attach("mix", "mix", {"mixed": "_mix"})
