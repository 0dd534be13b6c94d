"""Numbers, weights and batches for tests, the same on every machine."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["fill_with_sines", "fixed_state", "hashed_values", "kd_case", "shape_id", "sines"]


def sines(
    shape: tuple[int, ...], a: int, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """scale * sin(12.9898 (i + 1) + 78.233 a) at row-major index i: the input of the oracles."""
    i = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return (scale * torch.sin(12.9898 * i + 78.233 * a)).view(shape).to(dtype)


@torch.no_grad()
def fill_with_sines(module: nn.Module, number: int) -> None:
    """Fill the k-th parameter with `sines` number + k; batch norms stay near the identity."""
    for offset, (name, parameter) in enumerate(module.named_parameters()):
        value = sines(parameter.shape, number + offset, 0.3)
        owner = module.get_submodule(name.rpartition(".")[0])
        is_scale = isinstance(owner, nn.modules.batchnorm._BatchNorm) and name.endswith("weight")
        parameter.copy_(1 + value if is_scale else value)


def hashed_values(shape: Sequence[int], seed: int) -> Tensor:
    """Float64 numbers in [-1, 1) that look random, made from integers only: the same everywhere.

    Element i is a multiplicative hash of i + 1 and `seed`, so a stored result of another program on
    these inputs stays valid.
    """
    x = torch.arange(1, math.prod(shape) + 1) * 2654435761 + seed * 40503
    for factor, shift in ((2246822519, 15), (3266489917, 13)):
        x = x & 0xFFFFFFFF
        x = (x ^ (x >> shift)) * factor
    x = x & 0xFFFFFFFF
    return ((x ^ (x >> 16)).double() / 2**31 - 1).reshape(tuple(shape))


def fixed_state(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """A state dict of `hashed_values`: the same weights for two implementations of a network.

    Scaled so that activations neither vanish nor explode; batch norms differ from the identity.
    The order of `shapes` matters; of the names only the last component does.
    """
    state = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        values, kind = hashed_values(shape, seed), name.rpartition(".")[2]
        if kind == "num_batches_tracked":
            state[name] = torch.zeros(tuple(shape), dtype=torch.int64)
        elif len(shape) > 1:
            state[name] = values * math.sqrt(6 / math.prod(shape[1:]))
        elif kind in ("weight", "running_var"):
            state[name] = 0.7 + 0.3 * values
        else:
            state[name] = 0.1 * values
    return state


def kd_case(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    seed: int,
    spread: float = 3.0,
    teachers: int = 1,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Random student logits, teachers' logits and labels, with classes in dimension 1."""
    generator = torch.Generator().manual_seed(seed)
    student = (spread * torch.randn(shape, generator=generator)).to(dtype)
    others = [(spread * torch.randn(shape, generator=generator)).to(dtype) for _ in range(teachers)]
    labels = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
    return student, others, labels


def shape_id(shape: tuple[int, ...]) -> str:
    """4x19x256x512: how a shape appears in the name of a test."""
    return "x".join(map(str, shape))
