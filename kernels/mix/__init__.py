"""CutMix, mixup, cutout and normalisation of an image batch on its device, in one pass.

Formula, rounding and launches: README.md of this folder. `reference.py` says the same in plain
torch, `cpu.cpp` (through cpu.py) and `gpu.py` (Triton) are what runs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from fastkd.kernels._library import (
    LIBRARY,
    Core,
    Impl,
    choose,
    core,
    deferred,
    register,
    triton_reason,
)
from fastkd.kernels.mix.inputs import check as check_inputs
from fastkd.kernels.mix.inputs import check_values, is_channels_last
from fastkd.kernels.mix.reference import mix_reference
from torch import Tensor

__all__ = ["mix"]

# What the kernels read; all but the first is also what they write.
_DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)
# Triton gets a mean and a std per channel as arguments of the launch.
_TRITON_CHANNELS = 16


def mix(
    images: Tensor,
    partner: Tensor | None = None,
    *,
    boxes: Tensor | None = None,
    lam: Tensor | float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    impl: Impl | None = None,
    check: bool = False,
) -> Tensor:
    """A new batch: inside its box `lam * image + (1 - lam) * partner`, outside the image.

        mix(x, partner, boxes=boxes)    CutMix (Yun et al. 2019, arXiv:1905.04899)
        mix(x, partner, lam=lam)        mixup (Zhang et al. 2018, arXiv:1710.09412)
        mix(x, boxes=boxes)             Cutout (DeVries and Taylor 2017, arXiv:1708.04552)
        mix(x, mean=mean, std=std)      normalisation alone

    Args:
        images: [N, C, H, W], uint8 (then scaled to 0..1) or floating; any strides, and dense ones,
            channels-last too, are read in place.
        partner: indices into `images` [N] (int64 or int32), or images like `images`; None: zero,
            which is the mean colour of normalised images.
        boxes: half-open [y0, y1, x0, x1] in pixels, int64 or int32, [4] for the batch or [N, 4];
            clipped to the image, may be empty; None: the whole image.
        lam: share of the image itself inside the box, a number or a floating tensor [] or [N];
            None: 0.
        mean, std: per channel, in units of 0..1, applied to images and partners before they are
            mixed; None: not normalised.
        dtype: floating, of the result; None: that of the images, fp32 for uint8.
        memory_format: of the result; None: channels-last if the images are, else contiguous.
        impl: None picks by device; "reference", "cpp", "triton" force one.
        check: also look at the values of partner and lam; this waits for the device.

    Returns:
        The new batch, in memory of its own. Each operation is rounded to fp32 (fp64 where images or
        result are), the result once more to its dtype: all implementations give the same bits, and
        those of normalised images are torchvision's. Nothing waits for the device. A partner index
        that is no image gives NaN on a GPU and raises on the CPU.
        Gradients flow to images, partners and lam: where one requires grad the reference runs.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; lam without a partner; a partner with
            neither boxes nor lam; an `impl` that cannot run this.
    """
    by_index = partner is not None and partner.dim() == 1
    index, partners = (partner, None) if by_index else (None, partner)
    if dtype is None:
        dtype = images.dtype if images.is_floating_point() else torch.float32
    check_inputs(images, index, partners, boxes, lam, mean, std, dtype, memory_format)
    if check:
        check_values(index, lam, len(images))
    if lam is not None and not isinstance(lam, Tensor):
        # Filled on the device: torch.tensor would copy from the host and wait.
        lam = torch.full((), lam, dtype=torch.float64, device=images.device)
    if memory_format is None:
        channels_last = is_channels_last(images)
    else:
        channels_last = memory_format == torch.channels_last
    arguments: tuple[Any, ...] = (
        *(images, index, partners, boxes, lam),
        *([float(value) for value in values or ()] for values in (mean, std)),
        *(dtype, channels_last),
    )
    picked = choose("mix", images.device.type, impl)
    reason = _only_reference(images, partners, lam, mean, dtype, picked)
    if reason is not None and impl not in (None, "reference"):
        raise ValueError(f"mix: impl={impl!r} {reason}; use None or 'reference'")
    if reason is not None or picked == "reference":
        return mix_reference(*arguments)
    if impl == "triton":
        from fastkd.kernels.mix import gpu

        return gpu.mixed(*arguments)
    return torch.ops.fastkd._mix.default(*arguments)


def _only_reference(
    images: Tensor,
    partners: Tensor | None,
    lam: Tensor | None,
    mean: Sequence[float] | None,
    dtype: torch.dtype,
    picked: Impl,
) -> str | None:
    """What the kernels cannot do of what is asked, or None."""
    if images.dtype not in _DTYPES or dtype not in _DTYPES:
        return f"turns uint8, fp32, bf16, fp16 into the last three, not {images.dtype} into {dtype}"
    if torch.is_grad_enabled():
        for x in (images, partners, lam):
            if x is not None and x.requires_grad:
                return "has no gradient, which an input requires"
    if picked == "triton" and mean is not None and len(mean) > _TRITON_CHANNELS:
        return f"normalises up to {_TRITON_CHANNELS} channels, not {len(mean)}"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "cannot run under torch.func"
    return None


LIBRARY.define(
    "_mix(Tensor images, Tensor? index, Tensor? partners, Tensor? boxes, Tensor? lam, "
    "float[] mean, float[] std, ScalarType dtype, bool channels_last) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("fastkd::_mix", lib=LIBRARY)
def _fake(images, index, partners, boxes, lam, mean, std, dtype, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(images.shape, dtype=dtype, device=images.device, memory_format=layout)


def _register() -> None:
    backends: dict[str, Impl] = {}
    if isinstance(core(), Core):
        from fastkd.kernels.mix import cpu

        LIBRARY.impl("_mix", cpu.mixed, "CPU")
        backends["cpu"] = "cpp"
    if triton_reason() is None:
        LIBRARY.impl("_mix", deferred("fastkd.kernels.mix.gpu", "mixed"), "CUDA")
        backends["cuda"] = "triton"
    register("mix", backends)


_register()
