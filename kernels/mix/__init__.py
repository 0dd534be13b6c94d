"""CutMix, mixup, cutout and normalisation of an image batch on its device, in one pass.

Formula, rounding and launches: README.md of this folder. `reference.py` says the same in plain
torch; `cpu.cpp` (through cpu.py) and `gpu.py` (Triton) are what runs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.kernels._library import Impl
from fastkd.kernels.mix.inputs import check_values, prepare
from fastkd.kernels.mix.op import implementation

__all__ = ["mix"]


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
        dtype: of the result, floating; None: the images' dtype, fp32 for uint8.
        memory_format: of the result; None: channels-last if the images are, else contiguous.
        impl: None picks by device; "reference", "cpp", "triton" force one.
        check: also look at the values of partner and lam; this waits for the device.

    Returns:
        The new batch, in memory of its own. Each operation is rounded to fp32 (fp64 where images or
        result are), the result once more to its dtype: all implementations give the same bits, and
        normalised images have torchvision's. Nothing waits for the device. A partner index out of
        range gives NaN on a GPU and raises on the CPU.
        Gradients flow to images, partners and lam: where one requires grad the reference runs.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; lam without a partner; a partner with
            neither boxes nor lam; an `impl` that cannot run this.
    """
    inputs = prepare(
        images,
        partner,
        boxes=boxes,
        lam=lam,
        mean=mean,
        std=std,
        dtype=dtype,
        memory_format=memory_format,
    )
    if check:
        check_values(inputs)
    return implementation(inputs, impl)(*inputs)
