"""Random erasing: a rectangle of the normalised image becomes zero, the mean colour.

Zhong et al. 2017, arXiv:1708.04896, with torchvision's ranges: 2 to 33 % of the area, sides in
proportion of 0.3 to 3.3 (log-uniform), up to ten attempts to fit into the image. timm's ranges are
these except for rounding; its script fills with noise.
"""

import math

import numpy as np
import torch
from torch import Tensor

from fastkd.data.draws import as_uniforms
from fastkd.data.tables import to_device

__all__ = ["WORDS_PER_RECTANGLE", "erase", "rectangles"]

_ATTEMPTS = 10
_LEAST_AREA, _LARGEST_AREA = 0.02, 0.33
_LEAST_RATIO, _LARGEST_RATIO = 0.3, 3.3
# Whether; two per attempt for area and proportion; two for the place.
WORDS_PER_RECTANGLE = 1 + 2 * _ATTEMPTS + 2


def rectangles(words_BK: np.ndarray, side: int, probability: float) -> np.ndarray:
    """top, bottom, left, right in pixels for square images of this side, int64 [B, 4].

    An image of which nothing is erased has zeros.
    """
    numbers_BK = as_uniforms(words_BK)
    area_BA = _LEAST_AREA + (_LARGEST_AREA - _LEAST_AREA) * numbers_BK[:, 1:-2:2]
    low, high = math.log(_LEAST_RATIO), math.log(_LARGEST_RATIO)
    ratio_BA = np.exp(low + (high - low) * numbers_BK[:, 2:-2:2])
    heights_BA = np.round(side * np.sqrt(area_BA * ratio_BA))
    widths_BA = np.round(side * np.sqrt(area_BA / ratio_BA))
    fits_BA = (heights_BA < side) & (widths_BA < side)
    first_B = fits_BA.argmax(1)
    rows_B = np.arange(len(first_B))
    happens_B = (numbers_BK[:, 0] < probability) & fits_BA[rows_B, first_B]
    height_B = heights_BA[rows_B, first_B] * happens_B
    width_B = widths_BA[rows_B, first_B] * happens_B
    top_B = np.floor(numbers_BK[:, -2] * (side - height_B + 1)) * happens_B
    left_B = np.floor(numbers_BK[:, -1] * (side - width_B + 1)) * happens_B
    edges = (top_B, top_B + height_B, left_B, left_B + width_B)
    return np.stack(edges, axis=1).astype(np.int64)


def erase(images_BCHW: Tensor, rectangles_B4: np.ndarray) -> Tensor:
    """Set the rectangles of these images to zero, in place; the images."""
    edges_B4 = to_device(rectangles_B4, images_BCHW.device)
    top, bottom, left, right = edges_B4[:, :, None].unbind(1)
    down_H = torch.arange(images_BCHW.shape[2], device=images_BCHW.device)
    across_W = torch.arange(images_BCHW.shape[3], device=images_BCHW.device)
    rows_BH = (down_H >= top) & (down_H < bottom)
    columns_BW = (across_W >= left) & (across_W < right)
    return images_BCHW.masked_fill_((rows_BH[:, :, None] & columns_BW[:, None])[:, None], 0.0)
