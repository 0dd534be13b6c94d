"""Autocast type of a run and, for fp16, the gradient scale. fp32 master weights throughout."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from fastkd.errors import UserError

__all__ = [
    "Precision",
    "PrecisionChoice",
    "PrecisionName",
    "computes_in_bf16",
    "resolve_precision",
]

PrecisionName = Literal["bf16", "fp16", "fp32"]
"""Autocast type of a forward pass."""

PrecisionChoice = Literal["auto", PrecisionName]
"""One of these types, or `auto`: bf16 where the device computes in it, else fp32."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """The type that forward passes run in on one kind of device."""

    name: PrecisionName
    device_type: str

    @property
    def dtype(self) -> torch.dtype:
        """Type of most activations under autocast, and of the images of the zoo's networks."""
        return _DTYPES[self.name]

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast to `dtype`, or nothing for fp32."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.name != "fp32")

    def scaler(self) -> torch.amp.GradScaler:
        """Dynamic loss scale; a pass-through unless fp16."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def computes_in_bf16(device: torch.device) -> bool:
    """True where bf16 products are instructions and not emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    # AVX512-BF16 and AMX on x86-64, the BF16 extension on arm64.
    return bool(has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"))


def resolve_precision(name: str, device: torch.device) -> Precision:
    """`auto` is bf16 where the device computes in it, else fp32; UserError for fp16 on a CPU."""
    if name == "auto":
        name = "bf16" if computes_in_bf16(device) else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise UserError("precision=fp16 needs a GPU; on a CPU use precision=fp32 or bf16")
    for known in get_args(PrecisionName):
        if name == known:
            return Precision(known, device.type)
    choices = ", ".join(get_args(PrecisionChoice))
    raise UserError(f"precision={name} is unknown; choose one of {choices}")
