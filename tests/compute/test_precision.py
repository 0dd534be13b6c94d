"""The type of a run: bf16 where the device computes in it, never a slow surprise."""

import pytest
import torch

from fastkd.compute.precision import Precision, computes_in_bf16, resolve_precision
from fastkd.errors import UserError

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, "fp32"),
        ({"avx512_f": True, "avx512_vnni": True}, "fp32"),  # emulates bf16 only
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"bf16": True}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": False}, "fp32"),
    ],
    ids=str,
)
def test_auto_on_a_cpu_follows_its_instructions(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", CPU) == Precision(expected, "cpu")
    assert computes_in_bf16(CPU) == (expected == "bf16")


@pytest.mark.parametrize("native", [True, False])
def test_auto_on_a_gpu_does_not_count_emulation(native, monkeypatch):
    def supported(including_emulation):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert resolve_precision("auto", CUDA).name == ("bf16" if native else "fp32")


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_what_is_asked_for_is_taken(name, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert resolve_precision(name, CPU).name == name
    assert resolve_precision(name, CUDA).name == name


def test_fp16_needs_a_gpu():
    with pytest.raises(UserError, match=r"^precision=fp16 needs a GPU; on a CPU use precision=fp3"):
        resolve_precision("fp16", CPU)
    assert resolve_precision("fp16", CUDA).name == "fp16"


def test_an_unknown_type_is_refused():
    with pytest.raises(
        UserError, match="precision=fp8 is unknown; choose one of auto, bf16, fp16, fp32"
    ):
        resolve_precision("fp8", CPU)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)], ids=["fp32", "bf16"]
)
def test_autocast_computes_in_the_type_of_images(name, dtype):
    precision = Precision(name, "cpu")
    assert precision.dtype == dtype
    weight = torch.rand(4, 4)
    with precision.autocast():
        assert (torch.rand(4, 4) @ weight).dtype == dtype
    assert weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_only_fp16_scales_its_loss(name):
    scaler = Precision(name, "cpu").scaler()
    assert not scaler.is_enabled()
    loss = torch.tensor(3.0)
    assert scaler.scale(loss) is loss
    assert Precision("fp16", "cpu").scaler().is_enabled()
