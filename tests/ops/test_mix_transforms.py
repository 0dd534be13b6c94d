"""`mix` inside opcheck, gradcheck, torch.compile, torch.export and vmap."""

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from fastkd.kernels import mix, status

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
needs_cpp = pytest.mark.skipif(
    not status()["mix"]["cpu"].startswith("c++"), reason=status()["mix"]["reason"]
)


def inputs(num: int = 4, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    images = torch.randint(0, 256, (num, 3, 6, 8), dtype=torch.uint8)
    rest = torch.arange(num).flip(0), torch.tensor([1, 4, 2, 7])
    return images.to(device), rest[0].to(device), rest[1].to(device)


def views(images: Tensor, partner: Tensor, box: Tensor, which=None) -> tuple[Tensor, Tensor]:
    """What a training step does with the op."""
    x = mix(images, mean=MEAN, std=STD, dtype=torch.bfloat16, impl=which)
    return x, mix(x, partner, boxes=box, impl=which)


@needs_cpp
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_opcheck(channels_last: bool, place: str) -> None:
    images, index, box = inputs(device=place)
    op = torch.ops.fastkd._mix.default
    rest = (list(MEAN), list(STD), torch.bfloat16, channels_last)
    torch.library.opcheck(op, (images, index, None, box, None, *rest))
    torch.library.opcheck(
        op, (images, None, images.flip(0), None, torch.rand(4, device=place), *rest)
    )
    torch.library.opcheck(op, (images, None, None, None, None, *rest))


@pytest.mark.parametrize("which", [None, "reference"])
def test_fullgraph_compile_gives_the_same_and_recompiles_at_most_once(which, place) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(views, fullgraph=True, backend=counter)
    for num in (8, 12, 5, 33):
        arguments = inputs(num, place)
        for got, want in zip(compiled(*arguments, which), views(*arguments, which), strict=True):
            assert torch.equal(got, want)
    assert counter.frame_count <= 2


def test_export() -> None:
    class Views(nn.Module):
        def forward(self, images: Tensor, partner: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
            return views(images, partner, box)

    program = torch.export.export(Views(), inputs())
    arguments = inputs()
    for got, want in zip(program.module()(*arguments), views(*arguments), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("boxes", [None, torch.tensor([1, 3, 0, 2])], ids=["whole", "box"])
def test_gradients_of_images_partners_and_lam(boxes: Tensor | None) -> None:
    images, partners = (
        torch.rand(3, 2, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    lam = torch.tensor([0.2, 0.6, 0.9], dtype=torch.float64, requires_grad=True)
    norm = {"mean": (0.5, 0.4), "std": (0.2, 0.3)}
    up = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    index = torch.tensor([1, 2, 0])
    assert torch.autograd.gradcheck(
        lambda x, p, m: up * mix(x, p, boxes=boxes, lam=m, **norm), (images, partners, lam)
    )
    assert torch.autograd.gradcheck(
        lambda x, m: up * mix(x, index, boxes=boxes, lam=m, **norm), (images, lam)
    )


@needs_cpp
def test_a_kernel_without_gradient_says_so() -> None:
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    with pytest.raises(ValueError, match=r"impl='cpp' has no gradient"):
        mix(images, torch.tensor([1, 0]), lam=0.5, impl="cpp")
    with torch.no_grad():
        assert not mix(images, torch.tensor([1, 0]), lam=0.5, impl="cpp").requires_grad


def test_vmap_runs_on_the_reference() -> None:
    images, lam = torch.rand(3, 2, 3, 4, 4), torch.rand(3)
    index = torch.tensor([1, 0])
    got = torch.vmap(lambda x, m: mix(x, index, lam=m))(images, lam)
    want = torch.stack([mix(x, index, lam=m) for x, m in zip(images, lam, strict=True)])
    assert torch.equal(got, want)


def test_float64_runs_on_the_reference() -> None:
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    assert mix(images, torch.tensor([1, 0]), lam=0.5).dtype == torch.float64
    with pytest.raises(ValueError, match="uint8, fp32, bf16, fp16"):
        mix(images, torch.tensor([1, 0]), lam=0.5, impl="triton")
