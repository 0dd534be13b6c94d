"""Small networks and files for the tests of latency; what exported files are compared with:
onnxruntime as anybody calls it, and torch in float64."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from fastkd.deploy.latency.meter import Rule
from fastkd.models.taps import logits_of


def run_onnx(path: Path, images_NCHW: Tensor) -> Tensor:
    """The first output, with onnxruntime alone; one by one if the file takes one image."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    batch = session.get_inputs()[0].shape[0]
    pieces = images_NCHW.split(1 if batch == 1 else len(images_NCHW))
    return torch.from_numpy(
        np.concatenate([session.run(None, {"images": one.numpy()})[0] for one in pieces])
    )


def exactly(model: nn.Module, images_NCHW: Tensor) -> Tensor:
    """Logits in float64."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        return logits_of(model(images_NCHW.double()))


def trained(model: nn.Module) -> nn.Module:
    """With running statistics and norms that are not those of a new network."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
    return model


def check_near(found: Tensor, wanted: Tensor, bound: float = 1e-4) -> None:
    """Within the bound of the largest, and the same class except for ties."""
    found, wanted = found.double(), wanted.double()
    largest = wanted.abs().max()
    assert (found - wanted).abs().max() <= bound * largest
    if wanted.shape[1] > 1:
        top = wanted.topk(2, dim=1).values
        other = found.argmax(1) != wanted.argmax(1)
        assert ((top[:, 0] - top[:, 1])[other] <= bound * largest).all()


@pytest.fixture(scope="session")
def tools() -> Any:
    """The functions above."""

    class Tools:
        run_onnx: Callable[..., Tensor] = staticmethod(run_onnx)
        exactly: Callable[..., Tensor] = staticmethod(exactly)
        trained: Callable[..., nn.Module] = staticmethod(trained)
        check_near: Callable[..., None] = staticmethod(check_near)

    return Tools


FAST = Rule(window_calls=1, window_s=0.0, tolerance=10.0, warm_up_s=5.0, calls=3, seconds=0.0)


@pytest.fixture
def fast(monkeypatch) -> Rule:
    """Two calls to warm up and three that are timed, also for the command."""
    for module in ("alone", "measuring"):
        monkeypatch.setattr(f"fastkd.deploy.latency.{module}.RULE", FAST)
    return FAST


@pytest.fixture(scope="session")
def small() -> nn.Module:
    """A network of four layers, of which one runs twice."""
    torch.manual_seed(0)
    same = nn.Conv2d(8, 8, 3, padding=1)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), same, same, nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 5)).eval()


def exported(model: nn.Module, file, *, dynamic: bool = False, batch: int = 2):
    """An ONNX file of the network for images of 8x8, or of any size."""
    pytest.importorskip("onnxscript")
    shapes = None
    if dynamic:
        sides = {0: "batch", 2: "height", 3: "width"}
        shapes = ({axis: torch.export.Dim.DYNAMIC for axis in sides},)
    program = torch.onnx.export(
        model, (torch.randn(batch, 3, 8, 8),), dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    program.save(str(file))
    return file


@pytest.fixture(scope="session")
def onnx_file(small, tmp_path_factory):
    """The network for two images of 8x8."""
    return exported(small, tmp_path_factory.mktemp("onnx") / "small.onnx")


@pytest.fixture(scope="session")
def any_size(small, tmp_path_factory):
    """The network for any number of images of any size."""
    return exported(small, tmp_path_factory.mktemp("onnx") / "any.onnx", dynamic=True)
