"""How pictures are shown in evaluation: a fact of the data set, whatever the augmentation is.

Photographs (`normalization.PHOTOGRAPHS`): the short side to 256/224 of the image size, then the
central square, as is ImageNet's custom. Sets of small images, and folders whose pictures already
have the image size, are shown whole. The keys data.eval_* set it otherwise.
"""

from fastkd.data.config import DataConfig
from fastkd.data.normalization import PHOTOGRAPHS
from fastkd.data.sources.folder import FolderIndex
from fastkd.data.sources.image_set import ImageSet, first_readable
from fastkd.errors import UserError
from fastkd.storage.facts import Framing

__all__ = ["evaluation_framing"]

_ZOOM = (256, 224)


def evaluation_framing(data: DataConfig, train: ImageSet | FolderIndex, image_size: int) -> Framing:
    """The recipe's rule, and where it is silent the data set's own.

    train: the training images, of which the first one is looked at. image_size: their side.
    """
    if data.eval_mode == "whole":
        # Of a network for label maps, whose habits an evaluation takes over.
        raise UserError(
            f"the network learned from whole pictures with label maps, and data.name={data.name} "
            "has labels of whole images: evaluate it on a set with label maps"
        )
    crop = data.eval_crop or image_size
    resize = data.eval_resize or _own_resize(data, train, image_size, crop)
    if crop > resize:
        raise UserError(
            f"data.eval_crop={crop} does not fit into pictures resized to data.eval_resize="
            f"{resize}: set data.eval_resize to {crop} or more"
            if data.eval_crop
            else f"data.eval_resize={resize} is smaller than the images, which have {crop} pixels: "
            f"set data.eval_crop as well, to {resize} or less"
        )
    more = {"interpolation": data.eval_interpolation, "mode": data.eval_mode}
    chosen = {key: value for key, value in more.items() if value is not None}
    return Framing.model_validate({"resize": resize, "crop": crop} | chosen)


def _own_resize(data: DataConfig, train: ImageSet | FolderIndex, image_size: int, crop: int) -> int:
    if data.name not in PHOTOGRAPHS:
        return crop
    _, size = first_readable(train, skips=data.on_bad == "skip")
    if size == (image_size, image_size):
        return crop
    large, small = _ZOOM
    return round(crop * large / small)
