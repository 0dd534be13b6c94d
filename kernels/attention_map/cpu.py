"""`attention_map` and its loss on CPU tensors through the C++ core: arguments and calls.

Serves the three ops of this folder under the dispatcher's CPU key. Packed arguments:
`AttentionFeatures` in cpu.cpp and `AttentionMaps` in compare.h.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.kernels._library import STORAGE, Arguments, entry_point
from fastkd.kernels.attention_map.inputs import Strides, gradient_like, readable

__all__ = ["energy", "energy_grad", "loss"]

_FEATURES = Arguments(
    features="P",
    coefficients="P",
    out="P",
    samples="q",
    channels="q",
    height="q",
    width="q",
    window_h="q",
    window_w="q",
    stride="4q",
    out_stride="4q",
    type="q",
    power="q",
    threads="q",
    scale="d",
)
_MAPS = Arguments(
    student="P",
    teacher="P",
    coefficients="P",
    rows="P",
    loss="P",
    samples="q",
    pixels="q",
    wide="q",
    distance="q",
    threads="q",
    eps="d",
)


def energy(
    features_NCHW: Tensor, power: int, window: Sequence[int], isa: str | None = None
) -> Tensor:
    """Mean over channels of |window average|^power: [N, pixels of the map], fp32 or fp64."""
    num, _, height, width = features_NCHW.shape
    wide = torch.float64 if features_NCHW.dtype == torch.float64 else torch.float32
    out_NP = features_NCHW.new_empty(num, height * width // math.prod(window), dtype=wide)
    features_NCHW, strides = readable(features_NCHW)
    _walk("attention_energy", features_NCHW, strides, power, window, out_NP, isa=isa)
    return out_NP


def energy_grad(
    features_NCHW: Tensor,
    coefficients_NP: Tensor,
    upstream: Tensor | None,
    power: int,
    window: Sequence[int],
    isa: str | None = None,
) -> Tensor:
    """Gradient of `upstream * sum(coefficients * energy)` in the features' dtype and layout."""
    read_NCHW, strides = readable(features_NCHW)
    grad_NCHW, target_NCHW, out_strides = gradient_like(features_NCHW, strides)
    # Reading the scale costs nothing on the CPU.
    scale = 1.0 if upstream is None else upstream.item()
    scale /= features_NCHW.shape[1] * math.prod(window)
    _walk(
        "attention_gradient",
        read_NCHW,
        strides,
        power,
        window,
        target_NCHW,
        out_strides,
        coefficients_NP.contiguous(),
        scale,
        isa,
    )
    return grad_NCHW if target_NCHW is grad_NCHW else grad_NCHW.copy_(target_NCHW)


def loss(
    student_NCHW: Tensor,
    teacher_NCHW: Tensor,
    power: int,
    student_window: Sequence[int],
    teacher_window: Sequence[int],
    eps: float,
    distance: bool,
    isa: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its derivative at the student's energies, the teacher's energies [N, pixels]."""
    student_NP = energy(student_NCHW, power, student_window, isa)
    teacher_NP = energy(teacher_NCHW, power, teacher_window, isa)
    coefficients_NP, value = torch.empty_like(student_NP), student_NP.new_empty(())
    rows_N = student_NP.new_empty(student_NP.shape[0], dtype=torch.float64)
    packed = _MAPS.pack(
        student=student_NP,
        teacher=teacher_NP,
        coefficients=coefficients_NP,
        rows=rows_N,
        loss=value,
        samples=student_NP.shape[0],
        pixels=student_NP.shape[1],
        wide=student_NP.dtype == torch.float64,
        distance=distance,
        threads=torch.get_num_threads(),
        eps=eps,
    )
    entry_point("attention_compare", _MAPS, isa)(packed)
    return value, coefficients_NP, teacher_NP


def _walk(
    name: str,
    features_NCHW: Tensor,
    strides: Strides,
    power: int,
    window: Sequence[int],
    out: Tensor,
    out_strides: Strides | None = None,
    coefficients_NP: Tensor | None = None,
    scale: float = 1.0,
    isa: str | None = None,
) -> None:
    """One pass over the features. `isa` picks a clone, for benchmarks and tests."""
    num, channels, height, width = features_NCHW.shape
    if num == 0:
        return
    if math.prod(window) == 1:
        # Without pooling the map is one long row.
        height, width = 1, height * width
    packed = _FEATURES.pack(
        features=features_NCHW,
        coefficients=coefficients_NP,
        out=out,
        samples=num,
        channels=channels,
        height=height // window[0],
        width=width // window[1],
        window_h=window[0],
        window_w=window[1],
        stride=_steps(strides, width),
        out_stride=_steps(out_strides or strides, width),
        type=STORAGE[features_NCHW.dtype],
        power=power,
        threads=torch.get_num_threads(),
        scale=scale,
    )
    code = entry_point(name, _FEATURES, isa)(packed)
    if code < 0:
        raise MemoryError(f"attention_map: no memory for the scratch of {channels} channels")


def _steps(strides: Strides, width: int) -> list[int]:
    """Strides of sample, channel, row and pixel."""
    return [strides.sample, strides.channel, width * strides.pixel, strides.pixel]
