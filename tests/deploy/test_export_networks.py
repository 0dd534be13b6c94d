"""Every family, every block, networks of timm and torchvision through onnxruntime, on real images.

The truth is the network in float64. The images are CIFAR-10's where FASTKD_TEST_DATA has them.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastkd.deploy.export import export_network
from fastkd.deploy.source import Choice, Source
from fastkd.models import create_model
from fastkd.testing.networks import CLASSIFIERS, DENSE, Build

pytestmark = pytest.mark.matrix

DATA = os.environ.get("FASTKD_TEST_DATA")
MEAN_STD = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def often(*kept: Any, of: Iterable[Any]) -> list[Any]:
    """Parameters of which only those that are kept run in CI, the others by hand (`-m slow`)."""
    return [pytest.param(one, marks=[] if one in kept else pytest.mark.slow) for one in of]


ZOO: dict[str, Build] = {
    **CLASSIFIERS,
    "resnet18": ("resnet18", {"width": 0.25}),
    "resnet18-projection": ("resnet18", {"width": 0.25, "shortcuts": "projection"}),
}
BLOCKS = ("S", "S-2x2", "G:4", "G:N:8", "G:N", "B:2", "BG:2:4", "BG:2:M:8", "BG:2:M")
TIMM = (
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "convnext_atto",
    "swin_tiny_patch4_window7_224",
    "efficientnet_b0",
    "mobilenetv3_small_050",
    "mobilenetv2_050",
    "resnet18",
    "regnety_002",
    "repvgg_a0",
    "mobilevit_xxs",
    "edgenext_xx_small",
    "ghostnet_050",
    "levit_128s",
    "mixer_s32_224",
)
TORCHVISION = (
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "regnet_y_400mf",
    "googlenet",
    "vit_b_32",
)
SEGMENTATION: dict[str, Build] = {
    **DENSE,
    "lraspp": ("torchvision:lraspp_mobilenet_v3_large", {}),
    "deeplab": ("torchvision:deeplabv3_mobilenet_v3_large", {}),
}


def pictures(number: int, height: int, width: int) -> Tensor:
    """Normalised [N, 3, H, W], of several classes."""
    if DATA is None:
        return torch.randn(number, 3, height, width)
    files = sorted((Path(DATA) / "cifar10/test").rglob("*.*"))
    chosen = files[:: len(files) // number][:number]
    images = [
        np.asarray(
            Image.open(file).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        )
        for file in chosen
    ]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in MEAN_STD)
    pixels_NCHW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    return ((pixels_NCHW - mean) / std).contiguous()


def compared(model: nn.Module, path: Path, tools: Any, **how: Any) -> None:
    """Export; run by onnxruntime; compare with float64."""
    side, images = how.pop("size", None), how.pop("images", 16)
    choice = Choice(**how)
    source = Source.of(model, size=side)
    done = export_network(source, path / "net.onnx", choice)
    images_NCHW = pictures(images, *source.size)
    found = tools.run_onnx(done.path, images_NCHW)
    tools.check_near(found, tools.exactly(model, images_NCHW), choice.bound)


@pytest.mark.parametrize("form", ZOO)
def test_zoo(tmp_path: Path, tools: Any, form: str) -> None:
    name, options = ZOO[form]
    model = tools.trained(create_model(name, 10, kernels="auto", **options))
    compared(model, tmp_path, tools, dynamic_batch=form in ("resnet8x4", "shufflenetv1"))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", often("wrn_10_2", of=("wrn_10_2", "resnet18")))
@pytest.mark.parametrize("kernels", often("fused", of=("plain", "fused")))
def test_blocks(tmp_path: Path, tools: Any, block: str, name: str, kernels: Any) -> None:
    options = {"width": 0.25} if name == "resnet18" else {}
    model = create_model(name, 10, block=block, kernels=kernels, **options)
    compared(tools.trained(model), tmp_path, tools, dynamic_batch=kernels == "fused")


@pytest.mark.parametrize("name", TIMM)
def test_timm(tmp_path: Path, tools: Any, name: str) -> None:
    model = tools.trained(create_model(f"timm:{name}", 10))
    compared(model, tmp_path, tools, images=8)


@pytest.mark.parametrize("name", often("regnety_002", "convnext_atto", of=TIMM))
def test_timm_in_any_batch(tmp_path: Path, tools: Any, name: str) -> None:
    model = tools.trained(create_model(f"timm:{name}", 10))
    compared(model, tmp_path, tools, images=4, dynamic_batch=True)


@pytest.mark.parametrize(
    "name",
    often("resnet18-cheap", "vit_tiny_patch16_224", "regnety_002", of=[*TIMM, "resnet18-cheap"]),
)
def test_timm_as_a_folder(tmp_path: Path, tools: Any, name: str) -> None:
    import timm

    options = {"block": "G:4"} if name.endswith("-cheap") else {}
    model = tools.trained(create_model(f"timm:{name.removesuffix('-cheap')}", 10, **options))
    source = Source.of(model)
    done = export_network(source, tmp_path / "net", Choice(format="hf"))
    assert ("timm.create_model" in done.lines[0]) == (not options)
    if not options:
        loaded = timm.create_model(f"local-dir:{done.path}", pretrained=True).eval()
        images_NCHW = pictures(4, *source.size)
        with torch.no_grad():
            torch.testing.assert_close(loaded(images_NCHW), model.eval()(images_NCHW))


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(tmp_path: Path, tools: Any, name: str) -> None:
    model = tools.trained(create_model(f"torchvision:{name}", 10))
    compared(model, tmp_path, tools, images=8, dynamic_batch=name != "vit_b_32")


HALF = ("zoo:resnet8x4", "zoo:mobilenetv2_half", "zoo:shufflenetv2", "timm:resnet18")
HALF += ("timm:vit_tiny_patch16_224", "timm:convnext_atto", "timm:efficientnet_b0")
HALF += ("timm:swin_tiny_patch4_window7_224", "torchvision:mobilenet_v3_small")


@pytest.mark.parametrize("name", often(*HALF[:-2], HALF[-1], of=HALF))
def test_half(tmp_path: Path, tools: Any, name: str) -> None:
    model = tools.trained(create_model(name.removeprefix("zoo:"), 10))
    compared(model, tmp_path, tools, images=8, half=True)


@pytest.mark.parametrize("form", SEGMENTATION)
@pytest.mark.parametrize("how", [{}, {"dynamic_batch": True}], ids=["one", "any"])
def test_segmentation(tmp_path: Path, tools: Any, form: str, how: dict[str, Any]) -> None:
    name, options = SEGMENTATION[form]
    model = tools.trained(create_model(name, 11, kernels="auto", **options))
    source = Source.of(model)
    assert source.multiple == (8 if name == "erfnet" else 1)
    done = export_network(source, tmp_path / "net.onnx", Choice(**how))
    for height, width in ((96, 160), (200, 120)):
        images_NCHW = pictures(3, height, width)
        found = tools.run_onnx(done.path, images_NCHW)
        assert found.shape == (3, 11, height, width)
        tools.check_near(found, tools.exactly(model, images_NCHW))


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_simkd(tmp_path: Path, tools: Any, format: Any) -> None:
    model = create_model(
        "simkd:resnet8",
        10,
        student={"width": 0.5},
        tap="stage3",
        size=[4, 4],
        bias=True,
        student_channels=32,
        teacher_channels=64,
        factor=2,
    )
    model = tools.trained(model)
    if format == "onnx":
        compared(model, tmp_path, tools)
    else:
        export_network(Source.of(model), tmp_path / "net.pt2", Choice(format=format))


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_encoders(tmp_path: Path, tools: Any, name: str) -> None:
    import timm

    model = tools.trained(timm.create_model(name, num_classes=0))
    source = Source.of(model)
    assert source.answers == "embedding"
    done = export_network(source, tmp_path / "net.onnx")
    assert done.proof.compared.agreement is None
    images_NCHW = pictures(4, *source.size)
    found, wanted = tools.run_onnx(done.path, images_NCHW), tools.exactly(model, images_NCHW)
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", ["wrn_16_2", "timm:vit_tiny_patch16_224", "erfnet"])
def test_programs(tmp_path: Path, tools: Any, name: str) -> None:
    model = tools.trained(create_model(name, 10))
    for choice in (Choice(format="torch-export"), Choice(format="torch-export", half=True)):
        export_network(Source.of(model), tmp_path / f"{choice.half}.pt2", choice)


@pytest.mark.parametrize("opset", often(18, 23, of=(18, 20, 21, 23)))
def test_opsets(tmp_path: Path, tools: Any, opset: int) -> None:
    import onnx

    compared(tools.trained(create_model("wrn_10_1", 10)), tmp_path, tools, opset=opset)
    made = onnx.load(tmp_path / "net.onnx")
    assert made.opset_import[0].version == opset
