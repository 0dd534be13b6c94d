"""`mix` against a loop in float64, bit by bit against its reference, and in the corners.

With TRITON_INTERPRET=1 the same tests run the Triton kernel on the CPU; test_triton.py starts a
process that does.
"""

import itertools
import os

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as v2
from torch import Tensor

from fastkd.kernels import mix
from fastkd.testing import shape_id

LAYOUTS = (torch.contiguous_format, torch.channels_last)
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
# 11 and 7: rows that no vector divides; 32: vectors of 16 bytes; one channel, five channels.
SHAPES = [(5, 3, 7, 11), (2, 3, 16, 32), (2, 1, 8, 8), (2, 5, 6, 4)]
# The interpreter takes seconds for each pair of storage types.
SLOW_THERE = pytest.mark.matrix if os.environ.get("TRITON_INTERPRET") == "1" else ()


def batch(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8)
    return torch.randn(shape).to(dtype)


def boxes_of(num: int, height: int, width: int) -> Tensor:
    """Of all kinds: beyond the image, empty, with swapped edges, whole."""
    edges = [torch.randint(-2, high + 3, (num,)) for high in (height, height, width, width)]
    boxes = torch.stack(edges, 1)
    boxes[0] = torch.tensor([0, height, 0, width])
    return boxes


def constants(channels: int) -> dict[str, list[float]]:
    return {
        "mean": [0.3 + 0.1 * c for c in range(channels)],
        "std": [0.2 + 0.01 * c for c in range(channels)],
    }


def by_hand(images, partner, boxes, lam, mean, std) -> np.ndarray:
    """Image by image in float64, with slices."""
    scale = 255 if images.dtype == torch.uint8 else 1

    def normalized(x: Tensor) -> np.ndarray:
        x64 = x.double().numpy() / scale
        return (x64 - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))

    num, _, height, width = images.shape
    out = normalized(images)
    if partner is None and boxes is None:
        return out
    others = np.zeros_like(out)
    if partner is not None:
        others = normalized(images)[partner.numpy()] if partner.dim() == 1 else normalized(partner)
    for n in range(num):
        box = [0, height, 0, width]
        if boxes is not None:
            box = (boxes if boxes.dim() == 1 else boxes[n]).tolist()
        y0, y1, x0, x1 = (
            min(max(e, 0), s) for e, s in zip(box, (height, height, width, width), strict=True)
        )
        share = 0.0
        if lam is not None:
            share = float(lam) if not isinstance(lam, Tensor) or lam.dim() == 0 else float(lam[n])
        inside = np.s_[n, :, y0 : max(y0, y1), x0 : max(x0, x1)]
        out[inside] = share * out[inside] + (1 - share) * others[inside]
    return out


KINDS = ["normalise", "cutout", "cutmix", "cutmix-images", "mixup", "both"]


def options(kind: str, images: Tensor, per_image: bool) -> tuple[Tensor | None, dict]:
    num, _, height, width = images.shape
    partner = {"normalise": None, "cutout": None}.get(kind, torch.randperm(num))
    if kind == "cutmix-images":
        partner = batch(images.shape, images.dtype).contiguous(
            memory_format=torch.channels_last if images.stride(1) == 1 else torch.contiguous_format
        )
    chosen: dict = {}
    if kind not in ("normalise", "mixup"):
        one = torch.tensor([1, height - 1, 2, width], dtype=torch.int32)
        chosen["boxes"] = boxes_of(num, height, width) if per_image else one
    if kind in ("mixup", "both"):
        chosen["lam"] = torch.rand(num) if per_image else 0.3
    return partner, chosen


@pytest.mark.interpreter_share(per_image=[True])
@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "image"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", [torch.uint8, torch.float32], ids=str)
def test_values_against_a_loop_in_float64(impl: str, source, kind: str, per_image: bool) -> None:
    for shape in SHAPES:
        images = batch(shape, source)
        partner, chosen = options(kind, images, per_image)
        got = mix(images, partner, **chosen, **constants(shape[1]), impl=impl)
        want = by_hand(
            images, partner, chosen.get("boxes"), chosen.get("lam"), **constants(shape[1])
        )
        assert got.dtype == torch.float32
        # Rounded a few times at the size of x and the mean, then divided by a std of 0.2.
        np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=3e-6)


@pytest.mark.interpreter_share(
    shape=[(5, 3, 7, 11)],
    source=[torch.uint8],
    target=[torch.bfloat16],
    layout_in=[torch.contiguous_format],
)
@pytest.mark.parametrize("layout_in", LAYOUTS, ids=str)
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "source", [torch.uint8, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(
    "shape", [*SHAPES[:3], pytest.param(SHAPES[3], marks=SLOW_THERE)], ids=shape_id
)
def test_the_bits_are_those_of_the_reference(
    fast, interpreted, shape, source, target, layout_in
) -> None:
    if interpreted and torch.float16 in (source, target):
        pytest.skip("two storage types are enough for the interpreter")
    # The interpreter is slow: boxes and lam per image only.
    per_image_or_batch = (True,) if interpreted else (False, True)
    cases = itertools.product(KINDS, per_image_or_batch, (False, True), LAYOUTS)
    for kind, per_image, normalise, layout_out in cases:
        images = batch(shape, source).to(memory_format=layout_in)
        partner, chosen = options(kind, images, per_image)
        chosen |= {"dtype": target, "memory_format": layout_out}
        if normalise:
            chosen |= constants(shape[1])
        got = mix(images, partner, **chosen, impl=fast)
        want = mix(images, partner, **chosen, impl="reference")
        assert torch.equal(got, want), (kind, per_image, normalise, layout_out)
        assert got.is_contiguous(memory_format=layout_out)


def test_normalised_images_have_the_bits_of_torchvision(impl: str) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    want = v2.normalize(v2.to_dtype(images, torch.float32, scale=True), MEAN, STD)
    assert torch.equal(mix(images, mean=MEAN, std=STD, impl=impl), want)


def test_a_failed_proof_of_the_inverse_divides(interpreted, monkeypatch) -> None:
    if not interpreted:
        pytest.skip("the Triton kernel runs here only in the interpreter")
    from fastkd.kernels.mix import gpu

    monkeypatch.setattr(gpu, "proven_inverse", lambda mean, std: None)
    images = batch((2, 3, 5, 8), torch.uint8)
    got = mix(images, mean=MEAN, std=STD, impl="triton")
    assert torch.equal(got, mix(images, mean=MEAN, std=STD, impl="reference"))


def test_lam_of_0_and_1_gives_an_image_itself(impl: str) -> None:
    images = batch((3, 3, 5, 8), torch.float32)
    partner = torch.tensor([1, 2, 0])
    assert torch.equal(mix(images, partner, lam=1.0, impl=impl), images)
    assert torch.equal(mix(images, partner, lam=0.0, impl=impl), images[partner])


def test_pixels_outside_the_box_are_untouched_bits(impl: str) -> None:
    images = batch((2, 3, 6, 8), torch.bfloat16)
    got = mix(images, torch.tensor([1, 0]), boxes=torch.tensor([1, 3, 2, 6]), impl=impl)
    inside = torch.zeros(6, 8, dtype=torch.bool)
    inside[1:3, 2:6] = True
    assert torch.equal(got[..., inside], images.flip(0)[..., inside])
    assert torch.equal(got[..., ~inside], images[..., ~inside])


@pytest.mark.parametrize("box", [[0, 0, 0, 8], [3, 2, 0, 8], [9, 12, 0, 8], [-4, 0, 0, 8]], ids=str)
def test_empty_boxes_change_nothing(impl: str, box: list[int]) -> None:
    images = batch((2, 3, 6, 8), torch.float32)
    assert torch.equal(mix(images, boxes=torch.tensor(box), impl=impl), images)


def test_the_result_has_memory_of_its_own(impl: str) -> None:
    images = batch((2, 3, 4, 4), torch.float32)
    got = mix(images, impl=impl)
    assert torch.equal(got, images)
    assert got.data_ptr() != images.data_ptr()


def test_no_images(impl: str) -> None:
    images = torch.empty(0, 3, 4, 4, dtype=torch.uint8)
    got = mix(images, torch.empty(0, dtype=torch.int64), lam=0.5, impl=impl)
    assert got.shape == images.shape


def test_strided_inputs(impl: str) -> None:
    images = batch((6, 3, 8, 10), torch.float32)
    views = [images[::2], images[:, :, ::2, 1:9], images.transpose(2, 3), images[:, :2]]
    for view in views:
        box = torch.tensor([0, 1, 2, 2, 1, 3, 0, 4])[::2]
        got = mix(view, boxes=box, impl=impl)
        assert torch.equal(got, mix(view.contiguous(), boxes=box.contiguous(), impl="reference"))


def test_an_index_that_is_no_image(impl: str, interpreted) -> None:
    images = batch((3, 3, 4, 8), torch.float32)
    wrong = torch.tensor([1, 3, 0])
    if interpreted:
        got = mix(images, wrong, lam=0.5, impl=impl)
        assert got[1].isnan().all()
        assert not got[[0, 2]].isnan().any()
    elif impl == "cpp":
        with pytest.raises(ValueError, match=r"partner 3 of image 1 is out of range: .*0 to 2"):
            mix(images, wrong, lam=0.5, impl=impl)
    else:
        with pytest.raises(IndexError):
            mix(images, wrong, lam=0.5, impl=impl)


IMAGES = torch.zeros(4, 3, 8, 8)
INDEX = torch.tensor([1, 0, 3, 2])
WRONG = {
    "images are": ((torch.zeros(3, 8, 8),), {}),
    "partners are": ((IMAGES, torch.zeros(4, 3, 8, 9)), {"lam": 0.5}),
    "partner indices are": ((IMAGES, INDEX[:2]), {"lam": 0.5}),
    "boxes are": ((IMAGES,), {"boxes": torch.zeros(3, 4, dtype=torch.int64)}),
    "lam is": ((IMAGES, INDEX), {"lam": torch.zeros(2)}),
    "lam but no partner": ((IMAGES,), {"lam": 0.5}),
    "neither boxes nor lam": ((IMAGES, INDEX), {}),
    "give both or neither": ((IMAGES,), {"mean": MEAN}),
    "std above 0": ((IMAGES,), {"mean": MEAN, "std": (0.2, 0.0, 0.2)}),
    "expected a floating dtype": ((IMAGES,), {"dtype": torch.uint8}),
    "memory_format=": ((IMAGES,), {"memory_format": torch.channels_last_3d}),
    "expected 0 to 3": ((IMAGES, INDEX + 1), {"lam": 0.5, "check": True}),
    "expected 0 to 1": ((IMAGES, INDEX), {"lam": 1.5, "check": True}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input_is_named(message: str) -> None:
    arguments, keywords = WRONG[message]
    with pytest.raises(ValueError, match=message):
        mix(*arguments, **keywords)
