"""The operations of the policies, on whole batches with a magnitude for each image.

Each takes uint8 images [B, 3, H, W] and float64 magnitudes [B] on one device and returns new uint8
images. The pixels are those of torchvision.transforms.v2.functional with the same magnitude, which
takes one magnitude for a whole batch and so would need a call for every image. Two differ: `blur`
has a sigma per image, and geometric operations, whose source pixels are computed for a batch, may
differ at ties between two pixels.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["IDENTITY", "LARGEST_SIGMA", "OPERATIONS", "Resampling"]


class Resampling(NamedTuple):
    """How geometric operations read between and beyond pixels."""

    mode: str = "nearest"
    """"nearest" or "bilinear"."""
    fill: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Colour beyond the edge, 0 to 255."""


Operation = Callable[[Tensor, Tensor, Resampling], Tensor]
_Row = tuple[Tensor | float, Tensor | float, Tensor | float]
_Rows = tuple[_Row, _Row]
"""The two rows of an affine map, each entry for all images or one for each of them [B]."""

_LARGEST = 255
_LUMA = (0.2989, 0.587, 0.114)
LARGEST_SIGMA = 2.0
"""Of `blur`, in pixels."""


def _column(values_B: Tensor) -> Tensor:
    """One number per image, float32 [B, 1, 1, 1]."""
    return values_B.float().view(-1, 1, 1, 1)


def _pixels(wide_BCHW: Tensor) -> Tensor:
    return wide_BCHW.clamp_(0, _LARGEST).to(torch.uint8)


def _grey(images_BCHW: Tensor) -> Tensor:
    red, green, blue = images_BCHW.float().unbind(1)
    luma = red.mul(_LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
    return luma.floor_().unsqueeze(1)


def _blend(images_BCHW: Tensor, other: Tensor | None, factor_B: Tensor) -> Tensor:
    """factor * image + (1 - factor) * other; None is black."""
    wide_BCHW = images_BCHW.float() * _column(factor_B)
    if other is not None:
        wide_BCHW += other * _column(1.0 - factor_B)
    return _pixels(wide_BCHW)


def _brightness(images_BCHW: Tensor, factor_B: Tensor, _: Resampling) -> Tensor:
    return _blend(images_BCHW, None, factor_B)


def _color(images_BCHW: Tensor, factor_B: Tensor, _: Resampling) -> Tensor:
    return _blend(images_BCHW, _grey(images_BCHW), factor_B)


def _contrast(images_BCHW: Tensor, factor_B: Tensor, _: Resampling) -> Tensor:
    mean_B111 = _grey(images_BCHW).mean(dim=(1, 2, 3), keepdim=True)
    return _blend(images_BCHW, mean_B111, factor_B)


def _sharpness(images_BCHW: Tensor, factor_B: Tensor, _: Resampling) -> Tensor:
    if min(images_BCHW.shape[2:]) <= 2:
        return images_BCHW.clone()
    wide_BCHW = images_BCHW.float()
    kernel = wide_BCHW.new_full((3, 3), 1.0 / 13.0)
    kernel[1, 1] = 5.0 / 13.0
    smooth = F.conv2d(wide_BCHW, kernel.expand(3, 1, 3, 3), groups=3).round_()
    inner = wide_BCHW[..., 1:-1, 1:-1]
    inner += smooth.sub_(inner) * _column(1.0 - factor_B)
    return _pixels(wide_BCHW)


def _posterize(images_BCHW: Tensor, bits_B: Tensor, _: Resampling) -> Tensor:
    lost_B = (8 - bits_B.round().long()).clamp(0, 8)
    mask_B = (_LARGEST << lost_B) & _LARGEST
    return images_BCHW & mask_B.to(torch.uint8).view(-1, 1, 1, 1)


def _solarize(images_BCHW: Tensor, threshold_B: Tensor, _: Resampling) -> Tensor:
    above = images_BCHW >= _column(threshold_B)
    return torch.where(above, images_BCHW.bitwise_not(), images_BCHW)


def _solarize_add(images_BCHW: Tensor, amount_B: Tensor, _: Resampling) -> Tensor:
    """timm's: the amount is added to the dark half of the values."""
    more = images_BCHW.float() + _column(amount_B)
    return torch.where(images_BCHW < 128, _pixels(more), images_BCHW)


def _auto_contrast(images_BCHW: Tensor, _: Tensor, __: Resampling) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.autocontrast(images_BCHW)


def _equalize(images_BCHW: Tensor, _: Tensor, __: Resampling) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.equalize(images_BCHW)


def _invert(images_BCHW: Tensor, _: Tensor, __: Resampling) -> Tensor:
    return images_BCHW.bitwise_not()


def _grayscale(images_BCHW: Tensor, _: Tensor, __: Resampling) -> Tensor:
    return _grey(images_BCHW).to(torch.uint8).expand_as(images_BCHW)


def _blur(images_BCHW: Tensor, sigma_B: Tensor, _: Resampling) -> Tensor:
    """A Gaussian, cut off at three of the largest sigma; the edges are reflected."""
    num, channels, height, width = images_BCHW.shape
    radius = min(round(3 * LARGEST_SIGMA), height - 1, width - 1)
    offsets = torch.arange(-radius, radius + 1, device=images_BCHW.device, dtype=torch.float32)
    weights_BK = (-0.5 * (offsets / sigma_B.float()[:, None]).square()).softmax(1)
    # Images as channels: every image has its own kernel.
    taps = weights_BK.repeat_interleave(channels, 0)[:, None]
    wide = images_BCHW.float().reshape(1, num * channels, height, width)
    wide = F.pad(wide, (radius,) * 4, mode="reflect")
    wide = F.conv2d(wide, taps[:, :, None], groups=num * channels)
    wide = F.conv2d(wide, taps[..., None], groups=num * channels)
    return _pixels(wide.round_()).view(num, channels, height, width)


def _moved(images_BCHW: Tensor, rows: _Rows, resampling: Resampling) -> Tensor:
    """The pixel (x, y), counted from the centre, shows what lies at rows (x, y, 1)."""
    height, width = images_BCHW.shape[2:]
    device = images_BCHW.device
    across = torch.linspace((1.0 - width) * 0.5, (width - 1.0) * 0.5, width, device=device)
    down = torch.linspace((1.0 - height) * 0.5, (height - 1.0) * 0.5, height, device=device)
    # grid_sample counts from -1 to 1.
    places = [
        _entry(a, half) * across + _entry(b, half) * down[:, None] + _entry(c, half)
        for (a, b, c), half in zip(rows, (0.5 * width, 0.5 * height), strict=True)
    ]
    shape = (len(images_BCHW), height, width)
    grid = torch.stack([place.expand(shape) for place in places], dim=-1)
    # What lies beyond the edge is sampled as zero: it becomes the fill.
    filled = [
        plane.float() - fill
        for plane, fill in zip(images_BCHW.unbind(1), resampling.fill, strict=True)
    ]
    moved_BCHW = F.grid_sample(
        torch.stack(filled, 1),
        grid,
        mode=resampling.mode,
        padding_mode="zeros",
        align_corners=False,
    )
    planes = [
        plane + fill for plane, fill in zip(moved_BCHW.unbind(1), resampling.fill, strict=True)
    ]
    return _pixels(torch.stack(planes, 1).round_())


def _entry(value: Tensor | float, half: float) -> Tensor | float:
    """An entry of a row in units of half a side, for every pixel of its image."""
    if isinstance(value, Tensor):
        return (value / half).float().view(-1, 1, 1)
    return value / half


def _shear(
    images_BCHW: Tensor, tangent_B: Tensor, resampling: Resampling, *, across: bool
) -> Tensor:
    """Around the corner at the top left, as in torchvision and AutoAugment."""
    height, width = images_BCHW.shape[2:]
    if across:
        rows = (1.0, tangent_B, tangent_B * (0.5 * height)), (0.0, 1.0, 0.0)
    else:
        rows = (1.0, 0.0, 0.0), (tangent_B, 1.0, tangent_B * (0.5 * width))
    return _moved(images_BCHW, rows, resampling)


def _translate(
    images_BCHW: Tensor, pixels_B: Tensor, resampling: Resampling, *, across: bool
) -> Tensor:
    x, y = (-pixels_B, 0.0) if across else (0.0, -pixels_B)
    return _moved(images_BCHW, ((1.0, 0.0, x), (0.0, 1.0, y)), resampling)


def _rotate(images_BCHW: Tensor, degrees_B: Tensor, resampling: Resampling) -> Tensor:
    """Counter-clockwise around the centre."""
    angle_B = torch.deg2rad(-degrees_B)
    cos, sin = angle_B.cos(), angle_B.sin()
    return _moved(images_BCHW, ((cos, sin, 0.0), (-sin, cos, 0.0)), resampling)


OPERATIONS: dict[str, Operation] = {
    "shear_x": partial(_shear, across=True),  # the tangent
    "shear_y": partial(_shear, across=False),
    "translate_x": partial(_translate, across=True),  # pixels, to the right
    "translate_y": partial(_translate, across=False),  # pixels, down
    "rotate": _rotate,  # degrees
    "brightness": _brightness,  # a factor, 1 changes nothing; the next three too
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,  # bits that stay, rounded
    "solarize": _solarize,  # the value from which colours are inverted
    "solarize_add": _solarize_add,  # what is added to dark values
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "grayscale": _grayscale,
    "blur": _blur,  # sigma in pixels
}
"""By name; the comment says what the magnitude is."""
IDENTITY = -1
"""In place of an operation's number: nothing is done."""
