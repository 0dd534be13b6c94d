"""Memory as the Triton kernels of `grouped_pointwise` address it: layouts, vectors, sizes."""

from collections.abc import Sequence

from torch import Tensor

from fastkd.kernels.grouped_pointwise.memory import channels_last

__all__ = [
    "Tensors",
    "after_vectors",
    "pixels_of",
    "sizes",
    "vectors",
]

Tensors = Sequence[Tensor]


def vectors(norm: Tensors) -> tuple[Tensor, ...] | None:
    """A norm as kernels take it."""
    return tuple(vector.contiguous() for vector in norm) or None


def after_vectors(after: Tensors) -> tuple[Tensor, ...] | None:
    """`After` as kernels take it."""
    return (
        (channels_last(after[0]), *(vector.contiguous() for vector in after[1:])) if after else None
    )


def sizes(x: Tensor, y: Tensor) -> dict[str, int]:
    """Sizes of a 3x3 convolution's input and output, by name."""
    for each in (x, y):
        pixels_of(each)
    names = ("num", "height", "width", "out_height", "out_width")
    return dict(zip(names, (len(x), *x.shape[2:], *y.shape[2:]), strict=True))


def pixels_of(x: Tensor) -> int:
    """Pixels of the batch, which the kernels count in 32 bits, as they do elements of an image.

    Raises:
        ValueError: more than they count, a block behind the last pixel included.
    """
    pixels, of_image = x.numel() // x.shape[1], x.numel() // len(x)
    if pixels >= 2**30 or of_image >= 2**31:
        raise ValueError(
            f"grouped_pointwise: a batch of {pixels} pixels with images of {of_image} elements; "
            "expected fewer than 2^30 and 2^31 on a GPU: use a smaller batch or crops"
        )
    return pixels
