"""Crop, flip and normalise against torchvision.transforms.v2 applied to one image at a time."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as v2

from fastkd.data.geometry import Geometry, Normalizer, gather_crops, pad_images

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def random_images(num: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (num, height, width, channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (7, 11)], ids=["32x32", "8x8", "7x11"])
@pytest.mark.parametrize("mode", ["zero", "reflect"])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_same_bits_as_torchvision_per_sample(size, mode, padding):
    height, width = size
    geometry = Geometry(padding=padding, pad_mode=mode, flip=True)
    images = random_images(20, height, width)
    index = torch.tensor([3, 0, 19, 3, 7, 12, 3, 18])
    generator = torch.Generator().manual_seed(1)
    top = torch.randint(0, 2 * padding + 1, index.shape, generator=generator)
    left = torch.randint(0, 2 * padding + 1, index.shape, generator=generator)
    flip = torch.tensor([True, False, True, True, False, False, True, False])

    crops = gather_crops(pad_images(images, geometry), index, top, left, flip, size)
    got = Normalizer(MEAN, STD)(crops)

    tv_mode = "constant" if mode == "zero" else "reflect"
    for b, n in enumerate(index.tolist()):
        image = images[n].permute(2, 0, 1)
        if padding:
            image = v2.pad(image, [padding] * 4, fill=0, padding_mode=tv_mode)
        image = v2.crop(image, int(top[b]), int(left[b]), height, width)
        if flip[b]:
            image = v2.horizontal_flip(image)
        expected = v2.normalize(v2.to_dtype(image, torch.float32, scale=True), MEAN, STD)
        assert torch.equal(got[b], expected), f"sample {b} differs from torchvision"


def test_every_corner_of_the_padded_image_is_reachable():
    images = random_images(1, 4, 4)
    padded = pad_images(images, Geometry(padding=2))
    reference = np.pad(images[0].numpy(), ((2, 2), (2, 2), (0, 0)))
    for top in range(5):
        for left in range(5):
            crop = gather_crops(
                padded,
                torch.tensor([0]),
                torch.tensor([top]),
                torch.tensor([left]),
                None,
                (4, 4),
            )
            np.testing.assert_array_equal(crop[0], reference[top : top + 4, left : left + 4])


def test_reflect_padding_equals_numpy_for_non_square_images():
    images = random_images(3, 5, 9)
    got = pad_images(images, Geometry(padding=4, pad_mode="reflect"))
    expected = np.pad(images.numpy(), ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    np.testing.assert_array_equal(got, expected)


def test_without_padding_the_images_are_not_copied():
    images = random_images(3, 4, 4)
    assert pad_images(images, Geometry()).data_ptr() == images.data_ptr()


def test_inputs_are_left_alone():
    images = random_images(6, 8, 8)
    padded = pad_images(images, Geometry(padding=1))
    before = padded.clone()
    flip = torch.ones(6, dtype=torch.bool)
    corner = torch.zeros(6, dtype=torch.int64)
    Normalizer(MEAN, STD)(gather_crops(padded, torch.arange(6), corner, corner, flip, (8, 8)))
    assert torch.equal(padded, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_byte_value_against_float64(dtype):
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    got = Normalizer(MEAN, STD, dtype)(values.contiguous())
    assert got.dtype == dtype
    exact = (values.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    error = (got.double() - exact.permute(0, 3, 1, 2)).abs()
    # fp32: x / 255 and the mean are each rounded at a size of 1, then divided by a std of 0.2.
    # Narrower types: one more rounding, of results below 4, where an ulp is 2 * eps.
    fp32_error = 3 * torch.finfo(torch.float32).eps / 2 / min(STD)
    narrow_error = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert error.max() <= fp32_error + narrow_error


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_memory_layout(channels_last):
    out = Normalizer(MEAN, STD, channels_last=channels_last)(random_images(4, 5, 6))
    assert out.shape == (4, 3, 5, 6)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert out.is_contiguous(memory_format=layout)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="padding is -1, expected 0 or more"):
        Geometry(padding=-1)
    with pytest.raises(ValueError, match="pad_mode is 'edge'"):
        Geometry(pad_mode="edge")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"reflect padding of 4 pixels .* got 4x9"):
        pad_images(random_images(1, 4, 9), Geometry(padding=4, pad_mode="reflect"))
    with pytest.raises(ValueError, match=r"images are torch.float32, expected uint8"):
        Normalizer(MEAN, STD)(torch.zeros(1, 4, 4, 3))
    with pytest.raises(ValueError, match="std above 0"):
        Normalizer((0.5,), (0.0,))(random_images(1, 4, 4, channels=1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_bits_on_the_gpu():
    images = random_images(50, 32, 32)
    geometry = Geometry(padding=4, pad_mode="reflect", flip=True)
    generator = torch.Generator().manual_seed(1)
    index, top, left = (torch.randint(0, high, (64,), generator=generator) for high in (50, 9, 9))
    flip = torch.rand(64, generator=generator) < 0.5
    outputs = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        padded = pad_images(images.to(device), geometry)
        draws = [draw.to(device) for draw in (index, top, left, flip)]
        outputs.append(Normalizer(MEAN, STD)(gather_crops(padded, *draws, (32, 32))).cpu())
    assert torch.equal(outputs[0], outputs[1])
